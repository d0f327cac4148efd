"""What clients of a crash run know: each request before it was sent, each answer once it was there, the hub's lives.

All moments are seconds of this machine's monotonic clock.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import inf
from typing import Any

PULL = "/api/jobs/pull"
SUBMIT = "/api/jobs"
RESULTS = "/api/results"
FINAL = frozenset({"completed", "failed", "cancelled"})


@dataclass(slots=True)
class Exchange:
    """A request, and its answer if one came. `reached` is false if no connection was made: then nothing happened."""

    client: str
    method: str
    path: str
    body: Any
    sent: float
    reached: bool = True
    done: float = inf
    status: int = 0
    answer: Any = None

    @property
    def acknowledged(self) -> bool:
        """The hub has said that it is done."""
        return 200 <= self.status < 300

    @property
    def unknown(self) -> bool:
        """It may or may not have happened: no answer, or one that tells of the hub's own trouble."""
        return self.reached and (self.status == 0 or self.status >= 500)

    @property
    def pull(self) -> dict[str, Any] | None:
        """The pull that it is, or carries."""
        if self.path == PULL:
            return dict(self.body)
        found = self.body.get("pull") if isinstance(self.body, dict) else None
        return dict(found) if isinstance(found, dict) else None

    @property
    def leases(self) -> list[dict[str, Any]]:
        """The leases that it was told of, if it is a pull or carries one."""
        told = self.answer.get("jobs", []) if self.acknowledged and self.pull is not None else []
        return list(told)


@dataclass(slots=True)
class Life:
    """One process of the hub: when it was begun, and when it was surely over. `killed_at` is just before the signal."""

    began: float
    ready: float | None = None
    killed_at: float = inf
    dead: float = inf


@dataclass(frozen=True, slots=True)
class Reading:
    """All jobs and the data plane's metrics, read while nobody else talked to the hub. `drained`: no work was left."""

    at: float
    jobs: list[dict[str, Any]]
    metrics: dict[str, Any]
    drained: bool


@dataclass(slots=True)
class History:
    """A whole run. `grace_seconds` and `max_losses` are the hub's settings, `tolerance` (s) is for its wall clock."""

    exchanges: list[Exchange] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    grace_seconds: float = 1.0
    max_losses: int = 1000
    tolerance: float = 0.05

    def story(self, *words: str) -> list[str]:
        """Everything that was said about what is named, in order, and the lives of the hubs to which it was said."""
        names = [word for word in words if word]
        about = [one for one in self.exchanges if one.reached and _mentions(one, names)]
        lines = [(one.sent, _told(one, names)) for one in about]
        for number, life in enumerate(self.lives, 1):
            if any(life.began <= one.sent <= life.dead for one in about):
                lines.append((life.began, f"hub {number} is started"))
                lines += [(life.killed_at, f"hub {number} is killed")] if life.killed_at < inf else []
        begin = self.lives[0].began if self.lives else 0.0
        return [f"{at - begin:8.3f} {text}" for at, text in sorted(lines)]


def _mentions(exchange: Exchange, names: list[str]) -> bool:
    text = f"{exchange.path} {json.dumps(exchange.body)} {json.dumps(exchange.answer)}"
    return any(f'"{name}"' in text or f"/{name}" in text for name in names)


def _told(exchange: Exchange, names: list[str]) -> str:
    body = json.dumps(_about(exchange.body, names)) if exchange.body is not None else ""
    outcome = "no answer"
    if exchange.status:
        took_ms = (exchange.done - exchange.sent) * 1000
        outcome = f"{exchange.status} after {took_ms:.0f} ms {json.dumps(_about(exchange.answer, names))}"
    return f"{exchange.client}: {exchange.method} {exchange.path} {body} -> {outcome}"


def _about(value: Any, names: list[str]) -> Any:
    """The value without what lists hold about others, and without long texts."""
    if isinstance(value, dict):
        return {name: _about(one, names) for name, one in value.items()}
    if isinstance(value, list):
        kept = [_about(one, names) for one in value if any(name in json.dumps(one) for name in names)]
        return kept + ([f"{len(value) - len(kept)} others"] if len(kept) < len(value) else [])
    return f"{value[:40]}..." if isinstance(value, str) and len(value) > 60 else value
