"""The security audit log: one hash-chained JSON line an event, folded under floods, never a secret in it.

A line's `hash` is the SHA-256 of its own text without the `hash` member; `prev_hash` is the line before's.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from sheratan_hub.clock import Clock, rfc3339
from sheratan_hub.items import HUB, Committed, Origin
from sheratan_hub.rules.command import Code, Event

FOLD_MS = 1000
FOLDED_MAX = 4096
START_HASH = "0" * 64

NAMES = {
    "hub.start": "HUB_START",
    "hub.stop": "HUB_STOP",
    "key.hit": "IDEMPOTENCY_HIT",
    "pull.saturated": "INFLIGHT_SATURATED",
    "node.online": "NODE_ONLINE",
    "node.stale": "NODE_STALE",
    "node.dead": "NODE_DEAD",
    "node.forgotten": "NODE_FORGOTTEN",
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
    """Appends to one file, going on with the chain that is in it. Raises `OSError` when it cannot be opened."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path, self._clock = path, clock
        self._folded: OrderedDict[Fold, tuple[int, int, Origin, dict[str, Any]]] = OrderedDict()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        self._seq, self._prev = self._last()

    def _last(self) -> tuple[int, str]:
        """The number and hash of the last whole line. A line cut short by a crash is ended, and stays visible."""
        end = os.fstat(self._file).st_size
        tail = os.pread(self._file, 65536, max(0, end - 65536))
        if tail and not tail.endswith(b"\n"):
            os.write(self._file, b"\n")
        for line in reversed(tail.split(b"\n")):
            try:
                last = orjson.loads(line)
                return int(last["seq"]), str(last["hash"])
            except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
                continue
        return 0, START_HASH

    def committed(self, committed: Committed) -> None:
        """The observer: writes what of a batch is for the audit log."""
        for happened in committed.happened:
            for event in happened.events:
                name = self._name(event)
                if name is not None:
                    self._take(name, event, happened.origin)

    def _name(self, event: Event) -> str | None:
        if "cause" in event.meta:
            return "LEASE_REAP"
        return NAMES.get(event.event)

    def _take(self, name: str, event: Event, origin: Origin) -> None:
        meta = dict(event.meta)
        reason = str(meta.pop("cause", None) or meta.pop("reason", None) or "")
        detail = {"job_id": event.job_id, **meta} if event.job_id else meta
        node_id = meta.pop("node_id", None) or origin.node_id
        detail.pop("node_id", None)
        if event.event.startswith("node.") and event.actor != "hub":
            node_id = event.actor
        if origin is HUB:
            self._write(name, origin, node_id, reason, detail)
            return
        fold = Fold(name, origin.plane, node_id or origin.remote_addr, origin.route, reason)
        since, count, _, _ = self._folded.get(fold, (-FOLD_MS, 0, origin, detail))
        if self._clock.now() - since < FOLD_MS:
            self._folded[fold] = (since, count + 1, origin, detail)
            return
        self._unfold(fold)
        self._folded[fold] = (self._clock.now(), 0, origin, detail)
        self._write(name, origin, node_id, reason, detail)
        if len(self._folded) > FOLDED_MAX:
            self._unfold(next(iter(self._folded)))

    def _unfold(self, fold: Fold) -> None:
        _, count, origin, detail = self._folded.pop(fold, (0, 0, HUB, {}))
        if count:
            node_id = fold.who if fold.who != origin.remote_addr else None
            self._write(fold.event, origin, node_id, fold.reason, detail if count == 1 else {}, count)

    def flush(self, everything: bool = False) -> None:
        """Write the counts of folded events whose second is over (or of all)."""
        now = self._clock.now()
        for fold in [fold for fold, (since, *_) in self._folded.items() if everything or now - since >= FOLD_MS]:
            self._unfold(fold)

    def _write(
        self, name: str, origin: Origin, node_id: str | None, reason: str, detail: dict[str, Any], count: int = 1
    ) -> None:
        record = {
            "seq": self._seq + 1,
            "ts": rfc3339(self._clock.now()),
            "event": name,
            "plane": origin.plane,
            "remote_addr": origin.remote_addr,
            "node_id": node_id,
            "path": origin.path,
            "reason": reason,
            "detail": detail,
            **({"count": count} if count > 1 else {}),
            "prev_hash": self._prev,
        }
        text = orjson.dumps(record)
        digest = hashlib.sha256(text).hexdigest()
        line = b'%b,"hash":"%b"}\n' % (text[:-1], digest.encode())
        if os.write(self._file, line) != len(line):
            os.write(self._file, b"\n")
            raise OSError(f"a line of {self.path} was cut short")
        self._seq, self._prev = self._seq + 1, digest

    def close(self) -> None:
        """Write what is still folded, sync, close. Safe to call twice."""
        if self._file >= 0:
            self.flush(everything=True)
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1
