"""The operators' checklist: a PASS or FAIL line for each promise, against a running hub or one started for it.

`sheratan-hub smoke` runs it. On a running hub it works under names of its own, takes away what it made, and says what
stays: finished jobs, which the hub forgets by itself, and lines of the audit log. What a hub in use cannot be asked, or
refuses because it is busy, is left out with the reason.
Longer than 300 lines because the checklist is one list.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from sheratan_hub.audit_lines import FILE_NAME, chain_files
from sheratan_hub.audit_verify import verify
from sheratan_hub.canonical import result_sha256, result_sig
from sheratan_hub.client import CONTROL_URL, DATA_URL
from sheratan_hub.clock import Clock, SystemClock
from sheratan_hub.config import DEFAULT_TOKEN

OWN_DEPTH = 20
"""Queue depth of a hub that is started for the checklist, so that reaching it is quick."""

ABANDONED_SECONDS = 30 * 86_400
"""A rotation that is abandoned at once would last so long: should smoke be killed in between, somebody will notice."""

START_TRIES = 100
SETTLE_MS = 300
STOP_MS = 10_000
Echo = Callable[[str], None]


class Failed(Exception):
    """A promise was not kept; the text says how."""


class NotHere(Exception):
    """A check that would harm a hub in use; the text says why it is left out."""


BUSY = {
    "inflight_limit": "all leases that this hub allows are in use",
    "paused": "the hub is paused",
    "throttled": "its jobs are throttled",
    "node_full": "a node may hold no more here",
    "policy_denied": "the active policy forbids it",
}
"""Why a hub in use may rightly give a pull no job, and what is said then."""

REFUSED = {
    "queue_full": "its queue is full",
    "rate_limited": "its submits are limited",
    "policy_denied": "the active policy forbids it",
    "forbidden_role": "this token's role may not do it",
    "audit_unavailable": "its audit log cannot be written",
}
"""The same for requests, by code."""


class Answer(NamedTuple):
    """What came back: status, JSON body (or text), headers."""

    status: int
    body: Any
    headers: dict[str, str]


class Target:
    """The hub under check. `own`: it was started for this, so its limits are known, and `logs` is where it logs."""

    def __init__(self, session: aiohttp.ClientSession, control: str, data: str, token: str, clock: Clock) -> None:
        self.session, self.token, self.clock = session, token, clock
        self.urls = {"control": control.rstrip("/"), "data": data.rstrip("/")}
        self.own = False
        self.logs: Path | None = None
        self.hmac_key = os.environ.get("SHERATAN_RESULT_HMAC_KEY", "")
        self.name = f"smoke-{clock.secret()[:8]}"
        self.paused, self.busy, self.turning, self.access_id = False, False, False, ""

    async def ask(self, plane: str, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        """One request with the token, unless `headers` are given."""
        options.setdefault("headers", {"Authorization": f"Bearer {self.token}"})
        async with self.session.request(method, self.urls[plane] + path, json=body, **options) as answer:
            is_json = "json" in answer.headers.get("Content-Type", "")
            parsed = await answer.json(content_type=None) if is_json else await answer.text()
            return Answer(answer.status, parsed, dict(answer.headers))

    async def data(self, path: str, body: Any, status: int = 200) -> Any:
        """POST to the data plane; the body, if the status is the one expected."""
        answer = await self.ask("data", "POST", path, body)
        self.leave_out(answer, status)
        expect(answer.status == status, f"POST {path} gave {answer.status}: {answer.body}")
        return answer.body

    async def submit(self, **fields: Any) -> str:
        """A new job of this run's own kind; its id."""
        body = await self.data("/api/jobs", {"kind": self.name, **fields}, 201)
        return str(body["job_id"])

    async def lease(self, node: str = "a") -> dict[str, Any]:
        """The next job of this run's own kind, leased to one of its own nodes."""
        wait = 0 if self.busy else 5
        pull = {"node_id": f"{self.name}-{node}", "kinds": [self.name], "capabilities": [], "wait_seconds": wait}
        pulled = self.got(await self.data("/api/jobs/pull", pull))
        jobs: list[dict[str, Any]] = pulled["jobs"]
        expect(len(jobs) == 1, f"a pull got no job although one was waiting ({pulled.get('reason')})")
        return jobs[0]

    def got(self, pulled: Any) -> Any:
        """What a pull got, unless a hub in use had a good reason to give it nothing."""
        if not pulled["jobs"] and not self.own and pulled.get("reason") in BUSY:
            self.busy = True
            raise NotHere(BUSY[pulled["reason"]])
        return pulled

    def leave_out(self, answer: Answer, expected: int = 200) -> None:
        """Raise `NotHere` when a hub in use has a good reason to refuse what was asked of it."""
        code = answer.body.get("code") if isinstance(answer.body, dict) else None
        if not self.own and answer.status != expected and code in REFUSED:
            raise NotHere(REFUSED[code])

    async def finish(self, lease: dict[str, Any], status: int = 200, **fields: Any) -> Any:
        """Send a result for a lease, with the proof that any mode of integrity takes."""
        body = {"lease_id": lease["lease_id"], "ok": True, **fields}
        body.setdefault("integrity", self.proof(lease["job_id"], body))
        return await self.data(f"/api/jobs/{lease['job_id']}/result", body, status)

    def proof(self, job_id: str, body: dict[str, Any]) -> dict[str, str]:
        """A result's `integrity`: its SHA-256, and its signature where the key is known."""
        texts = [json.dumps(body.get(name)).encode() for name in ("result", "error")]
        sha256 = result_sha256(job_id, body["ok"], *texts)
        if not self.hmac_key:
            return {"mode": "sha256", "sha256": sha256}
        return {"mode": "hmac", "sha256": sha256, "sig": result_sig(self.hmac_key, job_id, body["ok"], *texts)}

    async def admin(self, method: str, path: str, body: Any = None) -> Any:
        """What an admin route answers, which is told to the hub's own machine only."""
        answer = await self.ask("data", method, path, body)
        if answer.status == 403 and answer.body["code"] == "loopback_only" and not self.own:
            raise NotHere("it is told to the hub's own machine only")
        self.leave_out(answer)
        expect(answer.status == 200, f"{method} {path} gave {answer.status}: {answer.body}")
        return answer.body

    async def revive(self, job_id: str) -> None:
        """Redrive a failed job and complete it, so that no dead letter stays."""
        done = await self.data(f"/api/jobs/{job_id}/redrive", {})
        expect(done["status"] == "pending" and done["redriven"], f"the redrive made it {done}")
        lease = await self.lease()
        expect(lease["job_id"] == job_id, "another job was leased")
        await self.finish(lease)

    async def job(self, job_id: str) -> Any:
        """The job as it is now."""
        return (await self.ask("data", "GET", f"/api/jobs/{job_id}")).body

    async def clean_up(self) -> list[str]:
        """Take away what the checks have left; what stays all the same, and why, as sentences."""
        steps = (self._end_jobs, self._end_pause, self._forget_nodes, self._revoke, self._end_rotation)
        return [text for step in steps if (text := await self._tried(step))]

    async def _tried(self, step: Callable[[], Awaitable[str]]) -> str:
        try:
            return await step()
        except (*BROKEN, NotHere) as why:
            return f"not all could be taken away: {str(why) or type(why).__name__}"

    async def _end_jobs(self) -> str:
        """Cancel what is not finished, twice: a submit that was broken off may be carried out a moment later."""
        for _ in range(2):
            for status in ("pending", "quarantined", "running"):
                for job in await self._jobs(status):
                    await self.ask("data", "POST", f"/api/jobs/{job['job_id']}/cancel", {})
            await self.clock.sleep(SETTLE_MS)
        finished = [job for status in ("completed", "cancelled", "failed") for job in await self._jobs(status)]
        running = await self._jobs("running")
        also = f", and {len(running)} that end with their leases" if running else ""
        return (
            f"{len(finished)} finished jobs of kind {self.name}, which the hub forgets by their age{also}"
            if finished
            else ""
        )

    async def _jobs(self, status: str) -> list[dict[str, Any]]:
        page = (await self.ask("data", "GET", f"/api/jobs?kind={self.name}&status={status}&limit=1000")).body
        found: list[dict[str, Any]] = page["jobs"]
        return found

    async def _end_pause(self) -> str:
        if self.paused:
            await self.admin("POST", "/admin/resume", {"kind": self.name})
        return ""

    async def _forget_nodes(self) -> str:
        """A drained node that holds nothing can be forgotten at once."""
        left = []
        for node in (f"{self.name}-{letter}" for letter in "ab"):
            path = f"/api/hosts/{node}"
            if (await self.ask("control", "GET", path)).status == 404:
                continue
            await self.ask("control", "POST", f"{path}/drain")
            if (await self.ask("control", "DELETE", path)).status != 200:
                left.append(node)
        return f"the record of {', '.join(left)}: sheratan-hub nodes forget" if left else ""

    async def _revoke(self) -> str:
        if self.access_id:
            await self.ask("control", "DELETE", f"/api/access/{self.access_id}")
        return ""

    async def _end_rotation(self) -> str:
        """One whose beginning or end was not answered."""
        if self.turning:
            gone = await self.ask("control", "DELETE", "/api/tokens/rotation")
            if gone.status != 200 and gone.body.get("code") != "no_rotation":
                return "a rotation of the token: sheratan-hub tokens abandon"
        return ""

    def sign(self, plane: str) -> str:
        """What an answer must hold that names this plane: its port, where it is surely the hub's own."""
        return self.urls[plane].rpartition(":")[2] if self.own else plane


