"""Requests that two readers could take for different ones: refused and their connection closed, or read as one."""

from __future__ import annotations

import asyncio

import pytest

from tests.conftest import TOKEN, MakeSite, Site

BODY = b'{"kind":"x"}'
HEAD = f"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Sheratan-Token: {TOKEN}\r\n".encode()
HIDDEN = HEAD + b"Connection: close\r\nContent-Length: 0\r\n\r\n"
CHUNKED = b"c\r\n" + BODY + b"\r\n0\r\n\r\n"


@pytest.fixture
async def site(make_site: MakeSite) -> Site:
    return await make_site()


async def statuses(site: Site, data: bytes) -> list[int]:
    """The statuses of all answers until the hub closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", site.app.ports["data"])
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 12\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4",
        b"Content-Length: 12\r\nContent-Length: 0",
        b"Content-Length: 12\r\nContent-Length: 12",
        b"Content-Length: +12",
        b"Content-Length: 12,12",
        b"Content-Length: 0x0c",
        b"Content-Length: -1",
        b"Content-Length: 1_2",
        b"Content-Length:",
        b"Content-Length: 99999999999999999999999",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding: chunked, chunked",
        b"Transfer-Encoding: \x0bchunked",
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding:\r\n chunked",
        b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
        b"X: a\rTransfer-Encoding: chunked",
        b"X: a\0b",
        b"X: a\nContent-Length: 12",
        b"Host: 127.0.0.1",
    ],
)
async def test_a_head_that_can_be_read_in_two_ways_is_refused_and_nothing_after_it_is_read(
    site: Site, headers: bytes
) -> None:
    assert await statuses(site, HEAD + headers + b"\r\n\r\n" + CHUNKED + HIDDEN) == [400]
    assert (await site.stored())[0].get("job:pending", 0) == 0


@pytest.mark.parametrize(
    "chunk",
    [
        b"0xc\r\n",
        b"+c\r\n",
        b"-1\r\n",
        b"c\n",
        b"c \r\n",
        b"c;\r\0\n",
        b"c;a\nb\r\n",
        b"fffffffffffffffff\r\n",
        b"\r\n",
    ],
)
async def test_a_chunk_that_can_be_read_in_two_ways_is_refused(site: Site, chunk: bytes) -> None:
    body = chunk + BODY + b"\r\n0\r\n\r\n"
    assert await statuses(site, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + HIDDEN) == [400]
    assert (await site.stored())[0].get("job:pending", 0) == 0


async def test_a_transfer_encoding_that_is_not_undone_is_refused(site: Site) -> None:
    assert (await statuses(site, HEAD + b"Connection: close\r\nTransfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKED))[
        0
    ] == 415
    assert (await site.stored())[0].get("job:pending", 0) == 0
    assert await statuses(site, HEAD + b"Connection: close\r\nTransfer-Encoding: Chunked\r\n\r\n" + CHUNKED) == [201]


async def test_the_body_of_a_refused_request_is_not_taken_for_the_next_one(site: Site) -> None:
    length = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN)
    for head in (HEAD.replace(b"X-Sheratan-Token", b"X-Other"), HEAD.replace(b"/api/jobs", b"/nowhere")):
        assert await statuses(site, head + length + HIDDEN) in ([403], [404])


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8788, evil",
        "127.0.0.1 evil",
        "localhost@evil",
        "127.0.0.1:8788:1",
        "[::1",
        "[::1]evil",
        "127.0.0.1/",
        "",
    ],
)
async def test_a_host_that_is_no_name_and_port_is_foreign(site: Site, host: str) -> None:
    data = f"GET /livez HTTP/1.1\r\nConnection: close\r\nHost: {host}\r\n\r\n".encode()
    assert await statuses(site, data) == [403]


@pytest.mark.parametrize(
    "origins",
    [
        "Origin: http://127.0.0.1:8788, http://evil.example",
        "Origin: http://127.0.0.1\r\nOrigin: http://evil.example",
        "Origin: http://evil.example\r\nOrigin: http://127.0.0.1",
        "Origin: http://127.0.0.1.evil.example",
        "Origin: http://127.0.0.1@evil.example",
        "Origin: null",
        "Origin:",
    ],
)
async def test_an_origin_that_is_not_just_this_machine_is_foreign(site: Site, origins: str) -> None:
    data = f"GET /livez HTTP/1.1\r\nConnection: close\r\nHost: 127.0.0.1\r\n{origins}\r\n\r\n".encode()
    assert await statuses(site, data) == [403]


async def test_a_host_and_an_origin_of_this_machine_are_fine(site: Site) -> None:
    for host in ("127.0.0.1", "localhost:1", "LOCALHOST.", "[::1]:8788", "127.9.9.9"):
        assert await statuses(
            site, f"GET /livez HTTP/1.1\r\nConnection: close\r\nHost: {host}\r\nOrigin: http://{host}\r\n\r\n".encode()
        ) == [200]
