"""The admin routes: who may, what is on record, dead letters, redrive, purge, cancel in bulk, the queue at a glance."""

from __future__ import annotations

from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock
from sheratan_hub.config import DlqSettings, IdempotencySettings, QueueSettings, RetentionSettings
from sheratan_hub.web import admin, walking
from sheratan_hub.web.routes import ROUTES
from tests.conftest import MakeSite, Site

ADMIN = [route for route in ROUTES if route.path.startswith("/admin/") and "{" not in route.path]
BODIES = {
    "/admin/dlq/redrive": {"filter": {}},
    "/admin/purge": {"filter": {}},
    "/admin/cancel": {"filter": {}},
}
DEEP = QueueSettings(max_depth=10_000, max_inflight=10_000)


def events(site: Site, name: str) -> list[dict[str, Any]]:
    return [line for line in site.audit() if line["event"] == name]


def refused(answer: tuple[int, Any], status: int, code: str) -> None:
    assert (answer[0], answer[1].get("code")) == (status, code), answer


async def dead(site: Site, n: int = 1, **fields: Any) -> list[str]:
    """Jobs that failed for good, in the order of their submission."""
    ids = [await site.submit(**{"max_retries": 0, **fields}) for _ in range(n)]
    for _ in ids:
        await site.finish(await site.lease(), ok=False, error={"type": "E", "message": "no"})
    return ids


async def redrive(site: Site, **body: Any) -> Any:
    status, told = await site.data("POST", "/admin/dlq/redrive", body)
    assert status == 200, told
    return told


async def listed(site: Site, query: str = "") -> list[str]:
    status, body = await site.data("GET", f"/admin/dlq{query}")
    assert status == 200, body
    return [job["job_id"] for job in body["jobs"]]


# Who may, and what is on record


def test_every_admin_route_has_the_right_of_its_name_and_no_other_has() -> None:
    assert len(ADMIN) >= 5
    named = [route.path for route in ROUTES if route.path.startswith("/admin/") or route.path == "/api/bundle"]
    assert [route.path for route in ROUTES if route.right == "admin"] == named


@pytest.mark.parametrize("route", ADMIN, ids=lambda route: route.path)
async def test_an_admin_route_needs_the_token_and_loopback(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, route: Any
) -> None:
    site = await make_site()
    body = BODIES.get(route.path)
    wrong = {"Authorization": "Bearer wrong"}
    refused(await site.data(route.method, route.path, body, headers=wrong), 403, "invalid_token")
    assert events(site, "ADMIN_ACTION") == []
    with monkeypatch.context() as far:
        far.setattr("sheratan_hub.web.plane.is_loopback", lambda address: False)
        refused(await site.data(route.method, route.path, body, headers=wrong), 403, "invalid_token")
        refused(await site.data(route.method, route.path, body), 403, "loopback_only")
    assert (await site.data(route.method, route.path, body))[0] == 200
    tried, used = events(site, "ADMIN_ACTION")
    assert tried["detail"] == {"route": f"{route.method} {route.path}", "refused": "loopback_only"}
    assert used["detail"]["route"] == f"{route.method} {route.path}"
    assert (used["plane"], used["remote_addr"], used["path"]) == ("data", "127.0.0.1", route.path)
    refused(await site.control(route.method, route.path, body), 410, "port_mismatch")


async def test_every_use_is_on_record_with_what_it_did_also_when_it_was_refused(site: Site) -> None:
    await dead(site, 2)
    await site.submit(params={"canary": "payload"}, kind="canary-kind")
    for _ in range(3):
        await site.data("GET", "/admin/dlq?limit=1")
    await redrive(site, filter={})
    await site.data("POST", "/admin/purge", {"filter": {"kind": "canary-kind"}})
    await site.data("POST", "/admin/purge", {"filter": {}, "cursor": "nonsense"})
    await site.data("POST", "/admin/purge", {})
    assert [{**line["detail"], "route": None} for line in events(site, "ADMIN_ACTION")] == [
        *[{"route": None, "jobs": 1}] * 3,
        {"route": None, "redriven": 2},
        {"route": None, "dry_run": False, "matched": 1, "purged": 1},
        {"route": None, "dry_run": False, "matched": 0, "purged": 0, "refused": "invalid_field"},
        {"route": None, "refused": "invalid_field"},
    ]
    assert "canary" not in site.app.audit.path.read_text()


