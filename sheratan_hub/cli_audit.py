"""The commands that prove and read the audit log on this machine, without a hub, and the one that watches it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sheratan_hub.cli_output import say, show_many
from sheratan_hub.cli_target import EXIT_CONFIG, EXIT_FAILED, give_up, output_option

if TYPE_CHECKING:
    from sheratan_hub.audit_lines import Head
    from sheratan_hub.audit_read import Filter
    from sheratan_hub.config import Settings

AUDIT_COLUMNS = ("seq", "ts", "event", "plane", "remote_addr", "node_id", "path", "reason", "count", "detail")
SEARCH_MAX = 1000

config_option = click.option("--config", "config", type=click.Path(), help="Settings file instead of ./hub.toml.")
data_dir_option = click.option("--data-dir", type=click.Path(), help="The hub's data directory.")
file_option = click.option("--file", type=click.Path(exists=True, dir_okay=False), help="Another audit log.")


@click.group()
def audit() -> None:
    """Prove, read and search the audit log of a hub on this machine; no hub need run."""


@audit.command("verify")
@click.argument("files", nargs=-1, type=click.Path(exists=True))
@click.option("--head", "head_text", help="A hash, SEQ:HASH, or a file of `audit head`: must be among the lines.")
@click.option("--begin", type=click.IntRange(1), help="The first line there is, if older ones were removed on purpose.")
@config_option
@data_dir_option
def audit_verify(
    files: tuple[str, ...], head_text: str | None, begin: int | None, config: str | None, data_dir: str | None
) -> NoReturn:
    """Prove that every line follows from the one before; exit code 1 and the first line that does not.

    FILES may be rotated ones, in any order, or directories; none means the configured log with all its files.
    """
    from sheratan_hub.audit_verify import verify_listed

    head = _head(head_text) if head_text else None
    find = partial(_files, files) if files else partial(_chain, _log(None, config, data_dir))
    try:
        verdict = verify_listed(find, head, begin=begin)
    except OSError as error:
        give_up(f"{error.filename} cannot be read: {error.strerror}", EXIT_FAILED)
    for note in verdict.notes:
        click.echo(note)
    for cut in verdict.cuts:
        click.echo(f"{cut.file}:{cut.line}: {cut.text}")
    if verdict.broken is not None:
        click.echo(f"{verdict.broken.file}:{verdict.broken.line}: {verdict.broken.text}")
        click.echo(f"BROKEN after line {verdict.head.seq}")
        sys.exit(EXIT_FAILED)
    held = "; the head is among them" if head else ""
    count = verdict.head.seq - verdict.began_at + 1
    click.echo(f"ok: {count} lines, {verdict.began_at} to {verdict.head.seq}, hash {verdict.head.hash}{held}")
    sys.exit(0)


@audit.command("head")
@file_option
@config_option
@data_dir_option
def audit_head(file: str | None, config: str | None, data_dir: str | None) -> None:
    """Print the number, hash and time of the last line as JSON: kept elsewhere, it proves that nothing was cut off."""
    import orjson

    from sheratan_hub.audit_verify import last_head

    heads = (last_head(one) for one in reversed(_chain(_log(file, config, data_dir))))
    found = next((head for head in heads if head is not None), None)
    if found is None:
        give_up("the audit log holds no line", EXIT_FAILED)
    click.echo(orjson.dumps(found._asdict()))


@audit.command("tail")
@click.option("-n", "count", type=click.IntRange(0, 100_000), default=20, show_default=True, help="Lines at most.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written, over rotations, until Ctrl-C.")
@file_option
@config_option
@data_dir_option
@output_option
def audit_tail(
    count: int, follow: bool, file: str | None, config: str | None, data_dir: str | None, output: str
) -> None:
    """Print the last lines, one each; `-o json` as they stand in the log."""
    from sheratan_hub.audit_read import newest

    path = _log(file, config, data_dir)
    records = newest(path, count)
    for record in records:
        _print(record, output)
    if follow:
        last = records[-1]["seq"] if records else 0
        _follow(path, last, output)


def _follow(path: Path, last: int, output: str) -> None:
    import asyncio

    from sheratan_hub.audit_read import page
    from sheratan_hub.clock import SystemClock

    async def follow() -> None:
        clock, after = SystemClock(), last
        while True:
            found = page(path, after, 1000)
            for record in found.records:
                _print(record, output)
            if after == found.last:
                await clock.sleep(300)
            after = found.last

    try:
        asyncio.run(follow())
    except KeyboardInterrupt:
        sys.exit(0)


def known_event(context: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """An event's name; a misspelt one would find nothing, which looks like good news."""
    from difflib import get_close_matches

    from sheratan_hub.audit_lines import EVENTS

    if value is not None and value not in EVENTS:
        near = get_close_matches(value.upper(), EVENTS, n=1)
        raise click.BadParameter(f"{value} is no audit event" + (f"; did you mean {near[0]}?" if near else ""))
    return value


