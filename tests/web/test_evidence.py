"""Over HTTP: what is shown of attempts and late results, at most once, and results that are too large or unproven."""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any

import aiohttp
import pytest

from sheratan_hub.canonical import result_sha256, result_sig
from sheratan_hub.client import HubClient
from sheratan_hub.clock import VirtualClock
from sheratan_hub.config import IntegritySettings, QueueSettings, Secrets
from sheratan_hub.hub import Hub
from sheratan_hub.rules.integrity import Demand
from sheratan_hub.rules.jobs import job_key
from sheratan_hub.rules.pull import Pulled
from sheratan_hub.web.request import Request
from tests.conftest import TOKEN, MakeSite, Site
from tests.web.test_data import demanding, events, refused

STORES = pytest.mark.parametrize("scheme", ["memory", "sqlite", "file"])
QUEUE = QueueSettings(lease_seconds=10, loss_delay_ms=0)


async def raced(make_site: MakeSite, scheme: str = "memory") -> tuple[Site, VirtualClock, dict[str, Any], Any]:
    """A job that n1 has lost and n2 has now."""
    clock = VirtualClock()
    site = await make_site(scheme, clock=clock, queue=QUEUE)
    await site.submit()
    lost = await site.lease("n1")
    await clock.advance(11_000)
    return site, clock, lost, await site.lease("n2")


@STORES
async def test_a_late_result_is_kept_judged_shown_audited_and_counted(make_site: MakeSite, scheme: str) -> None:
    site, _, lost, held = await raced(make_site, scheme)
    job_id = lost["job_id"]
    answer = await site.finish(lost, result={"n": 1}, node_id="n1")
    assert "attempt 2" in refused(answer, 409, "lease_superseded")["detail"]
    (late,) = (await site.job(job_id))["late"]
    at = late.pop("at")
    sha256 = result_sha256(job_id, True, b'{"n":1}', b"null")
    base = {"attempt": 1, "node_id": "n1", "ok": True, "sha256": sha256, "size_bytes": 8}
    assert late == {**base, "diverged": None, "result": {"n": 1}}
    assert at.endswith("Z")
    await site.finish(held, result={"n": 2})
    job = await site.job(job_id)
    assert (job["result"], job["late_results"], job["late"][0]["diverged"]) == ({"n": 2}, 1, True)
    lines = events(site, "RESULT_SUPERSEDED")
    assert [(line["node_id"], line["detail"]) for line in lines] == [
        ("n1", {"job_id": job_id, "attempt": 1, "diverged": None}),
        ("n1", {"job_id": job_id, "attempt": 1, "diverged": True}),
    ]
    _, text = await site.data("GET", "/metrics")
    assert 'sheratan_superseded_results_total{diverged="unknown"} 1.0' in text
    assert 'sheratan_superseded_results_total{diverged="true"} 1.0' in text


@pytest.mark.parametrize(("result", "diverged"), [({"a": 1, "b": [1.5]}, False), ({"a": 1}, True)])
async def test_a_result_after_the_winner_is_judged_at_once(make_site: MakeSite, result: Any, diverged: bool) -> None:
    site, _, lost, held = await raced(make_site)
    await site.finish(held, result={"b": [1.5], "a": 1})
    for _ in range(2):
        refused(await site.finish(lost, result=result), 409, "lease_superseded")
    job = await site.job(lost["job_id"])
    assert (job["late_results"], [late["diverged"] for late in job["late"]]) == (1, [diverged])
    (line,) = events(site, "RESULT_SUPERSEDED")
    assert line["detail"]["diverged"] is diverged


@pytest.mark.parametrize("path", ["/api/results", "/mesh/submit_result", "pull"])
async def test_every_way_to_send_a_late_result_leaves_evidence(make_site: MakeSite, path: str) -> None:
    site, _, lost, _ = await raced(make_site)
    other = await site.submit()
    report = {"job_id": lost["job_id"], "lease_id": lost["lease_id"], "ok": False, "error": {"type": "E"}}
    if path == "/api/results":
        fine = {"job_id": other, "lease_id": (await site.lease("n3"))["lease_id"], "ok": True}
        _, body = await site.data("POST", path, {"results": [report, fine]})
        assert [one.get("code") for one in body["results"]] == ["lease_superseded", None]
    elif path == "pull":
        del report["job_id"]
        report["pull"] = {"node_id": "n1"}
        path = f"/api/jobs/{lost['job_id']}/result"
        refused(await site.data("POST", path, report), 409, "lease_superseded")
        assert (await site.job(other))["status"] == "pending", "a refused result leases nothing"
    else:
        refused(await site.data("POST", path, report), 409, "lease_superseded")
    (late,) = (await site.job(lost["job_id"]))["late"]
    assert (late["ok"], late["error"], "result" in late) == (False, {"type": "E"}, False)


