"""The commands that look at jobs, cancel them, have them run again."""

from __future__ import annotations

from typing import Any

import click

from sheratan_hub.cli_output import JOB_COLUMNS, say, show_many, show_one
from sheratan_hub.cli_queue import span
from sheratan_hub.cli_submit import finished
from sheratan_hub.cli_target import EXIT_FAILED, PATIENCE_SECONDS, Target, given, output_option, run

PAGE = 500
STATUSES = ("pending", "throttled", "running", "quarantined", "completed", "failed", "cancelled")


@click.group()
def jobs() -> None:
    """Look at jobs, cancel them, redrive them."""


@jobs.command("list")
@click.option("--status", type=click.Choice(STATUSES))
@click.option("--kind")
@click.option("--source")
@click.option("--mission-id")
@click.option("--node-id")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Jobs at most.")
@output_option
@click.pass_obj
def jobs_list(target: Target, /, limit: int, output: str, **filters: str | None) -> None:
    """List jobs, oldest first."""
    run(_list_jobs(target, limit, output, filters))


async def _list_jobs(target: Target, limit: int, output: str, filters: dict[str, Any]) -> int:
    from msgspec import to_builtins

    found: list[dict[str, Any]] = []
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        async for job in hub.jobs(page=min(limit, PAGE), **filters):
            found.append(to_builtins(job))
            if len(found) == limit:
                say(f"showing the first {limit}; --limit shows more")
                break
    show_many(found, JOB_COLUMNS, output)
    return 0


@jobs.command("show")
@click.argument("job_id")
@click.option("--wait", type=click.FloatRange(0), default=0, help="Seconds to wait for its end.")
@output_option
@click.pass_obj
def jobs_show(target: Target, job_id: str, wait: float, output: str) -> None:
    """Show one job."""
    run(_show_job(target, job_id, wait, output))


async def _show_job(target: Target, job_id: str, wait: float, output: str) -> int:
    from msgspec import to_builtins

    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        show_one(to_builtins(await finished(hub, job_id, wait)), output)
    return 0


@jobs.command("cancel")
@click.argument("job_ids", nargs=-1)
@click.option("--status", type=click.Choice(["pending", "quarantined", "running"]))
@click.option("--kind")
@click.option("--source")
@click.option("--mission-id")
@click.option("--node-id")
@click.option("--older-than", "older_than_seconds", type=span, help="Submitted so long ago, such as 2h.")
@click.option("--dry-run", is_flag=True, help="Only count what the filters mean.")
@output_option
@click.pass_obj
def jobs_cancel(target: Target, /, job_ids: tuple[str, ...], dry_run: bool, output: str, **filters: Any) -> None:
    """Cancel jobs: waiting ones at once, running ones as soon as their worker hears of it.

    Those with JOB_IDS, or, on the hub's own machine, those that the filters mean.
    """
    chosen = given(filters)
    if bool(job_ids) == bool(chosen):
        raise click.UsageError("give JOB_IDS, or filters such as --kind")
    if job_ids and dry_run:
        raise click.UsageError("--dry-run goes with filters such as --kind")
    run(_cancel_jobs(target, job_ids, output) if job_ids else _cancel_many(target, chosen, dry_run, output))


async def _cancel_many(target: Target, filters: dict[str, Any], dry_run: bool, output: str) -> int:
    from msgspec import to_builtins

    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        show_one(to_builtins(await hub.cancel_many(filter=filters, dry_run=dry_run)), output)
    return 0


async def _cancel_jobs(target: Target, job_ids: tuple[str, ...], output: str) -> int:
    return await _each(target, "cancel", job_ids, ("job_id", "status", "cancel_requested"), output)


@jobs.command("redrive")
@click.argument("job_ids", nargs=-1, required=True)
@click.option("--dependents", is_flag=True, help="Also what was cancelled because it failed.")
@output_option
@click.pass_obj
def jobs_redrive(target: Target, job_ids: tuple[str, ...], dependents: bool, output: str) -> None:
    """Have failed or cancelled jobs run again, under the same ids."""
    columns = ("job_id", "status", "redriven", "redrives")
    run(_each(target, "redrive", job_ids, columns, output, dependents=dependents))


async def _each(
    target: Target, verb: str, job_ids: tuple[str, ...], columns: tuple[str, ...], output: str, **options: Any
) -> int:
    """Do it to one job after the other; what the hub refuses for one does not keep it from the rest."""
    from msgspec import to_builtins

    from sheratan_hub.client import HubRefused

    rows: list[dict[str, Any]] = []
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        for job_id in job_ids:
            try:
                rows.append(to_builtins(await getattr(hub, verb)(job_id, **options)))
            except HubRefused as no:
                if no.status not in (404, 409):
                    raise
                say(str(no))
    if rows or output == "json":
        show_many(rows, columns, output)
    return 0 if len(rows) == len(job_ids) else EXIT_FAILED