@audit.command("search")
@click.option("--event", callback=known_event, help="Such as AUTH_FAILURE.")
@click.option("--node-id")
@click.option("--reason")
@click.option("--since", help="RFC 3339 time of the first, such as 2026-11-21T10:00:00Z.")
@click.option("--until", help="RFC 3339 time before which the last must lie.")
@click.option("--limit", type=click.IntRange(1), default=SEARCH_MAX, show_default=True, help="Lines at most.")
@file_option
@config_option
@data_dir_option
@output_option
def audit_search(
    file: str | None, config: str | None, data_dir: str | None, limit: int, output: str, **wanted: str | None
) -> None:
    """Print the lines that fit, oldest first, through all rotated files."""
    from sheratan_hub.audit_read import search

    found: list[dict[str, Any]] = []
    for record in search(_log(file, config, data_dir), _filter(wanted)):
        if len(found) == limit:
            say(f"showing the first {limit}; --limit shows more")
            break
        found.append(record)
    show_many(found, AUDIT_COLUMNS, output)


def _filter(wanted: dict[str, str | None]) -> Filter:
    from sheratan_hub.audit_read import Filter, moment

    try:
        times = {name: moment(text) if (text := wanted.pop(name)) else None for name in ("since", "until")}
    except ValueError as error:
        raise click.UsageError(f"--since and --until are RFC 3339 times with a zone: {error}") from None
    return Filter(**wanted, **times)


@click.command()
@click.option("--once", is_flag=True, help="Read what is there, raise its alerts, and end.")
@config_option
@data_dir_option
def watch(once: bool, config: str | None, data_dir: str | None) -> NoReturn:
    """Watch a hub's audit log by the rules of [alerts]; alerts go to alerts.jsonl beside it, and to stdout."""
    import asyncio
    import signal

    from sheratan_hub.audit_lines import FILE_NAME
    from sheratan_hub.clock import SystemClock
    from sheratan_hub.config import BadConfig
    from sheratan_hub.watching import Watch

    settings = _settings(config, data_dir)
    folder = Path(settings.hub.data_dir) / "logs"
    note = f"there is no audit log in {folder.absolute()} yet; if its hub runs, name the directory by --data-dir"
    missing = "" if (folder / FILE_NAME).exists() else note

    async def run() -> None:
        watching = Watch(folder, settings.alerts, SystemClock(), lambda text: click.echo(text))
        if once:
            if missing:
                say(missing)
            await watching.once()
            return
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        say(f"watching {folder}; {len(settings.alerts.in_force())} rules" + (f"; {missing}" if missing else ""))
        await watching.run(stop)

    try:
        asyncio.run(run())
    except BadConfig as bad:
        give_up(str(bad), EXIT_CONFIG)
    except BlockingIOError:
        give_up("another process watches this audit log", EXIT_FAILED)
    except OSError as error:
        give_up(f"{error.filename}: {error.strerror}", EXIT_FAILED)
    sys.exit(0)


def _settings(config: str | None, data_dir: str | None) -> Settings:
    from sheratan_hub import config as configuration

    try:
        return configuration.load(config, os.environ, {"hub.data_dir": data_dir})[0]
    except configuration.BadConfig as bad:
        give_up(str(bad), EXIT_CONFIG)


def _log(file: str | None, config: str | None, data_dir: str | None) -> Path:
    """The log that is meant: a file, else that of the configured hub."""
    from sheratan_hub.audit_lines import FILE_NAME

    return Path(file) if file else Path(_settings(config, data_dir).hub.data_dir) / "logs" / FILE_NAME


def _chain(path: Path) -> list[Path]:
    from sheratan_hub.audit_lines import chain_files

    found = chain_files(path)
    if not found:
        give_up(f"there is no audit log {path}", EXIT_FAILED)
    return found


def _files(names: tuple[str, ...]) -> list[Path]:
    """What was named, each file once; a directory stands for the log in it."""
    return list(dict.fromkeys(_expanded(names)))


def _expanded(names: tuple[str, ...]) -> Iterator[Path]:
    from sheratan_hub.audit_lines import FILE_NAME

    for name in names:
        if Path(name).is_dir():
            yield from _chain(Path(name) / FILE_NAME)
        else:
            yield Path(name)


def _head(text: str) -> Head:
    """A head as it was given: HASH, SEQ:HASH, or a file with what `audit head` prints."""
    import re

    from sheratan_hub.audit_lines import Head, parsed

    match = re.fullmatch(r"(?:(\d{1,18}):)?([0-9a-f]{64})", text)
    if match:
        return Head(int(match[1] or 0), match[2])
    try:
        record = parsed(Path(text).read_bytes()) or {}
    except OSError as error:
        raise click.UsageError(f"--head is no hash, and {text} cannot be read: {error.strerror}") from None
    if not isinstance(record.get("seq"), int) or not re.fullmatch("[0-9a-f]{64}", str(record.get("hash"))):
        raise click.UsageError(f"{text} holds no head")
    return Head(record["seq"], record["hash"])


def _print(record: dict[str, Any], output: str) -> None:
    import orjson

    if output == "json":
        click.echo(orjson.dumps(record))
        return
    who = record.get("node_id") or record.get("remote_addr") or "hub"
    words = [record.get("ts"), record.get("event"), who, record.get("path"), record.get("reason")]
    if record.get("count"):
        words.append(f"x{record['count']}")
    if record.get("detail"):
        words.append(orjson.dumps(record["detail"]).decode())
    click.echo(" ".join(str(word) for word in words if word))
