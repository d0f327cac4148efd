"""A diagnosis: what is asked of a hub and of its files, part by part, and the bundle that comes of it.

The hub may be the running one, or one that was made over a store which somebody else has open or nobody. No part reads
more of the store than it shows; between slices of work a running hub has the time to itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from sheratan_hub import __version__
from sheratan_hub import diagnosis_files as files
from sheratan_hub.audit_lines import FILE_NAME
from sheratan_hub.bundle import Member, Members
from sheratan_hub.clock import Clock, rfc3339, settle
from sheratan_hub.config import Settings
from sheratan_hub.hub import Hub
from sheratan_hub.keyring import Use
from sheratan_hub.redact import Redactor
from sheratan_hub.rules.signs import Finding, Signs, Told
from sheratan_hub.rules.verdict import verdict
from sheratan_hub.tails import LINES, Clean, Record, Tail, audit_line, cleaned

log = logging.getLogger("sheratan.diagnosis")

LINES_PIECE = 20
"""Lines of a log that one slice of work looks at."""

SLICE_MS, SHARE, REST_MOST_MS = 2, 10, 500
"""Work goes on for so long; then others have the hub until it was a tenth of the time that has passed."""


class Pace:
    """Lets others have nine tenths of the time: after a slice of work it sleeps nine times as long."""

    def __init__(self, clock: Clock | None) -> None:
        self._clock = clock
        self._since = clock.now() if clock is not None else 0
        self.slices = 0

    async def step(self) -> None:
        """A small piece of work is done. Without a clock, where nobody else is, nothing waits."""
        self.slices += 1
        if self._clock is None:
            return
        took = self._clock.now() - self._since
        if took < SLICE_MS:
            await settle(1)
            return
        await self._clock.sleep(min(took * (SHARE - 1), REST_MOST_MS))
        self._since = self._clock.now()


Part = Callable[[], Awaitable[dict[str, Any]]]
"""Makes some members; what it returns are fields of `Signs`."""


class Bundle(msgspec.Struct, frozen=True):
    """A finished one: its members by name, what looks wrong, and the time of the state (ms) that it tells of."""

    members: list[Member]
    findings: list[Finding]
    now: int


class Looking(msgspec.Struct):
    """What parts need to know."""

    hub: Hub
    settings: Settings
    members: Members
    pace: Pace
    uses: Mapping[str, Use] = {}

    @property
    def redactor(self) -> Redactor:
        """What takes secrets out."""
        return self.members.redactor

    @property
    def logs(self) -> Path:
        """Where the logs are."""
        return logs_of(self.settings)


def logs_of(settings: Settings) -> Path:
    """The directory of a hub's logs."""
    return Path(settings.hub.data_dir) / "logs"


async def make(parts: Mapping[str, Part], members: Members, pace: Pace, now: int, source: str) -> Bundle:
    """Run the parts in order; what fails is told in its place and costs the others nothing.

    Broad `except`, the one of a diagnosis: whatever is broken, it must tell of the rest.
    """
    told: dict[str, Any] = {"now": now}
    for name, part in parts.items():
        try:
            told |= await part()
        except Exception as error:
            log.warning("the part %s of a diagnosis could not be made: %s", name, type(error).__name__)
            members.failed(name, error)
        await pace.step()
    signs = Signs(**told)
    findings = verdict(signs)
    members.json("verdict.json", {"as_of": rfc3339(now), "findings": findings})
    worst = findings[0].severity if findings else None
    about = {"version": __version__, "source": source, "as_of": rfc3339(now), "findings": len(findings), "worst": worst}
    return Bundle(members.sealed(about), findings, now)


# What is asked of its files


async def logs(look: Looking) -> dict[str, Any]:
    """The last lines of each log."""
    for name, clean in files.LOGS:
        try:
            await _log(look, name, await asyncio.to_thread(files.read_log, look.logs, name), clean)
        except OSError as error:
            look.members.failed(name, error)
    return {}


async def _log(look: Looking, name: str, found: Tail, clean: Clean) -> None:
    """What may be told of these lines, a few at a time."""
    lines: list[Record] = []
    for start in range(0, len(found.lines), LINES_PIECE):
        lines += (cleaned(line, clean, look.redactor) for line in found.lines[start : start + LINES_PIECE])
        await look.pace.step()
    look.members.lines(f"logs/{name}", lines, cut=found.cut)


async def audit_lines(look: Looking, found: Tail) -> dict[str, Any]:
    """The last lines of the audit log, and what more of them tell of."""
    shown = Tail(found.lines[-LINES:], found.cut and len(found.lines) < LINES)
    await _log(look, FILE_NAME, shown, audit_line)
    told: list[Told] = []
    for start in range(0, len(found.lines), LINES_PIECE):
        lines = found.lines[start : start + LINES_PIECE]
        told += (one for line in lines if (one := files.told(line, look.redactor)) is not None)
        await look.pace.step()
    return {"told": tuple(told)}


async def about(look: Looking, environ: Mapping[str, str], whose: str, where: Mapping[str, str]) -> dict[str, Any]:
    """Settings, names of variables, versions."""
    look.members.json("config.json", files.config(look.settings, look.redactor, where))
    await look.pace.step()
    look.members.json("environment.json", files.environment(environ, look.redactor, whose))
    look.members.json("system.json", files.system(look.settings))
    rule = look.settings.alerts
    bursts = {"AUTH_FAILURE": rule.auth_failure.more_than, "PORT_MISMATCH": rule.port_mismatch.more_than}
    return {"disks": tuple(files.disks(look.settings)), "bursts": bursts}


class Scrapes(Protocol):
    """Where metrics come from."""

    async def json(self, plane: str) -> dict[str, Any]:
        """The fleet's JSON."""
        ...

    async def text(self, plane: str) -> tuple[bytes, str]:
        """(Prometheus' text, its content type)"""
        ...


async def metrics(look: Looking, scrapes: Scrapes) -> dict[str, Any]:
    """The metrics of both planes."""
    shown, took = {}, None
    for plane in ("control", "data"):
        text, _ = await scrapes.text(plane)
        await look.pace.step()
        look.members.text(f"metrics/{plane}.txt", text.decode())
        shown[plane] = await scrapes.json(plane)
        took = commit_ms(text.decode()) if took is None else took
        await look.pace.step()
    look.members.json("metrics/fleet.json", shown)
    return {"commit_ms": took}


def commit_ms(text: str) -> float | None:
    """How long a commit takes on average, by the metrics; None if they do not tell."""
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("sheratan_commit_seconds_"))
    total, count = (float(found.get(f"sheratan_commit_seconds_{name}", 0)) for name in ("sum", "count"))
    return total * 1000 / count if count else None
