"""The commands for dead letters: list the jobs that failed for good, have them run again."""

from __future__ import annotations

from typing import Any

import click

from sheratan_hub.cli_output import in_short, say, show_many
from sheratan_hub.cli_target import EXIT_FAILED, PATIENCE_SECONDS, Target, given, output_option, run

COLUMNS = ("job_id", "kind", "source", "reason", "failures", "losses", "node_id", "finished_at", "error")
REDRIVEN_COLUMNS = ("job_id", "status", "redriven", "redrives", "not_before")
FILTERS = ("kind", "source", "mission_id", "node_id", "reason")
PAGE, IDS = 200, 1000


def filter_options(command: Any) -> Any:
    """The options that pick dead letters."""
    for name in reversed(FILTERS):
        command = click.option(f"--{name.replace('_', '-')}")(command)
    return command


@click.group()
def dlq() -> None:
    """Look at dead letters, the jobs that failed for good, and redrive them."""


@dlq.command("list")
@filter_options
@click.option("--oldest", is_flag=True, help="Those first that were submitted first.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Jobs at most.")
@output_option
@click.pass_obj
def dlq_list(target: Target, /, oldest: bool, limit: int, output: str, **filters: str | None) -> None:
    """List dead letters, newest first; all attempts of one are shown by `jobs show`."""
    run(_list(target, oldest, limit, output, filters))


async def _list(target: Target, oldest: bool, limit: int, output: str, filters: dict[str, Any]) -> int:
    from msgspec import to_builtins

    found: list[dict[str, Any]] = []
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        order: Any = "oldest" if oldest else "newest"
        async for job in hub.dead_letters(order=order, page=min(limit, PAGE), **filters):
            if len(found) == limit:
                say(f"showing the first {limit}; --limit shows more")
                break
            found.append(to_builtins(job))
    rows = found if output == "json" else [{**row, "error": in_short(row["error"])} for row in found]
    show_many(rows, COLUMNS, output)
    return 0


@dlq.command("redrive")
@click.argument("job_ids", nargs=-1)
@filter_options
@click.option("--all", "everything", is_flag=True, help="All dead letters, whatever they are.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="Jobs at most.")
@click.option("--rate", type=click.FloatRange(0.001), help="Let so many a second come back, one after the other.")
@output_option
@click.pass_obj
def dlq_redrive(
    target: Target,
    /,
    job_ids: tuple[str, ...],
    everything: bool,
    limit: int,
    rate: float | None,
    output: str,
    **filters: str | None,
) -> None:
    """Have dead letters run again: those with JOB_IDS, or those that the filters mean, the oldest first."""
    chosen = given(filters)
    if sum((bool(job_ids), bool(chosen), everything)) != 1:
        raise click.UsageError("give JOB_IDS, or filters such as --kind, or --all")
    if len(job_ids) > IDS:
        raise click.UsageError(f"at most {IDS} JOB_IDS")
    run(_redrive(target, job_ids, chosen, limit, rate, output))


async def _redrive(
    target: Target, job_ids: tuple[str, ...], filters: dict[str, str], limit: int, rate: float | None, output: str
) -> int:
    from msgspec import to_builtins

    from sheratan_hub.answers import Refusal

    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        if job_ids:
            done = await hub.redrive_many(job_ids, rate_per_second=rate)
        else:
            done = await hub.redrive_many(filter=filters, limit=limit, rate_per_second=rate)
    refused = [one for one in done.jobs if isinstance(one, Refusal)]
    for no in refused:
        say(f"{no.job_id}: {no.detail} ({no.status} {no.code})")
    show_many([to_builtins(one) for one in done.jobs if not isinstance(one, Refusal)], REDRIVEN_COLUMNS, output)
    more = "; there are more" if done.next_cursor is not None else ""
    say(f"{done.redriven} redriven, {len(refused)} refused{more}")
    return EXIT_FAILED if refused else 0
