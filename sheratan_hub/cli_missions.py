"""The commands for missions: graphs of jobs under one title."""

from __future__ import annotations

from typing import Any

import click

from sheratan_hub.cli_output import say, show_many, show_one
from sheratan_hub.cli_target import EXIT_FAILED, PATIENCE_SECONDS, Target, output_option, run, traced

COLUMNS = ("mission_id", "status", "title", "jobs", "progress", "created_at")
PAGE = 200


@click.group()
def missions() -> None:
    """Hand in missions, which are graphs of jobs, and look at them."""


@missions.command("submit")
@click.argument("file", type=click.File("rb"))
@click.option("--idempotency-key", help="One mission for all submits with this key. Default: the file's, or drawn.")
@output_option
@click.pass_obj
def missions_submit(target: Target, file: Any, idempotency_key: str | None, output: str) -> None:
    """Hand in the mission of FILE (-: standard input), a JSON object of `title` and `jobs`.

    A job names others in its `depends_on` by the `ref` that they have in the file, or by id.
    """
    run(_submit(target, _read(file.read()), idempotency_key, output))


def _read(text: bytes) -> dict[str, Any]:
    import json

    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(str(error), param_hint="FILE") from None
    unknown = set(found) - {"title", "jobs", "metadata", "idempotency_key"} if isinstance(found, dict) else set()
    if not isinstance(found, dict) or not isinstance(found.get("jobs", []), list) or unknown:
        wrong = f"; it has {', '.join(sorted(unknown))}" if unknown else ""
        raise click.BadParameter(
            f'a mission is {{"title": ..., "jobs": [...]}}, with metadata and idempotency_key if wanted{wrong}',
            param_hint="FILE",
        )
    if not all(isinstance(job, dict) for job in found.get("jobs", [])):
        raise click.BadParameter("each of its jobs is a JSON object", param_hint="FILE")
    return found


async def _submit(target: Target, mission: dict[str, Any], key: str | None, output: str) -> int:
    from msgspec import to_builtins

    try:
        with traced("sheratan-client") as tracing:
            async with target.client(patience_seconds=PATIENCE_SECONDS, tracing=tracing) as hub:
                done = await hub.submit_mission(
                    mission.get("title", ""),
                    mission.get("jobs", []),
                    metadata=mission.get("metadata"),
                    idempotency_key=key or mission.get("idempotency_key"),
                )
    except (TypeError, ValueError) as error:
        raise click.BadParameter(str(error), param_hint="FILE") from None
    if output == "json":
        show_one(to_builtins(done), output)
        return 0
    click.echo(done.mission_id)
    refs = [job.get("ref") or job.get("task_id") for job in mission.get("jobs", [])]
    rows = [{"ref": ref, **to_builtins(job)} for ref, job in zip(refs, done.jobs, strict=True)]
    show_many(rows, ("job_id", "status", "ref"), output)
    return 0


@missions.command("list")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Missions at most.")
@output_option
@click.pass_obj
def missions_list(target: Target, limit: int, output: str) -> None:
    """List missions, newest first."""
    run(_list(target, limit, output))


async def _list(target: Target, limit: int, output: str) -> int:
    from msgspec import to_builtins

    found: list[dict[str, Any]] = []
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        async for mission in hub.missions(page=min(limit, PAGE)):
            if len(found) == limit:
                say(f"showing the first {limit}; --limit shows more")
                break
            found.append(to_builtins(mission))
    show_many(found, COLUMNS, output)
    return 0


@missions.command("show")
@click.argument("mission_id")
@output_option
@click.pass_obj
def missions_show(target: Target, mission_id: str, output: str) -> None:
    """Show one mission; its jobs are told by `jobs list --mission-id`."""
    run(_act(target, "mission", mission_id, output))


@missions.command("cancel")
@click.argument("mission_id")
@output_option
@click.pass_obj
def missions_cancel(target: Target, mission_id: str, output: str) -> None:
    """Cancel every job of a mission that is not finished."""
    run(_act(target, "cancel_mission", mission_id, output))


@missions.command("redrive")
@click.argument("mission_id")
@output_option
@click.pass_obj
def missions_redrive(target: Target, mission_id: str, output: str) -> None:
    """Have every job of a mission run again that failed or was cancelled."""
    run(_act(target, "redrive_mission", mission_id, output))


async def _act(target: Target, verb: str, mission_id: str, output: str) -> int:
    from msgspec import to_builtins

    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        done = to_builtins(await getattr(hub, verb)(mission_id))
    show_one(done, output)
    return EXIT_FAILED if done.get("refused") else 0
