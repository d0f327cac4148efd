"""Which codes a route may be refused with: those of the gates, and its own from the route table; what each means."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sheratan_hub.rules.access import TOKEN_RIGHTS
from sheratan_hub.rules.command import Code

if TYPE_CHECKING:
    from sheratan_hub.web.plane import Route

MEANINGS: dict[Code, str] = {
    Code.BAD_JSON: "the body is not one strict JSON object",
    Code.BAD_REQUEST: "this is no HTTP request the hub understands",
    Code.MISSING_TOKEN: "no token was sent",
    Code.INVALID_TOKEN: "the token is not the hub's",
    Code.OLD_TOKEN: "the shared token was replaced",
    Code.EXPIRED_TOKEN: "the scoped token has expired",
    Code.FORBIDDEN_ROLE: "the token's role has not the right that the route asks for; the detail names both",
    Code.FORBIDDEN_NODE: "a node's token was used for another node, or for a lease of another node",
    Code.FOREIGN_ORIGIN: "a browser asks on behalf of a page of another site",
    Code.FOREIGN_HOST: "the Host header is not one the hub answers to",
    Code.LOOPBACK_ONLY: (
        "this is for the hub's own machine: what it asks of itself on the data plane, and every admin route"
    ),
    Code.UNKNOWN_PATH: "neither plane has this path",
    Code.JOB_NOT_FOUND: "no job has this id",
    Code.NODE_NOT_FOUND: "no node has this id",
    Code.RATE_LIMIT_NOT_FOUND: "the source has no rate limit, or none that was set at run time",
    Code.ACCESS_NOT_FOUND: "no scoped token has this id",
    Code.POLICY_DENIED: "the active policy denies it; the detail names version and rule",
    Code.POLICY_NOT_FOUND: "no version of the policy has this number",
    Code.METHOD_NOT_ALLOWED: "`Allow` lists those the path has",
    Code.PORT_MISMATCH: "the path belongs to the other plane; the detail names its port",
    Code.IDEMPOTENCY_KEY_COLLISION: "the key belongs to a job with another payload",
    Code.LEASE_SUPERSEDED: "the lease has ended: leased again, or finished by another",
    Code.LEASE_EXPIRED: (
        "an extension came after the lease's end; a result is still taken while nobody else has the job"
    ),
    Code.RESULT_CONFLICT: "this lease was ended with something else before; the first stands",
    Code.NOT_LEASED: "nobody holds the job",
    Code.NOT_HOLDER: "another node holds the job",
    Code.ALREADY_FINISHED: "a job that completed or failed cannot be cancelled",
    Code.NODE_ALIVE: "only a node that is DEAD, or drained and without a lease, can be forgotten",
    Code.BODY_TOO_LARGE: (
        "the body, or an entry of a batch; a lease whose result is too large stays, so its worker can report that as a"
        " failure"
    ),
    Code.NOT_FAILED: "a job that completed cannot be redriven",
    Code.NOT_ATTESTED: "the node's last heartbeat attested nothing that could be accepted",
    Code.ROTATION_UNDER_WAY: "abandon it first",
    Code.NO_ROTATION: "nothing to abandon, or the deadline has passed",
    Code.PRECONDITION_FAILED: "another policy version is active than `If-Match` says",
    Code.PRECONDITION_REQUIRED: "`If-Match` is missing",
    Code.UNSUPPORTED_MEDIA_TYPE: "a Content-Encoding, a Transfer-Encoding beside chunked, or a foreign charset",
    Code.INVALID_FIELD: "a field is missing, unknown or out of its bounds; the detail names it",
    Code.TOO_DEEP: "nested deeper than `[limits] json_depth`",
    Code.BATCH_TOO_LARGE: "more entries than `[limits] batch_jobs`",
    Code.RESULT_INTEGRITY_FAIL: "the result does not match its proof; the lease stays as it was",
    Code.DEPENDENCY_CYCLE: "jobs of the batch depend on each other in a circle, or one on itself",
    Code.UNKNOWN_DEPENDENCY: "`depends_on` names neither a job nor a `ref` of the batch",
    Code.MISSION_NOT_FOUND: "nobody has submitted it, and no job names it",
    Code.QUEUE_FULL: "the queue holds `[queue] max_depth` waiting jobs; 503 if `[queue] backpressure_mode` says so",
    Code.RATE_LIMITED: "the source has submitted as much as it may in a minute",
    Code.BUSY: "too many requests wait for the store",
    Code.UNAVAILABLE: "the store cannot read or write now",
    Code.AUDIT_UNAVAILABLE: "the audit log cannot be written, so nothing is changed",
    Code.DRAINING: "the hub is shutting down",
    Code.INTERNAL: "a bug; the log tells more under the `request_id`",
}
"""What docs/protocol.md says of each."""

TOKEN_CODES = (Code.MISSING_TOKEN, Code.INVALID_TOKEN, Code.OLD_TOKEN, Code.EXPIRED_TOKEN)
BODY_CODES = (
    Code.BAD_JSON,
    Code.BODY_TOO_LARGE,
    Code.UNSUPPORTED_MEDIA_TYPE,
    Code.INVALID_FIELD,
    Code.TOO_DEEP,
)
WRITING_CODES = (Code.BUSY, Code.UNAVAILABLE, Code.AUDIT_UNAVAILABLE, Code.DRAINING)


def codes_of(route: Route, plane: str, shadowed: bool = False) -> list[Code]:
    """Every code that the route may be refused with on this plane, in the order of `Code`.

    `shadowed`: another route's literal path is one of its own, so that its method may be refused there.
    """
    found = {*_of_gates(route, plane), *_of_body(route), *_of_store(route), *route.codes}
    if shadowed:
        found.add(Code.METHOD_NOT_ALLOWED)
    return [code for code in Code if code in found]


def _of_gates(route: Route, plane: str) -> Iterator[Code]:
    yield from (Code.BAD_REQUEST, Code.FOREIGN_HOST, Code.FOREIGN_ORIGIN, Code.INTERNAL)
    if "{" in route.path:
        yield Code.UNKNOWN_PATH  # with nothing in its place
    if route.right in TOKEN_RIGHTS or route.right in ("metrics", "docs"):
        yield from TOKEN_CODES
    if route.right in TOKEN_RIGHTS or route.right == "metrics":
        yield Code.FORBIDDEN_ROLE
    if route.right == "work":
        yield Code.FORBIDDEN_NODE
    if route.right == "admin":
        yield from (Code.LOOPBACK_ONLY, Code.POLICY_DENIED)
    if route.right == "local" and plane == "data":
        yield Code.LOOPBACK_ONLY


def _of_body(route: Route) -> Iterator[Code]:
    if route.form is not None:
        yield from BODY_CODES
    if route.batch:
        yield Code.BATCH_TOO_LARGE
    if route.query is not None:
        yield Code.INVALID_FIELD


def _of_store(route: Route) -> Iterator[Code]:
    if route.method != "GET" or route.acts:
        yield from WRITING_CODES
    elif route.right not in ("local", "docs"):
        yield Code.UNAVAILABLE
