"""The command that hands in jobs: one of a kind, or one for each line of standard input."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from sheratan_hub.cli_output import progress, say, show_one
from sheratan_hub.cli_target import EXIT_FAILED, EXIT_UNFINISHED, Target, output_option, run, traced, words

if TYPE_CHECKING:
    from sheratan_hub.client import HubClient, Job, Refusal, Submitted

    Outcome = Submitted | Refusal

CHUNK = 500
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
@click.option("--depends-on", help="Ids of jobs that must complete first, comma-separated.")
@click.option(
    "--on-dependency-failure",
    type=click.Choice(["cancel", "hold", "run"]),
    help="What becomes of it when one of these fails. Default: cancel.",
)
@click.option("--wait", type=click.FloatRange(0), default=0, help="Seconds to wait for the end of a single job.")
@click.option("--patience", type=click.FloatRange(0), default=10, show_default=True, help="Seconds to keep trying.")
@output_option
@click.pass_obj
def submit(
    target: Target, /, kind: str | None, params: str | None, wait: float, patience: float, output: str, **fields: Any
) -> None:
    """Hand in a job of KIND; without KIND one for each line of standard input, which holds a job as JSON.

    With KIND standard input is not read, but for `--params @-`. Without, options are the defaults of fields that a line
    leaves out. With --wait the job is shown at its end; exit code 75 when it has not ended by then.
    """
    job = {name: value for name, value in fields.items() if value is not None}
    for name in ("required_capabilities", "depends_on"):
        if listed := job.pop(name, None):
            job[name] = words(listed)
    if params is not None:
        job["params"] = _read_params(params)
    if kind is not None:
        run(_submit_one(target, {**job, "kind": kind}, wait, patience, output))
    if wait:
        raise click.UsageError("--wait goes with a single job: give a KIND, or leave it out")
    if params == "@-":
        raise click.UsageError("standard input can't hold both --params and the jobs: give a KIND")
    if sys.stdin.isatty():
        raise click.UsageError("give a KIND, or one job as JSON on each line of standard input")
    run(_submit_lines(target, job, patience, output))


async def _submit_one(target: Target, job: dict[str, Any], wait: float, patience: float, output: str) -> int:
    with traced("sheratan-client") as tracing:
        async with target.client(patience_seconds=patience, tracing=tracing) as hub:
            return await _submitted(hub, job, wait, output)


async def _submitted(hub: HubClient, job: dict[str, Any], wait: float, output: str) -> int:
    from msgspec import to_builtins

    from sheratan_hub.client import HubRefused

    try:
        done = await hub.submit(**job)
    except HubRefused as no:
        raise HubRefused(no.status, no.code, by_flags(no.detail), no.body, no.retry_after_seconds) from None
    if not wait:
        show_one(to_builtins(done), output)
        return 0
    found = await finished(hub, done.job_id, wait)
    show_one(to_builtins(found), output)
    if found.status in FINISHED:
        return 0 if found.status == "completed" else EXIT_FAILED
    say(f"sheratan-hub: the job is {found.status} and has not ended within {wait:g} s")
    return EXIT_UNFINISHED


def by_flags(detail: str) -> str:
    """What the hub says about the fields of a job, with the names that they have on the command line."""
    flags = {param.name: param.opts[-1] for param in submit.params if isinstance(param, click.Option)}
    flags["kind"] = "KIND"
    detail = re.sub(r"`\$\.(\w+)[^`]*`", lambda found: flags.get(found[1], found[0]), detail)
    return re.sub(r"\b\w+_\w+\b", lambda found: flags.get(found[0], found[0]), detail)


async def finished(hub: HubClient, job_id: str, wait: float) -> Job:
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
    with traced("sheratan-client") as tracing:
        async with target.client(patience_seconds=patience, tracing=tracing) as hub:
            return await _submitted_lines(hub, lines, defaults, output)


async def _submitted_lines(
    hub: HubClient, lines: Iterator[tuple[int, bytes]], defaults: dict[str, Any], output: str
) -> int:
    submitted = refused = 0
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


def _read_params(text: str) -> Any:
    import json

    try:
        if text.startswith("@"):
            with click.open_file(text[1:], encoding="utf-8") as file:
                text = file.read()
        return json.loads(text)
    except (OSError, ValueError) as error:
        raise click.BadParameter(str(error), param_hint="--params") from None
