"""`sheratan-hub nodes`: look at the machines of the fleet, drain them, take them back, accept them, forget them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from sheratan_hub.cli_output import NODE_COLUMNS, say, show_many, show_one
from sheratan_hub.cli_target import EXIT_FAILED, PATIENCE_SECONDS, Target, output_option, run

CHANGED_COLUMNS = ("node_id", "status", "health", "draining", "drain_until")


@click.group(invoke_without_command=True)
@output_option
@click.pass_context
def nodes(context: click.Context, output: str) -> None:
    """Look at the machines of the fleet and at each of them; without a command, list them."""
    if context.invoked_subcommand is None:
        run(_list(context.obj, output))


@nodes.command("list")
@output_option
@click.pass_obj
def nodes_list(target: Target, output: str) -> None:
    """List the machines of the fleet."""
    run(_list(target, output))


async def _list(target: Target, output: str) -> int:
    from msgspec import to_builtins

    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        show_many([to_builtins(node) for node in await hub.nodes()], NODE_COLUMNS, output)
    return 0


@nodes.command("show")
@click.argument("node_id")
@output_option
@click.pass_obj
def nodes_show(target: Target, node_id: str, output: str) -> None:
    """Show one node, with what it has attested."""
    run(_show(target, node_id, output))


async def _show(target: Target, node_id: str, output: str) -> int:
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        found = await hub.node(node_id)
        found.pop("ok", None)
        show_one(found, output)
    return 0


@nodes.command("drain")
@click.argument("node_ids", nargs=-1, required=True)
@click.option("--seconds", type=click.FloatRange(0), help="Then what it still holds goes to others. Default: never.")
@click.option("--until", help="The same as an RFC 3339 time.")
@output_option
@click.pass_obj
def nodes_drain(
    target: Target, node_ids: tuple[str, ...], seconds: float | None, until: str | None, output: str
) -> None:
    """Lease nothing more to these nodes; they finish what they hold."""
    if seconds is not None and until is not None:
        raise click.UsageError("give --seconds or --until, not both")
    run(_each(target, "drain_node", node_ids, output, {"seconds": seconds, "until": until}))


@nodes.command("resume")
@click.argument("node_ids", nargs=-1, required=True)
@output_option
@click.pass_obj
def nodes_resume(target: Target, node_ids: tuple[str, ...], output: str) -> None:
    """Take drained nodes back."""
    run(_each(target, "resume_node", node_ids, output))


@nodes.command("attest")
@click.argument("node_ids", nargs=-1, required=True)
@output_option
@click.pass_obj
def nodes_attest(target: Target, node_ids: tuple[str, ...], output: str) -> None:
    """Accept what these nodes attest now as their baseline."""
    run(_each(target, "attest", node_ids, output))


@nodes.command("forget")
@click.argument("node_ids", nargs=-1, required=True)
@output_option
@click.pass_obj
def nodes_forget(target: Target, node_ids: tuple[str, ...], output: str) -> None:
    """Forget nodes that are DEAD, or drained and without a job."""
    run(_each(target, "forget", node_ids, output))


async def _each(
    target: Target, verb: str, node_ids: Sequence[str], output: str, how: dict[str, Any] | None = None
) -> int:
    """Do it to each; one that the hub refuses is told and does not keep it from the others."""
    from sheratan_hub.client import HubRefused

    rows: list[dict[str, Any]] = []
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        for node_id in node_ids:
            try:
                rows.append(await getattr(hub, verb)(node_id, **(how or {})))
            except HubRefused as no:
                if no.status not in (404, 409):
                    raise
                say(str(no))
    if rows or output == "json":
        show_many(rows, ("node_id",) if verb == "forget" else CHANGED_COLUMNS, output)
    return 0 if len(rows) == len(node_ids) else EXIT_FAILED


@nodes.command("fleet")
@output_option
@click.pass_obj
def nodes_fleet(target: Target, output: str) -> None:
    """Show how many nodes are in which state, and whether mass silence keeps dead nodes' leases."""
    run(_fleet(target, output))


async def _fleet(target: Target, output: str) -> int:
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        found = await hub.fleet()
        show_one({**found["nodes"], "silence": found["silence"]}, output)
    return 0


@nodes.command("reap")
@click.pass_obj
def nodes_reap(target: Target) -> None:
    """End the brake on mass silence: the leases of DEAD nodes end now."""
    run(_reap(target))


async def _reap(target: Target) -> int:
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        ended = (await hub.reap())["ended"]
    say("the leases of dead nodes end now" if ended else "there was nothing to end: no mass silence is in force")
    return 0