def expect(true: bool, otherwise: str) -> None:
    """Raise `Failed` unless it is so."""
    if not true:
        raise Failed(otherwise)


Check = Callable[[Target], Awaitable[None]]
CHECKS: list[tuple[str, Check]] = []


def check(name: str) -> Callable[[Check], Check]:
    """Put a check on the list, under the name that its line shows."""

    def put(function: Check) -> Check:
        CHECKS.append((name, function))
        return function

    return put


@check("ports: the data plane's paths are 410 on the control port")
async def _data_on_control(hub: Target) -> None:
    for method, path in (("POST", "/api/jobs"), ("GET", "/api/jobs"), ("POST", "/mesh/submit_request")):
        answer = await hub.ask("control", method, path, headers={})
        expect(answer.status == 410, f"{method} {path} gave {answer.status}")
        expect(hub.sign("data") in answer.body["detail"], "the answer does not name the data plane's port")


@check("ports: the control plane's paths are 410 on the data port")
async def _control_on_data(hub: Target) -> None:
    for method, path in (("POST", "/api/hosts/heartbeat"), ("GET", "/api/registry"), ("DELETE", "/api/hosts")):
        answer = await hub.ask("data", method, path, headers={})
        expect(answer.status == 410, f"{method} {path} gave {answer.status}")
        expect(hub.sign("control") in answer.body["detail"], "the answer does not name the control plane's port")


