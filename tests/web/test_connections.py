"""Connections that are silent, dripping or stuck are cut, those that work are not; how many there may be; TLS."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.config import LimitSettings
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.connections import Bounds, Connections
from tests.conftest import TOKEN, MakeSite, Site

HEAD = f"Host: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"


class Wire:
    """A transport that only tells what it has yet to send, and whether it was cut."""

    def __init__(self) -> None:
        self.unsent = 0
        self.cut = False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.cut = True


class Line:
    """A connection in whatever state a test wants."""

    def __init__(self, among: Connections, address: str | None = None, asked: int = 0) -> None:
        self.wire: Any = Wire()
        self.busy, self.begun, self.asked = False, False, asked
        among.came(self, address)
        if asked:
            among.asks(self)


def cut_at(line: Line, among: Connections, last_s: int = 200) -> int | None:
    """At which second it was cut, looking every second."""
    for second in range(last_s):
        among.look(second * 1000)
        if line.wire.cut:
            return second
    return None


def test_one_that_never_asks_is_cut_after_the_time_for_a_head() -> None:
    among = Connections(Bounds())
    assert cut_at(Line(among), among) == 10
    assert among.cut == {"header": 1}
    assert len(among) == 0


def test_one_that_has_asked_may_wait_for_its_next_request_but_not_for_the_rest_of_one() -> None:
    among = Connections(Bounds())
    assert cut_at(Line(among, asked=1), among) == 75
    dripping = Line(among, asked=1)
    dripping.begun = True
    assert cut_at(dripping, among) == 10
    assert among.cut == {"idle": 1, "header": 1}


def test_one_whose_request_is_being_answered_is_never_cut() -> None:
    among = Connections(Bounds())
    polling = Line(among, asked=1)
    polling.busy = True
    assert cut_at(polling, among) is None
    polling.busy = False
    assert cut_at(polling, among) == 75, "its time begins when it was answered"


@pytest.mark.parametrize("busy", [True, False])
def test_one_that_takes_nothing_of_its_answer_is_cut(busy: bool) -> None:
    among = Connections(Bounds())
    stuck = Line(among, asked=1)
    stuck.busy, stuck.wire.unsent = busy, 100_000
    assert cut_at(stuck, among) == 10
    assert among.cut == {"send": 1}


def test_one_that_takes_its_answer_slowly_is_not() -> None:
    among = Connections(Bounds())
    slow = Line(among, asked=1)
    slow.busy, slow.wire.unsent = True, 1_000_000
    for second in range(100):
        among.look(second * 1000)
        slow.wire.unsent -= 1000
    assert not slow.wire.cut


def test_one_too_many_of_an_address_costs_its_oldest_silent_one() -> None:
    among = Connections(Bounds(per_address=3))
    worker, silent, other = Line(among, "a", asked=1), Line(among, "a"), Line(among, "a")
    more, elsewhere = Line(among, "a"), Line(among, "b")
    assert [one.wire.cut for one in (worker, silent, other, more, elsewhere)] == [False, True, False, False, False]
    among.asks(other)
    among.asks(more)
    last = Line(among, "a")
    assert last.wire.cut, "where all others work, it is the newcomer"
    assert (len(among), among.cut) == (4, {"address": 2})


def test_this_machines_own_connections_do_not_count_for_an_address_but_in_all() -> None:
    among = Connections(Bounds(most=3, per_address=1))
    first, second, third, fourth = (Line(among, None, asked=n) for n in (1, 0, 1, 0))
    assert [one.wire.cut for one in (first, second, third, fourth)] == [False, True, False, False]
    assert among.cut == {"full": 1}


def test_what_is_closed_is_forgotten() -> None:
    among = Connections(Bounds(per_address=2))
    for _ in range(1000):
        among.gone(Line(among, "a"))
    assert (len(among), among._of, among._silent, among._new) == (0, {}, {}, {})


# over sockets


async def dial(site: Site, text: str = "", plane: str = "data") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.app.ports[plane])
    writer.write(text.encode())
    await writer.drain()
    return reader, writer


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What the hub still says before it closes."""
    async with asyncio.timeout(10):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


