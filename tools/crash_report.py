"""What is told of a crash run: its figures, and the story of each job that a promise was broken to."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.crash_case import Case, Delivery, Violation
from tools.crash_history import History

STORIES = 5
"""How many violations are told with their whole story; the others are only named."""


def tally(history: History, found: list[Violation]) -> dict[str, int]:
    """The figures of a run. "told to nobody": the pull that got the job was not answered."""
    case = Case(history)
    submits = [one for asked in case.submits.values() for one in asked]
    results = [one for one in case.words if one.what in ("complete", "fail")]
    deliveries = [one for told in case.deliveries.values() for one in told]
    again = Counter(_cause(*two) for told in case.deliveries.values() for two in pairwise(told))
    attempts = sum(job["attempt"] for job in case.jobs.values())
    kinds = Counter(_kind(one.what) for one in found)
    return {
        "kills": sum(life.ready is None or life.dead > life.ready for life in history.lives if life.dead < 1e300),
        "kills before it was ready": sum(life.ready is None for life in history.lives if life.dead < 1e300),
        "requests": len(history.exchanges),
        "jobs": len(case.jobs),
        "submits acknowledged": sum(one.acknowledged for one in submits),
        "submits unanswered": sum(one.unknown for one in submits),
        "results acknowledged": sum(one.acknowledged for one in results),
        "results unanswered": sum(one.unknown for one in results),
        "results refused": sum(not one.possible for one in results),
        "deliveries": len(deliveries),
        "leases told again": sum(len(one.tellings) - 1 for one in deliveries),
        "redeliveries after a failure": again["fail"],
        "redeliveries after a release": again["release"],
        "redeliveries after the lease's end": again["lost"],
        "deliveries told to nobody": max(0, attempts - len(deliveries)),
        "lost": kinds["lost"],
        "unexpected": kinds["unexpected"],
        "double": kinds["double"],
        "other violations": kinds["other"],
    }


def _cause(before: Delivery, after: Delivery) -> str:
    ended = (verb for verb in ("fail", "release") if before.ended_by(after.told_at, verb))
    return next(ended, "lost" if after.attempt == before.attempt + 1 else "nobody")


def _kind(what: str) -> str:
    first = what.partition(" ")[0]
    return {"two": "double"}.get(first, first if first in ("lost", "unexpected", "double") else "other")


def show(console: Console, figures: dict[str, Any], found: list[Violation], history: History) -> None:
    """The figures as a table, and every violation."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in figures.items():
        table.add_row(name, str(value))
    console.print(table)
    for number, one in enumerate(found):
        console.print(f"[red]{one.what}[/red]", one.job_id, one.tag)
        console.print(f"  {one.text}", markup=False, soft_wrap=True)
        if number < STORIES and (one.job_id or one.tag):
            for line in history.story(one.job_id, one.tag):
                console.print(f"    {line}", markup=False, soft_wrap=True)
    console.print("[red]promises were broken[/red]" if found else "[green]every promise was kept[/green]")


def write(path: Path, figures: dict[str, Any], found: list[Violation], history: History) -> None:
    """The same as JSON."""
    violations = [dataclasses.asdict(one) for one in found]
    for number, one in enumerate(violations[:STORIES]):
        one["story"] = history.story(found[number].job_id, found[number].tag)
    path.write_text(json.dumps({**figures, "violations": violations}, indent=1) + "\n")
