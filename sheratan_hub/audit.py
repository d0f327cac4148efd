"""What goes into the security audit log: events by their names there, folded under floods, never a secret in it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sheratan_hub.audit_file import AuditFile
from sheratan_hub.audit_lines import START_HASH as START_HASH
from sheratan_hub.audit_lines import Head
from sheratan_hub.clock import Clock, rfc3339
from sheratan_hub.items import HUB, Committed, Origin
from sheratan_hub.rules.command import Code, Event, Refused

FOLD_MS = 1000
FOLDED_MAX = 4096

NEVER = frozenset(
    (
        "params",
        "payload",
        "result",
        "error",
        "token",
        "secret",
        "hmac_key",
        "idempotency_key",
        "lease_id",
        "authorization",
    )
)
"""What no `detail` holds, whatever an event's meta says. What is called `key` is cut to its first 8 characters."""

TEXT_CHARS = 200
LIST_MAX = 20

NAMES = {
    "hub.start": "HUB_START",
    "hub.stop": "HUB_STOP",
    "hub.reload": "ADMIN_ACTION",
    "key.hit": "IDEMPOTENCY_HIT",
    "pull.saturated": "INFLIGHT_SATURATED",
    "node.online": "NODE_ONLINE",
    "node.stale": "NODE_STALE",
    "node.dead": "NODE_DEAD",
    "node.forgotten": "NODE_FORGOTTEN",
    "job.superseded": "RESULT_SUPERSEDED",
    "job.judged": "RESULT_SUPERSEDED",
    "job.failed": "DLQ_ENQUEUE",
    "job.redriven": "DLQ_REDRIVE",
    "jobs.pruned": "ADMIN_ACTION",
    "admin.action": "ADMIN_ACTION",
    "node.drain": "NODE_DRAIN",
    "node.resume": "NODE_RESUME",
    "fleet.silent": "FLEET_SILENT",
    "attestation.first_seen": "ATTESTATION_FIRST_SEEN",
    "attestation.drift": "ATTESTATION_DRIFT",
    "attestation.spoof_suspect": "ATTESTATION_SPOOF_SUSPECT",
    "attestation.accepted": "ATTESTATION_ACCEPTED",
    "policy.created": "POLICY_CREATED",
    "policy.activated": "POLICY_ACTIVATED",
    f"refused.{Code.POLICY_DENIED}": "POLICY_DENY",
    f"refused.{Code.MISSING_TOKEN}": "AUTH_FAILURE",
    f"refused.{Code.INVALID_TOKEN}": "AUTH_FAILURE",
    f"refused.{Code.OLD_TOKEN}": "AUTH_FAILURE",
    f"refused.{Code.EXPIRED_TOKEN}": "AUTH_FAILURE",
    f"refused.{Code.FORBIDDEN_ROLE}": "AUTH_FAILURE",
    f"refused.{Code.FORBIDDEN_NODE}": "AUTH_FAILURE",
    "token.accepted_next": "TOKEN_ACCEPTED_NEXT",
    "token.accepted_old": "TOKEN_ACCEPTED_OLD",
    "token.retired_used": "TOKEN_RETIRED",
    "token.rotation_started": "TOKEN_ROTATION_STARTED",
    "token.rotation_finalized": "TOKEN_ROTATION_FINALIZED",
    "token.rotation_abandoned": "ADMIN_ACTION",
    "access.created": "ACCESS_CREATED",
    "access.revoked": "ACCESS_REVOKED",
    f"refused.{Code.PORT_MISMATCH}": "PORT_MISMATCH",
    f"refused.{Code.QUEUE_FULL}": "BACKPRESSURE_DROP",
    f"refused.{Code.RATE_LIMITED}": "RATE_LIMITED",
    f"refused.{Code.IDEMPOTENCY_KEY_COLLISION}": "IDEMPOTENCY_KEY_COLLISION",
    f"refused.{Code.RESULT_INTEGRITY_FAIL}": "RESULT_INTEGRITY_FAIL",
}
"""The audit event of what the observers are told; `LEASE_REAP` is every lease that the hub itself ended."""


class Fold(NamedTuple):
    """What makes two events equal: they are folded when they come from one origin within a second."""

    event: str
    plane: str
    who: str | None
    route: str | None
    reason: str


