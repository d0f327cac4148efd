"""`sheratan-hub policies`: versions of the policy, tried before they are active."""

from __future__ import annotations

import difflib
import json
from typing import Any

import click

from sheratan_hub.cli_output import say, show_many, show_one
from sheratan_hub.cli_target import PATIENCE_SECONDS, Target, output_option, run

COLUMNS = ("version", "active", "title", "rules", "note", "created_at", "file")
SHOWN = ("version", "active", "title", "sha256")
NODES = ("node_id", "lost", "gained", "by")
WAITING = ("kind", "source", "required_capabilities", "nodes_before", "nodes_after", "submit_allowed")

FILE = click.argument("file", type=click.File("rb"))


@click.group()
def policies() -> None:
    """Who may do what: try a policy, keep it as a version, put it in force."""


@policies.command("list")
@output_option
@click.pass_obj
def policies_list(target: Target, output: str) -> None:
    """List the versions, oldest first."""
    run(_list(target, output))


async def _list(target: Target, output: str) -> int:
    rows: list[dict[str, Any]] = []
    query = ""
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        while True:
            page = await hub.call("control", "GET", f"/api/policies{query}")
            rows += page["policies"]
            if page["next_cursor"] is None:
                break
            query = f"?cursor={page['next_cursor']}"
    show_many(rows, COLUMNS, output)
    if page["active"] == 0:
        say("version 0 is active: everything is allowed")
    return 0


@policies.command("show")
@click.argument("version", type=click.IntRange(1))
@output_option
@click.pass_obj
def policies_show(target: Target, version: int, output: str) -> None:
    """Show one version with its rules."""
    run(_show(target, version, output))


async def _show(target: Target, version: int, output: str) -> int:
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        found = await hub.call("control", "GET", f"/api/policies/{version}")
    show_one(found if output == "json" else {name: one for name, one in found.items() if name != "ok"}, output)
    return 0


@policies.command("diff")
@click.argument("old", type=click.IntRange(1))
@click.argument("new", type=click.IntRange(1))
@click.pass_obj
def policies_diff(target: Target, old: int, new: int) -> None:
    """Show what differs between two versions, line by line."""
    run(_diff(target, old, new))


async def _diff(target: Target, old: int, new: int) -> int:
    texts: list[list[str]] = []
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        for version in (old, new):
            found = await hub.call("control", "GET", f"/api/policies/{version}")
            texts.append(json.dumps(found["policy"], indent=2, sort_keys=True).splitlines())
    before, after = texts
    names = f"version {old}", f"version {new}"
    click.echo("\n".join(difflib.unified_diff(before, after, *names, lineterm="")))
    return 0


@policies.command("create")
@FILE
@click.option("--note", default="", help="Why it was made.")
@output_option
@click.pass_obj
def policies_create(target: Target, file: Any, note: str, output: str) -> None:
    """Keep the policy in FILE (- is standard input) as the next version; it is not active yet."""
    run(_create(target, {"policy": _read(file), "note": note}, output))


async def _create(target: Target, body: dict[str, Any], output: str) -> int:
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        made = await hub.call("control", "POST", "/api/policies", body)
    show_one(made if output == "json" else {name: made[name] for name in SHOWN}, output)
    say(f"not active yet: sheratan-hub policies activate {made['version']}")
    return 0


@policies.command("plan")
@click.argument("file", type=click.File("rb"), required=False)
@click.option("--version", type=click.IntRange(0), help="Try a version instead of a file.")
@output_option
@click.pass_obj
def policies_plan(target: Target, file: Any, version: int | None, output: str) -> None:
    """Tell what the policy in FILE, or a version, would change for the nodes and jobs that are there now."""
    if (file is None) == (version is None):
        raise click.UsageError("give a FILE or --version")
    run(_plan(target, {"version": version} if file is None else {"policy": _read(file)}, output))


async def _plan(target: Target, body: dict[str, Any], output: str) -> int:
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        told = await hub.call("control", "POST", "/api/policies/plan", body)
    if output == "json":
        show_one(told, output)
        return 0
    for rows, columns in ((told["nodes"], NODES), (told["waiting"], WAITING)):
        if rows:
            show_many(rows, columns, output)
    more = " or more" if told["more"] else ""
    say(f"{len(told['nodes'])} nodes change, {told['stranded_jobs']}{more} waiting jobs would have nobody to take them")
    return 0


@policies.command("activate")
@click.argument("version", type=click.IntRange(0))
@click.option("--active", type=click.IntRange(0), help="Only if this version is active now. Default: whichever is.")
@output_option
@click.pass_obj
def policies_activate(target: Target, version: int, active: int | None, output: str) -> None:
    """Put a version in force; 0 allows everything."""
    run(_activate(target, version, active, output))


async def _activate(target: Target, version: int, active: int | None, output: str) -> int:
    match = {"If-Match": "*" if active is None else f'"{active}"'}
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        done = await hub.call("control", "POST", f"/api/policies/{version}/activate", headers=match)
    show_one({"version": done["version"], "sha256": done["sha256"]}, output)
    return 0


def _read(file: Any) -> Any:
    try:
        return json.loads(file.read())
    except ValueError as error:
        raise click.UsageError(f"the policy is not JSON: {error}") from None
