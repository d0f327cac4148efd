"""Scoped tokens: every route with every role, generated from the route table; nodes held to their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from sheratan_hub.clock import VirtualClock
from sheratan_hub.config import MetricsSettings, Secrets
from sheratan_hub.rules.access import GRANTS, TOKEN_RIGHTS
from sheratan_hub.web.plane import Route
from sheratan_hub.web.routes import ROUTES
from tests.conftest import TOKEN, MakeSite, Site

ROLES = ("node", "producer", "viewer", "admin")
SERVED = [(plane, route) for route in ROUTES for plane in ("control", "data") if route.plane in (plane, "both")]
REFUSED = {"none": "missing_token", "wrong": "invalid_token", "expired": "expired_token", "revoked": "invalid_token"}


class Holders:
    """A hub, a client without a token, and a token for each role, and for each kind that is refused."""

    def __init__(self, site: Site, session: aiohttp.ClientSession, tokens: dict[str, str]) -> None:
        self.site, self.tokens = site, tokens
        self._as = Site(site.app, session)

    async def ask(self, who: str, plane: str, method: str, path: str, **options: Any) -> tuple[int, Any]:
        headers = {"X-Sheratan-Token": self.tokens[who]} if who != "none" else {}
        return (await self._as.ask(plane, method, path, headers=headers, **options))[:2]


async def made(site: Site, role: str, **fields: Any) -> tuple[str, str]:
    node = {"node_id": "n1"} if role == "node" else {}
    status, body = await site.control("POST", "/api/access", {"role": role, **node, **fields})
    assert status == 201, body
    return body["access_id"], body["token"]


@pytest.fixture
async def holders(make_site: MakeSite) -> AsyncIterator[Holders]:
    clock = VirtualClock()
    site = await make_site(clock=clock, metrics=MetricsSettings(require_token=True))
    tokens = {role: (await made(site, role))[1] for role in ROLES}
    tokens["expired"] = (await made(site, "admin", expires_in_seconds=5))[1]
    access_id, tokens["revoked"] = await made(site, "admin")
    await site.control("DELETE", f"/api/access/{access_id}")
    await clock.advance(5000)
    async with aiohttp.ClientSession() as session:
        yield Holders(site, session, {**tokens, "wrong": "wrong", "shared": TOKEN})


def needs_token(route: Route) -> bool:
    return route.right in TOKEN_RIGHTS or route.right == "metrics"


def test_every_right_of_the_table_is_given_to_the_admin_and_every_role_has_one() -> None:
    assert {route.right for route in ROUTES} <= TOKEN_RIGHTS | {"public", "local", "metrics", "docs"}
    assert GRANTS["admin"] >= TOKEN_RIGHTS
    assert set(GRANTS) == set(ROLES)
    assert all(rights <= GRANTS["admin"] for rights in GRANTS.values())


def test_the_routes_of_a_role_are_these() -> None:
    """Written out once more, so that a slip in the table is seen."""
    allowed = {
        role: {f"{route.method} {route.path}" for route in ROUTES if route.right in GRANTS[role]}  # type: ignore[index]
        for role in ("node", "producer", "viewer")
    }
    jobs = {
        "GET /api/jobs",
        "GET /api/jobs/{id}",
        "GET /api/jobs/{id}/explain",
        "GET /api/ledger",
        "GET /api/missions",
        "GET /api/missions/{id}",
    }
    docs = {"GET /openapi.json", "GET /docs"}
    assert allowed["producer"] == {"POST /api/jobs", "POST /mesh/submit_request", "POST /api/missions"} | jobs | docs
    assert {route for route in allowed["viewer"] if not route.startswith("GET ")} == set()
    assert allowed["node"] & (allowed["viewer"] | allowed["producer"]) == docs
    assert "POST /api/hosts/heartbeat" in allowed["node"]
    assert not any("tokens" in route or "access" in route for routes in allowed.values() for route in routes)


@pytest.mark.parametrize("who", [*REFUSED, *ROLES, "shared"])
async def test_every_route_with_every_kind_of_token(holders: Holders, who: str) -> None:
    rights = GRANTS.get(who, TOKEN_RIGHTS | {"metrics"})  # type: ignore[call-overload]
    tried = 0
    for plane, route in SERVED:
        path = route.path.format(id="x1", node_id="n1", source="s1", version="1")
        status, body = await holders.ask(who, plane, route.method, path)
        code = body.get("code") if isinstance(body, dict) else None
        if not needs_token(route):
            assert status == 200, (route, body)
        elif who in REFUSED:
            assert (status, code) == (403, REFUSED[who]), (route, body)
        elif route.right not in rights:
            assert (status, code) == (403, "forbidden_role"), (route, body)
        else:
            assert status in (200, 204, 400, 404, 409, 422, 428), (route, body)
        tried += 1
    assert tried >= 30


async def test_a_refused_role_is_audited_with_what_it_lacked(holders: Holders) -> None:
    await holders.ask("viewer", "data", "POST", "/api/jobs", json={"kind": "x"})
    [line] = [line for line in holders.site.audit() if line["event"] == "AUTH_FAILURE"]
    assert (line["reason"], line["detail"]["role"], line["detail"]["right"]) == ("invalid_token", "viewer", "submit")
    assert await holders.site.app.hub.counts("job:") == {}


async def test_a_list_tells_all_but_the_value(holders: Holders) -> None:
    _, body = await holders.site.control("GET", "/api/access")
    assert [one["role"] for one in body["access"]] == [*ROLES, "admin"]
    assert [one["expired"] for one in body["access"]] == [False] * 4 + [True]
    assert not any(token in str(body) for token in holders.tokens.values())
    told = {line["event"] for line in holders.site.audit()}
    assert {"ACCESS_CREATED", "ACCESS_REVOKED"} <= told


async def test_what_is_revoked_is_not_there_any_more(site: Site) -> None:
    access_id, _ = await made(site, "viewer")
    assert (await site.control("DELETE", f"/api/access/{access_id}"))[0] == 200
    status, body = await site.control("DELETE", f"/api/access/{access_id}")
    assert (status, body["code"]) == (404, "access_not_found")


@pytest.mark.parametrize("scheme", ["sqlite", "file"])
async def test_scoped_tokens_outlive_a_restart(make_site: MakeSite, scheme: str) -> None:
    site = await make_site(scheme)
    _, token = await made(site, "viewer")
    await site.session.close()
    await site.app.stop()
    site = await make_site(scheme)
    status, _, _ = await site.ask("control", "GET", "/api/hosts", headers={"Authorization": f"Bearer {token}"})
    assert status == 200


async def test_a_revoked_token_that_the_settings_name_is_still_the_shared_one(make_site: MakeSite) -> None:
    site = await make_site("sqlite")
    access_id, token = await made(site, "viewer")
    await site.session.close()
    await site.app.stop()
    site = await make_site("sqlite", secrets=Secrets(token))
    headers = {"Authorization": f"Bearer {token}"}
    assert (await site.ask("control", "DELETE", f"/api/access/{access_id}", headers=headers))[0] == 200
    assert (await site.ask("control", "GET", "/api/access", headers=headers))[0] == 200


async def test_scoped_tokens_outlive_a_rotation(make_site: MakeSite, clock: VirtualClock) -> None:
    site = await make_site(clock=clock)
    _, token = await made(site, "viewer")
    await site.control("POST", "/api/tokens/rotation", {"seconds": 1})
    await clock.advance(2000)
    status, _, _ = await site.ask("control", "GET", "/api/hosts", headers={"Authorization": f"Bearer {token}"})
    assert status == 200


# A node's token


def speaks(node_id: str) -> list[tuple[str, str, str, Any]]:
    """Every way to name a node."""
    result = {"job_id": "x", "lease_id": "y", "ok": True}
    return [
        ("control", "POST", "/api/hosts/heartbeat", {"node_id": node_id}),
        ("control", "POST", "/mesh/heartbeat", {"host": node_id}),
        ("data", "POST", "/api/jobs/pull", {"node_id": node_id}),
        ("data", "POST", "/mesh/pull_requests", {"node_id": node_id}),
        ("data", "POST", f"/mesh/pull_requests?node_id={node_id}", {}),
        ("data", "POST", f"/mesh/pull_requests/{node_id}", {}),
        ("data", "POST", "/mesh/pull_requests", {"node_id": node_id}),
        ("data", "GET", f"/mesh/pull_requests/{node_id}", None),
        ("data", "GET", f"/mesh/pull_requests?host_id={node_id}", None),
        ("data", "POST", "/api/results", {"results": [{**result, "node_id": node_id}]}),
        ("data", "POST", "/api/results", {"results": [], "pull": {"node_id": node_id}}),
        ("data", "POST", "/mesh/submit_result", {**result, "node_id": node_id}),
        ("data", "POST", "/api/jobs/x/result", {"lease_id": "y", "ok": True, "node_id": node_id}),
        ("data", "POST", "/api/jobs/x/result", {"lease_id": "y", "ok": True, "pull": {"node_id": node_id}}),
        ("data", "POST", "/api/jobs/x/extend", {"lease_id": "y", "node_id": node_id}),
        ("data", "POST", "/api/jobs/x/release", {"lease_id": "y", "node_id": node_id}),
    ]


@pytest.mark.parametrize(("plane", "method", "path", "body"), speaks("n2"))
async def test_a_nodes_token_speaks_for_no_other_node(
    holders: Holders, plane: str, method: str, path: str, body: Any
) -> None:
    await holders.site.submit()
    before = await holders.site.stored()
    status, told = await holders.ask("node", plane, method, path, **({} if body is None else {"json": body}))
    assert (status, told["code"]) == (403, "forbidden_node")
    assert await holders.site.stored() == before
    [line] = [line for line in holders.site.audit() if line["event"] == "AUTH_FAILURE"]
    assert (line["reason"], line["detail"]["for_node"]) == ("invalid_token", "n1")


@pytest.mark.parametrize(("plane", "method", "path", "body"), speaks("n1"))
async def test_a_nodes_token_speaks_for_its_node(
    holders: Holders, plane: str, method: str, path: str, body: Any
) -> None:
    status, told = await holders.ask("node", plane, method, path, **({} if body is None else {"json": body}))
    assert status in (200, 404), told


async def test_a_nodes_token_need_not_name_its_node_where_others_need_not(holders: Holders) -> None:
    await holders.site.submit()
    lease = await holders.site.lease("n1")
    for path, body in (
        (f"/api/jobs/{lease['job_id']}/extend", {"lease_id": lease["lease_id"]}),
        ("/mesh/submit_result", {"job_id": lease["job_id"], "ok": True}),
    ):
        assert (await holders.ask("node", "data", "POST", path, json=body))[0] == 200
    await holders.site.submit()
    _, told = await holders.ask("node", "data", "POST", "/mesh/pull_requests", json={})
    assert [job["attempt"] for job in told["jobs"]] == [1]
    assert (await holders.site.job(told["jobs"][0]["job_id"]))["node_id"] == "n1"


async def test_a_job_that_changes_hands_after_the_look_is_still_not_its_own(
    holders: Holders, monkeypatch: pytest.MonkeyPatch
) -> None:
    await holders.site.submit()
    lease = await holders.site.lease("n2")

    async def unaware(_: object) -> list[Any]:
        return []

    monkeypatch.setattr(holders.site.app.hub, "fetch", unaware)
    body = {"job_id": lease["job_id"], "ok": True}
    status, told = await holders.ask("node", "data", "POST", "/mesh/submit_result", json=body)
    assert (status, told["code"]) == (409, "not_holder")


async def test_one_path_and_another_node_in_the_query_is_refused(holders: Holders) -> None:
    status, told = await holders.ask("node", "data", "GET", "/mesh/pull_requests/n1?node_id=n2")
    assert (status, told["code"]) == (403, "forbidden_node")


async def test_every_route_of_a_node_that_names_one_is_tried_above() -> None:
    tried = {
        path.partition("?")[0].replace("/n2", "/{node_id}").replace("/x/", "/{id}/") for _, _, path, _ in speaks("n2")
    }
    assert tried == {route.path for route in ROUTES if route.right == "work"}


def touches(lease: dict[str, Any]) -> list[tuple[str, Any]]:
    """Every way to touch a lease, the holder unnamed."""
    job_id, lease_id = lease["job_id"], lease["lease_id"]
    return [
        (f"/api/jobs/{job_id}/extend", {"lease_id": lease_id}),
        (f"/api/jobs/{job_id}/release", {"lease_id": lease_id}),
        (f"/api/jobs/{job_id}/result", {"lease_id": lease_id, "ok": True}),
        ("/api/results", {"results": [{"job_id": job_id, "lease_id": lease_id, "ok": True}]}),
        (
            "/api/results",
            {"results": [{"job_id": job_id, "lease_id": one, "ok": True} for one in (lease_id, "another")]},
        ),
        ("/mesh/submit_result", {"job_id": job_id, "lease_id": lease_id, "ok": True}),
        ("/mesh/submit_result", {"job_id": job_id, "ok": True}),
    ]


async def test_a_nodes_token_touches_no_other_nodes_lease(holders: Holders) -> None:
    await holders.site.submit()
    lease = await holders.site.lease("n2")
    for path, body in touches(lease):
        status, told = await holders.ask("node", "data", "POST", path, json=body)
        assert (status, told["code"]) == (403, "forbidden_node"), path
    job = await holders.site.job(lease["job_id"])
    assert (job["status"], job["node_id"]) == ("running", "n2")


async def test_a_nodes_token_does_its_nodes_work(holders: Holders) -> None:
    for place in range(len(touches({"job_id": "", "lease_id": ""}))):
        await holders.site.submit()
        _, told = await holders.ask("node", "data", "POST", "/api/jobs/pull", json={"node_id": "n1"})
        path, body = touches(told["jobs"][0])[place]
        status, answer = await holders.ask("node", "data", "POST", path, json=body)
        assert (status, answer["ok"]) == (200, True), (path, answer)
        again, _ = await holders.ask("node", "data", "POST", path, json=body)
        assert again == 200 or (again, path.rpartition("/")[2]) == (409, "submit_result"), "a repeat is fine as ever"


async def test_a_late_result_of_a_node_is_told_what_it_always_was(holders: Holders) -> None:
    await holders.site.submit()
    _, told = await holders.ask("node", "data", "POST", "/api/jobs/pull", json={"node_id": "n1"})
    first = told["jobs"][0]
    await holders.site.data("POST", f"/api/jobs/{first['job_id']}/release", {"lease_id": first["lease_id"]})
    await holders.site.lease("n2")
    path = f"/api/jobs/{first['job_id']}/extend"
    status, told = await holders.ask("node", "data", "POST", path, json={"lease_id": first["lease_id"]})
    assert (status, told["code"]) == (409, "lease_superseded")


# Requests that wait


@pytest.mark.parametrize("how", ["revoked", "expired"])
async def test_a_long_poll_whose_token_ends_gets_no_job_that_comes_later(make_site: MakeSite, how: str) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    access_id, token = await made(site, "node", **({"expires_in_seconds": 5} if how == "expired" else {}))
    async with aiohttp.ClientSession() as session:
        holders = Holders(site, session, {"node": token})
        body = {"node_id": "n1", "wait_seconds": 20}
        poll = asyncio.create_task(holders.ask("node", "data", "POST", "/api/jobs/pull", json=body))
        while not site.app.hub.waiting.pulls:
            await asyncio.sleep(0)
        if how == "revoked":
            await site.control("DELETE", f"/api/access/{access_id}")
        else:
            await clock.advance(5000)
        job_id = await site.submit()
        status, answer = await poll
    assert (status, answer.get("code"), answer.get("jobs")) == (
        (403, "invalid_token", None) if how == "revoked" else (200, None, [])
    )
    assert (await site.job(job_id))["status"] == "pending"
    assert not site.app.hub.waiting.pulls


async def test_who_waits_for_a_jobs_end_is_told_nothing_once_the_token_is_revoked(site: Site) -> None:
    access_id, token = await made(site, "viewer")
    job_id = await site.submit()
    async with aiohttp.ClientSession() as session:
        holders = Holders(site, session, {"viewer": token})
        wait = asyncio.create_task(holders.ask("viewer", "data", "GET", f"/api/jobs/{job_id}?wait_seconds=30"))
        while not len(site.app.hub.waiting):
            await asyncio.sleep(0)
        await site.control("DELETE", f"/api/access/{access_id}")
        status, answer = await wait
    assert (status, answer["code"]) == (403, "invalid_token")


async def test_a_revoked_token_sends_nobody_else_home(site: Site) -> None:
    access_id, _ = await made(site, "node")
    poll = asyncio.create_task(site.data("POST", "/api/jobs/pull", {"node_id": "n2", "wait_seconds": 20}))
    while not site.app.hub.waiting.pulls:
        await asyncio.sleep(0)
    await site.control("DELETE", f"/api/access/{access_id}")
    await site.submit()
    assert len((await poll)[1]["jobs"]) == 1
