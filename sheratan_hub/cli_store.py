"""The commands that look at, back up, move and mend the store of a hub on this machine; no hub need run for them.

Exit codes: 0 done, and nothing wrong; 1 something is wrong, or was lost; 78 the store cannot be read, or the target not
written.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from sheratan_hub.cli_output import progress, say, show_one
from sheratan_hub.cli_target import EXIT_CONFIG, EXIT_FAILED, give_up

if TYPE_CHECKING:
    from sheratan_hub.storage import Store
    from sheratan_hub.store_copy import Content

T = TypeVar("T")

SHOWN = 50
"""So many problems are printed for people."""

config_option = click.option("--config", type=click.Path(), help="Settings file instead of ./hub.toml.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object for programs.")
store_argument = click.argument("store", required=False)


@click.group()
def store() -> None:
    """Look at, back up, move and mend a store.

    STORE is a URL such as sqlite://var/hub.db or file://var/hub, or the folder of a backup; without it the store of the
    configured hub is meant.
    """


@store.command("info")
@store_argument
@config_option
@json_option
def store_info(store: str | None, config: str | None, as_json: bool) -> None:
    """Tell what a store is, how large, and who has it open."""
    from sheratan_hub.store_check import describe

    told = _run(describe(_store(store, config)))
    if not as_json:
        told["held_by"] = told["held_by"] or "nobody"
    show_one(told, "json" if as_json else "table")


@store.command("check")
@store_argument
@config_option
@json_option
def store_check(store: str | None, config: str | None, as_json: bool) -> NoReturn:
    """Name every contradiction between rows, counters, events and files, also beside a running hub; 1 if there is one.

    What the codes mean stands in docs/protocol.md.
    """
    from sheratan_hub.storage_tools import tools_of
    from sheratan_hub.store_check import Report, check

    async def run() -> tuple[str, Report]:
        async with tools_of(_store(store, config), "reading").reading() as reading:
            with progress("checked") as tell:
                return reading.about.place, await check(reading, tell=tell)

    place, report = _run(run())
    if as_json:
        _json(_reported(report))
    else:
        for one in (*report.problems[:SHOWN], *report.notes[:SHOWN]):
            click.echo(f"{one.code}: {one.place}: {one.text}")
        if len(report.problems) > SHOWN:
            click.echo(f"... {', '.join(f'{code} {n}' for code, n in sorted(report.found.items()))}")
        rows = sum(report.rows.values())
        verdict = "ok" if report.clean else "PROBLEMS"
        click.echo(f"{verdict}: {rows} rows and {report.events} events of {place} were looked at")
    sys.exit(0 if report.clean else EXIT_FAILED)


def _reported(report: Any) -> dict[str, Any]:
    def told(problems: list[Any]) -> list[dict[str, str]]:
        return [one._asdict() for one in problems]

    return {
        "ok": report.clean,
        "problems": told(report.problems),
        "notes": told(report.notes),
        "found": report.found,
        "rows": report.rows,
        "events": report.events,
        "complete": report.complete,
    }


@store.command("backup")
@click.argument("folder", type=click.Path())
@click.option("--from", "store", help="Another store than the configured one.")
@config_option
@json_option
def store_backup(folder: str, store: str | None, config: str | None, as_json: bool) -> None:
    """Back the store up into FOLDER, which must not be there yet. A hub that runs may go on running."""
    import msgspec

    from sheratan_hub.clock import SystemClock
    from sheratan_hub.store_backup import back_up

    source, target = _store(store, config), Path(folder).absolute()
    with progress("proved") as tell:
        manifest = _run(back_up(source, target, SystemClock(), tell))
    if as_json:
        _json({"ok": True, "folder": str(target), **msgspec.to_builtins(manifest)})
    else:
        _told(manifest.holds, f"{_name(store, config)} backed up into {target}")


@store.command("restore")
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--to", "store", help="Another store than the configured one, of any kind.")
@config_option
@json_option
def store_restore(folder: str, store: str | None, config: str | None, as_json: bool) -> None:
    """Make the store out of the backup in FOLDER, and prove it. Where there is a store already, nothing is done."""
    from sheratan_hub.clock import SystemClock
    from sheratan_hub.store_backup import restore

    target = _store(store, config)
    with progress("restored") as tell:
        holds = _run(restore(Path(folder), target, SystemClock(), tell))
    _done(holds, f"restored from {folder}", as_json)


@store.command("copy")
@click.argument("source")
@click.argument("target")
@config_option
@json_option
def store_copy(source: str, target: str, config: str | None, as_json: bool) -> None:
    """Copy all of the store SOURCE into TARGET, a store of any kind that must not be there yet, and prove it."""
    from sheratan_hub.store_copy import copy

    with progress("copied") as tell:
        holds = _run(copy(_store(source, config), _store(target, config), "", tell))
    _done(holds, f"copied to {target}", as_json)


@store.command("compact")
@store_argument
@config_option
@json_option
def store_compact(store: str | None, config: str | None, as_json: bool) -> None:
    """Give back the room that nothing needs any more. Only while no hub has the store open."""
    from sheratan_hub.storage_tools import sizes_of, tools_of

    found = _store(store, config)

    async def run() -> tuple[int, int]:
        tools = tools_of(found, "compact", "sizes")
        before = await sizes_of(found)
        await tools.compact()
        after = await sizes_of(found)
        return (before.store_bytes if before else 0), (after.store_bytes if after else 0)

    before, after = _run(run())
    if as_json:
        _json({"ok": True, "bytes_before": before, "bytes_after": after})
    else:
        click.echo(f"ok: {before} bytes before, {after} now")


@store.command("repair")
@click.argument("source")
@click.argument("target")
@config_option
@json_option
def store_repair(source: str, target: str, config: str | None, as_json: bool) -> NoReturn:
    """Make the store TARGET out of what can be read of SOURCE, which stays as it is. 1 if anything was lost.

    TARGET must not be there yet, and may be of another kind.
    """
    from sheratan_hub.clock import SystemClock
    from sheratan_hub.store_repair import repair

    into = _store(target, config)
    with progress("rows") as tell:
        done = _run(repair(_store(source, config), into, _scratch(target), SystemClock().now(), tell))
    if as_json:
        told = {"lost": done.lost, "mended": done.mended, "lost_events": done.lost_events}
        _json({"ok": done.report.clean, **told, "check": _reported(done.report)})
    else:
        for text in done.lost:
            click.echo(f"lost: {text}")
        for text in done.mended[: 10 * SHOWN]:
            click.echo(f"mended: {text}")
        if len(done.mended) > 10 * SHOWN:
            click.echo(f"... and {len(done.mended) - 10 * SHOWN} more; --json shows all")
        if done.lost_events:
            click.echo(f"lost: {done.lost_events} events; lines named ledger.lost stand in their place")
        for one in done.report.problems[:SHOWN]:
            click.echo(f"STILL WRONG: {one.code}: {one.place}: {one.text}")
        rows = sum(done.report.rows.values())
        click.echo(f"{target} holds {rows} rows and {done.report.events} events; {source} was not changed")
    whole = done.report.clean and not (done.lost or done.mended or done.lost_events)
    sys.exit(0 if whole else EXIT_FAILED)


def _scratch(target: str) -> Path:
    """The folder in which the target will lie: there is room, or there would be none for the target."""
    folder = Path(target.partition("://")[2]).absolute().parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        give_up(f"{folder} cannot be made: {error.strerror}", EXIT_CONFIG)
    return folder


def _store(named: str | None, config: str | None) -> Store:
    """The store that was named: a URL, the folder of a backup, or nothing for the configured one. Not opened."""
    from sheratan_hub import config as configuration
    from sheratan_hub.clock import SystemClock
    from sheratan_hub.storage import StoreRefused, open_store
    from sheratan_hub.store_backup import MANIFEST, store_in

    clock = SystemClock()
    try:
        if named is None:
            settings, _ = configuration.load(config, os.environ)
            return open_store(configuration.store_url(settings), clock)
        if "://" not in named and (Path(named) / MANIFEST).exists():
            return store_in(Path(named), clock)
        return open_store(named, clock)
    except (configuration.BadConfig, StoreRefused) as no:
        give_up(str(no), EXIT_CONFIG)


def _name(named: str | None, config: str | None) -> str:
    """The store's URL, to be shown."""
    from sheratan_hub import config as configuration

    if named is not None:
        return named
    settings, _ = configuration.load(config, os.environ)
    return configuration.hide_password(configuration.store_url(settings))


def _run(work: Coroutine[Any, Any, T]) -> T:
    """What `work` comes to; one sentence and 78 if a store cannot be read, or written."""
    import asyncio

    from sheratan_hub.storage import StoreDown, StoreRefused

    try:
        return asyncio.run(work)
    except (StoreRefused, StoreDown) as no:
        give_up(str(no), EXIT_CONFIG)
    except OSError as error:
        give_up(f"{error.filename}: {error.strerror}" if error.filename else str(error), EXIT_CONFIG)
    except KeyboardInterrupt:
        give_up("interrupted; nothing was left behind", EXIT_FAILED)


def _done(holds: Content, what: str, as_json: bool) -> None:
    import msgspec

    if as_json:
        _json({"ok": True, **msgspec.to_builtins(holds)})
    else:
        _told(holds, what)


def _told(holds: Content, what: str) -> None:
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(holds.rows.items()))
    say(f"rows: {kinds or 'none'}")
    rows = sum(holds.rows.values())
    click.echo(f"ok: {what}: {rows} rows, {holds.events} events, {holds.counters} counters, sha256 {holds.sha256}")


def _json(value: object) -> None:
    import orjson

    click.echo(orjson.dumps(value))