async def test_an_unproven_late_result_leaves_nothing(make_site: MakeSite) -> None:
    site, _, lost, _ = await raced(make_site)
    before = await site.stored()
    wrong = {"mode": "sha256", "sha256": "0" * 64}
    refused(await site.finish(lost, result=1, integrity=wrong), 422, "result_integrity_fail")
    refused(await site.finish({**lost, "lease_id": "f" * 34}, result=1), 409, "lease_superseded")
    assert await site.stored() == before


@STORES
async def test_every_attempt_that_did_not_complete_is_shown_with_the_job_alone(
    make_site: MakeSite, scheme: str
) -> None:
    site, _, lost, held = await raced(make_site, scheme)
    long = {"type": "E", "message": "m" * 1500, "trace": "\n".join(map(str, range(60)))}
    await site.finish(held, ok=False, error=long, retry_after_seconds=0)
    third = await site.lease("n3")
    await site.data("POST", f"/api/jobs/{lost['job_id']}/release", {"lease_id": third["lease_id"]})
    job = await site.job(lost["job_id"])
    kept = {"type": "E", "message": "m" * 1000, "trace": "\n".join(map(str, range(10, 60))), "truncated": True}
    told = [(one["attempt"], one["node_id"], one["outcome"], one["error"]) for one in job["attempts"]]
    assert told == [(1, "n1", "lost", None), (2, "n2", "failed", kept), (3, "n3", "released", None)]
    assert (job["error"], job["lost_on"]) == (kept, ["n1"])
    (listed,) = (await site.data("GET", "/api/jobs"))[1]["jobs"]
    assert "attempts" not in listed
    assert "late" not in listed
    async with HubClient(site.url("control", ""), site.url("data", ""), TOKEN) as hub:
        assert [one["outcome"] for one in (await hub.job(lost["job_id"])).attempts] == ["lost", "failed", "released"]


async def test_the_proof_of_an_error_covers_what_was_sent_not_what_is_kept(site: Site) -> None:
    await site.submit()
    lease = await site.lease()
    error = b'{"message":"' + b"m" * 3000 + b'"}'
    proof = {"mode": "sha256", "sha256": result_sha256(lease["job_id"], False, b"null", error)}
    answer = await site.finish(lease, ok=False, error={"message": "m" * 3000}, integrity=proof)
    assert answer[0] == 200
    assert await site.finish(lease, ok=False, error={"message": "m" * 3000}) == answer
    assert (await site.job(lease["job_id"]))["error"] == {"message": "m" * 1000, "truncated": True}


# At most once


async def test_a_lease_says_that_it_is_at_most_once_and_only_then(site: Site) -> None:
    await site.submit(delivery="at_most_once")
    await site.submit()
    first, second = await site.lease(), await site.lease()
    assert (first["delivery"], "delivery" in second) == ("at_most_once", False)