@check("paths: an unknown path is 404, a wrong method 405")
async def _unknown(hub: Target) -> None:
    expect((await hub.ask("data", "GET", "/nowhere")).status == 404, "an unknown path is not 404")
    answer = await hub.ask("data", "PUT", "/api/jobs")
    expect(answer.status == 405 and "POST" in answer.headers.get("Allow", ""), "a wrong method is not 405 with Allow")


@check("health: /health, /livez and /readyz of the control plane need no token")
async def _health(hub: Target) -> None:
    for path in ("/health", "/livez", "/readyz?verbose"):
        answer = await hub.ask("control", "GET", path, headers={})
        expect(answer.status == 200 and answer.body["ok"], f"{path} gave {answer.status}")


@check("health: the data plane answers this machine, and others not at all")
async def _data_health(hub: Target) -> None:
    for path in ("/health", "/livez", "/readyz"):
        answer = await hub.ask("data", "GET", path, headers={})
        expect(answer.status == 200 or not hub.own, f"{path} gave {answer.status}")
        expect(answer.status == 200 or answer.body["code"] == "loopback_only", f"{path} gave {answer.status}")
        if answer.status != 200:
            raise NotHere("the data plane tells its health to its own machine only, and has refused this one")


async def _refused_tokens(hub: Target, plane: str, path: str) -> None:
    none = await hub.ask(plane, "GET", path, headers={})
    wrong = await hub.ask(plane, "GET", path, headers={"Authorization": "Bearer wrong"})
    other = await hub.ask(plane, "GET", path, headers={"X-Sheratan-Token": "wrong"})
    expect([one.status for one in (none, wrong, other)] == [403, 403, 403], "a missing or wrong token is not 403")
    expect(none.body["code"] == "missing_token" and wrong.body["code"] == "invalid_token", "the codes are wrong")


@check("token: none or a wrong one is 403 on the control plane")
async def _token_control(hub: Target) -> None:
    await _refused_tokens(hub, "control", "/api/registry")


@check("token: none or a wrong one is 403 on the data plane")
async def _token_data(hub: Target) -> None:
    await _refused_tokens(hub, "data", "/api/jobs")


async def _accepted_token(hub: Target, headers: dict[str, str]) -> None:
    for plane, path in (("control", "/api/registry"), ("data", "/api/jobs?limit=1")):
        answer = await hub.ask(plane, "GET", path, headers=headers)
        expect(answer.status == 200, f"the token was refused on the {plane} plane: {answer.body}")


@check("token: Authorization: Bearer is accepted on both planes")
async def _bearer(hub: Target) -> None:
    await _accepted_token(hub, {"Authorization": f"Bearer {hub.token}"})


@check("token: X-Sheratan-Token is accepted on both planes")
async def _header(hub: Target) -> None:
    await _accepted_token(hub, {"X-Sheratan-Token": hub.token})


@check("node: a heartbeat makes it ONLINE in the registry")
async def _node(hub: Target) -> None:
    node = f"{hub.name}-a"
    beat = await hub.ask("control", "POST", "/api/hosts/heartbeat", {"host_id": node, "zone": "smoke"})
    expect(beat.status == 200 and beat.body["heartbeat_after_seconds"] > 0, f"the heartbeat gave {beat.status}")
    registry = (await hub.ask("control", "GET", "/api/registry")).body
    expect(registry["nodes"][node]["status"] == "ONLINE", "it is not ONLINE")


@check("node: it is shown, and cannot be forgotten while it lives")
async def _node_shown(hub: Target) -> None:
    path = f"/api/hosts/{hub.name}-a"
    expect((await hub.ask("control", "GET", path)).body["zone"] == "smoke", "its zone is not shown")
    expect((await hub.ask("control", "DELETE", path)).status == 409, "a living node was forgotten")


@check("node: what it attests is a signal, and an operator can accept it")
async def _attested(hub: Target) -> None:
    node = f"{hub.name}-a"
    found = []
    for build_id in ("b1", "b2"):
        body = {"node_id": node, "attestation": {"build_id": build_id, "capability_hash": "c"}}
        found.append((await hub.ask("control", "POST", "/api/hosts/heartbeat", body)).body["attestation_status"])
    expect(found == ["OK", "DRIFT"], f"another build was {found[-1]}")
    accepted = (await hub.ask("control", "POST", f"/api/hosts/{node}/attest")).body
    expect(accepted["attestation"]["status"] == "OK", "it was not accepted")


