"""GET /api/bundle: what is in it, who gets it, what it costs, and that its verdict names what is wrong with the hub."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

import pytest

from sheratan_hub import diagnosis_of
from sheratan_hub.bundle import MEMBER_BYTES, zipped
from sheratan_hub.clock import VirtualClock
from sheratan_hub.config import AlertRule, AlertSettings, ControlSettings, NodeSettings, QueueSettings
from sheratan_hub.diagnosis import REST_MOST_MS, SHARE, Pace
from sheratan_hub.diagnosis_live import Running, of_hub
from sheratan_hub.diagnosis_of import NODES_PIECE, WAITING
from sheratan_hub.rules.verdict import CODES
from tests.conftest import TOKEN, MakeSite, Site
from tests.stores.faults import failing
from tests.web.test_gates import check_problem

MEMBERS = {
    *("audit.json", "config.json", "environment.json", "health.json", "manifest.json", "queue.json", "registry.json"),
    *("runtime.json", "store.json", "system.json", "tokens.json", "verdict.json", "waiting.json"),
    *("metrics/control.txt", "metrics/data.txt", "metrics/fleet.json", "logs/alerts.jsonl", "logs/hub_control.jsonl"),
    *("logs/hub_data.jsonl", "logs/hub_security_audit.jsonl", "logs/ledger.jsonl"),
}


async def asked(site: Site, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    async with site.session.get(site.url("control", "/api/bundle"), headers=headers) as answer:
        return answer.status, await answer.read(), dict(answer.headers)


def opened(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as bundle:
        assert bundle.testzip() is None
        return {name: bundle.read(name) for name in bundle.namelist()}


async def bundle_of(site: Site) -> dict[str, Any]:
    """The bundle's JSON members by name, without `.json`."""
    status, data, _ = await asked(site)
    assert status == 200
    return {
        name.removesuffix(".json"): json.loads(text) for name, text in opened(data).items() if name.endswith("json")
    }


def running(site: Site) -> Running:
    services = site.app.services
    keyring = services.tokens.keyring
    return Running(
        site.app.hub, site.app.settings, os.environ, keyring, services.audit, services.telling, services.inside
    )


async def codes(site: Site) -> list[str]:
    return [one["code"] for one in (await bundle_of(site))["verdict"]["findings"]]


async def beat(site: Site, node_id: str, **fields: Any) -> None:
    status, body = await site.control("POST", "/api/hosts/heartbeat", {"node_id": node_id, **fields})
    assert status == 200, body


# What is in it


async def test_a_bundle_holds_all_its_parts_and_proves_each(site: Site) -> None:
    await beat(site, "n1", labels="x", zone="z", capabilities=["gpu"])
    await site.submit(params={"a": "never in it"}, required_capabilities=["tpu"])
    status, data, headers = await asked(site)
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "application/zip", "no-store")
    assert headers["Content-Disposition"].startswith('attachment; filename="diag_bundle_2')
    members = opened(data)
    assert set(members) == MEMBERS
    assert list(members) == sorted(members)
    manifest = json.loads(members["manifest.json"])
    listed = {one["name"]: (one["bytes"], one["sha256"]) for one in manifest["members"]}
    there = {name: (len(text), hashlib.sha256(text).hexdigest()) for name, text in members.items()}
    del there["manifest.json"]
    assert listed == there
    assert not any(one["cut"] or one["error"] for one in manifest["members"])
    assert (manifest["source"], manifest["findings"], manifest["worst"]) == ("hub", 1, "warning")


async def test_it_tells_how_the_hub_is(site: Site) -> None:
    await beat(site, "n1", capabilities=["gpu"], max_concurrent=2)
    job_id = await site.submit(required_capabilities=["tpu"])
    told = await bundle_of(site)
    assert told["health"]["control"] == told["health"]["data"]
    assert told["health"]["data"]["status"] == "ok"
    [job] = told["waiting"]["jobs"]
    assert (job["job_id"], job["reasons"][0]["reason"]) == (job_id, "no_capable_node")
    assert job["reasons"][0]["evidence"]["lacking"] == ["tpu"]
    assert told["registry"]["nodes"]["n1"]["capabilities"] == ["gpu"]
    assert told["queue"]["counts"]["job:pending"] == 1
    assert {"sweep", "rotate", "fold"} <= set(told["runtime"]["loops"])
    assert told["runtime"]["connections"]["control"]["open"] == 1
    assert told["store"]["answers"]
    assert told["store"]["writes"]
    assert told["audit"]["chain"]["broken"] is None
    assert told["config"]["settings"]["queue.max_depth"] == 1000
    assert told["environment"]["names"] == sorted(os.environ)
    assert told["system"]["packages"]["aiohttp"]
    assert told["metrics/fleet"]["data"]["queue_depth"] == 1
    assert told["tokens"]["next"] is None