class Audit:
    """Writes one log, going on with the chain that is in it. Raises `OSError` when it cannot be opened.

    `required`: `refusal` refuses changes while the log cannot be written. `dead_letters` false: there is no such list.
    """

    def __init__(
        self,
        path: Path,
        clock: Clock,
        *,
        max_bytes: int = 0,
        keep_files: int = 0,
        required: bool = True,
        dead_letters: bool = True,
    ) -> None:
        self.path, self._clock = path, clock
        self._required, self._dead_letters = required, dead_letters
        self._folded: OrderedDict[Fold, tuple[int, int, Origin, dict[str, Any]]] = OrderedDict()
        self.file = AuditFile(path, max_bytes=max_bytes, keep_files=keep_files)

    def adopt(self, *, max_bytes: int, keep_files: int, required: bool, dead_letters: bool) -> None:
        """Go by other settings from now on; a file that was moved away is opened anew."""
        self._required, self._dead_letters = required, dead_letters
        self.file.adopt(max_bytes, keep_files)

    @property
    def head(self) -> Head:
        """The last line written."""
        return self.file.head

    def refusal(self) -> Refused | None:
        """The "no" for a change whose audit lines could not be written, None if they can be. Asked before a commit."""
        trouble = self.file.check()
        if trouble is None or not self._required:
            return None
        text = f"nothing is changed while the audit log cannot be written: {trouble}"
        return Refused(Code.AUDIT_UNAVAILABLE, text, retry_after_ms=5000)

    def committed(self, committed: Committed) -> None:
        """The observer: writes what of a batch is for the audit log."""
        for happened in committed.happened:
            for event in happened.events:
                if "cause" in event.meta:
                    self._take("LEASE_REAP", event, happened.origin)
                name = NAMES.get(event.event)
                if name is not None and self._is_told(event):
                    self._take(name, event, happened.origin)
        self.file.write()

    def _is_told(self, event: Event) -> bool:
        """Of what was pruned, only dead letters; and of these nothing where no such list is wanted."""
        if event.event == "jobs.pruned":
            return self._dead_letters and event.meta.get("status") == "failed"
        return self._dead_letters or event.event != "job.failed"

    def _take(self, name: str, event: Event, origin: Origin) -> None:
        meta = dict(event.meta)
        reason = _reason(name, meta)
        detail = {"job_id": event.job_id, **meta} if event.job_id else meta
        node_id = meta.pop("node_id", None) or origin.node_id
        detail.pop("node_id", None)
        if node_id is None and event.event.startswith(("node.", "attestation.")) and event.actor != "hub":
            node_id = event.actor
        if name == "ADMIN_ACTION" or (origin is HUB and name != "DLQ_ENQUEUE"):
            self._add(name, origin, node_id, reason, detail)
            return
        fold = Fold(name, origin.plane, node_id or origin.remote_addr, origin.route, reason)
        since, count, _, _ = self._folded.get(fold, (-FOLD_MS, 0, origin, detail))
        if self._clock.now() - since < FOLD_MS:
            self._folded[fold] = (since, count + 1, origin, detail)
            return
        self._unfold(fold)
        self._folded[fold] = (self._clock.now(), 0, origin, detail)
        self._add(name, origin, node_id, reason, detail)
        if len(self._folded) > FOLDED_MAX:
            self._unfold(next(iter(self._folded)))

    def _unfold(self, fold: Fold) -> None:
        _, count, origin, detail = self._folded.pop(fold, (0, 0, HUB, {}))
        if count:
            node_id = fold.who if fold.who != origin.remote_addr else None
            self._add(fold.event, origin, node_id, fold.reason, detail if count == 1 else {}, count)

    def flush(self, everything: bool = False) -> None:
        """Write the counts of folded events whose second is over (or of all)."""
        now = self._clock.now()
        for fold in [fold for fold, (since, *_) in self._folded.items() if everything or now - since >= FOLD_MS]:
            self._unfold(fold)
        self.file.write()

    def _add(
        self, name: str, origin: Origin, node_id: str | None, reason: str, detail: dict[str, Any], count: int = 0
    ) -> None:
        self.file.add(
            {
                "ts": rfc3339(self._clock.now()),
                "event": name,
                "plane": origin.plane,
                "remote_addr": origin.remote_addr,
                "node_id": node_id if node_id is None else _text(node_id),
                "path": origin.path if origin.path is None else _text(origin.path),
                "reason": reason,
                "detail": clean(detail),
                **({"count": count} if count else {}),
            }
        )

    def close(self) -> None:
        """Write what is still folded, sync, close. Safe to call twice."""
        self.flush(everything=True)
        self.file.close()


def clean(detail: Mapping[str, Any]) -> dict[str, Any]:
    """The detail without what may not be in it: secrets, payloads, whole keys, long texts, anything deep."""
    kept = {_text(str(name)): _value(value) for name, value in detail.items() if name not in NEVER}
    if isinstance(kept.get("key"), str):
        kept["key"] = kept["key"][:8]
    return kept


def _value(value: Any) -> Any:
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else str(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_text(str(one)) for one in list(value)[:LIST_MAX]]
    return _text(str(value))


def _text(text: str) -> str:
    """At most 200 characters, and nothing in them that is no Unicode."""
    if text.isascii():
        return text[:TEXT_CHARS]
    return text[:TEXT_CHARS].encode("utf-8", "backslashreplace").decode()


def _reason(name: str, meta: dict[str, Any]) -> str:
    """Why it happened, taken out of `meta`: for a lease that the hub ended what ended it, else the event's reason."""
    if name == "LEASE_REAP":
        return str(meta.pop("cause"))
    meta.pop("cause", None)
    return str(meta.pop("reason", None) or "")