@check("node: capabilities that keep changing are SPOOF_SUSPECT, and block nothing")
async def _spoof_suspect(hub: Target) -> None:
    if not hub.own:
        raise NotHere("it would raise an alarm on a hub in use")
    node = f"{hub.name}-b"
    found = []
    for n in range(5):
        body = {"node_id": node, "attestation": {"build_id": "b", "capability_hash": f"c{n}"}}
        found.append((await hub.ask("control", "POST", "/api/hosts/heartbeat", body)).body["attestation_status"])
    expect(found[0] == "OK" and found[1] == "DRIFT" and found[-1] == "SPOOF_SUSPECT", f"it was {found}")
    await hub.submit()
    await hub.finish(await hub.lease("b"))


@check("node: a drained one gets no jobs until it is resumed")
async def _drained(hub: Target) -> None:
    node = f"{hub.name}-a"
    expect((await hub.ask("control", "POST", f"/api/hosts/{node}/drain")).status == 200, "it was not drained")
    job_id = await hub.submit()
    pulled = await hub.data("/api/jobs/pull", {"node_id": node, "kinds": [hub.name], "capabilities": []})
    expect((pulled["jobs"], pulled.get("reason")) == ([], "node_draining"), "it got a job, or no reason")
    await hub.ask("control", "POST", f"/api/hosts/{node}/resume")
    lease = await hub.lease()
    expect(lease["job_id"] == job_id, "another job was leased")
    await hub.finish(lease)


@check("job: submit, lease, extend, result, completed")
async def _life(hub: Target) -> None:
    job_id = await hub.submit(params={"n": 1})
    lease = await hub.lease()
    expect(lease["job_id"] == job_id and lease["params"] == {"n": 1}, "another job was leased")
    longer = await hub.data(f"/api/jobs/{job_id}/extend", {"lease_id": lease["lease_id"], "seconds": 60})
    expect(longer["lease_seconds"] > 0, "the lease was not extended")
    await hub.finish(lease, result={"m": 2})
    job = await hub.job(job_id)
    expect(job["status"] == "completed" and job["result"] == {"m": 2}, f"the job is {job['status']}")


@check("job: a repeated result gets the same answer, another one 409")
async def _repeat(hub: Target) -> None:
    await hub.submit()
    lease = await hub.lease()
    first = await hub.finish(lease, result=1)
    expect(await hub.finish(lease, result=1) == first, "the repeat was answered otherwise")
    expect((await hub.finish(lease, 409, result=2))["code"] == "result_conflict", "another result was taken")


@check("job: a failure is retried, and fails for good when it says so")
async def _fail(hub: Target) -> None:
    job_id = await hub.submit()
    lease = await hub.lease()
    body = await hub.finish(lease, ok=False, error={"type": "Smoke"}, retry_after_seconds=0.05)
    expect(body["status"] == "pending", "a first failure was not retried")
    await hub.finish(await hub.lease(), ok=False, error={"type": "Smoke"}, retry=False)
    job = await hub.job(job_id)
    expect((job["status"], job["reason"], job["failures"]) == ("failed", "NOT_RETRYABLE", 2), f"it is {job}")
    await hub.revive(job_id)


@check("job: a released job goes to the next node at no cost")
async def _release(hub: Target) -> None:
    job_id = await hub.submit()
    lease = await hub.lease()
    await hub.data(f"/api/jobs/{job_id}/release", {"lease_id": lease["lease_id"]})
    again = await hub.lease("b")
    expect((again["attempt"], again["failures"], again["losses"]) == (2, 0, 0), "the release cost something")
    stale = await hub.finish(lease, 409)
    expect(stale["ok"] is False, "the released lease could still end the job")
    await hub.finish(again)


@check("job: a waiting job is cancelled at once")
async def _cancel(hub: Target) -> None:
    job_id = await hub.submit(delay_seconds=3600)
    body = await hub.data(f"/api/jobs/{job_id}/cancel", {})
    expect(body["status"] == "cancelled", f"it is {body['status']}")


@check("job: the same pull_id gives the same lease")
async def _replay(hub: Target) -> None:
    await hub.submit()
    pull = {"node_id": f"{hub.name}-a", "kinds": [hub.name], "capabilities": [], "pull_id": hub.name}
    first, again = [hub.got(await hub.data("/api/jobs/pull", pull))["jobs"] for _ in range(2)]
    ids = [[(job["job_id"], job["lease_id"]) for job in jobs] for jobs in (first, again)]
    expect(ids[0] == ids[1] and len(first) == 1, "the lease was not given again")
    await hub.finish(first[0])


@check("job: the fleet's routes submit, pull and return")
async def _fleet(hub: Target) -> None:
    await hub.data("/mesh/submit_request", {"kind": hub.name, "params": [1], "unknown": True})
    node = f"{hub.name}-a"
    got = hub.got(await hub.data(f"/mesh/pull_requests/{node}", {"kinds": [hub.name], "capabilities": []}))
    result = {"job_id": got["jobs"][0]["job_id"], "node_id": node, "ok": True, "result": 1}
    result["integrity"] = hub.proof(result["job_id"], result)
    expect((await hub.data("/mesh/submit_result", result))["status"] == "completed", "it was not completed")


@check("job: lists by kind, with a cursor")
async def _list(hub: Target) -> None:
    page = (await hub.ask("data", "GET", f"/api/jobs?kind={hub.name}&limit=2")).body
    expect(len(page["jobs"]) == 2 and page["next_cursor"] is not None, "the page is not full or has no cursor")


