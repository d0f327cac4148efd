"""The ledger over HTTP and its file: every transition, in order, on every store, over restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from sheratan_hub.config import LedgerSettings
from sheratan_hub.web import ledger
from tests.conftest import MakeSite, Site

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
FIELDS = {"seq", "ts", "actor", "event", "job_id", "trace_id", "zone", "artifact_path", "meta"}


async def story(site: Site) -> list[str]:
    """Two jobs, one completed, one failed and redriven; their ids."""
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1", "zone": "z1"})
    _, made = await site.data("POST", "/api/jobs", {"kind": "w"}, headers={"traceparent": TRACE})
    await site.finish(await site.lease(), result={"artifact_path": "out/1"})
    other = await site.submit(max_retries=0)
    await site.finish(await site.lease(), ok=False)
    await site.data("POST", f"/api/jobs/{other}/redrive")
    return [made["job_id"], other]


async def told(site: Site, query: str = "") -> list[dict[str, Any]]:
    """All pages."""
    found, cursor = [], None
    while True:
        more = f"&cursor={cursor}" if cursor else ""
        status, body = await site.data("GET", f"/api/ledger?{query}{more}")
        assert status == 200, body
        assert len(body["events"]) <= int(parse_qs(query).get("limit", ["100"])[0])
        found += body["events"]
        cursor = body["next_cursor"]
        if cursor is None:
            return found


def filed(site: Site) -> list[dict[str, Any]]:
    path = Path(site.app.settings.hub.data_dir) / "logs" / "ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_the_ledger_is_complete_and_in_order(site: Site) -> None:
    first, second = await story(site)
    events = await told(site)
    assert [set(event) for event in events] == [FIELDS] * 8
    assert [event["seq"] for event in events] == list(range(1, 9))
    assert [(event["event"], event["job_id"]) for event in events] == [
        ("node.online", None),
        ("job.submitted", first),
        ("job.leased", first),
        ("job.completed", first),
        ("job.submitted", second),
        ("job.leased", second),
        ("job.failed", second),
        ("job.redriven", second),
    ]
    assert {event["trace_id"] for event in events[1:4]} == {TRACE.split("-")[1]}
    assert (events[3]["artifact_path"], events[3]["zone"], events[3]["actor"]) == ("out/1", "z1", "n1")
    assert all(event["ts"].endswith("Z") for event in events)


@pytest.mark.parametrize("limit", [1, 3, 7, 8, 9])
async def test_pages_of_any_size_tell_the_same(site: Site, limit: int) -> None:
    await story(site)
    assert await told(site, f"limit={limit}") == await told(site)


async def test_who_follows_asks_for_what_comes_after_the_last(site: Site) -> None:
    _, second = await story(site)
    _, body = await site.data("GET", "/api/ledger?after=8")
    assert (body["events"], body["next_cursor"]) == ([], None)
    await site.data("POST", f"/api/jobs/{second}/cancel")
    _, body = await site.data("GET", "/api/ledger?after=8")
    assert [event["event"] for event in body["events"]] == ["job.cancelled"]


@pytest.mark.parametrize("limit", [1, 2, 100])
async def test_the_events_of_one_job(site: Site, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "READ_AT_ONCE", 2)
    monkeypatch.setattr(ledger, "EXAMINED_MAX", 4)
    _, second = await story(site)
    events = await told(site, f"job_id={second}&limit={limit}")
    assert [event["seq"] for event in events] == [5, 6, 7, 8]
    assert await told(site, "job_id=none") == []


@pytest.mark.parametrize("query", ["after=-1", "after=x", "cursor=1.5", "after=1e3", f"after={10**19}", "limit=0"])
async def test_a_wrong_place_is_refused(site: Site, query: str) -> None:
    status, body = await site.data("GET", f"/api/ledger?{query}")
    assert (status, body["code"]) == (422, "invalid_field")


@pytest.mark.parametrize("scheme", ["sqlite", "file"])
async def test_the_file_says_the_same_and_goes_on_after_a_restart(
    make_site: MakeSite, scheme: str, tmp_path: Path
) -> None:
    site = await make_site(scheme)
    await story(site)
    events = await told(site)
    await site.app.stop()
    assert filed(site) == events
    path = tmp_path / "logs" / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-40] + b"\0")
    again = await make_site(scheme)
    await again.submit()
    events = await told(again)
    await again.app.stop()
    assert filed(again) == events
    assert len(events) == 9


async def test_the_file_can_be_switched_off(make_site: MakeSite, tmp_path: Path) -> None:
    site = await make_site(ledger=LedgerSettings(file=False))
    await site.submit()
    await site.app.stop()
    assert not (tmp_path / "logs" / "ledger.jsonl").exists()