@pytest.mark.parametrize("begun", [True, False])
async def test_an_answer_that_broke_while_it_was_written_does_not_bring_an_at_most_once_job_twice(
    site: Site, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, often = await site.submit(delivery="at_most_once"), await site.submit()
    given_back: list[Pulled] = []
    inner = Hub.give_back

    def give_back(hub: Hub, pulled: Pulled, **named: bool) -> None:
        given_back.append(pulled)
        inner(hub, pulled, **(named if begun else {}))

    async def breaks(*_: object) -> None:
        raise ConnectionResetError("gone")

    with monkeypatch.context() as broken:
        broken.setattr(Request, "answer", breaks)
        broken.setattr(Hub, "give_back", give_back)
        with pytest.raises(aiohttp.ClientError):
            await site.data("POST", "/api/jobs/pull", {"node_id": "gone", "max": 2})
    assert len(given_back) == 1
    _, body = await site.data("POST", "/api/jobs/pull", {"node_id": "here", "max": 2, "wait_seconds": 5})
    assert [lease["job_id"] for lease in body["jobs"]] == ([often] if begun else [once, often])


# Integrity


@pytest.mark.parametrize("mode", ["sha256", "hmac"])
async def test_a_refused_result_leaves_its_lease_as_it_was_in_every_way(site: Site, mode: str) -> None:
    demanding(site, mode, required=True)
    job_id = await site.submit()
    lease = await site.lease()
    row = await site.app.store.fetch([job_key(job_id)])
    for proof in (None, {"mode": "none"}, {"mode": mode, "sha256": "0" * 64, "sig": "0" * 64}):
        refused(await site.finish(lease, result=1, integrity=proof), 422, "result_integrity_fail")
    assert await site.app.store.fetch([job_key(job_id)]) == row
    body = {"lease_id": lease["lease_id"], "seconds": 60}
    assert (await site.data("POST", f"/api/jobs/{job_id}/extend", body))[1]["lease_seconds"] == 60
    covered = (job_id, True, b"1", b"null")
    proof = {"mode": mode, "sha256": result_sha256(*covered), "sig": result_sig("hmac-key", *covered)}
    assert (await site.finish(lease, result=1, integrity=proof))[1]["status"] == "completed"
    assert [line["reason"] for line in events(site, "RESULT_INTEGRITY_FAIL")][:2] == [
        "missing_integrity",
        "mode_downgrade",
    ]


async def test_in_a_batch_each_entry_proves_itself(site: Site) -> None:
    demanding(site, "sha256", required=True)
    ids = [await site.submit() for _ in range(3)]
    entries = []
    for n, job_id in enumerate(ids):
        lease = await site.lease()
        sha256 = result_sha256(job_id, True, b"1", b"null") if n == 1 else "0" * 64
        proof = {"mode": "sha256", "sha256": sha256} if n else None
        entries.append({**{k: lease[k] for k in ("job_id", "lease_id")}, "ok": True, "result": 1, "integrity": proof})
    _, body = await site.data("POST", "/api/results", {"results": entries})
    assert [one.get("status") for one in body["results"]] == [422, "completed", 422]
    assert [line["reason"] for line in events(site, "RESULT_INTEGRITY_FAIL")] == ["missing_integrity", "sha_mismatch"]
    assert [(await site.job(id))["status"] for id in ids] == ["running", "completed", "running"]


async def test_the_key_of_signatures_is_written_nowhere(
    make_site: MakeSite, tmp_path: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    site = await make_site("file", integrity=IntegritySettings(mode="hmac", required=True))
    key = "canary-integrity-key"
    object.__setattr__(site.app.services, "demand", Demand("hmac", True, key))
    await site.submit()
    lease = await site.lease()
    covered = (lease["job_id"], True, b"1", b"null")
    said = [await site.finish(lease, result=1, integrity={"mode": "hmac", "sig": "0"})]
    said += [await site.finish(lease, result=1, integrity={"mode": "hmac", "sig": result_sig(key, *covered)})]
    assert [status for status, _ in said] == [422, 200]
    said += [await site.data("GET", "/metrics"), await site.data("GET", f"/api/jobs/{lease['job_id']}")]
    site.app.audit.flush(everything=True)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path
    assert key not in repr((said, site.app.services.demand, Secrets(hmac_key=key)))
    out, err = capfd.readouterr()
    assert key not in out + err


# Too large


async def test_a_result_that_is_too_large_leaves_the_lease_to_say_so(site: Site) -> None:
    await site.submit()
    lease = await site.lease()
    before = await site.stored()
    report = {"lease_id": lease["lease_id"], "ok": True, "result": "x" * 1_100_000}
    no = refused(await large(site, f"/api/jobs/{lease['job_id']}/result", report), 413, "body_too_large")
    assert "1048576" in no["detail"]
    _, body = await large(site, "/api/results", {"results": [{"job_id": lease["job_id"], **report}]})
    assert body["results"][0]["code"] == "body_too_large"
    assert await site.stored() == before
    answer = await site.finish(lease, ok=False, error={"type": "ResultTooLarge"}, retry=False)
    assert (answer[0], answer[1]["status"]) == (200, "failed")


async def large(site: Site, path: str, body: Any) -> tuple[int, Any]:
    return (await site.ask("data", "POST", path, data=BytesIO(json.dumps(body).encode())))[:2]