async def test_the_same_state_makes_the_same_bytes_but_for_figures_of_the_process(
    make_site: MakeSite, clock: VirtualClock
) -> None:
    site = await make_site("sqlite", clock)
    for n in range(30):
        await beat(site, f"n{n}")
        await site.submit(required_capabilities=["x"])
    made = [await of_hub(running(site)) for _ in range(2)]
    first, second = ({one.name: one.data for one in bundle.members} for bundle in made)
    differing = {name for name in first if first[name] != second[name]}
    assert differing <= {"metrics/control.txt", "metrics/data.txt", "manifest.json"}
    stable = [[one for one in bundle.members if one.name not in differing] for bundle in made]
    assert zipped(stable[0]) == zipped(stable[1])


async def test_what_fails_is_told_in_its_place_and_costs_the_others_nothing(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site()

    async def broken(*_: object, **__: object) -> Any:
        raise RuntimeError("the index is gone, Authorization: Bearer hunter2")

    monkeypatch.setattr(site.app.hub, "page", broken)
    (site.app.audit.path.parent / "ledger.jsonl").unlink()
    (site.app.audit.path.parent / "ledger.jsonl").mkdir()
    status, data, _ = await asked(site)
    members = opened(data)
    assert status == 200
    assert set(members) == MEMBERS - {"waiting.json", "registry.json", "tokens.json"} | {
        "errors/waiting.json",
        "errors/registry.json",
    }
    told = json.loads(members["errors/waiting.json"])
    assert (told["part"], told["error"]) == ("waiting", "RuntimeError")
    assert "hunter2" not in told["text"]
    listed = json.loads(members["manifest.json"])["members"]
    assert [one["name"] for one in listed if one["error"]] == ["errors/registry.json", "errors/waiting.json"]


# Who gets it


async def test_another_address_gets_none_even_if_the_policy_lets_admins_come_from_anywhere(make_site: MakeSite) -> None:
    site = await make_site(control=ControlSettings(port=0, trusted_proxies=("127.0.0.1",)))
    policy = {"policy": {"gates": {"admin_from_loopback": False}}}
    _, made = await site.control("POST", "/api/policies", policy)
    for version in (0, made["version"]):
        if version:
            path = f"/api/policies/{version}/activate"
            assert (await site.control("POST", path, headers={"If-Match": "0"}))[0] == 200
        answer = await site.ask("control", "GET", "/api/bundle", headers={"X-Forwarded-For": "10.1.2.3"})
        check_problem(answer, 403, "loopback_only")
    assert (await asked(site))[0] == 200
    lines = [line for line in site.audit() if line["path"] == "/api/bundle"]
    assert [line["event"] for line in lines] == ["ADMIN_ACTION"] * 3
    assert [line["detail"].get("refused") for line in lines] == ["loopback_only", "loopback_only", None]
    assert lines[-1]["detail"]["bytes"] > 1000


async def test_without_a_token_or_through_an_unknown_proxy_there_is_none(site: Site) -> None:
    refused = await site.ask("control", "GET", "/api/bundle", headers={"Authorization": "Bearer wrong"})
    check_problem(refused, 403, "invalid_token")
    refused = await site.ask("control", "GET", "/api/bundle", headers={"X-Forwarded-For": "127.0.0.1"})
    check_problem(refused, 403, "loopback_only")
    assert (await site.ask("data", "GET", "/api/bundle"))[0] == 410


async def test_one_is_made_at_a_time(make_site: MakeSite) -> None:
    site = await make_site()
    site.app.services.inside.making = True
    check_problem(await site.ask("control", "GET", "/api/bundle"), 503, "busy")
    site.app.services.inside.making = False
    assert (await asked(site))[0] == 200
    assert not site.app.services.inside.making


# What it costs


class Counting:
    """Counts the rows that a store is read for."""

    def __init__(self, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, int] = {}
        self.largest = 0
        real_page, real_fetch = store.page, store.fetch

        async def page(*args: Any, **options: Any) -> Any:
            found = await real_page(*args, **options)
            self._add(found.rows)
            return found

        async def fetch(*args: Any, **options: Any) -> Any:
            found = await real_fetch(*args, **options)
            self._add(found)
            return found

        monkeypatch.setattr(store, "page", page)
        monkeypatch.setattr(store, "fetch", fetch)

    def _add(self, rows: Any) -> None:
        self.largest = max(self.largest, len(rows))
        for row in rows:
            self.rows[row.kind] = self.rows.get(row.kind, 0) + 1


@pytest.mark.parametrize("scheme", ["sqlite", "file"])
async def test_it_reads_no_more_of_the_store_than_it_shows(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    site = await make_site(scheme, queue=QueueSettings(max_depth=100_000))
    for n in range(30):
        await beat(site, f"n{n}")
    for _ in range(3):
        jobs = [{"kind": "k", "params": {}, "required_capabilities": [f"c{n % 7}"]} for n in range(1000)]
        assert (await site.data("POST", "/api/jobs", {"jobs": jobs}))[0] == 200
    counting = Counting(site.app.store, monkeypatch)
    told = await bundle_of(site)
    assert len(told["waiting"]["jobs"]) == WAITING
    assert told["waiting"]["more"]
    assert counting.rows["job"] == WAITING
    assert counting.rows["node"] <= 2 * 30, "once for the registry, once for all explanations"
    assert set(counting.rows) <= {"job", "node", "token", "standing", "fleet"}
    assert told["queue"]["lane_count"] == 7


async def test_a_large_fleet_is_shown_in_part_and_this_is_told(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis_of, "NODES_SHOWN", 60)
    site = await make_site()
    for n in range(64):
        await beat(site, f"node-{n:04}")
    status, data, _ = await asked(site)
    members = opened(data)
    assert status == 200
    assert len(json.loads(members["registry.json"])["nodes"]) == 60
    listed = {one["name"]: one for one in json.loads(members["manifest.json"])["members"]}
    assert listed["registry.json"]["cut"]
    assert all(one["bytes"] <= MEMBER_BYTES for one in listed.values())


class Working(VirtualClock):
    """Each look at the time costs a millisecond of work; sleeps pass at once and are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.slept: list[float] = []

    def now(self) -> int:
        self._now += 1
        return self._now

    async def sleep(self, ms: float) -> None:
        self.slept.append(ms)
        self._now += int(ms)


async def test_others_have_nine_tenths_of_the_time() -> None:
    clock = Working()
    began = clock._now
    pace = Pace(clock)
    for _ in range(500):
        await pace.step()
    rested, passed = sum(clock.slept), clock._now - began
    assert rested >= (SHARE - 1) / SHARE * passed * 0.95
    assert max(clock.slept) <= REST_MOST_MS


async def test_it_is_made_in_many_small_slices(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await make_site()
    for n in range(70):
        await beat(site, f"n{n}")
        await site.ask("control", "GET", "/api/hosts", headers={"Authorization": "Bearer wrong"})
    jobs = [{"kind": "k", "params": {}, "required_capabilities": ["x"]} for _ in range(30)]
    await site.data("POST", "/api/jobs", {"jobs": jobs})
    slices: list[int] = []
    counting = Counting(site.app.store, monkeypatch)
    real = Pace.step

    async def step(pace: Pace) -> None:
        slices.append(sum(counting.rows.values()) - sum(slices))
        await real(pace)

    monkeypatch.setattr(Pace, "step", step)
    await asked(site)
    lines = len(site.audit())
    assert len(slices) >= lines // 20 + WAITING + 70 // NODES_PIECE + 10
    assert max(slices) <= 70 + WAITING + 2, "the nodes for all explanations are the most that is read at once"


# What it says is wrong

Trouble = Callable[[Site, VirtualClock, ExitStack], Awaitable[object]]


async def starved(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    await beat(site, "n1", capabilities=["gpu"])
    await site.submit(required_capabilities=["tpu"])


async def paused(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    await beat(site, "n1")
    await site.data("POST", "/admin/pause", {"kind": "work", "reason": "never in it"})
    await site.submit()


async def all_stale(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    await beat(site, "n1")
    await site.submit()
    await clock.advance(25_000)


async def mass_silence(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    for n in range(8):
        await beat(site, f"n{n}")
    await clock.advance(31_000)


async def saturated(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    await beat(site, "n1")
    for _job in range(3):
        await site.submit()
    await site.lease(max=2)


async def filled(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    await beat(site, "n1")
    for _job in range(4):
        await site.submit()


async def strangers(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    for _second in range(8):
        await site.ask("data", "GET", "/api/jobs", headers={"Authorization": "Bearer wrong"})
        await site.control("GET", "/api/jobs")
        await clock.advance(1100)


async def stragglers(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    await beat(site, "n1")
    await site.control("POST", "/api/tokens/rotation", {"token": "the-token-that-is-to-follow", "seconds": 60})
    await beat(site, "n1")


async def disk_full(site: Site, clock: VirtualClock, stack: ExitStack) -> None:
    stack.enter_context(failing("pwrite", "log-", errno.ENOSPC))
    assert (await site.data("POST", "/api/jobs", {"kind": "work"}))[0] == 503


async def sync_failed(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    with failing("fdatasync", "log-", left=1):
        assert (await site.data("POST", "/api/jobs", {"kind": "work"}))[0] == 503


async def audit_not_writable(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    site.app.audit.path.rename(site.app.audit.path.with_suffix(".aside"))
    site.app.audit.path.mkdir()
    assert (await site.data("POST", "/api/jobs", {"kind": "work"}))[1]["code"] == "audit_unavailable"


async def audit_touched(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    for _line in range(3):
        await site.ask("data", "GET", "/api/jobs", headers={"Authorization": "Bearer wrong"})
        await clock.advance(1100)
    lines = site.app.audit.path.read_bytes().splitlines(keepends=True)
    site.app.audit.path.write_bytes(b"".join([*lines[:1], *lines[2:]]))


async def results_corrupted(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    await site.submit()
    bad = {"mode": "sha256", "sha256": "0" * 64}
    assert (await site.finish(await site.lease(), result=1, integrity=bad))[0] == 422


async def dead_letters(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    for _job in range(11):
        await site.submit(max_retries=0)
        await site.finish(await site.lease(), ok=False, error="never in it")
        await clock.advance(1100)


async def stands_still(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    await site.submit()
    for _minute in range(40):
        await clock.advance(10_000)
        await beat(site, "n1")


async def denied(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    policy = {"policy": {"rules": [{"effect": "deny", "actions": ["pull"], "kinds": ["work"]}]}}
    _, made = await site.control("POST", "/api/policies", policy)
    await site.control("POST", f"/api/policies/{made['version']}/activate", headers={"If-Match": "0"})
    await beat(site, "n1")
    await site.submit()


async def clock_off(site: Site, clock: VirtualClock, _: ExitStack) -> None:
    await beat(site, "n1", ts_utc="2001-01-01T00:00:00Z")


TROUBLES: dict[Trouble, tuple[str, str]] = {
    starved: ("memory", "no-capable-node"),
    paused: ("memory", "paused"),
    all_stale: ("sqlite", "nodes-silent"),
    mass_silence: ("memory", "mass-silence"),
    saturated: ("memory", "saturated"),
    filled: ("memory", "backpressure"),
    strangers: ("memory", "auth-burst"),
    stragglers: ("memory", "rotation-stragglers"),
    disk_full: ("file", "disk-full"),
    sync_failed: ("file", "store-down"),
    audit_not_writable: ("memory", "audit-not-writable"),
    audit_touched: ("memory", "audit-broken"),
    results_corrupted: ("memory", "integrity"),
    dead_letters: ("memory", "dead-letters"),
    stands_still: ("memory", "queue-stuck"),
    denied: ("memory", "policy-denies"),
    clock_off: ("memory", "clock-skew"),
}


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda one: one.__name__)
async def test_the_verdict_names_the_trouble(make_site: MakeSite, clock: VirtualClock, trouble: Trouble) -> None:
    scheme, code = TROUBLES[trouble]
    rule = AlertRule("AUTH_FAILURE", more_than=5)
    site = await make_site(
        scheme,
        clock,
        nodes=NodeSettings(ttl_seconds=20, dead_seconds=60),
        queue=QueueSettings(max_inflight=2, max_depth=4),
        alerts=AlertSettings(auth_failure=rule, port_mismatch=AlertRule("PORT_MISMATCH", more_than=5)),
    )
    assert [one for one in await codes(site) if one != code] == await codes(site) == []
    with ExitStack() as stack:
        await trouble(site, clock, stack)
        status, data, _ = await asked(site)
        assert status == 200
        members = opened(data)
        findings = json.loads(members["verdict.json"])["findings"]
        assert code in [one["code"] for one in findings], findings
        assert all(one["severity"] != "note" for one in findings if one["code"] == code)
        assert trouble is sync_failed or not any(name.startswith("errors/") for name in members)
        assert b"never in it" not in b"".join(members.values())
        if trouble is audit_not_writable:
            site.app.audit.path.rmdir()
    assert code in CODES
    assert TOKEN.encode() not in b"".join(members.values())
