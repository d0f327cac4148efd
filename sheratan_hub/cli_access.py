"""`sheratan-hub access`: scoped tokens."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import click

from sheratan_hub.cli_output import say, show_many, show_one
from sheratan_hub.cli_target import PATIENCE_SECONDS, Target, output_option, run
from sheratan_hub.cli_tokens import duration, secret_file

COLUMNS = ("access_id", "role", "node_id", "name", "created_at", "expires_at", "expired")

SHOWN = ("access_id", "role", "node_id", "name", "expires_at", "token")


@click.group()
def access() -> None:
    """Make, list and revoke tokens that may do only what their role needs."""


@access.command()
@click.argument("role", type=click.Choice(["node", "producer", "viewer", "admin"]))
@click.option("--node-id", help="The node that a token of the role node is for.")
@click.option("--expires", help="How long it lasts: 24h, 90m, 7d. Default: until it is revoked.")
@click.option("--name", help="A word of yours to know it by.")
@click.option("--to", "path", type=click.Path(dir_okay=False), help="Write the token there, not to the screen.")
@output_option
@click.pass_obj
def create(
    target: Target, role: str, node_id: str | None, expires: str | None, name: str | None, path: str | None, output: str
) -> None:
    """Make a scoped token, which is shown once."""
    seconds = None if expires is None else duration(expires)
    if expires is not None and seconds is None:
        raise click.UsageError("--expires must be a duration such as 24h, 90m or 7d")
    given = {"role": role, "node_id": node_id, "expires_in_seconds": seconds, "name": name}
    run(_create(target, {key: value for key, value in given.items() if value is not None}, path, output))


async def _create(target: Target, body: dict[str, object], path: str | None, output: str) -> int:
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        with secret_file(path) as keep:
            made = await hub.call("control", "POST", "/api/access", body)
            shown = {**{name: made[name] for name in SHOWN}, "token": keep(made["token"])}
    show_one(shown, output)
    return 0


@access.command("list")
@output_option
@click.pass_obj
def list_access(target: Target, output: str) -> None:
    """List scoped tokens, without their values."""
    run(_list(target, output))


async def _list(target: Target, output: str) -> int:
    rows: list[dict[str, Any]] = []
    after = ""
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        while True:
            page = await hub.call("control", "GET", f"/api/access?limit=1000{after}")
            rows += page["access"]
            if page["next_cursor"] is None:
                break
            after = f"&cursor={quote(page['next_cursor'], safe='')}"
    show_many(rows, COLUMNS, output)
    return 0


@access.command()
@click.argument("access_id")
@click.pass_obj
def revoke(target: Target, access_id: str) -> None:
    """Revoke a scoped token, at once and for ever."""
    run(_revoke(target, access_id))


async def _revoke(target: Target, access_id: str) -> int:
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        await hub.call("control", "DELETE", f"/api/access/{quote(access_id, safe='')}")
    say(f"{access_id} is revoked")
    return 0
