"""The commands that hand in jobs, look at them, cancel them."""

from __future__ import annotations

import sys
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from sheratan_hub.cli_output import JOB_COLUMNS, progress, say, show_many, show_one
from sheratan_hub.cli_target import EXIT_FAILED, PATIENCE_SECONDS, Target, output_option, run, words

if TYPE_CHECKING:
    from sheratan_hub.client import HubClient, Job, Refusal, Submitted

    Outcome = Submitted | Refusal

CHUNK, PAGE = 500, 500
STATUSES = ("pending", "running", "quarantined", "completed", "failed", "cancelled")
FINISHED = frozenset({"completed", "failed", "cancelled"})


@click.command()
@click.argument("kind", required=False)
@click.option("--params", help="JSON, or @FILE (@- is standard input).")
@click.option("--idempotency-key", help="One job for all submits with this key. Default: drawn.")
@click.option("--source", help="Who wants it.")
@click.option("--mission-id")
@click.option("--task-id")
@click.option("--priority", type=click.Choice(["CRITICAL", "HIGH", "NORMAL", "LOW"], case_sensitive=False))
@click.option("--timeout", "timeout_seconds", type=float, help="Seconds that one attempt may run.")
@click.option("--max-retries", type=int)
@click.option("--retry-backoff", type=click.Choice(["exponential", "linear"]))
@click.option("--needs", "required_capabilities", help="Capabilities a node must have, comma-separated.")
@click.option("--not-before", help="RFC 3339 time of the first start.")
@click.option("--delay", "delay_seconds", type=float, help="Seconds until the first start.")
@click.option("--expires-in", "expires_in_seconds", type=float, help="Seconds after which it is not started any more.")
@click.option("--delivery", type=click.Choice(["at_least_once", "at_most_once"]))
@click.option("--wait", type=click.FloatRange(0), default=0, help="Seconds to wait for the end of a single job.")
@click.option("--patience", type=click.FloatRange(0), default=10, show_default=True, help="Seconds to keep trying.")
@output_option
@click.pass_obj
def submit(
    target: Target, /, kind: str | None, params: str | None, wait: float, patience: float, output: str, **fields: Any
) -> None:
    """Hand in a job of KIND; without KIND one for each line of standard input, which holds a job as JSON.

    Options are the defaults of fields that a line leaves out.
    """
    job = {name: value for name, value in fields.items() if value is not None}
    if needs := job.pop("required_capabilities", None):
        job["required_capabilities"] = words(needs)
    if params is not None:
        job["params"] = _read_params(params)
    if kind is not None:
        run(_submit_one(target, {**job, "kind": kind}, wait, patience, output))
    if sys.stdin.isatty():
        raise click.UsageError("give a KIND, or one job as JSON on each line of standard input")
    run(_submit_lines(target, job, patience, output))


async def _submit_one(target: Target, job: dict[str, Any], wait: float, patience: float, output: str) -> int:
    from msgspec import to_builtins

    async with target.client(patience_seconds=patience) as hub:
        done = await hub.submit(**job)
        if not wait:
            show_one(to_builtins(done), output)
            return 0
        found = await _finished(hub, done.job_id, wait)
        show_one(to_builtins(found), output)
        return 0 if found.status == "completed" else EXIT_FAILED


async def _finished(hub: HubClient, job_id: str, wait: float) -> Job:
    """The job at its end, or as it is after `wait` seconds."""
    while True:
        step = min(wait, 30)
        wait -= step
        job = await hub.job(job_id, wait_seconds=step)
        if job.status in FINISHED or wait <= 0:
            return job


async def _submit_lines(target: Target, defaults: dict[str, Any], patience: float, output: str) -> int:
    """Submit what stands on standard input, 500 lines at a time, and tell of each as its answer comes."""
    lines = enumerate(sys.stdin.buffer, 1)
    submitted = refused = 0
    async with target.client(patience_seconds=patience) as hub:
        with progress("submitted") as advance:
            while chunk := list(islice(lines, CHUNK)):
                entries = [(number, _read_job(line, defaults)) for number, line in chunk if line.strip()]
                for number, outcome in await _outcomes(hub, entries):
                    taken = _tell(number, outcome, output)
                    submitted, refused = submitted + taken, refused + (not taken)
                advance(len(entries))
    say(f"{submitted} submitted, {refused} refused")
    return EXIT_FAILED if refused else 0


async def _outcomes(hub: HubClient, entries: list[tuple[int, dict[str, Any] | Refusal]]) -> list[tuple[int, Outcome]]:
    """The outcome of each line: what could not be read is refused here, the rest goes to the hub together."""
    jobs = [entry for _, entry in entries if isinstance(entry, dict)]
    answers = iter(await hub.submit_many(jobs) if jobs else ())
    return [(number, next(answers) if isinstance(entry, dict) else entry) for number, entry in entries]


def _read_job(line: bytes, defaults: dict[str, Any]) -> dict[str, Any] | Refusal:
    """The job on a line, with the defaults for what it leaves out."""
    import json

    from sheratan_hub.answers import Refusal, json_text

    try:
        job = json.loads(line)
        json_text(job)
    except (ValueError, TypeError, RecursionError) as error:
        return Refusal(code="bad_json", status=400, detail=str(error))
    if not isinstance(job, dict):
        return Refusal(code="bad_json", status=400, detail="a job is a JSON object")
    return {**defaults, **job}


def _tell(number: int, outcome: Outcome, output: str) -> bool:
    """Print one outcome; whether the hub took the job."""
    from msgspec import to_builtins

    from sheratan_hub.answers import Refusal

    taken = not isinstance(outcome, Refusal)
    if isinstance(outcome, Refusal):
        say(f"line {number}: {outcome.detail} ({outcome.status} {outcome.code})")
    if output == "json":
        show_one({"line": number, "ok": taken, **to_builtins(outcome)}, output)
    elif not isinstance(outcome, Refusal):
        click.echo(f"{outcome.job_id}  {outcome.status}")
    return taken


@click.group()
def jobs() -> None:
    """Look at jobs, cancel them."""


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
        show_one(to_builtins(await _finished(hub, job_id, wait)), output)
    return 0


@jobs.command("cancel")
@click.argument("job_ids", nargs=-1, required=True)
@output_option
@click.pass_obj
def jobs_cancel(target: Target, job_ids: tuple[str, ...], output: str) -> None:
    """Cancel jobs: waiting ones at once, running ones as soon as their worker hears of it."""
    run(_cancel_jobs(target, job_ids, output))


async def _cancel_jobs(target: Target, job_ids: tuple[str, ...], output: str) -> int:
    from msgspec import to_builtins

    from sheratan_hub.client import HubRefused

    rows: list[dict[str, Any]] = []
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        for job_id in job_ids:
            try:
                rows.append(to_builtins(await hub.cancel(job_id)))
            except HubRefused as no:
                if no.status not in (404, 409):
                    raise
                say(str(no))
    show_many(rows, ("job_id", "status", "cancel_requested"), output)
    return 0 if len(rows) == len(job_ids) else EXIT_FAILED


def _read_params(text: str) -> Any:
    import json

    try:
        if text.startswith("@"):
            with click.open_file(text[1:], encoding="utf-8") as file:
                text = file.read()
        return json.loads(text)
    except (OSError, ValueError) as error:
        raise click.BadParameter(str(error), param_hint="--params") from None