async def test_what_a_bug_cut_short_is_on_record_too(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await make_site()
    await site.submit()

    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(admin, "_count", broken)
    assert (await site.data("POST", "/admin/purge", {"filter": {}}))[0] == 500
    assert events(site, "ADMIN_ACTION")[0]["detail"]["matched"] == 1


# Dead letters


async def test_a_dead_letter_is_listed_with_its_reason_its_error_and_its_attempts(site: Site) -> None:
    (job_id,) = await dead(site, params={"a": 1}, source="s", mission_id="m")
    (found,) = (await site.data("GET", "/admin/dlq"))[1]["jobs"]
    shown = ("job_id", "status", "reason", "params", "source", "mission_id", "node_id", "redrives")
    expected = [job_id, "failed", "RETRIES_EXHAUSTED", {"a": 1}, "s", "m", "n1", 0]
    assert [found[name] for name in shown] == expected
    error = {"type": "E", "message": "no"}
    assert found["error"] == error
    (attempt,) = found["attempts"]
    assert [attempt[name] for name in ("attempt", "node_id", "outcome", "error")] == [1, "n1", "failed", error]
    assert found["late"] == []


async def test_dead_letters_come_newest_first_page_by_page(make_site: MakeSite) -> None:
    site = await make_site(queue=DEEP)
    ids = await dead(site, 5)
    await site.submit()
    assert await listed(site) == ids[::-1]
    assert await listed(site, "?order=oldest") == ids
    found, cursor = [], ""
    while True:
        _, body = await site.data("GET", f"/admin/dlq?limit=2{cursor}")
        found += [job["job_id"] for job in body["jobs"]]
        if body["next_cursor"] is None:
            break
        cursor = f"&cursor={body['next_cursor']}"
    assert found == ids[::-1]


async def test_dead_letters_are_found_by_what_they_have_in_common(site: Site) -> None:
    (first,) = await dead(site, kind="a", source="s", mission_id="m")
    (second,) = await dead(site, kind="b", delivery="at_most_once")
    for query, expected in {
        "kind=a": [first],
        "source=s": [first],
        "mission_id=m": [first],
        "node_id=n1": [second, first],
        "node_id=n2": [],
        "reason=NOT_RETRYABLE": [second],
        "reason=RETRIES_EXHAUSTED&kind=b": [],
        "kind=": [second, first],
    }.items():
        assert await listed(site, f"?{query}") == expected, query


async def test_a_rare_reason_is_found_over_pages_that_may_be_empty(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walking, "CHUNK", 2)
    monkeypatch.setattr(admin, "PAGE_EXAMINED", 3)
    site = await make_site(queue=DEEP)
    rare = await dead(site, delivery="at_most_once")
    await dead(site, 9)
    found, cursor, pages = [], "", 0
    while cursor is not None:
        query = f"?reason=NOT_RETRYABLE&limit=1{cursor and '&cursor='}{cursor}"
        body = (await site.data("GET", f"/admin/dlq{query}"))[1]
        found += [job["job_id"] for job in body["jobs"]]
        cursor, pages = body["next_cursor"], pages + 1
    assert (found, pages >= 3) == (rare, True)


@pytest.mark.parametrize("query", ["reason=BORED", "order=random", "limit=0", "limit=1001", "limit=x"])
async def test_a_wrong_query_is_refused(site: Site, query: str) -> None:
    refused(await site.data("GET", f"/admin/dlq?{query}"), 422, "invalid_field")


async def test_a_dead_letter_and_its_redrive_are_audited(site: Site) -> None:
    (job_id,) = await dead(site)
    (line,) = events(site, "DLQ_ENQUEUE")
    assert (line["reason"], line["detail"]["job_id"]) == ("RETRIES_EXHAUSTED", job_id)
    await site.data("POST", f"/api/jobs/{job_id}/redrive")
    (line,) = events(site, "DLQ_REDRIVE")
    assert line["reason"] == "RETRIES_EXHAUSTED"
    assert line["detail"] == {"job_id": job_id, "was": "failed", "redrives": 1}


async def test_a_job_that_dies_by_a_lost_lease_is_audited_as_both(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, queue=QueueSettings(lease_seconds=5, max_losses=1))
    await site.submit()
    await site.lease()
    await clock.advance(25_000)
    assert [line["reason"] for line in events(site, "LEASE_REAP")] == ["lease_expired"]
    assert [line["reason"] for line in events(site, "DLQ_ENQUEUE")] == ["POISON"]


async def test_many_that_expire_at_once_are_two_lines(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    for _ in range(20):
        await site.submit(expires_in_seconds=1)
    await clock.advance(10_000)
    assert [(line["reason"], line.get("count")) for line in events(site, "DLQ_ENQUEUE")] == [
        ("EXPIRED", None),
        ("EXPIRED", 19),
    ]


# Redrive


async def test_one_redriven_job_runs_again(site: Site) -> None:
    (job_id,) = await dead(site, idempotency_key="k")
    status, body = await site.data("POST", f"/api/jobs/{job_id}/redrive", {})
    told = {"ok": True, "job_id": job_id, "status": "pending", "redriven": True, "redrives": 1, "not_before": None}
    assert (status, body) == (200, told)
    again = await site.data("POST", f"/api/jobs/{job_id}/redrive")
    assert again == (200, {**told, "redriven": False})
    assert (await site.submit(idempotency_key="k")) == job_id
    lease = await site.lease()
    assert (lease["job_id"], lease["attempt"], lease["failures"]) == (job_id, 2, 0)
    assert (await site.finish(lease, result=1))[1]["status"] == "completed"
    refused(await site.data("POST", f"/api/jobs/{job_id}/redrive"), 409, "not_failed")
    refused(await site.data("POST", "/api/jobs/none/redrive"), 404, "job_not_found")
    assert (await site.job(job_id))["redrives"] == 1


async def test_given_ids_have_an_outcome_each_in_their_order(site: Site) -> None:
    first, second = await dead(site, 2)
    waiting = await site.submit()
    body = await redrive(site, job_ids=[second, "none", waiting, first, second])
    outcomes = [(one["job_id"], one.get("redriven"), one.get("code")) for one in body["jobs"]]
    assert outcomes == [
        (second, True, None),
        ("none", None, "job_not_found"),
        (waiting, False, None),
        (first, True, None),
        (second, False, None),
    ]
    assert (body["redriven"], body["next_cursor"]) == (2, None)
    assert [(await site.lease())["job_id"] for _ in range(3)] == [waiting, second, first]


async def test_a_filter_redrives_the_first_submitted_first_up_to_the_limit(make_site: MakeSite) -> None:
    site = await make_site(queue=DEEP)
    ids = await dead(site, 5, kind="a")
    other = await dead(site, kind="b")
    body = await redrive(site, filter={"kind": "a"}, limit=2)
    assert [one["job_id"] for one in body["jobs"]] == ids[:2]
    body = await redrive(site, filter={"kind": "a"}, limit=2, cursor=body["next_cursor"])
    assert [one["job_id"] for one in body["jobs"]] == ids[2:4]
    body = await redrive(site, filter={"kind": "a"})
    assert ([one["job_id"] for one in body["jobs"]], body["next_cursor"]) == (ids[4:], None)
    assert await listed(site) == other
    assert (await redrive(site, filter={"reason": "POISON"}))["jobs"] == []


async def test_hundreds_are_redriven_some_a_transaction(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "CHUNK", 3)
    site = await make_site(queue=DEEP)
    ids = await dead(site, 10)
    sizes: list[int] = []
    site.app.hub.observe(lambda committed: sizes.append(len(committed.changes.put)))
    assert (await redrive(site, filter={}))["redriven"] == 10
    assert [size for size in sizes if size] == [3, 3, 3, 1]
    assert await listed(site) == []
    assert [(await site.lease())["job_id"] for _ in ids] == ids


async def test_with_a_rate_they_come_back_one_after_the_other(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, queue=DEEP)
    ids = await dead(site, 3)
    waiting = await site.submit(delay_seconds=1000)
    body = await redrive(site, job_ids=[ids[0], waiting, *ids[1:]], rate_per_second=0.5)
    start = clock.now()
    assert [one["not_before"] is None for one in body["jobs"]] == [True, False, False, False]
    back: list[str] = []
    for _ in range(4):
        _, found = await site.data("POST", "/api/jobs/pull", {"node_id": "n1", "max": 10})
        back += [f"{clock.now() - start}:{job['job_id']}" for job in found["jobs"]]
        await clock.advance(2000)
    assert [one.partition(":")[2] for one in back] == ids


async def test_only_one_of_ids_and_filter_is_taken(site: Site) -> None:
    for body in ({}, {"job_ids": [], "filter": {}}, {"limit": 5}):
        refused(await site.data("POST", "/admin/dlq/redrive", body), 422, "invalid_field")
        refused(await site.data("POST", "/admin/cancel", body), 422, "invalid_field")
    assert (await redrive(site, job_ids=[]))["jobs"] == []


# Purge and cancel


async def test_a_dry_run_counts_and_changes_nothing(site: Site) -> None:
    for _ in range(3):
        await site.submit()
    before = await site.stored()
    for path, name in (("/admin/purge", "purged"), ("/admin/cancel", "cancelled")):
        _, body = await site.data("POST", path, {"filter": {}, "dry_run": True})
        assert (body["dry_run"], body["matched"], body[name], body["next_cursor"]) == (True, 3, 0, None)
    assert await site.stored() == before


async def test_a_purge_cancels_what_waits_and_nothing_else(site: Site) -> None:
    await dead(site)
    await site.submit("taken")
    await site.lease()
    ids = [await site.submit(kind) for kind in ("a", "b", "a")]
    late = await site.submit("a", delay_seconds=1000)
    _, body = await site.data("POST", "/admin/purge", {"filter": {"kind": "a"}})
    assert body == {"ok": True, "dry_run": False, "matched": 3, "purged": 3, "next_cursor": None}
    for job_id in (ids[0], ids[2], late):
        job = await site.job(job_id)
        assert (job["status"], job["reason"]) == ("cancelled", "PURGED")
    assert (await site.stored())[0] == {"job:pending": 1, "job:running": 1, "job:failed": 1, "job:cancelled": 3}
    await site.data("POST", f"/api/jobs/{late}/redrive")
    assert (await site.job(late))["status"] == "pending"


@pytest.mark.parametrize("given", [{"source": "s"}, {"mission_id": "m"}, {"source": "s", "mission_id": "m"}])
async def test_a_purge_goes_by_all_that_is_given(site: Site, given: dict[str, str]) -> None:
    meant = await site.submit(source="s", mission_id="m")
    await site.submit(source="other", mission_id="other")
    await site.data("POST", "/admin/purge", {"filter": given})
    assert (await site.job(meant))["reason"] == "PURGED"
    counts = (await site.stored())[0]
    assert (counts["job:pending"], counts["job:cancelled"]) == (1, 1)


async def test_a_purge_goes_by_age_since_the_submission(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    old = await site.submit()
    await clock.advance(60_000)
    new = await site.submit()
    await site.data("POST", "/admin/purge", {"filter": {"older_than_seconds": 60.001}})
    assert (await site.job(old))["status"] == "pending"
    await site.data("POST", "/admin/purge", {"filter": {"older_than_seconds": 60}})
    assert [(await site.job(id))["status"] for id in (old, new)] == ["cancelled", "pending"]


async def test_a_limit_is_kept_and_the_cursor_leads_on(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "CHUNK", 2)
    site = await make_site(queue=DEEP)
    for _ in range(7):
        await site.submit()
    matched, cursor = [], None
    while True:
        body = {"filter": {}, "limit": 3, "dry_run": True, **({"cursor": cursor} if cursor else {})}
        _, told = await site.data("POST", "/admin/purge", body)
        matched.append(told["matched"])
        cursor = told["next_cursor"]
        if cursor is None:
            break
    assert matched == [3, 3, 1]


async def test_a_cancel_of_many_goes_from_those_that_wait_to_those_that_run(make_site: MakeSite) -> None:
    site = await make_site(queue=DEEP)
    running = [await site.submit() for _ in range(2)]
    for _ in running:
        await site.lease()
    waiting = [await site.submit() for _ in range(2)]
    _, body = await site.data("POST", "/admin/cancel", {"filter": {}, "limit": 2})
    assert (body["matched"], body["cancelled"], body["cancel_requested"]) == (2, 2, 0)
    _, body = await site.data("POST", "/admin/cancel", {"filter": {}, "limit": 2, "cursor": body["next_cursor"]})
    assert (body["matched"], body["cancelled"], body["cancel_requested"], body["next_cursor"]) == (2, 0, 2, None)
    assert [(await site.job(id))["reason"] for id in waiting] == ["CANCELLED"] * 2
    _, body = await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1"})
    assert body["cancel"] == running
    assert [(await site.job(id))["status"] for id in running] == ["running"] * 2


async def test_a_cancel_by_node_asks_only_what_that_node_runs(site: Site) -> None:
    for node in ("n1", "n2"):
        await site.control("POST", "/api/hosts/heartbeat", {"node_id": node})
        await site.submit()
        await site.lease(node)
    _, body = await site.data("POST", "/admin/cancel", {"filter": {"node_id": "n2", "status": "running"}})
    assert (body["matched"], body["cancel_requested"]) == (1, 1)
    told = [(await site.control("POST", "/api/hosts/heartbeat", {"node_id": n}))[1]["cancel"] for n in ("n1", "n2")]
    assert [len(ids) for ids in told] == [0, 1]


async def test_given_ids_are_cancelled_with_an_outcome_each(site: Site) -> None:
    (failed,) = await dead(site)
    waiting = await site.submit()
    _, body = await site.data("POST", "/admin/cancel", {"job_ids": [waiting, failed, "none", waiting]})
    assert [(one["job_id"], one.get("code")) for one in body["jobs"]] == [
        (waiting, None),
        (failed, "already_finished"),
        ("none", "job_not_found"),
        (waiting, None),
    ]
    assert (body["jobs"][0]["status"], body["jobs"][0]["cancel_requested"]) == ("cancelled", False)


@pytest.mark.parametrize("cursor", ["nonsense", "running:x", "failed:", ":"])
async def test_a_cursor_of_another_list_is_refused(site: Site, cursor: str) -> None:
    refused(await site.data("POST", "/admin/purge", {"filter": {}, "cursor": cursor}), 422, "invalid_field")


async def test_a_store_that_fails_is_503_and_what_was_done_stays_done(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sheratan_hub.storage import StoreDown

    monkeypatch.setattr(walking, "CHUNK", 2)
    site = await make_site(queue=DEEP)
    for _ in range(4):
        await site.submit()
    pages = 0
    page = site.app.store.page

    async def failing(*given: Any) -> Any:
        nonlocal pages
        pages += 1
        if pages == 2:
            raise StoreDown("the disk is on fire")
        return await page(*given)

    monkeypatch.setattr(site.app.store, "page", failing)
    refused(await site.data("POST", "/admin/purge", {"filter": {}}), 503, "unavailable")
    assert (await site.stored())[0] == {"job:pending": 2, "job:cancelled": 2}
    assert events(site, "ADMIN_ACTION")[0]["detail"]["purged"] == 2
    assert (await site.data("POST", "/admin/purge", {"filter": {}}))[1]["purged"] == 2


# The queue


async def test_the_queue_at_a_glance(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, queue=QueueSettings(max_depth=50, max_inflight=5), dlq=DlqSettings(max_items=7))
    await dead(site)
    await site.submit()
    await site.lease()
    await site.submit("slow", priority="LOW", source="s", required_capabilities=["gpu"])
    await clock.advance(5000)
    await site.submit("fast", priority="HIGH")
    await site.submit("later", delay_seconds=100)
    _, body = await site.data("GET", "/admin/queue")
    assert body["counts"] == {"pending": 3, "running": 1, "failed": 1}
    assert (body["depth"], body["inflight"]) == ({"jobs": 3, "limit": 50}, {"leases": 1, "limit": 5})
    assert body["dead_letters"] == {"jobs": 1, "limit": 7, "over": False}
    assert (body["oldest_ready_seconds"], body["lane_count"]) == (5, 2)
    fast, slow = body["lanes"]
    assert (fast["priority"], fast["kind"], fast["source"], fast["head_age_seconds"]) == (1, "fast", None, 0)
    assert (slow["priority"], slow["source"], slow["required_capabilities"]) == (3, "s", ["gpu"])
    assert slow["head_age_seconds"] == 5


async def test_an_empty_queue_has_nothing_to_tell(site: Site) -> None:
    _, body = await site.data("GET", "/admin/queue")
    assert (body["counts"], body["lanes"], body["oldest_ready_seconds"]) == ({}, [], None)


# Retention and what was read, over HTTP


async def test_a_finished_job_is_404_when_its_time_is_over(make_site: MakeSite) -> None:
    clock = VirtualClock()
    retention, keys = RetentionSettings(completed_seconds=10, failed_seconds=30), IdempotencySettings(ttl_seconds=20)
    site = await make_site(clock=clock, retention=retention, idempotency=keys)
    await site.submit()
    plain = (await site.lease())["job_id"]
    await site.data("POST", f"/api/jobs/{plain}/cancel")
    await site.submit()
    done = await site.lease()
    await site.finish(done)
    keyed = await site.submit(idempotency_key="k")
    await site.finish(await site.lease())
    (failed,) = await dead(site)

    async def there() -> list[int]:
        ids = (done["job_id"], keyed, failed)
        return [(await site.data("GET", f"/api/jobs/{id}"))[0] for id in ids]

    assert await there() == [200, 200, 200]
    await clock.advance(12_000)
    assert await there() == [404, 200, 200]
    await clock.advance(10_000)
    assert await there() == [404, 404, 200]
    await clock.advance(10_000)
    assert await there() == [404, 404, 404]
    (line,) = events(site, "ADMIN_ACTION")
    assert (line["plane"], line["reason"], line["detail"]) == ("hub", "retention", {"status": "failed", "count": 1})


async def test_without_a_dead_letter_list_failed_jobs_go_like_completed_ones(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(
        clock=clock, retention=RetentionSettings(completed_seconds=10), dlq=DlqSettings(enabled=False)
    )
    (failed,) = await dead(site)
    await clock.advance(12_000)
    assert (await site.data("GET", f"/api/jobs/{failed}"))[0] == 404
    assert {line["event"] for line in site.audit()} == {"HUB_START"}


async def test_pending_processing_falls_when_a_result_is_first_read(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, idempotency=IdempotencySettings(max_cached_bytes=100))
    ids = []
    for n in range(4):
        ids.append(await site.submit(idempotency_key=f"k{n}"))
        await site.finish(await site.lease(), result="x" * 200 if n == 3 else 1)
    await dead(site)

    async def unread() -> int:
        await clock.advance(1100)
        found: int = (await site.data("GET", "/metrics?format=json"))[1]["pending_processing"]
        return found

    assert await unread() == 4
    await site.data("GET", "/api/jobs")
    assert await unread() == 4
    for _ in range(2):
        await site.job(ids[0])
    assert await unread() == 3
    await site.data("GET", f"/api/jobs/{ids[1]}?wait_seconds=5")
    assert await unread() == 2
    for n in (2, 3):
        await site.data("POST", "/api/jobs", {"kind": "work", "idempotency_key": f"k{n}"})
    assert await unread() == 1, "the last was too large for the answer"
    await site.data("POST", "/api/jobs", {"jobs": [{"kind": "work", "idempotency_key": "k3"}]})
    assert await unread() == 1


async def test_metrics_tell_dead_letters_by_reason_and_what_was_forgotten(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, retention=RetentionSettings(failed_seconds=10), dlq=DlqSettings(max_items=1))
    ids = [*await dead(site, 2), *await dead(site, delivery="at_most_once")]
    await site.data("POST", f"/api/jobs/{ids[0]}/redrive")
    await clock.advance(2000)
    text = (await site.ask("data", "GET", "/metrics"))[1]
    assert 'sheratan_dead_letters_total{reason="RETRIES_EXHAUSTED"} 2.0' in text
    assert 'sheratan_dead_letters_total{reason="NOT_RETRYABLE"} 1.0' in text
    assert 'sheratan_events_total{event="job.redriven"} 1.0' in text
    assert "sheratan_dead_letters_over_limit 1.0" in text
    await clock.advance(12_000)
    text = (await site.ask("data", "GET", "/metrics"))[1]
    assert 'sheratan_pruned_jobs_total{status="failed"} 2.0' in text
    assert "sheratan_dead_letters_over_limit 0.0" in text
