"""Backups: a folder with a store of the same kind, proved, and `backup.json`, which says what it holds."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import msgspec

from sheratan_hub import __version__
from sheratan_hub.clock import Clock, rfc3339
from sheratan_hub.storage import Store, StoreDown, StoreRefused, open_store
from sheratan_hub.storage_tools import tools_of
from sheratan_hub.store_copy import Content, Tell, content, copy

MANIFEST = "backup.json"
FORMAT = 1


class Manifest(msgspec.Struct, frozen=True):
    """The content of `backup.json`. `scheme` and `name` (a path in the folder) say which store, `holds` what it has."""

    format: int
    made_at: str
    made_by: str
    scheme: str
    name: str
    holds: Content


async def back_up(store: Store, folder: Path, clock: Clock, tell: Tell = lambda _: None) -> Manifest:
    """Back a store up into a folder (an absolute path) that is not there yet, beside whoever writes.

    The folder appears under its name when everything in it is proved and on disk. Raises `StoreRefused`, `StoreDown`.
    """
    refuse_if_there(folder)
    tools = tools_of(store, "reading", "copy_to")
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        made_at = rfc3339(clock.now())
        url = await tools.copy_to(draft)
        manifest = await _proved(url, draft, made_at, clock, tell)
        await asyncio.to_thread(_finish, draft, folder, manifest)
    except OSError as error:
        raise StoreDown(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


async def _proved(url: str, draft: Path, made_at: str, clock: Clock, tell: Tell) -> Manifest:
    scheme, _, path = url.partition("://")
    async with tools_of(open_store(url, clock)).reading() as reading:
        holds = await content(reading, tell)
        damage = [found for found in await reading.findings() if not found.harmless]
    if damage:
        raise StoreRefused(f"the store is damaged, so no backup was made: {damage[0].text}")
    return Manifest(FORMAT, made_at, f"sheratan-hub {__version__}", scheme, str(Path(path).relative_to(draft)), holds)


def _finish(draft: Path, folder: Path, manifest: Manifest) -> None:
    text = msgspec.json.format(msgspec.json.encode(manifest)) + b"\n"
    file = os.open(draft / MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(file, "wb") as out:
        out.write(text)
        out.flush()
        os.fsync(file)
    _sync_folder(draft)
    refuse_if_there(folder)
    draft.rename(folder)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def refuse_if_there(path: Path) -> None:
    """Nothing is overwritten: raises `StoreRefused` if there is anything at this path."""
    if path.exists() or path.is_symlink():
        raise StoreRefused(f"{path} is there already, and nothing is overwritten")


def manifest_of(folder: Path) -> Manifest:
    """What a backup says of itself. Raises `StoreRefused`."""
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise StoreRefused(f"{folder} is no backup: there is no {MANIFEST} in it") from None
    except OSError as error:
        raise StoreRefused(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise StoreRefused(f"{path} is damaged: {error}") from error
    if manifest.format > FORMAT:
        raise StoreRefused(f"{path} has format {manifest.format}, this version knows formats up to {FORMAT}")
    return manifest


def store_in(folder: Path, clock: Clock) -> Store:
    """The store in a backup, not opened. Raises `StoreRefused`."""
    folder = folder.absolute()
    manifest = manifest_of(folder)
    inside = (folder / manifest.name).resolve()
    if not inside.is_relative_to(folder.resolve()):
        raise StoreRefused(f"{folder / MANIFEST} is damaged: it names {manifest.name}, which is not in that folder")
    return open_store(f"{manifest.scheme}://{inside}", clock)


async def restore(folder: Path, target: Store, clock: Clock, tell: Tell = lambda _: None) -> Content:
    """Make `target`, of whatever kind, out of a backup that still holds what was written into it; prove it."""
    return await copy(store_in(folder, clock), target, manifest_of(folder).holds.sha256, tell)
