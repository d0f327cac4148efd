"""What can go wrong with a running hub, done to it: each is killed, filled, corrupted or starved of something.

`TROUBLES` names them with the alerts that must fire. Each has the hub's minutes told by `look`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from msgspec import structs

from sheratan_hub import clock
from sheratan_hub.asking import Planes
from sheratan_hub.bundle import read_member
from sheratan_hub.clock import VirtualClock, rfc3339
from sheratan_hub.config import AlertSettings, DlqSettings, NodeSettings, QueueSettings, StoreSettings
from sheratan_hub.diagnosis_offline import Given, of_files
from sheratan_hub.metrics import looking, timing
from sheratan_hub.redact import Redactor
from sheratan_hub.rules.signs import Answering
from tests.conftest import Site
from tests.prometheus import Scrape, scrape
from tests.stores.faults import failing

CALM = 12
"""Minutes before the trouble: the hub as it was then, scraped once."""


class Watched:
    """A hub in this process, and what it has told once a minute."""

    def __init__(self, site: Site, time: VirtualClock, patch: pytest.MonkeyPatch) -> None:
        self.site, self.clock, self.patch = site, time, patch
        self.minutes: list[Scrape] = []
        self.findings: list[str] = []
        self.left: list[str] = []

    async def look(self, minutes: int = 1) -> None:
        """Scrape both planes; the hub stays as it is for so many minutes."""
        texts: dict[str, str | None] = {}
        for plane in ("control", "data"):
            status, text, _ = await self.site.ask(plane, "GET", "/metrics")
            assert status == 200
            texts[plane] = text
        self.minutes += [scrape(texts)] * minutes

    async def diagnose(self) -> None:
        """What the hub itself finds wrong now, and what its files would tell if it were killed now: codes, in order."""
        async with self.site.session.get(self.site.url("control", "/api/bundle")) as answer:
            body = await answer.read()
            assert answer.status == 200, body
        self.findings = [one["code"] for one in read_member(body, "verdict.json")["findings"]]
        self.left = [one.code for one in (await of_files(self.killed())).findings]

    def killed(self) -> Given:
        """The files as a kill leaves them, with nobody behind the ports."""
        settings = self.site.app.settings
        here = Path(settings.hub.data_dir)
        there = here.with_name(f"{here.name}-killed")
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(here, there)
        store = StoreSettings(url=settings.store.url.replace(str(here), str(there)))
        hub = structs.replace(settings.hub, data_dir=str(there))
        settings = structs.replace(settings, hub=hub, store=store)
        planes = tuple(Answering(plane, "http://127.0.0.1:1", False, "refused") for plane in ("control", "data"))
        return Given(settings, {}, {}, Redactor(), planes, Planes("", "", ""))

    async def pass_time(self, ms: int) -> None:
        """Move the clock, and see that what fell due meanwhile is done: a store on disk takes its own time."""
        await self.clock.advance(ms)
        await self.site.app.hub.sweep()

    async def beat(self, node_id: str, **fields: Any) -> None:
        status, body = await self.site.control("POST", "/api/hosts/heartbeat", {"node_id": node_id, **fields})
        assert status == 200, body

    async def activate(self, policy: dict[str, Any]) -> None:
        _, made = await self.site.control("POST", "/api/policies", policy)
        path = f"/api/policies/{made['version']}/activate"
        assert (await self.site.control("POST", path, headers={"If-Match": "0"}))[0] == 200

    async def submit(self, **fields: Any) -> tuple[int, Any]:
        return await self.site.data("POST", "/api/jobs", {"kind": "work", **fields})


async def well(hub: Watched) -> None:
    """A node that is well, a job that is done, and some minutes of quiet after that."""
    await hub.beat("n1", attestation={"build_id": "b", "capability_hash": "c"}, health="GREEN")
    await hub.site.submit()
    await hub.site.finish(await hub.site.lease("n1"), result=1)
    await hub.look(CALM)


# Killed


async def workers_are_killed(hub: Watched) -> None:
    for _ in range(12):
        await hub.site.submit(timeout_seconds=1000)
    for n in range(12):
        await hub.site.lease(f"w{n}")
    await hub.pass_time(5_000)
    await hub.look(3)


async def the_fleet_falls_silent(hub: Watched) -> None:
    for n in range(8):
        await hub.beat(f"w{n}")
    await hub.pass_time(31_000)
    await hub.look(2)


async def a_node_is_killed(hub: Watched) -> None:
    await hub.pass_time(61_000)
    await hub.look(3)


# Filled


async def the_queue_is_filled(hub: Watched) -> None:
    await hub.submit()
    await hub.submit()
    for _ in range(8):
        assert (await hub.submit())[0] == 429
        await hub.look()


async def leases_are_used_up(hub: Watched) -> None:
    await hub.submit()
    await hub.submit()
    await hub.site.lease()
    for _ in range(14):
        _, told = await hub.site.data("POST", "/api/jobs/pull", {"node_id": "n2"})
        assert told["reason"] == "inflight_limit"
        await hub.look()


async def the_disk_is_full(hub: Watched) -> None:
    with failing("pwrite", "log-", errno.ENOSPC):
        for _ in range(3):
            assert (await hub.submit())[0] == 503
            assert (await hub.site.data("GET", "/api/jobs"))[0] == 200
            await hub.look()
        await hub.diagnose()
    assert (await hub.submit())[0] == 201, "and goes on when there is room again"


async def the_disk_fills(hub: Watched) -> None:
    disk = namedtuple("disk", "f_bavail f_frsize f_blocks")
    hub.patch.setattr(looking.os, "statvfs", lambda _: disk(80_000, 4096, 1_000_000))
    await hub.site.app._looks.look()
    await hub.look(17)


async def dead_letters_pile_up(hub: Watched) -> None:
    for _ in range(12):
        await hub.site.submit(max_retries=0)
        await hub.site.finish(await hub.site.lease(), ok=False, error="broken")
    await hub.look(3)


async def nobody_looks_at_dead_letters(hub: Watched) -> None:
    for _ in range(2):
        await hub.site.submit(max_retries=0)
        await hub.site.finish(await hub.site.lease(), ok=False, error="broken")
    await hub.pass_time(2_000)
    await hub.look(17)


# Corrupted


async def results_are_corrupted(hub: Watched) -> None:
    await hub.site.submit()
    bad = {"mode": "sha256", "sha256": "0" * 64}
    assert (await hub.site.finish(await hub.site.lease(), result=1, integrity=bad))[0] == 422
    await hub.look(2)


async def work_is_done_twice_and_differs(hub: Watched) -> None:
    await hub.site.submit(timeout_seconds=1000)
    first = await hub.site.lease("w1")
    await hub.pass_time(5_000)
    await hub.site.finish(await hub.site.lease("w2"), result=2)
    assert (await hub.site.finish(first, result=1))[0] == 409
    await hub.look(2)


async def keys_are_used_twice(hub: Watched) -> None:
    await hub.submit(idempotency_key="k", params=1)
    assert (await hub.submit(idempotency_key="k", params=2))[0] == 409
    await hub.look(2)


async def the_audit_log_is_touched(hub: Watched) -> None:
    await hub.clock.advance(3_000)
    path = hub.site.app.audit.path
    assert (await hub.site.ask("control", "GET", "/api/hosts", headers={"Authorization": "Bearer wrong"}))[0] == 403
    assert b"/api/hosts" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"/api/hosts", b"/api/other"))
    async with asyncio.timeout(20):
        while (
            'sheratan_alerts_total{rule="audit_chain"} 1.0' not in (await hub.site.ask("control", "GET", "/metrics"))[1]
        ):
            await hub.clock.advance(1000)  # the watcher reads in a thread, which takes its own time
    await hub.look(2)


async def the_audit_log_cannot_be_written(hub: Watched) -> None:
    path = hub.site.app.audit.path
    path.rename(path.with_suffix(".aside"))
    path.mkdir()
    for _ in range(4):
        assert (await hub.submit())[1]["code"] == "audit_unavailable"
        await hub.look()
    await hub.diagnose()
    path.rmdir()
    path.with_suffix(".aside").rename(path)


async def a_sync_fails(hub: Watched) -> None:
    with failing("fdatasync", "log-", left=1):
        assert (await hub.submit())[0] == 503
    assert (await hub.submit())[0] == 503, "it does not trust the disk any more"
    await hub.look(3)


async def a_file_cannot_be_followed(hub: Watched) -> None:
    with failing("write", "ledger.jsonl"), failing("pwrite", "ledger.jsonl"), failing("open", "ledger.jsonl"):
        for _ in range(12):
            await hub.submit()
            await hub.clock.advance(1_100)
            await hub.look()


async def a_bug(hub: Watched) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    hub.patch.setattr(hub.site.app.store, "page", broken)
    assert (await hub.site.data("GET", "/api/jobs"))[0] == 500
    hub.patch.undo()
    await hub.look(2)


# Starved


async def no_worker_comes(hub: Watched) -> None:
    hub.patch.setattr(clock, "settle", partial(clock.settle, 8))  # many minutes, in which little happens
    await hub.submit(priority="HIGH")
    for _ in range(17):
        await hub.clock.advance(60_000)
        await hub.beat("n1", health="GREEN")
        await hub.look()


async def the_disk_is_slow(hub: Watched) -> None:
    late, real, sync = [0.0], timing.stopwatch, os.fdatasync

    def slow(file: int) -> None:
        late[0] += 0.8
        sync(file)

    hub.patch.setattr(os, "fdatasync", slow)
    hub.patch.setattr(timing, "stopwatch", lambda: real() + late[0])
    for _ in range(14):
        await hub.submit()
        await hub.look()


async def nodes_are_unwell(hub: Watched) -> None:
    await hub.beat("n1", health="RED", attestation={"build_id": "another", "capability_hash": "c"})
    for n in range(5):
        await hub.beat("n2", attestation={"build_id": "b", "capability_hash": f"c{n % 2}"})
    await hub.look(34)


async def nodes_are_late(hub: Watched) -> None:
    await hub.beat("n3")
    await hub.pass_time(21_000)
    await hub.beat("n1", health="GREEN")
    await hub.look(8)


async def strangers_come(hub: Watched) -> None:
    for _ in range(60):
        await hub.site.ask("data", "GET", "/api/jobs", headers={"Authorization": "Bearer wrong"})
    for _ in range(25):
        await hub.site.control("GET", "/api/jobs")
    await hub.clock.advance(2_000)  # then what was folded is written
    await hub.look(2)


async def a_rotation_leaves_nodes_behind(hub: Watched) -> None:
    body = {"token": "the-token-that-is-to-follow", "seconds": 60}
    assert (await hub.site.control("POST", "/api/tokens/rotation", body))[0] == 201
    await hub.beat("n1", health="GREEN")
    await hub.pass_time(31_000)
    await hub.look(2)


async def old_tokens_are_used(hub: Watched) -> None:
    body = {"token": "the-token-that-is-to-follow", "seconds": 2}
    assert (await hub.site.control("POST", "/api/tokens/rotation", body))[0] == 201
    await hub.clock.advance(3_000)
    assert (await hub.site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1"}))[0] == 403
    await hub.look(2)


async def the_policy_denies(hub: Watched) -> None:
    await hub.activate({"policy": {"rules": [{"effect": "deny", "actions": ["submit"], "kinds": ["work"]}]}})
    for _ in range(25):
        assert (await hub.submit())[0] == 403
    await hub.look(2)


async def a_kind_is_paused(hub: Watched) -> None:
    await hub.submit()
    assert (await hub.site.data("POST", "/admin/pause", {"kind": "work"}))[0] == 200
    await hub.look()


async def no_node_can(hub: Watched) -> None:
    await hub.submit(required_capabilities=["tpu"])
    await hub.look()


async def all_nodes_are_silent(hub: Watched) -> None:
    await hub.submit()
    await hub.pass_time(61_000)
    await hub.look()


async def the_policy_keeps_nodes_away(hub: Watched) -> None:
    policy = {"policy": {"rules": [{"effect": "deny", "actions": ["pull"], "kinds": ["work"]}]}}
    await hub.activate(policy)
    await hub.submit()
    await hub.look()


async def a_clock_is_wrong(hub: Watched) -> None:
    await hub.beat("n1", health="GREEN", ts_utc=rfc3339(hub.clock.now() - 3_600_000))
    await hub.look()


class Trouble(NamedTuple):
    """What happens; the alerts that must fire; what diagnose finds, the worst first, of the running hub.

    `left`: of its files it finds the same, behind `hub-down`.
    """

    happens: Callable[[Watched], Awaitable[None]]
    alerts: tuple[str, ...]
    findings: tuple[str, ...]
    left: bool = True
    store: str = "memory"
    settings: Mapping[str, Any] = MappingProxyType({})


NODES = NodeSettings(ttl_seconds=20, dead_seconds=60)

TROUBLES = (
    Trouble(
        workers_are_killed,
        ("SheratanLeasesLost", "SheratanPoison", "SheratanDeadLettersGrowing"),
        ("dead-letters",),
        store="file",
        settings={"queue": QueueSettings(lease_seconds=2, max_losses=1)},
    ),
    Trouble(
        the_fleet_falls_silent,
        ("SheratanFleetSilent",),
        ("mass-silence", "node-down"),
        store="file",
        settings={"nodes": NODES},
    ),
    Trouble(a_node_is_killed, ("SheratanNodeDown",), ("node-down",), store="file", settings={"nodes": NODES}),
    Trouble(
        the_queue_is_filled,
        ("SheratanQueueFull",),
        ("backpressure",),
        store="file",
        settings={"queue": QueueSettings(max_depth=2)},
    ),
    Trouble(
        leases_are_used_up,
        ("SheratanInflightSaturated",),
        ("saturated",),
        store="file",
        settings={"queue": QueueSettings(max_inflight=1)},
    ),
    Trouble(the_disk_is_full, ("SheratanDiskFull",), ("disk-full",), left=False, store="file"),
    Trouble(the_disk_fills, ("SheratanDiskFilling",), (), store="file"),
    Trouble(dead_letters_pile_up, ("SheratanDeadLettersGrowing",), ("dead-letters",), store="file"),
    Trouble(
        nobody_looks_at_dead_letters,
        ("SheratanDeadLettersOverLimit",),
        ("dead-letters",),
        store="file",
        settings={"dlq": DlqSettings(max_items=1)},
    ),
    Trouble(results_are_corrupted, ("SheratanIntegrityFailure",), ("integrity",)),
    Trouble(
        work_is_done_twice_and_differs,
        ("SheratanResultsDiverge",),
        (),
        settings={"queue": QueueSettings(lease_seconds=2)},
    ),
    Trouble(keys_are_used_twice, ("SheratanIdempotencyCollisions",), ()),
    Trouble(
        the_audit_log_is_touched,
        ("SheratanAuditBroken",),
        ("audit-broken",),
        settings={"alerts": AlertSettings(in_process=True)},
    ),
    Trouble(the_audit_log_cannot_be_written, ("SheratanAuditNotWritable",), ("audit-not-writable",)),
    Trouble(a_sync_fails, ("SheratanStoreDown",), ("store-down",), left=False, store="file"),
    Trouble(a_file_cannot_be_followed, ("SheratanLoopFailing",), ("loop-errors",), left=False),
    Trouble(a_bug, ("SheratanErrors",), ()),
    Trouble(no_worker_comes, ("SheratanQueueStuck", "SheratanPromisesMissed"), ("queue-stuck",), left=False),
    Trouble(the_disk_is_slow, ("SheratanCommitSlow",), ("commit-latency",), left=False, store="file"),
    Trouble(nodes_are_unwell, ("SheratanNodeUnwell", "SheratanAttestationDrift", "SheratanAttestationSpoof"), ()),
    Trouble(nodes_are_late, ("SheratanNodesStale",), ("node-down",), store="file", settings={"nodes": NODES}),
    Trouble(strangers_come, ("SheratanAuthBurst", "SheratanPortMismatch"), ("auth-burst", "port-mismatch")),
    Trouble(a_rotation_leaves_nodes_behind, ("SheratanRotationStragglers",), ("rotation-stragglers",), store="file"),
    Trouble(old_tokens_are_used, ("SheratanOldToken",), ()),
    Trouble(the_policy_denies, ("SheratanPolicyDenials",), ()),
    Trouble(a_kind_is_paused, (), ("paused",), store="file"),
    Trouble(no_node_can, (), ("no-capable-node",), store="file"),
    Trouble(all_nodes_are_silent, (), ("nodes-silent", "node-down"), store="file", settings={"nodes": NODES}),
    Trouble(the_policy_keeps_nodes_away, (), ("policy-denies",), store="file"),
    Trouble(a_clock_is_wrong, (), ("clock-skew",), store="file"),
)
