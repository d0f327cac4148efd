"""`sheratan-hub tokens`: how the shared token stands, and its rotation."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from sheratan_hub.cli_output import say, show_many, show_one
from sheratan_hub.cli_target import PATIENCE_SECONDS, Target, output_option, run

NODE_COLUMNS = ("node_id", "token", "at", "status", "locked_out")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@click.group()
def tokens() -> None:
    """Look at the shared token and replace it without a refused request."""


@tokens.command()
@output_option
@click.pass_obj
def status(target: Target, output: str) -> None:
    """Which token is active or next, until when, and who would be locked out if the rotation ended now."""
    run(_status(target, output))


async def _status(target: Target, output: str) -> int:
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        told = await hub.call("control", "GET", "/api/tokens")
    if output == "json":
        show_one(told, output)
        return 0
    show_one(_ring(told), output)
    named = {slot["id"]: f"{slot['id']} ({name})" for name in ("active", "next") if (slot := told[name])}
    rows = [
        {
            **use,
            "node_id": node_id,
            "token": named.get(use["token_id"], use["token_id"]),
            "locked_out": "yes" if node_id in told["locked_out"] else None,
        }
        for node_id, use in sorted(told["nodes"].items())
    ]
    show_many(rows, NODE_COLUMNS, output)
    return 0


@tokens.command()
@click.option("--until", required=True, help="When the next token takes over: 24h, 90m, 7d, or an RFC 3339 time.")
@click.option("--to", "path", type=click.Path(dir_okay=False), help="Write the token there, not to the screen.")
@output_option
@click.pass_obj
def rotate(target: Target, until: str, path: str | None, output: str) -> None:
    """Begin a rotation to a new token, which is shown once. Both tokens are good until it ends."""
    seconds = duration(until)
    ends: dict[str, object] = {"until": until} if seconds is None else {"seconds": seconds}
    run(_rotate(target, ends, path, output))


async def _rotate(target: Target, ends: dict[str, object], path: str | None, output: str) -> int:
    from sheratan_hub.clock import SystemClock

    clock = SystemClock()
    token = f"shn_{clock.secret()}{clock.secret()}"  # made here, so that the request can be repeated
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        with secret_file(path) as keep:
            told = await hub.call("control", "POST", "/api/tokens/rotation", {**ends, "token": token})
            shown = {**_ring(told), "token": keep(token)}
    show_one(shown, output)
    say("give it to producers and nodes, then see `sheratan-hub tokens status`")
    return 0


@tokens.command()
@output_option
@click.pass_obj
def abandon(target: Target, output: str) -> None:
    """End the rotation under way as if it had never begun."""
    run(_abandon(target, output))


async def _abandon(target: Target, output: str) -> int:
    async with target.client(patience_seconds=PATIENCE_SECONDS) as hub:
        told = await hub.call("control", "DELETE", "/api/tokens/rotation")
    show_one({**_ring(told), "locked_out": told["locked_out"]}, output)
    return 0


def _ring(told: dict[str, Any]) -> dict[str, Any]:
    ids = {name: told[name]["id"] if told[name] else None for name in ("active", "next")}
    return {**ids, "until": told["until"]}


def duration(text: str) -> float | None:
    """Seconds of a text like 24h, 90m, 7d or 3600; None if it is no duration."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", text.strip())
    return float(found[1]) * SECONDS[found[2] or "s"] if found else None


@contextmanager
def secret_file(path: str | None) -> Iterator[Callable[[str], str]]:
    """What keeps a secret in a file for its owner only, in the place of what was there, and says what to show instead.

    Without a path that is the secret itself. A file that cannot be made is told before there is a secret to lose.
    """
    if path is None:
        yield lambda text: text
        return
    draft = Path(path).with_name(Path(path).name + ".new")
    try:
        draft.unlink(missing_ok=True)
        opened = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise click.UsageError(f"--to: {path} cannot be written: {error.strerror}") from None

    def keep(text: str) -> str:
        try:
            os.write(opened, f"{text}\n".encode())
            draft.replace(path)
        except OSError as error:
            say(f"sheratan-hub: {path} cannot be written: {error.strerror}; the token is shown instead")
            return text
        return f"written to {path}"

    try:
        yield keep
    finally:
        os.close(opened)
        draft.unlink(missing_ok=True)
