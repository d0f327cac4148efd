"""Long polls whose clients go away: before the lease, around it, and in the middle of the answer."""

from __future__ import annotations

import asyncio
import json
import socket
import struct

import aiohttp
import pytest

from sheratan_hub.web.request import Request
from tests.conftest import TOKEN, MakeSite, Site


def request(path: str, body: dict[str, object]) -> bytes:
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-Sheratan-Token: {TOKEN}\r\nContent-Length: {len(text)}"
    return head.encode() + b"\r\n\r\n" + text


async def poll(site: Site, by: str) -> asyncio.StreamWriter:
    """A long poll, alone or in a result, on a connection of its own; returns once the hub has it waiting."""
    path, body = "/api/jobs/pull", {"node_id": "gone", "wait_seconds": 30, "capabilities": []}
    if by == "result":
        await site.submit("before")
        lease = await site.lease("gone", kinds=["before"])
        path = f"/api/jobs/{lease['job_id']}/result"
        body = {"lease_id": lease["lease_id"], "ok": True, "pull": body}
    waiting = len(site.app.hub.waiting)
    _, writer = await asyncio.open_connection("127.0.0.1", site.app.ports["data"])
    writer.write(request(path, body))
    if by == "result":
        await site.data("GET", f"/api/jobs/{lease['job_id']}?wait_seconds=10")
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


BY = pytest.mark.parametrize("by", ["pull", "result"])


@BY
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_left_is_never_leased_to(make_site: MakeSite, how: str, by: str) -> None:
    site = await make_site()
    for _ in range(10):
        vanish(await poll(site, by), how)
        await until(lambda: len(site.app.hub.waiting) == 0)
    job_id = await site.submit()
    lease = await site.lease("here")
    assert (lease["job_id"], lease["attempt"]) == (job_id, 1)


@BY
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_leaves_as_the_job_comes_delays_nobody(make_site: MakeSite, how: str, by: str) -> None:
    site = await make_site("sqlite")
    for n in range(20):
        writer = await poll(site, by)
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


@pytest.mark.parametrize("path", ["/api/jobs/pull", "/mesh/pull_requests", "/api/results"])
async def test_leases_whose_answer_could_not_be_written_go_back_at_no_cost(
    site: Site, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await site.submit(), await site.submit()
    lease = await site.lease("gone")
    result = {"job_id": first, "lease_id": lease["lease_id"], "ok": True}
    pull = {"node_id": "gone"}

    async def breaks(*_: object) -> None:
        raise ConnectionResetError("gone")

    with monkeypatch.context() as broken:
        broken.setattr(Request, "answer", breaks)
        with pytest.raises(aiohttp.ClientError):
            await site.data("POST", path, {"results": [result], "pull": pull} if path == "/api/results" else pull)
    again = await site.lease("here")
    assert (again["job_id"], again["attempt"], again["losses"]) == (second, 2, 0)
    assert (await site.job(first))["status"] == ("completed" if path == "/api/results" else "running")


async def test_the_same_pull_id_gives_the_leases_of_an_answer_that_was_lost(make_site: MakeSite) -> None:
    site = await make_site()
    job_id = await site.submit()
    first = await site.lease("n", pull_id="p")
    again = await site.lease("n", pull_id="p")
    assert {**again, "lease_seconds": 0} == {**first, "lease_seconds": 0}
    assert again["job_id"] == job_id
    _, nothing = await site.data("POST", "/api/jobs/pull", {"node_id": "n", "pull_id": "q"})
    assert nothing["jobs"] == []