@check("idempotency: the same key makes one job")
async def _key(hub: Target) -> None:
    body = {"kind": hub.name, "params": {"a": 1, "b": 2}, "idempotency_key": hub.name}
    first = await hub.data("/api/jobs", body, 201)
    again = await hub.data("/api/jobs", {**body, "params": {"b": 2, "a": 1}}, 200)
    expect(again["job_id"] == first["job_id"] and again["dedup"], "a second job was made")
    await hub.finish(await hub.lease(), result=7)
    expect((await hub.data("/api/jobs", body, 200))["result"] == 7, "the result is not given again")


@check("idempotency: the same key with another payload is 409")
async def _collision(hub: Target) -> None:
    body = {"kind": hub.name, "params": {"a": 2}, "idempotency_key": hub.name}
    expect((await hub.data("/api/jobs", body, 409))["code"] == "idempotency_key_collision", "the code is wrong")


@check("integrity: a wrong SHA-256 is 422 and the lease stays")
async def _integrity(hub: Target) -> None:
    job_id = await hub.submit()
    lease = await hub.lease()
    wrong = {"mode": "sha256", "sha256": "0" * 64}
    body = await hub.finish(lease, 422, result={"x": 1.5}, integrity=wrong)
    expect(body["code"] == "result_integrity_fail", "the code is wrong")
    expect((await hub.job(job_id))["status"] == "running", "the lease did not stay")
    await hub.finish(lease, result={"x": 1.5})
    expect((await hub.job(job_id))["status"] == "completed", "the right one was not taken")


@check("dead letters: a failed job is listed and redriven under its id")
async def _dead_letter(hub: Target) -> None:
    job_id = await hub.submit()
    await hub.finish(await hub.lease(), ok=False, error={"type": "Smoke", "message": "on purpose"}, retry=False)
    try:
        (dead,) = (await hub.admin("GET", f"/admin/dlq?kind={hub.name}"))["jobs"]
        told = [(one["outcome"], one["error"]["type"]) for one in dead["attempts"]]
        expect((dead["job_id"], dead["reason"]) == (job_id, "NOT_RETRYABLE"), f"it is listed as {dead}")
        expect(told == [("failed", "Smoke")], f"its attempts are {told}")
    finally:
        await hub.revive(job_id)
    job = await hub.job(job_id)
    expect((job["status"], job["redrives"], job["attempt"]) == ("completed", 1, 2), f"it is {job}")
    expect((await hub.admin("GET", f"/admin/dlq?kind={hub.name}"))["jobs"] == [], "it is still a dead letter")


@check("dependency: a job waits for another and runs after it")
async def _dependency(hub: Target) -> None:
    first = await hub.submit()
    second = await hub.submit(depends_on=[first])
    lease = await hub.lease()
    expect(lease["job_id"] == first and (await hub.job(second))["depends_on_left"] == 1, "it does not wait")
    await hub.finish(lease)
    lease = await hub.lease("b")
    expect(lease["job_id"] == second, "the dependent job was not leased")
    await hub.finish(lease)


@check("dependency: a failure cancels what depends on it, and names the root cause")
async def _dependency_failed(hub: Target) -> None:
    chain = [{"kind": hub.name, "ref": "a"}, {"kind": hub.name, "ref": "b", "depends_on": ["a"]}]
    made = (await hub.data("/api/jobs", {"jobs": chain, "atomic": True}))["jobs"]
    first, second = [one["job_id"] for one in made]
    await hub.finish(await hub.lease(), ok=False, error={"type": "Smoke"}, retry=False)
    job = (await hub.ask("data", "GET", f"/api/jobs/{second}?wait_seconds=10")).body
    told = (job["status"], job["reason"], job["root_cause"])
    expect(told == ("cancelled", "DEPENDENCY_FAILED", first), f"it is {told}")
    await hub.data(f"/api/jobs/{first}/redrive", {"dependents": True})
    for node in ("a", "b"):
        await hub.finish(await hub.lease(node))
    for job_id in (first, second):
        expect((await hub.job(job_id))["status"] == "completed", "the redrive did not bring back both")


@check("pause: a kind is not leased until it is resumed")
async def _pause(hub: Target) -> None:
    await hub.admin("POST", "/admin/pause", {"kind": hub.name, "seconds": 60, "reason": "smoke"})
    hub.paused = True
    try:
        await hub.submit()
        pull = {"node_id": f"{hub.name}-a", "kinds": [hub.name], "capabilities": []}
        got = await hub.data("/api/jobs/pull", pull)
        expect((got["jobs"], got.get("reason")) == ([], "paused"), f"a pull got {got}")
    finally:
        left = await hub.admin("POST", "/admin/resume", {"kind": hub.name})
        hub.paused = False
    expect(hub.name not in [one["kind"] for one in left["pauses"]], "it is still paused")
    await hub.finish(await hub.lease())


@check("explain: a job that waits says why")
async def _explain(hub: Target) -> None:
    job_id = await hub.submit(delay_seconds=3600)
    answer = await hub.ask("data", "GET", f"/api/jobs/{job_id}/explain")
    await hub.data(f"/api/jobs/{job_id}/cancel", {})
    if answer.status in (404, 405) and answer.body["code"] in ("unknown_path", "method_not_allowed"):
        raise NotHere("this hub does not explain")
    expect(answer.status == 200 and answer.body["reasons"], f"it gave {answer.status}: {answer.body}")


