"""Each metric moves when its thing happens, and no other does.

A story first sets the stage, then `yield`s, then does the thing; what it says has moved is all that has. What moves
with any request is left out: `NOISE`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sheratan_hub.canonical import result_sha256
from sheratan_hub.clock import VirtualClock
from sheratan_hub.config import DlqSettings, IntegritySettings, NodeSettings, QueueSettings, RetentionSettings
from tests.conftest import MakeSite, Site

NOISE = (
    *("sheratan_http_requests", "sheratan_events", "sheratan_auth_accepted", "sheratan_audit_lines"),
    *("sheratan_commands", "sheratan_commit_", "sheratan_sync_", "sheratan_event_loop_lag", "sheratan_connections"),
    *("sheratan_oldest_wait", "sheratan_store_", "sheratan_build_info", "process_", "python_"),
)

Thing = Callable[[Site, VirtualClock], AsyncIterator[None]]
STORIES: list[tuple[Thing, dict[str, float]]] = []


def moves(**metrics: float | dict[str, float]) -> Callable[[Thing], Thing]:
    """The metrics, without their prefix, that a story moves, and by how much; by label values joined with a comma."""
    told = {}
    for name, moved in metrics.items():
        for labels, n in (moved if isinstance(moved, dict) else {"": moved}).items():
            told[f"{name}{{{labels}}}" if labels else name] = n

    def known(story: Thing) -> Thing:
        STORIES.append((story, told))
        return story

    return known


async def told(site: Site) -> dict[str, float]:
    """Every series of both planes that is not noise; of histograms the counts."""
    found = {}
    for plane in ("control", "data"):
        text = (await site.app.telling.text(plane))[0].decode()
        for sample in (one for family in parse_text(text) for one in family.samples):
            if not sample.name.startswith(NOISE) and not sample.name.endswith(("_bucket", "_sum")):
                labels = ",".join(sample.labels.values())
                name = sample.name.removeprefix("sheratan_") + (f"{{{labels}}}" if labels else "")
                assert name not in found, f"{name} is served twice"
                found[name] = sample.value
    return found


BEAT = {"node_id": "n1"}
WORK = {"kind": "work"}
KEYED = {**WORK, "idempotency_key": "k1"}


async def beat(site: Site, **fields: Any) -> None:
    await site.control("POST", "/api/hosts/heartbeat", {**BEAT, **fields})


# Jobs that come


@moves(jobs={"pending": 1}, ready_jobs={"HIGH": 1})
async def a_submit(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    yield
    await site.submit(priority="HIGH")


@moves(jobs={"pending": 1})
async def a_submit_that_waits_for_a_time(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    yield
    await site.submit(delay_seconds=60)


@moves(jobs={"pending": 1}, ready_jobs={"NORMAL": 1}, idempotency_keys=1)
async def a_submit_with_a_key(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    yield
    await site.data("POST", "/api/jobs", KEYED)


@moves(idempotency_hits_total=1)
async def the_same_submit_again(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.data("POST", "/api/jobs", KEYED)
    yield
    await site.data("POST", "/api/jobs", KEYED)


@moves(idempotency_collisions_total=1, refusals_total={"idempotency_key_collision,data": 1})
async def another_payload_under_the_same_key(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.data("POST", "/api/jobs", KEYED)
    yield
    await site.data("POST", "/api/jobs", {**KEYED, "params": 1})


@moves(submits_limited_total={"queue_full": 1}, refusals_total={"queue_full,data": 1})
async def a_submit_into_a_full_queue(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    for _ in range(3):
        await site.submit()
    yield
    await site.data("POST", "/api/jobs", WORK)


@moves(submits_limited_total={"rate_limited": 1}, refusals_total={"rate_limited,data": 1})
async def a_submit_beyond_its_sources_rate(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.data("PUT", "/admin/rate-limits/s", {"per_minute": 1, "concurrent": 0})
    await site.submit(source="s")
    yield
    await site.data("POST", "/api/jobs", {**WORK, "source": "s"})


@moves(refusals_total={"invalid_field,data": 1})
async def a_submit_that_makes_no_sense(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    yield
    await site.data("POST", "/api/jobs", {**WORK, "priority": 9})


# Leases and how they end


@moves(
    jobs={"pending": -1, "running": 1},
    ready_jobs={"NORMAL": -1},
    leases=1,
    leases_granted_total=1,
    job_wait_seconds_count={"work": 1},
)
async def a_lease(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.submit()
    yield
    await site.lease()


@moves(pulls_saturated_total=1)
async def a_pull_at_the_inflight_limit(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    for _ in range(3):
        await site.submit()
    await site.lease()
    await site.lease()
    yield
    await site.data("POST", "/api/jobs/pull", BEAT)


@moves(
    jobs={"running": -1, "completed": 1},
    leases=-1,
    attempts_total={"completed": 1},
    pending_processing=1,
    job_run_seconds_count={"work": 1},
    job_end_to_end_seconds_count={"work": 1},
)
async def a_result(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.submit()
    lease = await site.lease()
    yield
    await site.finish(lease, result=7)


@moves()
async def the_same_result_again(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.submit()
    lease = await site.lease()
    await site.finish(lease, result=7)
    yield
    await site.finish(lease, result=7)


@moves(
    jobs={"running": -1, "pending": 1},
    leases=-1,
    attempts_total={"failed": 1},
    retries_total={"failure": 1},
    job_run_seconds_count={"work": 1},
)
async def a_failure_that_is_tried_again(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.submit()
    lease = await site.lease()
    yield
    await site.finish(lease, ok=False, error={})


@moves(
    jobs={"running": -1, "failed": 1},
    leases=-1,
    attempts_total={"failed": 1},
    dead_letters_total={"NOT_RETRYABLE": 1},
    job_run_seconds_count={"work": 1},
)
async def a_failure_for_good(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.submit()
    lease = await site.lease()
    yield
    await site.finish(lease, ok=False, error={}, retry=False)


@moves(
    jobs={"running": -1, "pending": 1},
    ready_jobs={"NORMAL": 1},
    leases=-1,
    attempts_total={"released": 1},
    job_run_seconds_count={"work": 1},
)
async def a_release(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    job_id = await site.submit()
    lease = await site.lease()
    yield
    await site.data("POST", f"/api/jobs/{job_id}/release", {"lease_id": lease["lease_id"]})


@moves(
    jobs={"running": -1, "pending": 1},
    leases=-1,
    leases_ended_total={"lease_expired": 1},
    attempts_total={"lost": 1},
    retries_total={"lease_expired": 1},
    job_run_seconds_count={"work": 1},
)
async def a_lease_that_runs_out(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.submit()
    await site.lease()
    yield
    await clock.advance(10_100)


@moves(
    jobs={"running": -1, "pending": 1},
    leases=-1,
    leases_ended_total={"timeout": 1},
    attempts_total={"timeout": 1},
    retries_total={"timeout": 1},
    job_run_seconds_count={"work": 1},
)
async def an_attempt_that_runs_too_long(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await clock.advance(11_000)
    await site.submit(timeout_seconds=3)
    await site.lease()
    yield
    await clock.advance(3_100)


@moves(
    jobs={"pending": -1, "completed": 1},
    ready_jobs={"NORMAL": -1},
    attempts_total={"late": 1},
    pending_processing=1,
    job_end_to_end_seconds_count={"work": 1},
)
async def a_late_result_that_is_taken(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.submit()
    lease = await site.lease()
    await clock.advance(12_000)
    yield
    await site.finish(lease, result=7)


@moves(superseded_results_total={"unknown": 1}, refusals_total={"lease_superseded,data": 1})
async def a_late_result_while_another_has_the_job(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.submit()
    late = await site.lease("n1")
    await clock.advance(12_000)
    await site.lease("n2")
    yield
    await site.finish(late, result=7)


@moves(
    jobs={"pending": -1, "failed": 1},
    ready_jobs={"NORMAL": -1},
    dead_letters_total={"EXPIRED": 1},
)
async def a_job_that_nobody_took_in_time(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.submit(expires_in_seconds=5)
    yield
    await clock.advance(5_100)


@moves(jobs={"pending": -1, "cancelled": 1}, ready_jobs={"NORMAL": -1})
async def a_waiting_job_is_cancelled(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    job_id = await site.submit()
    yield
    await site.data("POST", f"/api/jobs/{job_id}/cancel")


@moves(
    jobs={"running": -1, "cancelled": 1},
    leases=-1,
    leases_ended_total={"cancel_deadline": 1},
    attempts_total={"cancelled": 1},
    job_run_seconds_count={"work": 1},
)
async def a_running_job_is_cancelled_and_its_worker_does_not_hear(
    site: Site, clock: VirtualClock
) -> AsyncIterator[None]:
    await clock.advance(11_000)
    job_id = await site.submit()
    await site.lease()
    await site.data("POST", f"/api/jobs/{job_id}/cancel")
    yield
    await clock.advance(2_100)


@moves(jobs={"pending": 1, "failed": -1}, ready_jobs={"NORMAL": 1})
async def a_redrive(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    job_id = await site.submit()
    await site.finish(await site.lease(), ok=False, error={}, retry=False)
    yield
    await site.data("POST", f"/api/jobs/{job_id}/redrive")


@moves(jobs={"completed": -1}, pruned_jobs_total={"completed": 1}, pending_processing=-1)
async def a_finished_job_is_forgotten(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.submit()
    await site.finish(await site.lease(), result=7)
    yield
    await clock.advance(41_000)


@moves(
    dead_letters_over_limit=1,
    jobs={"running": -1, "failed": 1},
    leases=-1,
    attempts_total={"failed": 1},
    dead_letters_total={"NOT_RETRYABLE": 1},
    job_run_seconds_count={"work": 1},
)
async def more_dead_letters_than_wanted(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    leases = []
    for _ in range(2):
        await site.submit()
        leases.append(await site.lease())
    await site.finish(leases[0], ok=False, error={}, retry=False)
    yield
    await site.finish(leases[1], ok=False, error={}, retry=False)
    await clock.advance(1_100)


@moves(pending_processing=-1)
async def a_result_is_read(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    job_id = await site.submit()
    await site.finish(await site.lease(), result=7)
    yield
    await site.job(job_id)
    await clock.advance(1_100)


@moves(pauses=1)
async def a_pause(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    yield
    await site.data("POST", "/admin/pause", {"kind": "work"})


@moves(
    throttled_sources=1,
    jobs={"pending": -1, "running": 1},
    ready_jobs={"NORMAL": -1},
    leases=1,
    leases_granted_total=1,
    job_wait_seconds_count={"work": 1},
)
async def a_source_at_its_concurrency(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.data("PUT", "/admin/rate-limits/s", {"per_minute": 0, "concurrent": 1})
    await site.submit(source="s")
    yield
    await site.lease()


# Proofs


def proof(lease: dict[str, Any], result: bytes) -> dict[str, str]:
    return {"mode": "sha256", "sha256": result_sha256(lease["job_id"], True, result, b"null")}


@moves(
    result_integrity_total={"ok": 1},
    jobs={"running": -1, "completed": 1},
    leases=-1,
    attempts_total={"completed": 1},
    pending_processing=1,
    job_run_seconds_count={"work": 1},
    job_end_to_end_seconds_count={"work": 1},
)
async def a_result_with_its_proof(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.submit()
    lease = await site.lease()
    yield
    await site.finish(lease, result=7, integrity=proof(lease, b"7"))


@moves(result_integrity_total={"sha_mismatch": 1}, refusals_total={"result_integrity_fail,data": 1})
async def a_result_with_anothers_proof(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.submit()
    lease = await site.lease()
    yield
    await site.finish(lease, result=7, integrity=proof(lease, b"8"))


@moves(result_integrity_total={"mode_downgrade": 1}, refusals_total={"result_integrity_fail,data": 1})
async def a_result_with_a_weaker_proof(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.submit()
    lease = await site.lease()
    yield
    await site.finish(lease, result=7, integrity={"mode": "none"})


# Nodes


@moves(nodes={"ONLINE": 1}, node_health={"GREEN": 1}, node_attestations={"MISSING": 1})
async def a_node_comes(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    yield
    await beat(site)


@moves(node_health={"GREEN": -1, "RED": 1})
async def a_node_is_ill(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await beat(site)
    yield
    await beat(site, health="RED")


@moves(nodes={"ONLINE": -1, "STALE": 1}, node_health={"GREEN": -1})
async def a_node_falls_silent(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await beat(site)
    yield
    await clock.advance(20_200)


@moves(
    nodes={"STALE": -1, "DEAD": 1},
    jobs={"running": -1, "pending": 1},
    leases=-1,
    leases_ended_total={"node_dead": 1},
    attempts_total={"node_dead": 1},
    retries_total={"node_dead": 1},
    job_run_seconds_count={"work": 1},
)
async def a_node_dies_with_its_lease(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    job_id = await site.submit(timeout_seconds=1000)
    await beat(site)
    lease = await site.lease()
    body = {"lease_id": lease["lease_id"], "seconds": 500}
    await site.data("POST", f"/api/jobs/{job_id}/extend", body)
    await clock.advance(25_000)
    yield
    await clock.advance(5_300)


@moves(
    jobs={"running": -1, "pending": 1},
    leases=-1,
    leases_ended_total={"node_restarted": 1},
    attempts_total={"lost": 1},
    retries_total={"node_restarted": 1},
    job_run_seconds_count={"work": 1},
)
async def a_node_is_started_anew(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await beat(site, boot_id="a")
    await site.submit()
    await site.lease()
    yield
    await clock.advance(10)
    await beat(site, boot_id="b")
    await clock.advance(100)


@moves(nodes_draining=1)
async def a_node_is_drained(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await beat(site)
    yield
    await site.control("POST", "/api/hosts/n1/drain")


@moves(
    jobs={"running": -1, "pending": 1},
    ready_jobs={"NORMAL": 1},
    leases=-1,
    leases_ended_total={"drain_deadline": 1},
    attempts_total={"released": 1},
    job_run_seconds_count={"work": 1},
)
async def a_drains_deadline_passes(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await beat(site)
    await site.submit()
    await site.lease()
    await site.control("POST", "/api/hosts/n1/drain", {"seconds": 3})
    yield
    await clock.advance(3_300)


@moves(
    attestation_changes_total={"first_seen": 1},
    node_attestations={"MISSING": -1, "OK": 1},
)
async def a_node_attests_something(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await beat(site)
    yield
    await beat(site, attestation={"build_id": "b"})


@moves(
    attestation_changes_total={"drift": 1},
    node_attestations={"OK": -1, "DRIFT": 1},
    node_health={"GREEN": -1, "YELLOW": 1},
)
async def a_node_attests_something_else(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await beat(site, attestation={"build_id": "b"})
    yield
    await beat(site, attestation={"build_id": "c"})


@moves(
    attestation_changes_total={"drift": 1, "spoof_suspect": 1},
    node_attestations={"OK": -1, "SPOOF_SUSPECT": 1},
    node_health={"GREEN": -1, "YELLOW": 1},
)
async def a_node_keeps_changing_its_word(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    for claim in "bcb":
        await beat(site, attestation={"capability_hash": claim})
    yield
    await beat(site, attestation={"capability_hash": "c"})


@moves(
    attestation_changes_total={"accepted": 1},
    node_attestations={"DRIFT": -1, "OK": 1},
    node_health={"YELLOW": -1, "GREEN": 1},
)
async def an_operator_accepts_it(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await beat(site, attestation={"build_id": "b"})
    await beat(site, attestation={"build_id": "c"})
    yield
    await site.control("POST", "/api/hosts/n1/attest")


@moves(fleet_silent=1, nodes={"ONLINE": -6, "STALE": 6}, node_health={"GREEN": -6})
async def most_of_the_fleet_falls_silent(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    for n in range(6):
        await beat(site, node_id=f"n{n}")
    yield
    await clock.advance(20_500)


# Who asks


@moves(auth_failures_total={"invalid_token": 1}, refusals_total={"invalid_token,data": 1})
async def a_wrong_token(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    yield
    await site.data("GET", "/api/jobs", headers={"Authorization": "Bearer wrong"})


@moves(auth_failures_total={"missing_token": 1}, refusals_total={"missing_token,control": 1})
async def no_token(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    yield
    await site.control("GET", "/api/hosts", headers={"Authorization": ""})


@moves(port_mismatches_total={"control": 1}, refusals_total={"port_mismatch,control": 1})
async def a_path_on_the_wrong_port(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    yield
    await site.control("GET", "/api/jobs")


@moves(token_rotation_active=1, token_rotation_remaining_seconds=3600, token_rotation_stragglers=1)
async def a_rotation_begins(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await beat(site, node_id="old")
    yield
    status, body = await site.control("POST", "/api/tokens/rotation", {"seconds": 3600})
    assert status == 201, body
    await site.app._looks.look_for_stragglers()


@moves(policy_denials_total={"submit": 1}, refusals_total={"policy_denied,data": 1})
async def the_policy_denies_a_submit(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await deny(site)
    yield
    await site.data("POST", "/api/jobs", WORK)


@moves(policy_version=1)
async def a_policy_is_activated(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    yield
    await deny(site)


async def deny(site: Site) -> None:
    rules = [{"effect": "deny", "actions": ["submit"]}]
    status, made = await site.control("POST", "/api/policies", {"policy": {"rules": rules}})
    assert status == 201, made
    path = f"/api/policies/{made['version']}/activate"
    status, body = await site.control("POST", path, headers={"If-Match": "*"})
    assert status == 200, body


@moves(alerts_total={"poison": 1})
async def the_watcher_raises_an_alert(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    yield
    alerts = site.app.audit.path.with_name("alerts.jsonl")
    alerts.write_text('{"id": "1", "rule": "poison"}\n{"id": "2", "rule": "poi')
    await site.app._looks.look()


@moves(audit_writable=-1, audit_write_failures_total=1, audit_queue_lines=1)
async def the_audit_log_cannot_be_written(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    yield
    site.app.audit.file._failed(OSError("full"))
    site.app.audit.file.add({"event": "HUB_STOP", "detail": {}})


@moves(loop_errors_total={"look": 1})
async def a_loop_fails(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    async def failing() -> None:
        raise RuntimeError("for the test")

    (look,) = (loop for loop in site.app.telling._loops if loop.name == "look")
    look._step = failing
    yield
    look.nudge(clock.now())
    await clock.advance(0)


@moves(waiting_pulls=1, long_polls=1)
async def a_pull_waits(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    yield
    with site.app.hub.waiting.pull(await site.app.hub._offer(pull_of("n1")), 1, "n1"):
        yield


@moves(promises_missed={"HIGH": 1})
async def a_promise_is_missed(site: Site, clock: VirtualClock) -> AsyncIterator[None]:
    await site.submit(priority="HIGH")
    await site.submit(priority="NORMAL")
    yield
    await clock.advance(61_000)


def pull_of(node_id: str) -> Any:
    from sheratan_hub.rules.pull import Pull

    return Pull(node_id, "secret")


@pytest.mark.parametrize(("story", "expected"), STORIES, ids=[story.__name__ for story, _ in STORIES])
async def test_a_metric_moves_when_its_thing_happens_and_no_other_does(
    make_site: MakeSite, story: Thing, expected: dict[str, float]
) -> None:
    clock = VirtualClock()
    site = await make_site(
        clock=clock,
        nodes=NodeSettings(ttl_seconds=20, dead_seconds=30),
        queue=QueueSettings(max_depth=3, max_inflight=2, lease_seconds=10, cancel_grace_seconds=2),
        integrity=IntegritySettings(mode="sha256"),
        retention=RetentionSettings(completed_seconds=40),
        dlq=DlqSettings(max_items=1),
    )
    steps = story(site, clock)
    await anext(steps)
    before = await told(site)
    await anext(steps, None)
    after = await told(site)
    moved = {name: n - before.get(name, 0) for name, n in after.items() if n != before.get(name, 0)}
    assert moved == {name: n for name, n in expected.items() if n}
