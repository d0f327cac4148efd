"""Whether a result is what its worker meant: SHA-256 or HMAC over the canonical text (wire contract, Integrity)."""

from __future__ import annotations

import hmac
from typing import Literal, NamedTuple

from sheratan_hub.canonical import result_sha256, result_sig
from sheratan_hub.rules.command import Code, Refused

Mode = Literal["none", "sha256", "hmac"]
STRENGTH: dict[str, int] = {"none": 0, "sha256": 1, "hmac": 2}


class Proof(NamedTuple):
    """What came with a result."""

    mode: Mode
    sha256: str | None = None
    sig: str | None = None


class Demand(NamedTuple):
    """What the hub is configured to ask for; `key` only for hmac."""

    mode: Mode = "sha256"
    required: bool = False
    key: str = ""

    def __repr__(self) -> str:
        return f"Demand({self.mode}, required={self.required})"


def check_result(job_id: str, ok: bool, result: bytes, error: bytes, proof: Proof | None, demand: Demand) -> bool:
    """Whether there was something to check and it held. Refused with `result_integrity_fail` if it did not.

    The hub decides: a weaker mode than configured is refused. No proof at all is refused only if required; a signature
    alone is none where the hub has no key to check it with.
    """
    if proof is None or (proof.mode == "none" and demand.mode == "none") or _unreadable(proof, demand):
        if demand.required and demand.mode != "none":
            raise _fail(job_id, "missing_integrity", "an integrity proof is required")
        return False
    if STRENGTH[proof.mode] < STRENGTH[demand.mode]:
        raise _fail(job_id, "mode_downgrade", f"{proof.mode} is weaker than the configured {demand.mode}")
    if proof.mode == "hmac" and demand.key:
        if not _equal(proof.sig, result_sig(demand.key, job_id, ok, result, error)):
            raise _fail(job_id, "sig_mismatch", "the signature does not match")
        return True
    if proof.sha256 is None:
        raise _fail(job_id, "missing_integrity", "sha256 is missing")
    if not _equal(proof.sha256, result_sha256(job_id, ok, result, error)):
        raise _fail(job_id, "sha_mismatch", "the SHA-256 does not match")
    return True


def _unreadable(proof: Proof, demand: Demand) -> bool:
    return proof.mode == "hmac" and not demand.key and proof.sha256 is None and proof.sig is not None


def _equal(given: str | None, right: str) -> bool:
    return given is not None and hmac.compare_digest(given.lower().encode(), right.encode())


def _fail(job_id: str, reason: str, text: str) -> Refused:
    return Refused(
        Code.RESULT_INTEGRITY_FAIL, f"the result of job {job_id} was not taken: {text}; the lease stays", reason=reason
    )