@check("back-pressure: beyond the queue's depth it is refused with Retry-After")
async def _depth(hub: Target) -> None:
    if not hub.own:
        raise NotHere("the depth of a hub in use is not tried")
    jobs = [{"kind": hub.name, "delay_seconds": 3600} for _ in range(OWN_DEPTH)]
    made = (await hub.data("/api/jobs", {"jobs": jobs}))["jobs"]
    answer = await hub.ask("data", "POST", "/api/jobs", {"kind": hub.name})
    expect(answer.status in (429, 503) and "Retry-After" in answer.headers, f"it gave {answer.status}")
    expect(answer.body["code"] == "queue_full", "the code is wrong")
    for one in made:
        if one["ok"]:
            await hub.data(f"/api/jobs/{one['job_id']}/cancel", {})


@check("access: a scoped token may do what its role may, until it is revoked")
async def _access(hub: Target) -> None:
    answer = await hub.ask("control", "POST", "/api/access", {"role": "viewer", "expires_in_seconds": 600})
    hub.leave_out(answer, 201)
    expect(answer.status == 201, f"making one gave {answer.status}: {answer.body}")
    hub.access_id = answer.body["access_id"]
    headers = {"Authorization": f"Bearer {answer.body['token']}"}
    seen = await hub.ask("data", "GET", "/api/jobs?limit=1", headers=headers)
    expect(seen.status == 200, f"looking gave {seen.status}")
    no = await hub.ask("data", "POST", "/api/jobs", {"kind": hub.name}, headers=headers)
    expect((no.status, no.body.get("code")) == (403, "forbidden_role"), f"submitting gave {no.status}")
    await hub.ask("control", "DELETE", f"/api/access/{hub.access_id}")
    hub.access_id = ""
    gone = await hub.ask("data", "GET", "/api/jobs?limit=1", headers=headers)
    expect(gone.status == 403, f"the revoked one gave {gone.status}")


def _presented(token: str) -> list[tuple[str, str, dict[str, str]]]:
    """The token in either header to either plane: (plane, path, headers)."""
    forms = ({"Authorization": f"Bearer {token}"}, {"X-Sheratan-Token": token})
    return [
        (plane, path, headers)
        for plane, path in (("control", "/api/registry"), ("data", "/api/jobs?limit=1"))
        for headers in forms
    ]


async def _answers(hub: Target, token: str) -> set[tuple[int, str]]:
    """What the hub answers to this token: (status, code)."""
    found = set()
    for plane, path, headers in _presented(token):
        answer = await hub.ask(plane, "GET", path, headers=headers)
        found.add((answer.status, answer.body.get("code", "")))
    return found


async def _begin(hub: Target, seconds: float) -> str:
    """Begin a rotation; the next token."""
    before = (await hub.ask("control", "GET", "/api/tokens")).body
    if before["next"] is not None:
        raise NotHere("a rotation is under way")
    token = f"{hub.name}-{hub.clock.secret()}"
    hub.turning = not hub.own
    begun = await hub.ask("control", "POST", "/api/tokens/rotation", {"seconds": seconds, "token": token})
    hub.turning = hub.turning and begun.status == 201
    expect(begun.status == 201, f"the beginning gave {begun.status}: {begun.body}")
    expect(begun.body["active"] == before["active"] and token not in json.dumps(begun.body), f"it said {begun.body}")
    return token


@check("rotation: once begun both tokens are accepted, once abandoned the old one alone")
async def _abandoned(hub: Target) -> None:
    before = (await hub.ask("control", "GET", "/api/tokens")).body["active"]
    token = await _begin(hub, ABANDONED_SECONDS)
    try:
        both = await _answers(hub, hub.token) | await _answers(hub, token)
        expect(both == {(200, "")}, f"while both should be good they were answered {both}")
        again = await hub.ask("control", "POST", "/api/tokens/rotation", {"seconds": 60})
        expect((again.status, again.body["code"]) == (409, "rotation_under_way"), f"a second one gave {again.status}")
    finally:
        gone = await hub.ask("control", "DELETE", "/api/tokens/rotation")
        expect(gone.status == 200, f"to abandon it gave {gone.status}")
        hub.turning = False
    expect(await _answers(hub, token) == {(403, "invalid_token")}, "the abandoned token is still accepted")
    after = (await hub.ask("control", "GET", "/api/tokens")).body
    expect((after["active"], after["next"]) == (before, None), f"the tokens are not as they were: {after}")


