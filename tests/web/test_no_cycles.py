"""No request leaves a cycle behind: the collector would have to find it, and stop everybody for a tenth of a second."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import pytest

from sheratan_hub.config import QueueSettings
from tests.conftest import MakeSite, Site


@pytest.fixture
def left() -> Iterator[Callable[[], Counter[str]]]:
    """What of this project's own is found in cycles, by type."""

    def found() -> Counter[str]:
        gc.collect()
        names = (f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.garbage)
        return Counter(name for name in names if name.startswith("sheratan"))

    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def takes_a_job(site: Site) -> None:
    await site.submit()
    lease = await site.lease("n1")
    body = {"lease_id": lease["lease_id"], "ok": True, "pull": {"node_id": "n1", "wait_seconds": 0.01}}
    assert (await site.data("POST", f"/api/jobs/{lease['job_id']}/result", body))[0] == 200


async def waits_for_a_job(site: Site) -> None:
    pull = {"node_id": "n1", "wait_seconds": 5}
    asked = asyncio.create_task(site.data("POST", "/api/jobs/pull", pull))
    while not site.app.hub.waiting.pulls:
        await asyncio.sleep(0)
    job_id = await site.submit()
    (lease,) = (await asked)[1]["jobs"]
    end = asyncio.create_task(site.data("GET", f"/api/jobs/{job_id}?wait_seconds=5"))
    body = {"lease_id": lease["lease_id"], "ok": False, "retry": False}
    await site.data("POST", f"/api/jobs/{job_id}/result", body)
    assert (await end)[1]["status"] == "failed"


async def waits_in_vain(site: Site) -> None:
    _, told = await site.data("POST", "/api/jobs/pull", {"node_id": "n1", "wait_seconds": 0.02})
    assert told["jobs"] == []


async def gives_up(site: Site) -> None:
    asked = asyncio.create_task(site.data("POST", "/api/jobs/pull", {"node_id": "n1", "wait_seconds": 5}))
    while not site.app.hub.waiting.pulls:
        await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    while site.app.hub.waiting.pulls:
        await asyncio.sleep(0)


async def is_refused(site: Site) -> None:
    for path, body in (("/api/jobs", {"kind": 1}), ("/api/jobs/nothing/cancel", {}), ("/nowhere", {})):
        assert (await site.data("POST", path, body))[0] >= 400
    assert (await site.data("GET", "/api/jobs?limit=0"))[0] == 422
    assert (await site.data("GET", "/api/jobs", headers={"Authorization": "Bearer wrong"}))[0] == 403


async def finds_the_queue_full(site: Site) -> None:
    answers = await asyncio.gather(*(site.data("POST", "/api/jobs", {"kind": "k"}) for _ in range(30)))
    assert 429 in {status for status, _ in answers}


async def beats_and_looks(site: Site) -> None:
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1", "capabilities": ["gpu"]})
    for path in ("/api/registry", "/api/hosts/n1", "/metrics"):
        assert (await site.control("GET", path))[0] == 200
    job_id = await site.submit(depends_on=[await site.submit()])
    for path in (f"/api/jobs/{job_id}", f"/api/jobs/{job_id}/explain", "/api/jobs"):
        assert (await site.data("GET", path))[0] == 200
    assert (await site.data("POST", f"/api/jobs/{job_id}/cancel", {}))[0] == 200


@pytest.mark.parametrize("store", ["memory", "sqlite", "file"])
@pytest.mark.parametrize(
    "does",
    [
        takes_a_job,
        waits_for_a_job,
        waits_in_vain,
        gives_up,
        is_refused,
        finds_the_queue_full,
        beats_and_looks,
    ],
    ids=lambda does: does.__name__,
)
async def test_no_request_leaves_a_cycle(
    make_site: MakeSite, store: str, does: Callable[[Site], Awaitable[None]], left: Callable[[], Counter[str]]
) -> None:
    site = await make_site(store, queue=QueueSettings(max_depth=20))
    await does(site)
    gc.garbage.clear()
    gc.collect()
    gc.garbage.clear()
    for _ in range(3):
        await does(site)
    assert left() == {}
