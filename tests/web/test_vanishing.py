"""Long polls whose clients go away: before the lease, around it, and in the middle of the answer."""

from __future__ import annotations

import asyncio
import json
import socket
import struct

import pytest

from tests.conftest import TOKEN, MakeSite, Site


def request(body: dict[str, object]) -> bytes:
    text = json.dumps(body).encode()
    head = (
        f"POST /api/jobs/pull HTTP/1.1\r\nHost: localhost\r\nX-Sheratan-Token: {TOKEN}\r\nContent-Length: {len(text)}"
    )
    return head.encode() + b"\r\n\r\n" + text


async def poll(site: Site, **fields: object) -> asyncio.StreamWriter:
    """A long poll on a connection of its own; returns once the hub has it waiting."""
    waiting = len(site.app.hub.waiting)
    _, writer = await asyncio.open_connection("127.0.0.1", site.app.ports["data"])
    writer.write(request({"node_id": "gone", "wait_seconds": 30, "capabilities": [], **fields}))
    await until(lambda: len(site.app.hub.waiting) == waiting + 1)
    return writer


async def until(true: object) -> None:
    async with asyncio.timeout(10):
        while not true():  # type: ignore[operator]
            await asyncio.sleep(0)


def vanish(writer: asyncio.StreamWriter, how: str) -> None:
    if how == "reset":
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_left_is_never_leased_to(make_site: MakeSite, how: str) -> None:
    site = await make_site()
    for _ in range(10):
        vanish(await poll(site), how)
        await until(lambda: len(site.app.hub.waiting) == 0)
    job_id = await site.submit()
    lease = await site.lease("here")
    assert (lease["job_id"], lease["attempt"]) == (job_id, 1)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_leaves_as_the_job_comes_delays_nobody(make_site: MakeSite, how: str) -> None:
    site = await make_site("sqlite")
    for n in range(20):
        writer = await poll(site)
        submitting = asyncio.create_task(site.submit(kind=f"k{n}"))
        for _ in range(n):
            await asyncio.sleep(0)
        vanish(writer, how)
        job_id = await submitting
        _, body = await site.data("POST", "/api/jobs/pull", {"node_id": "here", "capabilities": [], "wait_seconds": 10})
        job = await site.job(job_id)
        if not body["jobs"]:
            # The answer was written to a client that had just gone without a word: only the lease's end tells.
            assert job["node_id"] == "gone"
            continue
        assert body["jobs"][0]["job_id"] == job_id
        assert (job["losses"], job["failures"]) == (0, 0)
        await site.finish(body["jobs"][0])


async def test_the_same_pull_id_gives_the_leases_of_an_answer_that_was_lost(make_site: MakeSite) -> None:
    site = await make_site()
    job_id = await site.submit()
    first = await site.lease("n", pull_id="p")
    again = await site.lease("n", pull_id="p")
    assert {**again, "lease_seconds": 0} == {**first, "lease_seconds": 0}
    assert again["job_id"] == job_id
    _, nothing = await site.data("POST", "/api/jobs/pull", {"node_id": "n", "pull_id": "q"})
    assert nothing["jobs"] == []