@check("rotation: at its end the old token is refused for good, the new one goes on")
async def _rotated(hub: Target) -> None:
    if not hub.own:
        raise NotHere("the token of a hub in use is not turned")
    old, new = hub.token, await _begin(hub, 1.5)
    beat = {"node_id": f"{hub.name}-a"}
    told = (await hub.ask("control", "POST", "/api/hosts/heartbeat", beat)).body["token"]
    expect(told["retiring"] is True, f"a heartbeat with the old token was told {told}")
    hub.token = new
    told = (await hub.ask("control", "POST", "/api/hosts/heartbeat", beat)).body["token"]
    expect(told["retiring"] is False, f"a heartbeat with the new token was told {told}")
    for _ in range(50):
        state = (await hub.ask("control", "GET", "/api/tokens")).body
        if state["next"] is None:
            break
        await hub.clock.sleep(100)
    expect(state["next"] is None and bool(state["retired"]), f"the rotation did not end: {state}")
    expect(await _answers(hub, old) == {(403, "old_token")}, "the old token is not refused as old")
    expect(await _answers(hub, new) == {(200, "")}, "the new token is not accepted")
    ends = (await hub.ask("control", "GET", "/api/audit?event=TOKEN_ROTATION_FINALIZED")).body["events"]
    expect(len(ends) == 1, f"its end is told {len(ends)} times")


@check("policy: a draft is tried without effect")
async def _plan(hub: Target) -> None:
    draft = {"rules": [{"effect": "deny", "actions": ["submit"], "kinds": [hub.name]}]}
    told = await hub.ask("control", "POST", "/api/policies/plan", {"policy": draft})
    expect(told.status == 200 and "nodes" in told.body, f"it gave {told.status}: {told.body}")
    await hub.submit()
    await hub.finish(await hub.lease())


@check("policy: what the active one denies is 403 policy_denied, and version 0 allows it again")
async def _policy(hub: Target) -> None:
    if not hub.own:
        raise NotHere("the policy of a hub in use is not changed")
    draft = {"rules": [{"effect": "deny", "actions": ["submit"], "kinds": [hub.name]}]}
    made = await hub.ask("control", "POST", "/api/policies", {"policy": draft})
    headers = {"Authorization": f"Bearer {hub.token}", "If-Match": '"0"'}
    path = f"/api/policies/{made.body['version']}/activate"
    done = await hub.ask("control", "POST", path, headers=headers)
    expect(done.status == 200, f"activation gave {done.status}: {done.body}")
    no = await hub.ask("data", "POST", "/api/jobs", {"kind": hub.name})
    headers["If-Match"] = "*"
    back = await hub.ask("control", "POST", "/api/policies/0/activate", headers=headers)
    expect((no.status, no.body.get("code")) == (403, "policy_denied"), f"it gave {no.status}: {no.body}")
    expect(f"version {made.body['version']}" in no.body["detail"], f"it does not name what denied it: {no.body}")
    expect(back.status == 200, f"going back gave {back.status}")
    lines = (await hub.ask("control", "GET", "/api/audit?event=POLICY_DENY")).body["events"]
    expect(len(lines) == 1 and lines[0]["path"] == "/api/jobs", f"the audit log has {lines}")
    await hub.submit()
    await hub.finish(await hub.lease())


@check("audit: the chain of the log holds")
async def _audit(hub: Target) -> None:
    told = await hub.ask("control", "GET", "/api/audit?limit=1")
    expect(told.status == 200 and told.body["chain"]["ok"] is True, f"it gave {told.status}: {told.body}")


@check("audit: its files are proved from outside, and one changed byte is found")
async def _audit_files(hub: Target) -> None:
    if hub.logs is None:
        raise NotHere("the files of a hub in use are proved by `sheratan-hub audit verify`")
    files = chain_files(hub.logs / FILE_NAME)
    verdict = await asyncio.to_thread(verify, files)
    expect(verdict.broken is None and verdict.head.seq > 0, f"they are broken: {verdict.broken}")
    text = b"".join(file.read_bytes() for file in files)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / FILE_NAME
        copy.write_bytes(text.replace(b"AUTH_FAILURE", b"AUTH_FAILURF", 1))
        changed = await asyncio.to_thread(verify, [copy])
    expect(changed.broken is not None, "a changed line was not found")


@check("errors: hostile bodies are 400 as problem+json")
async def _hostile(hub: Target) -> None:
    headers = {"Authorization": f"Bearer {hub.token}"}
    for text in (b"", b"[]", b'{"kind":"a","kind":"b"}', b'{"kind":NaN}', b'{"kind":"\xff"}'):
        for plane, path in (("data", "/api/jobs"), ("control", "/api/hosts/heartbeat")):
            async with hub.session.post(hub.urls[plane] + path, data=text, headers=headers) as answer:
                kind = answer.headers.get("Content-Type", "")
                fine = answer.status == 400 and kind.startswith("application/problem+json")
                expect(fine, f"{text!r} to {path} gave {answer.status} {kind}")
                expect({"code", "detail", "type"} <= set(await answer.json(content_type=None)), "no problem+json")


@check("metrics: Prometheus text and the fleet's JSON on the control plane")
async def _metrics_control(hub: Target) -> None:
    await _metrics(hub, "control", "sheratan_nodes{", "nodes_online")


@check("metrics: Prometheus text and the fleet's JSON on the data plane")
async def _metrics_data(hub: Target) -> None:
    await _metrics(hub, "data", "sheratan_jobs{", "queue_depth")


async def _metrics(hub: Target, plane: str, family: str, key: str) -> None:
    text = (await hub.ask(plane, "GET", "/metrics")).body
    expect(family in text and hub.token not in text, "the text is not as it should be")
    expect(key in (await hub.ask(plane, "GET", "/metrics?format=json")).body, f"{key} is missing")
    headers = {"Authorization": f"Bearer {hub.token}", "Accept": "application/json"}
    expect(key in (await hub.ask(plane, "GET", "/metrics", headers=headers)).body, "Accept makes no difference")


