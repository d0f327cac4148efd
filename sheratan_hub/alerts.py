"""When lines of the audit log make an alert: rules, windows, cool-downs. Knows the lines' times only, so that a line
that is read again makes the same alert again, under the same id.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import msgspec

from sheratan_hub.clock import rfc3339
from sheratan_hub.config import AlertRule, is_loopback

GROUPS_MAX = 1000
"""So many addresses or nodes are counted apart for one rule; the longest silent one is forgotten first."""

CHAIN = "AUDIT_CHAIN"
"""What the watcher itself makes of a log that does not hang together; in no audit log."""

CHAIN_RULE = AlertRule(CHAIN)

Record = Mapping[str, Any]


class Alert(msgspec.Struct, frozen=True):
    """One line of alerts.jsonl. `origin` is what it was counted for, None for all; `ts` is that of the last line."""

    id: str
    ts: str
    rule: str
    event: str
    reason: str
    origin: str | None
    count: int
    window_seconds: int
    remote_addr: str | None
    node_id: str | None
    from_seq: int
    to_seq: int
    text: str


class Group(msgspec.Struct):
    """What was counted for one address, node or all: [time, count, seq] of the lines, and until when it is silent."""

    hits: list[tuple[int, int, int]] = []
    silent_until: int = 0


State = dict[str, dict[str, Group]]


class Judge:
    """Takes line after line; `state` and `now` are all that it remembers, fit to be stored."""

    def __init__(self, rules: Mapping[str, AlertRule], state: State | None = None, now: int = 0) -> None:
        self._rules: dict[str, list[tuple[str, AlertRule]]] = {}
        for name, rule in {**rules, "audit_chain": CHAIN_RULE}.items():
            self._rules.setdefault(rule.event, []).append((name, rule))
        self._groups = {name: OrderedDict(groups) for name, groups in (state or {}).items()}
        self.now = now
        """The time (ms) of the latest line."""

    def take(self, record: Record) -> Iterator[Alert]:
        """The alerts that this line makes."""
        for name, rule in self._rules.get(str(record.get("event")), ()):
            if _counts(rule, record):
                alert = self._count(name, rule, record)
                if alert is not None:
                    yield alert

    def _count(self, name: str, rule: AlertRule, record: Record) -> Alert | None:
        now = self.now = max(self.now, _ms(record))
        origin = _origin(rule, record)
        group = self._group(name, origin or "")
        group.hits.append((now, _number(record.get("count"), 1), _number(record.get("seq"), 0)))
        _shorten(group, now - rule.window_seconds * 1000, rule.more_than)
        total = sum(count for _, count, _ in group.hits)
        if total <= rule.more_than or now < group.silent_until:
            return None
        group.silent_until = now + rule.cooldown_seconds * 1000
        return _alert(name, rule, record, origin, group, total)

    def _group(self, name: str, origin: str) -> Group:
        groups = self._groups.setdefault(name, OrderedDict())
        group = groups.setdefault(origin, Group())
        groups.move_to_end(origin)
        if len(groups) > GROUPS_MAX:
            groups.popitem(last=False)
        return group

    @property
    def state(self) -> State:
        """What must be known to go on from here."""
        return {name: dict(groups) for name, groups in self._groups.items()}


def _counts(rule: AlertRule, record: Record) -> bool:
    """Whether the rule is about this line."""
    address = record.get("remote_addr")
    if rule.ignore_loopback and isinstance(address, str) and is_loopback(address):
        return False
    return rule.reason in ("", record.get("reason"))


def _origin(rule: AlertRule, record: Record) -> str | None:
    address, node_id = record.get("remote_addr"), record.get("node_id")
    found = {"all": None, "address": address, "node": node_id, "origin": node_id or address}[rule.per]
    return None if found is None else str(found)


def _shorten(group: Group, since: int, more_than: int) -> None:
    """Forget what is out of the window, and the oldest that are not needed to know whether there are too many."""
    hits = group.hits
    spare = sum(count for _, count, _ in hits)
    while hits and (hits[0][0] <= since or spare - hits[0][1] > more_than):
        spare -= hits.pop(0)[1]


def _alert(name: str, rule: AlertRule, record: Record, origin: str | None, group: Group, total: int) -> Alert:
    seq, from_seq = group.hits[-1][2], group.hits[0][2]
    mark = f"{name}\0{origin or ''}\0{record.get('hash')}\0{seq}"
    times = f"{total} {rule.event}" + (f" {record.get('reason')}" if rule.reason else "")
    where = f" from {origin}" if origin else ""
    within = f" within {rule.window_seconds} s" if rule.more_than else ""
    told = str(record.get("reason")) if rule.event == CHAIN else f"{times}{where}{within}"
    return Alert(
        hashlib.sha256(mark.encode()).hexdigest()[:20],
        rfc3339(group.hits[-1][0]),
        name,
        rule.event,
        str(record.get("reason") or ""),
        origin,
        total,
        rule.window_seconds,
        record.get("remote_addr"),
        record.get("node_id"),
        from_seq,
        seq,
        told,
    )


def _ms(record: Record) -> int:
    try:
        return int(datetime.fromisoformat(str(record.get("ts"))).timestamp() * 1000)
    except ValueError:
        return 0


def _number(value: object, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default
