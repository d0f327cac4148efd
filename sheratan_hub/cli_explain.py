"""The command that tells why a job is not running."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sheratan_hub.cli_output import say, show_many, show_one
from sheratan_hub.cli_target import PATIENCE_SECONDS, Target, output_option, run

if TYPE_CHECKING:
    from sheratan_hub.client import Explained

REASON_COLUMNS = ("reason", "until", "detail")
NODE_COLUMNS = ("node_id", "status", "leases", "reasons")


@click.command("explain")
@click.argument("job_id")
@output_option
@click.pass_obj
def jobs_explain(target: Target, job_id: str, output: str) -> None:
    """Tell why a job is not running now: every reason, until when, and what keeps each node from it."""
    run(_explain(target, job_id, output))


async def _explain(target: Target, job_id: str, output: str) -> int:
    from msgspec import to_builtins

    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        found = await hub.explain(job_id)
    if output == "json":
        show_one(to_builtins(found), output)
    else:
        _print(found)
    return 0


def _print(found: Explained) -> None:
    from msgspec import to_builtins

    say(f"job {found.job_id} is {found.status}" + (f", and expires at {found.expires_at}" if found.expires_at else ""))
    show_many([to_builtins(one) for one in found.reasons], REASON_COLUMNS, "table")
    if found.nodes is None or not found.nodes.shown:
        return
    nodes = found.nodes
    more = " of those looked at" if nodes.cut else ""
    say(f"{nodes.known} nodes: {nodes.live} live, {nodes.capable} capable, {nodes.free} free{more}")
    rows: list[dict[str, Any]] = [
        {
            "node_id": one.node_id,
            "status": one.status,
            "leases": one.leases,
            "reasons": " ".join(why.detail for why in one.reasons) or "free to have it",
        }
        for one in nodes.shown
    ]
    click.echo()
    show_many(rows, NODE_COLUMNS, "table")