BROKEN = (Failed, aiohttp.ClientError, TimeoutError, LookupError, TypeError, ValueError)
"""What a check ends with when a promise is broken: an answer of another shape is one too."""


async def run(
    control_url: str | None, data_url: str | None, token: str | None, echo: Echo, tls: ssl.SSLContext | None = None
) -> int:
    """Go through the list; 0 if every promise is kept, else 1. Without URLs a hub is started for it, and ended.
    SIGTERM does what Ctrl-C does.

    `tls` is for a hub whose certificate the system does not know, or that asks for one.
    """
    clock = SystemClock()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
    connector = aiohttp.TCPConnector(ssl=tls or True)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=40), connector=connector) as session:
        try:
            if control_url is None and data_url is None:
                async with own_hub(session, clock) as own:
                    return await go_through(own, echo)
            control, data = control_url or CONTROL_URL, data_url or DATA_URL
            return await on_running_hub(Target(session, control, data, token or DEFAULT_TOKEN, clock), echo)
        except Failed as why:
            echo(f"FAIL  the hub: {why}")
            return 1


async def on_running_hub(hub: Target, echo: Echo) -> int:
    """The list, on a hub that others use; whatever happens, what it made is taken away, and what stays is said."""
    for plane in hub.urls:
        try:
            await hub.ask(plane, "GET", "/livez", headers={})
        except (aiohttp.ClientError, TimeoutError) as why:
            raise Failed(f"nothing answers at {hub.urls[plane]}: {str(why) or type(why).__name__}") from why
    try:
        return await go_through(hub, echo)
    finally:
        for text in await hub.clean_up():
            echo(f"left  {text}")


async def go_through(hub: Target, echo: Echo) -> int:
    """One line a check, then the sum."""
    count = {"PASS": 0, "FAIL": 0, "SKIP": 0}
    for name, function in CHECKS:
        verdict, why = await verdict_of(function, hub)
        count[verdict] += 1
        echo(f"{verdict}  {name}{why and ': '}{why}")
    skipped = f", {count['SKIP']} skipped" if count["SKIP"] else ""
    where = "a hub of its own" if hub.own else " and ".join(dict.fromkeys(hub.urls.values()))
    echo(f"smoke: {count['PASS']} passed, {count['FAIL']} failed{skipped}, on {where}")
    return 1 if count["FAIL"] else 0


async def verdict_of(function: Check, hub: Target) -> tuple[str, str]:
    """PASS, FAIL or SKIP, and why."""
    try:
        await function(hub)
    except NotHere as why:
        return "SKIP", str(why)
    except BROKEN as why:
        return "FAIL", str(why) or type(why).__name__
    return "PASS", ""


@asynccontextmanager
async def own_hub(session: aiohttp.ClientSession, clock: Clock) -> AsyncIterator[Target]:
    """A hub in a process of its own, on free ports, with a store that goes with it."""
    control, data = _free_ports()
    token = clock.secret()
    with tempfile.TemporaryDirectory(prefix="sheratan-smoke-") as directory:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sheratan_hub", "serve"),
            cwd=directory,
            env=_environment(control, data, token, directory),
            stdout=asyncio.subprocess.DEVNULL,
        )
        try:
            hub = Target(session, f"http://127.0.0.1:{control}", f"http://127.0.0.1:{data}", token, clock)
            hub.own, hub.hmac_key, hub.logs = True, "", Path(directory) / "logs"
            await _until_ready(hub, process, clock)
            yield hub
        finally:
            status = await _end(process, clock)
    expect(status == 0, f"it ended with {status} after SIGTERM")


async def _end(process: asyncio.subprocess.Process, clock: Clock) -> int:
    """The exit status after SIGTERM, or after SIGKILL if it does not hear."""
    if process.returncode is None:
        process.terminate()
        if not await clock.wait(process.wait(), STOP_MS):
            process.kill()
    return await process.wait()


def _environment(control: int, data: int, token: str, directory: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SHERATAN_")}
    scheme = os.environ.get("SHERATAN_STORE_URL", "sqlite://").partition("://")[0]
    return {
        **kept,
        "SHERATAN_HUB_TOKEN": token,
        "SHERATAN_CONTROL_PORT": str(control),
        "SHERATAN_DATA_PORT": str(data),
        "SHERATAN_DATA_DIR": directory,
        "SHERATAN_STORE_URL": f"{scheme}://{directory}/store" if scheme != "memory" else "memory://",
        "SHERATAN_MAX_QUEUE_DEPTH": str(OWN_DEPTH),
    }


async def _until_ready(hub: Target, process: asyncio.subprocess.Process, clock: Clock) -> None:
    for _ in range(START_TRIES):
        if process.returncode is not None:
            raise Failed(f"the hub ended at its start with {process.returncode}")
        try:
            if (await hub.ask("control", "GET", "/readyz", headers={})).status == 200:
                return
        except aiohttp.ClientError:
            pass
        await clock.sleep(100)
    raise Failed("the hub did not become ready")


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]
