"""How the command line shows things: tables for people, JSON for programs, progress on a terminal's stderr.

Data goes to stdout, everything said about it to stderr. rich honours NO_COLOR by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

JOB_COLUMNS = ("job_id", "status", "kind", "source", "attempt", "node_id", "created_at", "reason")
NODE_COLUMNS = (
    "node_id",
    "status",
    "health",
    "draining",
    "zone",
    "capabilities",
    "current_jobs",
    "max_concurrent",
    "last_seen",
)

WHOLE = ("job_id", "mission_id", "node_id", "status")

Row = Mapping[str, Any]


def say(text: str) -> None:
    """One line for the person at the keyboard, on stderr."""
    click.echo(text, err=True)


def show_many(rows: Iterable[Row], columns: Sequence[str], output: str) -> None:
    """Rows as a table of `columns`, or as one JSON array of everything that is in them."""
    if output == "json":
        _echo_json(list(rows))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # On a narrow screen ids and states stay whole, so that they can be copied; the rest wraps.
        table.add_column(column, no_wrap=column in WHOLE, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    _print(table)


def show_one(row: Row, output: str) -> None:
    """One thing: a line for each field, or one JSON object."""
    if output == "json":
        _echo_json(row)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in row.items():
        table.add_row(name, _cell(value))
    _print(table)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int], None]]:
    """A function that is told how many more are done; it draws only on a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn(what), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda n: bar.advance(task, n)


def _cell(value: object) -> Any:
    """A value as text, which rich does not read as markup; of an error its trace, which ends with what it says."""
    from rich.text import Text

    if isinstance(value, dict) and isinstance(value.get("trace"), str):
        return Text(value["trace"])
    if isinstance(value, (list, tuple)) and value and all(isinstance(one, dict) for one in value):
        return Text("\n".join(_line(one) for one in value))
    return Text(_plain(value))


def _plain(value: object) -> str:
    """A value as a person writes it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return ", ".join(value) or "-"
    return _json(value).decode() if isinstance(value, (dict, list, tuple)) else str(value)


def _line(row: Row) -> str:
    """One of several things on a line, its errors in short."""
    shown = {name: in_short(value) if name == "error" else value for name, value in row.items()}
    return ", ".join(f"{name} {_plain(value)}" for name, value in shown.items() if value is not None)


def in_short(error: Any) -> str | None:
    """An error on one line of a table."""
    if error is None:
        return None
    if isinstance(error, dict):
        error = ": ".join(str(error[name]) for name in ("type", "message") if error.get(name)) or error
    return " ".join(str(error).split())[:200]


def _print(table: Any) -> None:
    """Print a table; one that nobody looks at on a screen in full width and without blanks at the ends of lines."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console().print(table)
        return
    console = Console(width=10_000)
    with console.capture() as text:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in text.get().splitlines()))


def _echo_json(value: object) -> None:
    click.echo(_json(value))


def _json(value: object) -> bytes:
    import orjson

    return orjson.dumps(value)
