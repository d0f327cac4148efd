"""A disk that is full or read-only: what changes something is 503, reads and heartbeats go on, and all works again."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock
from sheratan_hub.config import QueueSettings
from sheratan_hub.rules.nodes import node_of
from sheratan_hub.storage import Key
from tests.conftest import MakeSite, Site
from tests.stores.faults import failing

Fault = Callable[[Site], Any]


def sqlite_pragma(bad: str, good: str) -> Fault:
    @asynccontextmanager
    async def fault(site: Site) -> AsyncIterator[None]:
        store: Any = site.app.store
        await store.write(lambda db: db.execute(f"PRAGMA {bad}").fetchone())
        yield
        await store.write(lambda db: db.execute(f"PRAGMA {good}").fetchone())

    return fault


def writes_fail(number: int) -> Fault:
    @asynccontextmanager
    async def fault(site: Site) -> AsyncIterator[None]:
        with failing("pwrite", "log-", number):
            yield

    return fault


FAULTS: dict[str, tuple[str, Fault]] = {
    "sqlite full": ("sqlite", sqlite_pragma("max_page_count = 1", "max_page_count = 1000000")),
    "sqlite read-only": ("sqlite", sqlite_pragma("query_only = 1", "query_only = 0")),
    "file full": ("file", writes_fail(errno.ENOSPC)),
    "file read-only": ("file", writes_fail(errno.EROFS)),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_without_room_changes_wait_reads_and_heartbeats_go_on(
    name: str, make_site: MakeSite, clock: VirtualClock
) -> None:
    scheme, fault = FAULTS[name]
    site = await make_site(scheme, clock, queue=QueueSettings(lease_seconds=60))
    beat = {"node_id": "n1", "capabilities": ["gpu"]}
    await site.control("POST", "/api/hosts/heartbeat", beat)
    job_id = await site.submit()
    lease = await site.lease()
    big = {"kind": "big", "params": "x" * 200_000}
    async with fault(site):
        for method, path, body in (
            ("POST", "/api/jobs", big),
            ("POST", "/api/jobs", {"jobs": [big, big], "atomic": True}),
            (
                "POST",
                f"/api/jobs/{job_id}/result",
                {"lease_id": lease["lease_id"], "ok": True, "result": "x" * 200_000},
            ),
            ("POST", "/api/missions", {"title": "m", "jobs": [big]}),
        ):
            status, answer, headers = await site.ask("data", method, path, json=body)
            assert (status, answer["code"]) == (503, "unavailable"), answer
            assert int(headers["Retry-After"]) >= 1
        for _ in range(3):
            await clock.advance(50_000)  # longer in all than a node may be silent, and than the lease lasts
            labels = {f"l{n}": "x" * 200 for n in range(40)}
            status, answer = await site.control("POST", "/api/hosts/heartbeat", {**beat, **labels})
            assert status == 200, answer
            assert answer["heartbeat_after_seconds"] > 0
        assert (await site.job(job_id))["status"] == "running"
        for plane, path in (
            ("data", "/api/jobs"),
            ("control", "/api/registry"),
            ("data", "/metrics"),
            ("data", "/livez"),
        ):
            assert (await site.ask(plane, "GET", path))[0] == 200
    await site.app.hub.sweep()
    (row,) = await site.app.store.fetch([Key("node", "n1")])
    assert (node_of(row).state, clock.now() - node_of(row).last_seen < 60_000) == ("ONLINE", True)
    assert len(site.app.hub.beats.unsaved) == 0
    assert (await site.finish(lease))[0] == 200, "nobody could extend it meanwhile"
    assert await site.submit("big", params="x" * 200_000)
    assert (await site.ask("data", "GET", "/readyz"))[0] == 200


async def test_a_store_that_failed_for_good_hears_nobody(make_site: MakeSite) -> None:
    site = await make_site("file")
    with failing("fdatasync", "log-", errno.EIO):
        assert (await site.data("POST", "/api/jobs", {"kind": "a"}))[0] == 503
    status, answer = await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1"})
    assert (status, answer["code"]) == (503, "unavailable")