def alive(reader: asyncio.StreamReader) -> bool:
    return not reader.at_eof() and reader.exception() is None


async def test_hundreds_of_silent_and_dripping_sockets_are_gone_in_time_while_others_are_served(
    make_site: MakeSite,
) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    sockets = [await dial(site, "" if n % 2 else "GET /livez HTTP/1.1\r\nX-A: b\r\n") for n in range(500)]
    job_id = await site.submit()
    polling = asyncio.create_task(site.lease(kinds=["other"], wait_seconds=30))
    for second in range(13):
        await clock.advance(1000)
        assert (await site.job(job_id))["status"] == "pending"
        for place, (_, writer) in enumerate(sockets):
            if place % 2 == 0 and not writer.is_closing():
                writer.write(f"X-{second}: drip\r\n".encode())
    for reader, writer in sockets:
        await ended(reader)
        writer.close()
    await site.submit("other")
    assert (await polling)["kind"] == "other", "a long poll is not cut"


async def test_a_kept_connection_is_cut_when_it_is_idle_for_too_long(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, limits=LimitSettings(idle_seconds=20))
    reader, writer = await dial(site)
    for _ in range(3):
        writer.write(f"GET /livez HTTP/1.1\r\n{HEAD}\r\n".encode())
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        await clock.advance(19_000)
        await settle(20)
        assert alive(reader)
    await clock.advance(4_000)
    assert await ended(reader) == b""
    writer.close()


