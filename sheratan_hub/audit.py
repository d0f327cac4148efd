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
    f"refused.{Code.MISSING_TOKEN}": "AUTH_FAILURE",
    f"refused.{Code.INVALID_TOKEN}": "AUTH_FAILURE",
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
    """Appends to one file, going on with the chain that is in it. Raises `OSError` when it cannot be opened."""

    def __init__(self, path: Path, clock: Clock, *, dead_letters: bool = True) -> None:
        self.path, self._clock, self._dead_letters = path, clock, dead_letters
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
                if "cause" in event.meta:
                    self._take("LEASE_REAP", event, happened.origin)
                name = NAMES.get(event.event)
                if name is not None and self._is_told(event):
                    self._take(name, event, happened.origin)

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


def _reason(name: str, meta: dict[str, Any]) -> str:
    """Why it happened, taken out of `meta`: for a lease that the hub ended what ended it, else the event's reason."""
    if name == "LEASE_REAP":
        return str(meta.pop("cause"))
    meta.pop("cause", None)
    return str(meta.pop("reason", None) or "")
