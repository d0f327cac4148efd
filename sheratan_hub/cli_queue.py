"""The commands of operators: the queue as a whole, and what sources may do. They work on the hub's own machine only."""

from __future__ import annotations

import re
import sys
from typing import Any

import click

from sheratan_hub.cli_output import say, show_many, show_one
from sheratan_hub.cli_target import PATIENCE_SECONDS, Target, given, output_option, run

PAUSE_COLUMNS = ("kind", "since", "until", "reason")
LANE_COLUMNS = ("priority", "kind", "source", "required_capabilities", "head_age_seconds")
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def span(text: str) -> float:
    """A time span such as 90, 90s, 10m, 1.5h or 2d, in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if found is None:
        raise click.BadParameter(f"{text!r} is no time span such as 90s, 10m, 1.5h or 2d")
    return float(found[1]) * UNITS[found[2]]


@click.group()
def queue() -> None:
    """Look at the queue, pause, resume and purge it."""


@queue.command("show")
@output_option
@click.pass_obj
def queue_show(target: Target, output: str) -> None:
    """Show how full it is, what waits longest, what is paused."""
    run(_show(target, output))


async def _show(target: Target, output: str) -> int:
    from msgspec import to_builtins

    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        found = to_builtins(await hub.queue())
    if output == "json":
        show_one(found, output)
        return 0
    tables = {name: found.pop(name) for name in ("lanes", "pauses")}
    counts = found.pop("counts")
    of_many = {"depth": "jobs", "inflight": "leases", "dead_letters": "jobs"}
    for name, what in of_many.items():
        found[name] = f"{found[name].get(what)} of {found[name].get('limit')}"
    show_one({**{f"{state} jobs": count for state, count in counts.items()}, **found}, output)
    for name, columns in (("pauses", PAUSE_COLUMNS), ("lanes", LANE_COLUMNS)):
        if tables[name]:
            click.echo(f"\n{name}:")
            show_many([{**row, "kind": row["kind"] or "(all)"} for row in tables[name]], columns, output)
    return 0


@queue.command("pause")
@click.argument("kind", required=False)
@click.option("--for", "seconds", type=span, help="It ends by itself after this time, such as 10m.")
@click.option("--reason", help="Shown with it.")
@output_option
@click.pass_obj
def queue_pause(target: Target, kind: str | None, seconds: float | None, reason: str | None, output: str) -> None:
    """Hand out no more jobs of KIND, or none at all; what runs goes on."""
    run(_pauses(target, "pause", output, kind=kind, seconds=seconds, reason=reason))


@queue.command("resume")
@click.argument("kind", required=False)
@output_option
@click.pass_obj
def queue_resume(target: Target, kind: str | None, output: str) -> None:
    """End the pause of KIND, or every pause; what is still paused is shown."""
    run(_pauses(target, "resume", output, kind=kind))


async def _pauses(target: Target, verb: str, output: str, **fields: Any) -> int:
    from msgspec import to_builtins

    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        left = [to_builtins(pause) for pause in await getattr(hub, verb)(**fields)]
    if output == "table":
        if not left:
            say("nothing is paused")
            return 0
        left = [{**row, "kind": row["kind"] or "(all)", "until": row["until"] or "(resumed)"} for row in left]
    show_many(left, PAUSE_COLUMNS, output)
    return 0


@queue.command("purge")
@click.option("--status", type=click.Choice(["pending", "quarantined"]))
@click.option("--kind")
@click.option("--source")
@click.option("--mission-id")
@click.option("--older-than", "older_than_seconds", type=span, help="Submitted so long ago, such as 2h.")
@click.option("--all", "everything", is_flag=True, help="All jobs that wait.")
@click.option("--dry-run", is_flag=True, help="Only count.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=10_000, show_default=True, help="Jobs at most.")
@click.option("--yes", is_flag=True, help="Do not ask on a terminal.")
@output_option
@click.pass_obj
def queue_purge(
    target: Target, /, everything: bool, dry_run: bool, limit: int, yes: bool, output: str, **filters: Any
) -> None:
    """Cancel waiting jobs by filter. They can be redriven until they are forgotten."""
    chosen = given(filters)
    if bool(chosen) == everything:
        raise click.UsageError("give filters such as --kind, or --all")
    run(_purge(target, chosen, dry_run, limit, yes, output))


async def _purge(target: Target, filters: dict[str, Any], dry_run: bool, limit: int, yes: bool, output: str) -> int:
    from msgspec import to_builtins

    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        if not dry_run and not yes and on_terminal():
            meant = await hub.purge(filters, dry_run=True, limit=limit)
            click.confirm(f"Cancel {meant.matched} waiting jobs?", abort=True, err=True)
        show_one(to_builtins(await hub.purge(filters, dry_run=dry_run, limit=limit)), output)
    return 0


def on_terminal() -> bool:
    """Whether somebody is there to be asked."""
    return sys.stdin.isatty()


@click.group()
def limits() -> None:
    """Look at and set what single sources may do."""


@limits.command("show")
@click.argument("source")
@output_option
@click.pass_obj
def limits_show(target: Target, source: str, output: str) -> None:
    """Show the limit of SOURCE that is in force."""
    run(_limit(target, "rate_limit", source, output))


@limits.command("set")
@click.argument("source")
@click.option("--per-minute", type=click.IntRange(0), help="Submits a minute; 0: without limit. Default: 10.")
@click.option("--concurrent", type=click.IntRange(0), help="Jobs running at once; 0: without limit. Default: 5.")
@output_option
@click.pass_obj
def limits_set(target: Target, source: str, per_minute: int | None, concurrent: int | None, output: str) -> None:
    """Limit SOURCE, from now on and after a restart."""
    run(_limit(target, "set_rate_limit", source, output, per_minute=per_minute, concurrent=concurrent))


@limits.command("drop")
@click.argument("source")
@output_option
@click.pass_obj
def limits_drop(target: Target, source: str, output: str) -> None:
    """Forget what was set for SOURCE; what the hub's configuration says counts again."""
    run(_limit(target, "drop_rate_limit", source, output))


async def _limit(target: Target, verb: str, source: str, output: str, **fields: Any) -> int:
    from msgspec import to_builtins

    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        show_one(to_builtins(await getattr(hub, verb)(source, **fields)), output)
    return 0