async def test_a_kept_connection_that_drips_the_head_of_its_next_request_is_cut_soon(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    reader, writer = await dial(site, f"GET /livez HTTP/1.1\r\n{HEAD}\r\n")
    assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
    for letter in "GET /livez HTT":
        writer.write(letter.encode())
        await settle(20)
        await clock.advance(1000)
    assert await ended(reader) == b""
    writer.close()


async def test_a_body_that_drips_is_given_up_and_one_that_flows_is_not(make_site: MakeSite) -> None:
    site = await make_site(limits=LimitSettings(body_seconds=1))
    head = f"POST /api/jobs HTTP/1.1\r\n{HEAD}Connection: close\r\nContent-Length: 100000\r\n\r\n"
    reader, writer = await dial(site, head + "{")
    begun = asyncio.get_running_loop().time()
    flowing, pushed = await dial(site, head + '{"kind": "x", "params": "')
    for _ in range(12):
        pushed.write(b"x" * 8192)
        writer.write(b" ")
        await asyncio.sleep(0.13)
    pushed.write(b"x" * (100_000 - 25 - 12 * 8192 - 2) + b'"}')
    assert (await ended(flowing)).startswith(b"HTTP/1.1 201")
    assert (await ended(reader)).startswith(b"HTTP/1.1 400")
    assert asyncio.get_running_loop().time() - begun < 10
    for one in (writer, pushed):
        one.close()


async def test_open_and_cut_connections_are_counted(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    reader, writer = await dial(site)
    await settle(50)
    _, text, _ = await site.ask("data", "GET", "/metrics")
    assert 'sheratan_connections{plane="data"} 2.0' in text
    await clock.advance(13_000)
    await ended(reader)
    _, text, _ = await site.ask("data", "GET", "/metrics")
    assert 'sheratan_connections_cut_total{plane="data",reason="header"} 1.0' in text
    writer.close()


async def test_silent_sockets_of_an_address_cannot_keep_its_working_ones_out(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sheratan_hub.web.server.is_loopback", lambda _: False)
    site = await make_site(limits=LimitSettings(connections_per_address=6))
    await site.submit()
    silent = [await dial(site) for _ in range(20)]
    workers = [await dial(site, f"GET /livez HTTP/1.1\r\n{HEAD}\r\n") for _ in range(3)]
    for reader, writer in workers:
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        silent += [await dial(site) for _ in range(10)]
        writer.write(f"GET /livez HTTP/1.1\r\n{HEAD}\r\n".encode())
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
    assert len(site.app.listeners["data"].connections) == 6
    await site.submit()
    for _, writer in (*silent, *workers):
        writer.close()


@pytest.mark.parametrize(("protocol", "together"), [("h2c", False), ("websocket", False), ("websocket", True)])
async def test_an_offer_to_speak_another_protocol_is_passed_over(
    make_site: MakeSite, protocol: str, together: bool
) -> None:
    site = await make_site()
    offer = f"GET /livez HTTP/1.1\r\n{HEAD}Connection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n"
    more = f"GET /livez HTTP/1.1\r\n{HEAD}\r\nGET /livez HTTP/1.1\r\n{HEAD}Connection: close\r\n\r\n"
    reader, writer = await dial(site, offer + more if together else offer)
    if not together:
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        writer.write(more.encode())
    assert (await ended(reader)).count(b"HTTP/1.1 200") == (3 if together else 2)
    writer.close()


async def test_requests_that_come_in_one_piece_are_answered_in_their_order(make_site: MakeSite) -> None:
    site = await make_site()
    bodies = [b'{"kind": "%d", "params": "%s"}' % (n, b"x" * (n % 7 * 9000)) for n in range(60)]
    head = f"POST /api/jobs HTTP/1.1\r\n{HEAD}".encode()
    reader, writer = await dial(site)
    writer.writelines(head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body) for body in bodies)
    writer.write(f"GET /livez HTTP/1.1\r\n{HEAD}Connection: close\r\n\r\n".encode())
    assert (await ended(reader)).count(b"HTTP/1.1 201") == len(bodies)
    _, page = await site.data("GET", "/api/jobs")
    assert [job["kind"] for job in page["jobs"]] == [str(n) for n in range(60)]
    writer.close()


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_many_requests_in_one_piece_behind_one_in_two_pieces_are_all_answered(
    make_site: MakeSite, method: str
) -> None:
    site = await make_site()
    post = f"POST /api/jobs HTTP/1.1\r\n{HEAD}Content-Length: 12\r\n\r\n"
    reader, writer = await dial(site, post)
    await settle(50)
    writer.write(b'{"kind":"k"}')
    assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 201")
    one = f"GET /livez HTTP/1.1\r\n{HEAD}\r\n" if method == "GET" else post + '{"kind":"k"}'
    writer.write((one * 100).encode())
    async with asyncio.timeout(20):
        for _ in range(100):
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 20")
    writer.close()


async def test_a_body_that_comes_behind_the_answer_to_an_offer_is_passed_over_too(make_site: MakeSite) -> None:
    site = await make_site()
    offer = f"POST /nowhere HTTP/1.1\r\n{HEAD}Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\n"
    reader, writer = await dial(site, offer)
    assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 404")
    writer.write(f"helloGET /livez HTTP/1.1\r\n{HEAD}Connection: close\r\n\r\n".encode())
    assert (await ended(reader)).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_the_end_of_a_hub_ends_the_reading_of_half_a_body_by_itself(make_site: MakeSite) -> None:
    """Not by cancelling its task, which comes only after another time of waiting."""
    site = await make_site()
    _, writer = await dial(site, f"POST /api/jobs HTTP/1.1\r\n{HEAD}Content-Length: 12\r\n\r\n" + '{"ki')
    await settle(50)
    (line,) = site.app.listeners["data"].connections._seen
    task = line._task_handler
    await line.shutdown(0.05)
    assert (task.done(), task.cancelling()) == (True, 0)
    writer.close()


async def test_a_handler_that_ends_with_a_bug_closes_its_connection(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(*_: object) -> bytes:
        raise ValueError("a bug")

    site = await make_site()
    with monkeypatch.context() as broken:
        broken.setattr(Answer, "data", breaks)
        reader, writer = await dial(site, f"GET /livez HTTP/1.1\r\n{HEAD}\r\n")
        assert await ended(reader) == b""
    assert "a request could not be answered" in caplog.text
    writer.close()
    reader, writer = await dial(site, f"GET /livez HTTP/1.1\r\n{HEAD}\r\n")
    assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
    writer.close()
