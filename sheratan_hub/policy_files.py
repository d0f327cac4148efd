"""Policies that lie in files: loaded as new versions at the start, and refused when a known one was edited."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from sheratan_hub.hub import Hub
from sheratan_hub.rules.policies import CreatePolicy, Snapshot, snapshot_of
from sheratan_hub.rules.policy import Policy
from sheratan_hub.storage import StoreRefused

FILE_BYTES = 1 << 20


async def load_policies(hub: Hub, folder: str) -> list[Snapshot]:
    """Keep every `*.json` in `folder` that is not known yet as a version, in the order of their names.

    Loading activates nothing, and all are read before the first is kept. Raises `StoreRefused` for a folder or a file
    that cannot be read, is no policy, or was changed since it was loaded: a version never changes, so an edited policy
    needs a new name.
    """
    return [await hub.execute(command) for command in await new_policies(hub, folder)]


async def new_policies(hub: Hub, folder: str) -> list[CreatePolicy]:
    """What `load_policies` would keep. Raises `StoreRefused` as it does."""
    if not folder:
        return []
    known = {snapshot.file: snapshot for snapshot in await _snapshots(hub) if snapshot.file}
    found: list[CreatePolicy] = []
    for path, text in _texts(Path(folder)):
        digest = hashlib.sha256(text).hexdigest()
        before = known.get(path.name)
        if before is None:
            found.append(CreatePolicy(_policy(path, text), f"loaded from {path.name}", path.name, digest))
        elif before.file_sha256 != digest:
            raise StoreRefused(
                f"{path} was edited since it was loaded as policy version {before.version}; "
                "put it back, and give the edited policy a name of its own"
            )
    return found


async def _snapshots(hub: Hub) -> list[Snapshot]:
    found: list[Snapshot] = []
    after: str | None = None
    while True:
        page = await hub.page("policy", (), after, 1000)
        found += map(snapshot_of, page.rows)
        if page.next is None:
            return found
        after = page.next


def _texts(folder: Path) -> list[tuple[Path, bytes]]:
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json")
        found = []
        for path in paths:
            if not _is_text(path.name):
                raise StoreRefused(f"{path!a} must have a name in UTF-8")
            if path.stat().st_size > FILE_BYTES:
                raise StoreRefused(f"{path} is larger than {FILE_BYTES} bytes")
            found.append((path, path.read_bytes()))
    except OSError as error:
        raise StoreRefused(f"policies cannot be read: {error}") from error
    return found


def _is_text(name: str) -> bool:
    """Whether it can be stored: what the file system has in another encoding comes as lone surrogates."""
    return name.encode(errors="ignore").decode() == name


def _policy(path: Path, text: bytes) -> Policy:
    try:
        return msgspec.json.decode(text, type=Policy)
    except msgspec.DecodeError as error:
        raise StoreRefused(f"{path} is no policy: {error}") from error
