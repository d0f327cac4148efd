"""The one table from code to HTTP status, and the one form of error: problem+json (RFC 9457)."""

from __future__ import annotations

from typing import Any

import orjson

from sheratan_hub.rules.command import Code, Quota, Refused
from sheratan_hub.web.answer import PROBLEM, Answer

STATUS: dict[Code, int] = {
    Code.BAD_JSON: 400,
    Code.BAD_REQUEST: 400,
    Code.MISSING_TOKEN: 403,
    Code.INVALID_TOKEN: 403,
    Code.OLD_TOKEN: 403,
    Code.EXPIRED_TOKEN: 403,
    Code.FORBIDDEN_ROLE: 403,
    Code.FORBIDDEN_NODE: 403,
    Code.FOREIGN_HOST: 403,
    Code.FOREIGN_ORIGIN: 403,
    Code.LOOPBACK_ONLY: 403,
    Code.UNKNOWN_PATH: 404,
    Code.JOB_NOT_FOUND: 404,
    Code.NODE_NOT_FOUND: 404,
    Code.RATE_LIMIT_NOT_FOUND: 404,
    Code.ACCESS_NOT_FOUND: 404,
    Code.METHOD_NOT_ALLOWED: 405,
    Code.PORT_MISMATCH: 410,
    Code.IDEMPOTENCY_KEY_COLLISION: 409,
    Code.LEASE_SUPERSEDED: 409,
    Code.LEASE_EXPIRED: 409,
    Code.RESULT_CONFLICT: 409,
    Code.NOT_LEASED: 409,
    Code.NOT_HOLDER: 409,
    Code.ALREADY_FINISHED: 409,
    Code.NODE_ALIVE: 409,
    Code.NOT_FAILED: 409,
    Code.NOT_ATTESTED: 409,
    Code.ROTATION_UNDER_WAY: 409,
    Code.NO_ROTATION: 409,
    Code.POLICY_DENIED: 403,
    Code.POLICY_NOT_FOUND: 404,
    Code.PRECONDITION_FAILED: 412,
    Code.PRECONDITION_REQUIRED: 428,
    Code.BODY_TOO_LARGE: 413,
    Code.UNSUPPORTED_MEDIA_TYPE: 415,
    Code.INVALID_FIELD: 422,
    Code.TOO_DEEP: 422,
    Code.BATCH_TOO_LARGE: 422,
    Code.RESULT_INTEGRITY_FAIL: 422,
    Code.DEPENDENCY_CYCLE: 422,
    Code.UNKNOWN_DEPENDENCY: 422,
    Code.MISSION_NOT_FOUND: 404,
    Code.QUEUE_FULL: 429,
    Code.RATE_LIMITED: 429,
    Code.BUSY: 503,
    Code.UNAVAILABLE: 503,
    Code.AUDIT_UNAVAILABLE: 503,
    Code.DRAINING: 503,
    Code.INTERNAL: 500,
}
"""`queue_full` alone may be configured to be 503; see `status_of`."""


def status_of(code: Code, backpressure: int = 429) -> int:
    """The HTTP status of a code; `backpressure` is the configured one for `queue_full`."""
    return backpressure if code is Code.QUEUE_FULL else STATUS[code]


def problem(no: Refused, backpressure: int = 429, **more: Any) -> Answer:
    """The answer to a refused request."""
    status = status_of(no.code, backpressure)
    headers = quota_headers(no.quota)
    if no.retry_after_ms or status in (429, 503):
        headers["Retry-After"] = str(max(1, -(-no.retry_after_ms // 1000)))
    return Answer(status, orjson.dumps(problem_body(no, backpressure, **more)), PROBLEM, headers)


def problem_body(no: Refused, backpressure: int = 429, **more: Any) -> dict[str, Any]:
    """The same as a JSON object."""
    return {
        "type": f"urn:sheratan-hub:error:{no.code}",
        "title": no.code.replace("_", " "),
        "status": status_of(no.code, backpressure),
        "detail": no.text,
        "code": no.code,
        "ok": False,
        **more,
    }


def quota_headers(quota: Quota | None) -> dict[str, str]:
    """What a source may still submit, in the form of draft-ietf-httpapi-ratelimit-headers."""
    if quota is None:
        return {}
    left = f'"source";r={quota.left}'
    return {
        "RateLimit-Policy": f'"source";q={quota.per_minute};w=60',
        "RateLimit": left if quota.left else f"{left};t={max(1, -(-quota.next_in_ms // 1000))}",
    }


def entry(no: Refused, backpressure: int = 429) -> dict[str, Any]:
    """A refused entry of a batch, in the place of its answer."""
    return {"ok": False, "code": no.code, "status": status_of(no.code, backpressure), "detail": no.text}
