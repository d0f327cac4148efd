"""What a diagnosis goes by: the signs of a hub's state, and the findings that are made of them. Times in ms."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sheratan_hub.rules.command import Limits
from sheratan_hub.rules.pauses import Pause
from sheratan_hub.rules.silence import Fleet

Severity = Literal["critical", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "note")
"""Worst first. A `note` is told, but nothing is wrong because of it."""

StoreState = Literal["ok", "damaged", "foreign", "newer", "missing", "unknown"]


class Finding(msgspec.Struct, frozen=True):
    """Something that looks wrong: what (`text`), by which evidence, what to do, and where the runbook tells more."""

    code: str
    severity: Severity
    text: str
    evidence: dict[str, Any]
    do: tuple[str, ...]
    runbook: str


Said = tuple[str, str, dict[str, Any], tuple[str, ...], Severity | None]
"""A finding being made: code, sentence, evidence, what to do, and the severity if it is not the usual one."""


class Answering(msgspec.Struct, frozen=True):
    """Whether a plane answers at `url`; if not, why."""

    plane: str
    url: str
    answers: bool
    why: str = ""


class StoreSign(msgspec.Struct, frozen=True):
    """What the store looks like, in one sentence if it is not `ok`; what a check found; why it does not write."""

    state: StoreState = "unknown"
    text: str = ""
    problems: tuple[str, ...] = ()
    not_writing: str = ""


def state_by(text: str) -> StoreState:
    """What is the matter with a store, by the sentence in which it was refused."""
    if "there is no store" in text:
        return "missing"
    if "knows formats up to" in text:
        return "newer"
    if "of another" in text or "is no store" in text or "is not a SQLite database" in text or "no folder" in text:
        return "foreign"
    broken = ("is damaged", "is missing", "malformed", "SQLITE_CORRUPT", "SQLITE_NOTADB")
    return "damaged" if any(word in text for word in broken) else "unknown"


class DiskSign(msgspec.Struct, frozen=True):
    """The disk of one of the hub's directories."""

    path: str
    state: Literal["ok", "low", "full", "read-only", "forbidden"]


class AuditSign(msgspec.Struct, frozen=True):
    """The first place where the audit log's chain is broken, and why it cannot be written; empty: nothing is wrong."""

    broken: str = ""
    trouble: str = ""


class Wait(msgspec.Struct, frozen=True):
    """A waiting job, for how long it has waited, the reasons why it does not run; which capabilities nobody offers."""

    job_id: str
    kind: str
    age_ms: int
    reasons: tuple[str, ...]
    lacking: tuple[str, ...] = ()


class NodeSign(msgspec.Struct, frozen=True):
    """A node, for how long it has been silent, and by how much its clock differs from the hub's."""

    node_id: str
    state: str
    silent_ms: int
    skew_ms: int = 0


class Told(msgspec.Struct, frozen=True):
    """A line of the audit log; `count` is how many equal events it stands for."""

    at: int
    event: str
    who: str
    reason: str = ""
    count: int = 1


class Turning(msgspec.Struct, frozen=True):
    """A rotation of the token: when it ends (0: when somebody ends it), and which nodes still use the old one."""

    until: int
    stragglers: tuple[str, ...]


class Signs(msgspec.Struct, frozen=True):
    """All of them. `now` is the hub's time; of one that is down, the last moment that its files tell of.

    `held_by` names the process that holds the store; `killed`: its audit log ends without a HUB_STOP (None: it cannot
    be read), `began`: it has one at all. `oldest_ms`: how long the first job that may be leased has waited, None if
    there is none.
    `bursts` are how many events of a kind within a minute are too many; `commit_ms` is how long a commit takes.
    """

    now: int
    planes: tuple[Answering, ...] = ()
    held_by: str = ""
    killed: bool | None = False
    began: bool = True
    store: StoreSign = StoreSign()
    disks: tuple[DiskSign, ...] = ()
    audit: AuditSign = AuditSign()
    counts: dict[str, int] = {}
    limits: Limits = Limits()
    oldest_ms: int | None = None
    waits: tuple[Wait, ...] = ()
    pauses: tuple[Pause, ...] = ()
    fleet: Fleet = Fleet()
    nodes: tuple[NodeSign, ...] = ()
    turning: Turning | None = None
    told: tuple[Told, ...] = ()
    bursts: dict[str, int] = {}
    commit_ms: float | None = None
    failed_loops: dict[str, int] = {}

    @property
    def down(self) -> bool:
        """Whether no plane answers."""
        return bool(self.planes) and not any(one.answers for one in self.planes)

    def count(self, facet: str) -> int:
        """One of the kept counters."""
        return self.counts.get(facet, 0)
