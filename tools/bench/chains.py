"""What a connection of our own client does: a generator that yields a request's bytes and is sent the answer's body."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import orjson

from tools.bench.requests import BULK_JOBS, KIND, RESULT, Wire, bulk, job, mixed_bulk, submit

Chain = Generator[bytes, bytes, None]
BATCH = 100
WAIT_SECONDS = 10


class Dry(Exception):
    """A pull got nothing: what was queued is used up."""


class Wrong(Exception):
    """An answer with status 200 that is not what was asked for."""


class Tally:
    """What all connections have done together. `over` tells them to begin nothing new."""

    def __init__(self, wire: Wire, jobs: int) -> None:
        self.wire, self.most = wire, jobs
        self.done = 0
        self.begun = 0
        self.topped = 0
        self.over = False
        self.seconds: list[float] | None = None
        """How long each job took, for chains that time whole jobs rather than requests."""

    def may_begin(self, jobs: int) -> bool:
        """Whether that many more may be begun; if so they are."""
        if self.over or (self.most and self.begun + jobs > self.most):
            return False
        self.begun += jobs
        return True


def empty(tally: Tally, place: int) -> Chain:
    """Submits one job after the other; the empty handler gets the same."""
    (request,) = submit(tally.wire)
    while tally.may_begin(1):
        yield request
        tally.done += 1


def fill(tally: Tally, place: int, make: Callable[[Wire], bytes] = bulk) -> Chain:
    """Submits in bulk."""
    request = make(tally.wire)
    while tally.may_begin(BULK_JOBS):
        yield from accepted(request)
        tally.done += BULK_JOBS


def accepted(request: bytes) -> Chain:
    """One bulk, every job of which must be taken."""
    taken = (yield request).count(b'"accepted"')
    if taken != BULK_JOBS:
        raise Wrong(f"{taken} of {BULK_JOBS} jobs of a bulk were accepted")


def pull_then_result(tally: Tally, place: int) -> Chain:
    """A pull and a result, one request each."""
    node = f"bench-{place}"
    pull = tally.wire.post("/api/jobs/pull", orjson.dumps({"node_id": node, "max": 1}))
    while tally.may_begin(1):
        (lease,) = leases((yield pull))
        yield result(tally, node, lease)
        tally.done += 1


def steady(tally: Tally, place: int) -> Chain:
    """The same, and whoever completes the 500th job since the last bulk submits the next: the queue stays as deep."""
    node = f"bench-{place}"
    pull = tally.wire.post("/api/jobs/pull", orjson.dumps({"node_id": node, "max": 1}))
    more = bulk(tally.wire)
    while tally.may_begin(1):
        (lease,) = leases((yield pull))
        yield result(tally, node, lease)
        tally.done += 1
        if tally.done - tally.topped >= BULK_JOBS:
            tally.topped += BULK_JOBS
            yield from accepted(more)


def result_with_pull(tally: Tally, place: int) -> Chain:
    """One request a job: each result carries the next pull."""
    node = f"bench-{place}"
    pull = {"node_id": node, "max": 1}
    if not tally.may_begin(1):
        return
    (lease,) = leases((yield tally.wire.post("/api/jobs/pull", orjson.dumps(pull))))
    while tally.may_begin(1):
        answer = yield result(tally, node, lease, pull=pull)
        tally.done += 1
        (lease,) = leases(answer)
    yield result(tally, node, lease)
    tally.done += 1


def batches(tally: Tally, place: int) -> Chain:
    """100 results a request, which carries the next pull of 100."""
    node = f"bench-{place}"
    pull = {"node_id": node, "max": BATCH}
    if not tally.may_begin(BATCH):
        return
    held = leases((yield tally.wire.post("/api/jobs/pull", orjson.dumps(pull))))
    while tally.may_begin(BATCH):
        answer = yield results(tally, node, held, pull=pull)
        count_results(tally, answer, len(held))
        held = leases(answer)
    count_results(tally, (yield results(tally, node, held)), len(held))


def drain(tally: Tally, place: int) -> Chain:
    """Pulls of 100 and their results until so many jobs are done."""
    node = f"bench-{place}"
    while tally.may_begin(1):
        want = 1 + min(BATCH - 1, tally.most - tally.begun)
        tally.begun += want - 1
        held = leases((yield tally.wire.post("/api/jobs/pull", orjson.dumps({"node_id": node, "max": want}))))
        tally.begun -= want - len(held)
        count_results(tally, (yield results(tally, node, held)), len(held))


def count_results(tally: Tally, answer: bytes, n: int) -> None:
    done = sum(one.get("status") == "completed" for one in orjson.loads(answer)["results"])
    if done != n:
        raise Wrong(f"{done} of {n} results of a batch were taken")
    tally.done += n


def work(tally: Tally, place: int) -> Chain:
    """A worker that long-polls."""
    body = {"node_id": "bench-worker", "max": 1, "wait_seconds": WAIT_SECONDS}
    pull = tally.wire.post("/api/jobs/pull", orjson.dumps(body))
    while True:
        for lease in leases((yield pull), dry=False):
            yield result(tally, "bench-worker", lease)


def submit_and_wait(tally: Tally, place: int) -> Chain:
    """Submits one job, waits for its end, and only then the next."""
    tally.seconds = []
    request = tally.wire.post("/api/jobs", orjson.dumps(job()))
    while tally.may_begin(1):
        began = time.perf_counter()
        job_id = orjson.loads((yield request))["job_id"]
        ended = orjson.loads((yield tally.wire.get(f"/api/jobs/{job_id}?wait_seconds={WAIT_SECONDS}")))
        if ended["status"] != "completed":
            raise Wrong(f"a job that was waited for is {ended['status']}")
        tally.seconds.append(time.perf_counter() - began)
        tally.done += 1


def leases(body: bytes, *, dry: bool = True) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = orjson.loads(body)["jobs"]
    if dry and not found:
        raise Dry
    return found


def outcome(node: str, lease: dict[str, Any]) -> dict[str, Any]:
    return {"lease_id": lease["lease_id"], "node_id": node, "ok": True, "result": RESULT}


def result(tally: Tally, node: str, lease: dict[str, Any], **more: Any) -> bytes:
    if lease["kind"] != KIND:
        raise Wrong(f"leased a job of kind {lease['kind']}")
    return tally.wire.post(f"/api/jobs/{lease['job_id']}/result", orjson.dumps({**outcome(node, lease), **more}))


def results(tally: Tally, node: str, held: list[dict[str, Any]], **more: Any) -> bytes:
    entries = [{"job_id": lease["job_id"], **outcome(node, lease)} for lease in held]
    return tally.wire.post("/api/results", orjson.dumps({"results": entries, **more}))


CHAINS: dict[str, Callable[[Tally, int], Chain]] = {
    "empty": empty,
    "fill": fill,
    "fill-mixed": partial(fill, make=mixed_bulk),
    "pull+result": pull_then_result,
    "steady": steady,
    "result-pull": result_with_pull,
    "batches": batches,
    "drain": drain,
    "idle": submit_and_wait,
}
FOREVER = {"idle": work}
"""Chains that a connection of its own runs beside the others, and that nobody waits for."""
