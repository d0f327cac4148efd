"""The audit log and the alerts over HTTP; a chain that is broken is told; no change without an audit log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from sheratan_hub.alerts import Alert
from sheratan_hub.audit_lines import chain_files
from sheratan_hub.config import AuditSettings
from tests.conftest import MakeSite, Site
from tests.hub.chains import record, written

WRONG = {"Authorization": "Bearer wrong"}


async def lines(site: Site, count: int) -> None:
    """So many lines beside HUB_START, each of another origin."""
    for n in range(count):
        site.app.audit.file.add(record(n))
    site.app.audit.file.write()


async def get(site: Site, query: str = "") -> Any:
    status, body = await site.control("GET", f"/api/audit{query}")
    assert status == 200, body
    return body


async def test_the_log_is_told_page_by_page_the_newest_last(make_site: MakeSite) -> None:
    site = await make_site()
    await lines(site, 250)
    seqs: list[int] = []
    cursor, pages = "", 0
    while True:
        body = await get(site, f"?limit=100{cursor}")
        seqs += [line["seq"] for line in body["events"]]
        pages += 1
        if body["next_cursor"] is None:
            break
        cursor = f"&cursor={body['next_cursor']}"
    assert (seqs, pages) == (list(range(1, 252)), 3)
    assert body["events"][-1] == site.audit()[-1], "word for word as it stands in the file"
    await lines(site, 2)
    more = await get(site, f"?cursor={body['position']}")
    assert [line["seq"] for line in more["events"]] == [252, 253]


async def test_the_last_lines_are_told_when_they_are_asked_for(make_site: MakeSite) -> None:
    site = await make_site()
    await lines(site, 50)
    body = await get(site, "?last=3")
    assert [line["seq"] for line in body["events"]] == [49, 50, 51]
    assert (body["next_cursor"], body["position"]) == (None, "51")


async def test_lines_can_be_picked_by_what_is_in_them(make_site: MakeSite) -> None:
    site = await make_site()
    await lines(site, 60)
    assert {line["event"] for line in (await get(site, "?event=PORT_MISMATCH"))["events"]} == {"PORT_MISMATCH"}
    assert {line["node_id"] for line in (await get(site, "?node_id=n2"))["events"]} == {"n2"}
    picked = (await get(site, "?since=2026-11-21T10:00:10Z&until=2026-11-21T11:00:12%2B01:00"))["events"]
    assert [line["ts"][17:19] for line in picked] == ["10", "11"]
    assert (await get(site, "?reason=invalid_token&node_id=n2"))["events"] == []


async def test_a_page_looks_at_a_bounded_number_of_lines(make_site: MakeSite) -> None:
    site = await make_site()
    await lines(site, 2500)
    body = await get(site, "?event=HUB_STOP")
    assert (body["events"], body["next_cursor"]) == ([], "2000")
    assert (await get(site, f"?event=HUB_STOP&cursor={body['next_cursor']}"))["next_cursor"] is None


@pytest.mark.parametrize(
    "query", ["?cursor=x", "?cursor=-1", "?limit=0", "?last=1001", "?since=yesterday", "?until=2026-11-21T10:00:10"]
)
async def test_a_bad_question_is_refused(make_site: MakeSite, query: str) -> None:
    status, body = await (await make_site()).control("GET", f"/api/audit{query}")
    assert (status, body["code"]) == (422, "invalid_field")


@pytest.mark.parametrize("path", ["/api/audit", "/api/alerts"])
async def test_only_the_token_opens_them_and_only_on_the_control_plane(make_site: MakeSite, path: str) -> None:
    site = await make_site()
    assert (await site.control("GET", path, headers=WRONG))[0] == 403
    assert (await site.data("GET", path))[0] == 410


async def test_a_log_of_many_files_is_told_as_one(make_site: MakeSite) -> None:
    site = await make_site(audit=AuditSettings(max_bytes=20_000))
    for _ in range(10):
        await lines(site, 30)
    assert len(chain_files(site.app.audit.path)) > 4
    body = await get(site, "?limit=1000")
    assert [line["seq"] for line in body["events"]] == list(range(1, 302))
    assert [line["seq"] for line in (await get(site, "?cursor=150&limit=2"))["events"]] == [151, 152]
    assert [line["seq"] for line in (await get(site, "?last=200"))["events"]] == list(range(102, 302))
    assert (body["chain"]["ok"], body["chain"]["complete"], body["chain"]["to_seq"]) == (True, True, 301)


# The chain


async def test_a_sound_chain_is_told_with_its_head(make_site: MakeSite) -> None:
    site = await make_site()
    await lines(site, 5)
    for _ in range(2):
        chain = (await get(site))["chain"]
        assert (chain["ok"], chain["complete"], chain["from_seq"], chain["to_seq"]) == (True, True, 1, 6)
        assert (chain["broken"], chain["cuts"], chain["writable"]) == (None, [], True)
        assert chain["head"]["hash"] == site.audit()[-1]["hash"]


def change(path: Path, number: int) -> None:
    kept = path.read_bytes().splitlines(keepends=True)
    kept[number - 1] = kept[number - 1].replace(b'"plane":"', b'"plane":"x', 1)
    path.write_bytes(b"".join(kept))


@pytest.mark.parametrize("tick_ms", [-(10**15), 20])
async def test_a_line_that_is_changed_after_it_was_proved_is_found(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, tick_ms: int
) -> None:
    from sheratan_hub import audit_check

    monkeypatch.setattr(audit_check, "TICK_MS", tick_ms)
    site = await make_site()
    await lines(site, 20)
    assert (await get(site))["chain"]["ok"]
    change(site.app.audit.path, 7)
    for _ in range(2):
        chain = (await get(site))["chain"]
        assert (chain["ok"], chain["complete"]) == (False, True)
        assert (chain["broken"]["file"], chain["broken"]["line"]) == ("hub_security_audit.jsonl", 7)
        await lines(site, 1)


async def test_a_bit_that_is_changed_in_the_moment_after_a_write_is_found(make_site: MakeSite) -> None:
    site = await make_site()
    path = site.app.audit.path
    for _ in range(5):
        await lines(site, 3)
        assert (await get(site))["chain"]["ok"]
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b'"data"', b'"dat4"', 1))
        assert not (await get(site))["chain"]["ok"]
        path.write_bytes(whole)
        assert (await get(site))["chain"]["ok"]


async def test_a_file_that_was_changed_a_moment_before_it_was_proved_is_proved_once_more(tmp_path: Path) -> None:
    from sheratan_hub.audit_check import ChainCheck

    path = tmp_path / "logs" / "hub_security_audit.jsonl"
    head = written(path, 20).head
    check = ChainCheck(path)
    changed_ms = path.stat().st_ctime_ns // 1_000_000
    assert check.advance(head, 0, changed_ms + 5).broken is None
    change(path, 3)
    broken = check.advance(head, 0, changed_ms + 6).broken
    assert broken is not None
    assert broken.line == 3


async def test_lines_that_are_cut_off_at_the_end_are_found_as_the_hub_knows_its_head(make_site: MakeSite) -> None:
    site = await make_site()
    await lines(site, 20)
    assert (await get(site))["chain"]["ok"]
    kept = site.app.audit.path.read_bytes().splitlines(keepends=True)
    site.app.audit.path.write_bytes(b"".join(kept[:-2]))
    chain = (await get(site))["chain"]
    assert not chain["ok"]
    assert "cut off" in chain["broken"]["text"]


async def test_a_rotated_file_that_is_changed_after_it_was_proved_is_found(make_site: MakeSite) -> None:
    site = await make_site(audit=AuditSettings(max_bytes=20_000))
    for n in range(10):
        await lines(site, 30)
        if n % 3 == 0:
            assert (await get(site))["chain"]["ok"]
    assert (await get(site))["chain"]["complete"]
    for file in chain_files(site.app.audit.path)[:-1]:
        whole = file.read_bytes()
        change(file, 3)
        broken = (await get(site))["chain"]["broken"]
        assert (broken["file"], broken["line"]) == (file.name, 3)
        file.write_bytes(whole)
        assert (await get(site))["chain"]["ok"]


async def test_a_file_in_the_middle_that_is_removed_is_found_and_the_oldest_may_go(make_site: MakeSite) -> None:
    site = await make_site(audit=AuditSettings(max_bytes=20_000))
    for _ in range(10):
        await lines(site, 30)
    assert (await get(site))["chain"]["ok"]
    oldest, _, third, *_ = chain_files(site.app.audit.path)
    oldest.unlink()
    assert (await get(site))["chain"]["ok"]
    third.unlink()
    assert not (await get(site))["chain"]["ok"]


async def test_a_long_log_is_proved_in_several_looks(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    from sheratan_hub import audit_check

    monkeypatch.setattr(audit_check.ChainCheck.advance, "__defaults__", (50_000,))
    monkeypatch.setattr(audit_check, "CHUNK_BYTES", 100)
    site = await make_site(audit=AuditSettings(max_bytes=120_000))
    await lines(site, 500)
    await lines(site, 500)
    seen = []
    while True:
        chain = (await get(site))["chain"]
        assert chain["ok"]
        seen.append(chain["to_seq"])
        if chain["complete"]:
            break
        assert len(seen) < 20
    assert (len(seen) > 5, seen[-1], seen) == (True, 1001, sorted(seen))


async def test_what_a_crash_has_cut_is_told_and_is_no_break(make_site: MakeSite, tmp_path: Path) -> None:
    path = tmp_path / "logs" / "hub_security_audit.jsonl"
    written(path, 5)
    path.write_bytes(path.read_bytes()[:-50])
    chain = (await get(await make_site()))["chain"]
    assert (chain["ok"], [cut["line"] for cut in chain["cuts"]]) == (True, [5])


# No change without an audit log


async def test_changes_are_refused_while_the_log_cannot_be_written_and_reads_go_on(
    make_site: MakeSite, tmp_path: Path
) -> None:
    (tmp_path / "logs").mkdir()
    path = tmp_path / "logs" / "hub_security_audit.jsonl"
    site = await make_site("sqlite")
    await site.submit()
    lease = await site.lease()
    keep = path.rename(tmp_path / "kept.jsonl")
    path.symlink_to("/dev/full")
    await site.control("GET", "/api/hosts", headers=WRONG)
    before = await site.stored()
    for plane, method, route, body in (
        ("data", "POST", "/api/jobs", {"kind": "work"}),
        ("data", "POST", "/mesh/submit_request", {"kind": "work"}),
        ("data", "POST", "/api/jobs/pull", {"node_id": "n1"}),
        ("data", "POST", f"/api/jobs/{lease['job_id']}/result", {"lease_id": lease["lease_id"], "ok": True}),
        ("data", "POST", f"/api/jobs/{lease['job_id']}/cancel", {}),
        ("control", "POST", "/api/hosts/n1/drain", {}),
    ):
        status, answer, headers = await site.ask(plane, method, route, json=body)
        assert (status, answer["code"], headers["Retry-After"]) == (503, "audit_unavailable", "5"), route
    assert (await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1"}))[0] == 200, "it is heard all the same"
    assert await site.stored() == before
    assert (await site.data("GET", "/api/jobs"))[0] == 200
    assert (await site.control("GET", "/api/hosts"))[0] == 200
    assert (await get(site))["chain"]["writable"] is False
    assert (await site.data("GET", "/readyz?verbose"))[0] == 503
    assert (await site.data("GET", "/health"))[1]["checks"]["audit"] is False
    assert (await site.control("GET", "/api/hosts", headers=WRONG))[0] == 403, "refusals need no log"

    path.unlink()
    keep.rename(path)
    assert (await site.finish(lease))[0] == 200
    assert (await site.data("GET", "/readyz?verbose"))[0] == 200
    chain = (await get(site))["chain"]
    assert (chain["ok"], chain["writable"]) == (True, True)
    assert any(line["event"] == "AUTH_FAILURE" for line in site.audit()), "what waited in memory is there"


async def test_a_hub_that_is_told_so_goes_on_without_its_log(make_site: MakeSite, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "hub_security_audit.jsonl").symlink_to("/dev/full")
    site = await make_site(audit=AuditSettings(required=False))
    await site.submit()
    assert (await site.data("GET", "/readyz"))[0] == 200


# Alerts


async def test_without_a_watcher_there_are_no_alerts(make_site: MakeSite) -> None:
    status, body = await (await make_site()).control("GET", "/api/alerts")
    assert (status, body) == (200, {"ok": True, "alerts": [], "next_cursor": None, "position": "0"})


def alert_line(id: str) -> str:
    ts = "2026-11-21T10:31:07.412Z"
    alert = Alert(id, ts, "poison", "DLQ_ENQUEUE", "POISON", None, 1, 60, None, None, 1, 1, "a job")
    return msgspec.json.encode(alert).decode() + "\n"


async def test_alerts_are_told_page_by_page_the_newest_last(make_site: MakeSite, tmp_path: Path) -> None:
    site = await make_site()
    path = tmp_path / "logs" / "alerts.jsonl"
    path.write_text("".join(alert_line(f"a{n}") for n in range(25)) + '{"id": "half')
    found: list[str] = []
    cursor = ""
    while True:
        _, body = await site.control("GET", f"/api/alerts?limit=10{cursor}")
        found += [alert["id"] for alert in body["alerts"]]
        if body["next_cursor"] is None:
            break
        cursor = f"&cursor={body['next_cursor']}"
    assert found == [f"a{n}" for n in range(25)]
    _, last = await site.control("GET", "/api/alerts?last=2")
    assert [alert["id"] for alert in last["alerts"]] == ["a23", "a24"]
    assert last["position"] == body["position"]
    path.write_text(path.read_text().removesuffix('{"id": "half') + alert_line("new"))
    _, more = await site.control("GET", f"/api/alerts?cursor={body['position']}")
    assert [alert["id"] for alert in more["alerts"]] == ["new"]


async def test_a_job_that_takes_its_workers_down_raises_an_alert(make_site: MakeSite) -> None:
    from sheratan_hub.clock import VirtualClock
    from sheratan_hub.config import AlertSettings, QueueSettings
    from sheratan_hub.watcher import Watcher

    clock = VirtualClock()
    site = await make_site(clock=clock, queue=QueueSettings(max_losses=1, lease_seconds=10))
    job_id = await site.submit()
    await site.lease()
    await clock.advance(20_000)
    assert (await site.job(job_id))["reason"] == "POISON"
    watcher = Watcher(site.app.audit.path.parent, AlertSettings(), clock, lambda _: None)
    watcher.open()
    watcher.step()
    watcher.close()
    _, body = await site.control("GET", "/api/alerts")
    assert [(alert["rule"], alert["reason"]) for alert in body["alerts"]] == [("poison", "POISON")]
