"""Policies over HTTP: kept as versions, tried, activated against the active one, and then obeyed by every route."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.policy_files import load_policies
from sheratan_hub.rules.policy import Policy
from sheratan_hub.storage import StoreRefused
from tests.conftest import Site

DENY_ALL = {"default": "deny"}


def rule(effect: str, **names: Any) -> dict[str, Any]:
    return {"effect": effect, **names}


async def create(site: Site, policy: Any) -> int:
    status, body = await site.control("POST", "/api/policies", {"policy": policy})
    assert status == 201, body
    return int(body["version"])


async def activate(site: Site, version: int, before: str = "*") -> tuple[int, Any]:
    return await site.control("POST", f"/api/policies/{version}/activate", headers={"If-Match": before})


async def obey(site: Site, policy: Any) -> int:
    version = await create(site, policy)
    status, body = await activate(site, version)
    assert (status, body.get("version")) == (200, version)
    return version


def denied(answer: tuple[int, Any]) -> str:
    assert (answer[0], answer[1].get("code")) == (403, "policy_denied"), answer
    return str(answer[1]["detail"])


async def test_at_first_version_0_is_active_and_there_is_none_to_list(site: Site) -> None:
    _, body = await site.control("GET", "/api/policies")
    assert (body["active"], body["policies"]) == (0, [])
    _, registry = await site.control("GET", "/api/registry")
    assert registry["policy"] == {"version": 0, "sha256": None}


async def test_versions_are_kept_and_shown(site: Site) -> None:
    policy = {"title": "first", "rules": [rule("deny", zones=["dmz"])]}
    version = await create(site, policy)
    await create(site, DENY_ALL)
    _, body = await site.control("GET", "/api/policies")
    assert [(one["version"], one["active"]) for one in body["policies"]] == [(1, False), (2, False)]
    assert body["policies"][1]["prev_sha256"] == body["policies"][0]["sha256"]
    _, one = await site.control("GET", f"/api/policies/{version}")
    assert (one["title"], one["policy"]["rules"]) == ("first", [rule("deny", zones=["dmz"])])
    for unknown in ("7", "x", "-1", "99999999999"):
        status, body = await site.control("GET", f"/api/policies/{unknown}")
        assert (status, body["code"]) == (404, "policy_not_found")


@pytest.mark.parametrize(
    "policy",
    [
        {"defualt": "deny"},
        {"rules": [{}]},
        {"rules": [rule("deny", zones=[])]},
        {"rules": [rule("deny", actions=["x"])]},
        5,
    ],
)
async def test_what_is_no_policy_is_refused_and_not_kept(site: Site, policy: Any) -> None:
    status, body = await site.control("POST", "/api/policies", {"policy": policy})
    assert (status, body["code"]) == (422, "invalid_field")
    assert (await site.control("GET", "/api/policies"))[1]["policies"] == []


async def test_activation_needs_the_version_that_is_active(site: Site) -> None:
    version = await create(site, DENY_ALL)
    status, body = await site.control("POST", f"/api/policies/{version}/activate")
    assert (status, body["code"]) == (428, "precondition_required")
    for wrong in ('"5"', "nonsense"):
        status, body = await activate(site, version, wrong)
        assert (status, body["code"]) == (412, "precondition_failed")
    status, body = await activate(site, version, '"0"')
    assert (status, body["version"]) == (200, version)
    _, registry = await site.control("GET", "/api/registry")
    assert registry["policy"] == {"version": version, "sha256": body["sha256"]}
    assert (await activate(site, 99))[0] == 404
    assert (await activate(site, 0, f'"{version}"'))[0] == 200


async def test_of_two_who_activate_at_once_one_is_told_to_look_again(site: Site) -> None:
    versions = [await create(site, {"title": str(n)}) for n in range(2)]
    answers = await asyncio.gather(*(activate(site, version, '"0"') for version in versions))
    assert sorted(status for status, _ in answers) == [200, 412]


async def test_a_denied_submit_makes_nothing(site: Site) -> None:
    await obey(site, {"rules": [rule("deny", actions=["submit"], kinds=["bad.*"])]})
    text = denied(await site.data("POST", "/api/jobs", {"kind": "bad.one"}))
    assert "policy version 1" in text
    assert "rule 1" in text
    status, body = await site.data("POST", "/api/jobs", {"jobs": [{"kind": "bad.one"}, {"kind": "good"}]})
    assert (status, [one.get("code") for one in body["jobs"]]) == (200, ["policy_denied", None])
    _, body = await site.data("GET", "/api/jobs")
    assert [job["kind"] for job in body["jobs"]] == ["good"]


async def test_a_denied_heartbeat_is_refused_but_recorded(site: Site) -> None:
    await obey(site, {"rules": [rule("deny", actions=["heartbeat"], zones=["dmz"])]})
    denied(await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1", "zone": "dmz"}))
    _, body = await site.control("GET", "/api/hosts/n1")
    assert body["zone"] == "dmz"


async def test_a_denied_node_gets_nothing_and_a_denied_result_leaves_the_lease(site: Site) -> None:
    await site.data("POST", "/api/jobs", {"kind": "k"})
    _, body = await site.data("POST", "/api/jobs/pull", {"node_id": "n1"})
    (lease,) = body["jobs"]
    await obey(site, {"rules": [rule("deny", nodes=["n1"])]})
    denied(await site.data("POST", "/api/jobs/pull", {"node_id": "n1"}))
    denied(await site.data("GET", "/mesh/pull_requests/n1"))
    result = {"lease_id": lease["lease_id"], "node_id": "n1", "ok": True}
    path = f"/api/jobs/{lease['job_id']}/result"
    denied(await site.data("POST", path, result))
    assert (await activate(site, 0))[0] == 200
    status, body = await site.data("POST", path, result)
    assert (status, body["status"]) == (200, "completed")


async def test_a_result_whose_pull_is_denied_is_taken(site: Site) -> None:
    for _ in range(2):
        await site.data("POST", "/api/jobs", {"kind": "k"})
    _, body = await site.data("POST", "/api/jobs/pull", {"node_id": "n1"})
    (lease,) = body["jobs"]
    await obey(site, {"rules": [rule("deny", actions=["pull"])]})
    result = {"lease_id": lease["lease_id"], "node_id": "n1", "ok": True, "pull": {"node_id": "n1"}}
    status, body = await site.data("POST", f"/api/jobs/{lease['job_id']}/result", result)
    assert (status, body["status"], body["jobs"], body["reason"]) == (200, "completed", [], "policy_denied")


async def test_a_node_that_never_reported_gets_nothing_where_a_heartbeat_is_required(site: Site) -> None:
    await obey(site, {"gates": {"heartbeat_before_pull": True}})
    await site.data("POST", "/api/jobs", {"kind": "k"})
    denied(await site.data("POST", "/api/jobs/pull", {"node_id": "n1"}))
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1"})
    _, body = await site.data("POST", "/api/jobs/pull", {"node_id": "n1"})
    assert len(body["jobs"]) == 1


async def test_a_long_poll_that_waits_obeys_a_policy_that_came_meanwhile(site: Site) -> None:
    pull = {"node_id": "n1", "wait_seconds": 20}
    waiting = asyncio.create_task(site.data("POST", "/api/jobs/pull", pull))
    while not site.app.hub.waiting.pulls:
        await asyncio.sleep(0)
    await obey(site, {"rules": [rule("deny", actions=["pull"], kinds=["k"])]})
    await site.data("POST", "/api/jobs", {"kind": "k"})
    await site.data("POST", "/api/jobs", {"kind": "free"})
    _, body = await waiting
    assert [job["kind"] for job in body["jobs"]] == ["free"]


@pytest.mark.parametrize("submitted", ["before", "after"])
async def test_a_long_poll_gets_the_jobs_that_its_node_may_have_since_it_said_something_else(
    site: Site, submitted: str
) -> None:
    await obey(site, {"rules": [rule("deny", actions=["pull"], kinds=["k"], zones=["b"])]})
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1", "zone": "b"})
    if submitted == "before":
        await site.submit("k")
    pull = {"node_id": "n1", "wait_seconds": 20, "capabilities": []}
    waiting = asyncio.create_task(site.data("POST", "/api/jobs/pull", pull))
    while not site.app.hub.waiting.pulls:
        await asyncio.sleep(0)
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1", "zone": "a"})
    if submitted == "after":
        await site.submit("k")
    async with asyncio.timeout(5):
        _, body = await waiting
    assert [job["kind"] for job in body["jobs"]] == ["k"]


async def test_a_plan_tells_who_would_lose_what_and_which_jobs_would_be_stranded(site: Site) -> None:
    for n, zone in enumerate(("a", "b")):
        beat = {"node_id": f"n{n}", "zone": zone, "capabilities": ["gpu"] if zone == "a" else []}
        await site.control("POST", "/api/hosts/heartbeat", beat)
    for _ in range(3):
        await site.data("POST", "/api/jobs", {"kind": "k", "required_capabilities": ["gpu"]})
    draft = {"rules": [rule("deny", actions=["pull"], zones=["a"])]}
    status, body = await site.control("POST", "/api/policies/plan", {"policy": draft})
    assert status == 200, body
    assert body["nodes"] == [{"node_id": "n0", "lost": ["pull"], "gained": [], "by": ["rule 1"]}]
    (lane,) = body["waiting"]
    assert (lane["kind"], lane["nodes_before"], lane["nodes_after"]) == ("k", 1, 0)
    assert body["stranded_jobs"] == 3
    version = await create(site, draft)
    assert (await site.control("POST", "/api/policies/plan", {"version": version}))[1]["nodes"] == body["nodes"]
    for wrong in ({}, {"policy": draft, "version": 1}):
        assert (await site.control("POST", "/api/policies/plan", wrong))[0] == 422
    assert (await site.control("POST", "/api/policies/plan", {"version": 9}))[0] == 404
    assert (await site.control("GET", "/api/policies"))[1]["active"] == 0


async def test_a_plan_counts_the_jobs_of_stranded_groups_only_and_each_once(site: Site) -> None:
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1", "zone": "a", "capabilities": ["gpu"]})
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n2", "zone": "b"})
    for n in range(2):
        await site.submit("k", required_capabilities=["gpu"])
        await site.submit("k", required_capabilities=["gpu"], priority="HIGH")
        await site.submit("k", source=f"s{n}")
        await site.submit("k")
    draft = {"rules": [rule("deny", actions=["pull"], zones=["a"])]}
    _, body = await site.control("POST", "/api/policies/plan", {"policy": draft})
    assert body["stranded_jobs"] == 4
    assert not body["more"]


async def test_a_plan_of_what_is_in_force_changes_nothing(site: Site) -> None:
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1"})
    await site.submit("k")
    await obey(site, {"rules": [rule("deny", actions=["submit", "heartbeat"])]})
    _, body = await site.control("POST", "/api/policies/plan", {"version": 1})
    assert (body["nodes"], body["waiting"]) == ([], [])


async def test_what_happens_to_policies_is_audited(site: Site) -> None:
    await obey(site, {"rules": [rule("deny", actions=["submit"])]})
    await site.data("POST", "/api/jobs", {"kind": "k"})
    lines = {line["event"]: line for line in site.audit()}
    assert lines["POLICY_CREATED"]["detail"]["version"] == 1
    assert lines["POLICY_ACTIVATED"]["detail"]["before"] == 0
    assert (lines["POLICY_DENY"]["reason"], lines["POLICY_DENY"]["detail"]["version"]) == ("rule 1", "1")


async def test_admin_routes_obey_the_policy_and_its_gate(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await obey(site, {"rules": [rule("deny", actions=["admin"])]})
    denied(await site.data("GET", "/admin/queue"))
    assert (await activate(site, 0))[0] == 200, "policies are no admin action"
    assert (await site.data("GET", "/admin/queue"))[0] == 200
    monkeypatch.setattr("sheratan_hub.web.plane.is_loopback", lambda address: False)
    assert (await site.data("GET", "/admin/queue"))[1]["code"] == "loopback_only"
    await obey(site, {"gates": {"admin_from_loopback": False}})
    assert (await site.data("GET", "/admin/queue"))[0] == 200


async def test_explain_names_the_policy_that_keeps_a_job_from_a_node(site: Site) -> None:
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1", "zone": "dmz"})
    job_id = await site.submit("secret.one")
    version = await obey(site, {"rules": [rule("deny", actions=["pull"], zones=["dmz"], kinds=["secret.*"])]})
    _, body = await site.data("GET", f"/api/jobs/{job_id}/explain")
    assert body["runnable"] is False
    (said,) = body["nodes"]["shown"][0]["reasons"]
    assert (said["reason"], said["evidence"]) == ("policy_denied", {"version": version, "by": "rule 1"})


# Files


def write(folder: Path, name: str, policy: Any) -> None:
    (folder / name).write_text(json.dumps(policy))


async def test_files_become_versions_once_in_the_order_of_their_names(site: Site, tmp_path: Path) -> None:
    write(tmp_path, "02.json", DENY_ALL)
    write(tmp_path, "01.json", {"title": "one"})
    (tmp_path / "notes.txt").write_text("no policy")
    made = await load_policies(site.app.hub, str(tmp_path))
    assert [(one.version, one.file) for one in made] == [(1, "01.json"), (2, "02.json")]
    assert made[1].policy == Policy("deny")
    assert await load_policies(site.app.hub, str(tmp_path)) == []
    assert site.app.hub.judge.version == 0


async def test_an_edited_file_is_refused(site: Site, tmp_path: Path) -> None:
    write(tmp_path, "01.json", {"title": "one"})
    await load_policies(site.app.hub, str(tmp_path))
    write(tmp_path, "01.json", DENY_ALL)
    with pytest.raises(StoreRefused, match=r"01\.json was edited since it was loaded as policy version 1"):
        await load_policies(site.app.hub, str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"rules": 5}'])
async def test_a_file_that_is_no_policy_is_refused_with_its_name(site: Site, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(StoreRefused, match=r"bad\.json is no policy"):
        await load_policies(site.app.hub, str(tmp_path))


async def test_a_folder_that_is_not_there_is_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(StoreRefused, match="policies cannot be read"):
        await load_policies(site.app.hub, str(tmp_path / "none"))
