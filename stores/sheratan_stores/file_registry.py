"""`nodes_registry.json`: the nodes as the file store has them, for people. Nothing is ever read from it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from sheratan_hub.clock import Clock, rfc3339
from sheratan_stores.file_disk import in_thread, replace
from sheratan_stores.state import NONE, State, unpack

log = logging.getLogger("sheratan.store")

PAUSE_MS = 1000
"""At most so often it is written, and never for more than a hundredth of the time."""


class Registry:
    """Writes the file behind changes, whole or not at all. `changed` is told of every change."""

    def __init__(self, path: Path, state: State, clock: Clock) -> None:
        self._path, self._state, self._clock = path, state, clock
        self.changed = asyncio.Event()
        self._failing = False

    async def follow(self) -> None:
        """Write it after each change, until cancelled."""
        while True:
            await self.changed.wait()
            began = self._clock.now()
            await self.write()
            await self._clock.sleep(max(PAUSE_MS, 100 * (self._clock.now() - began)))

    async def write(self) -> None:
        """Write it now, if something has changed. Where it can't be written, that is logged: the log has it all."""
        if not self.changed.is_set():
            return
        self.changed.clear()
        rows = dict(self._state.rows.get("node", NONE))
        try:
            await in_thread(self._replace, rows)
        except OSError as error:
            self.changed.set()
            if not self._failing:
                log.warning("%s cannot be written: %s", self._path, error.strerror)
            self._failing = True
        else:
            self._failing = False

    def _replace(self, rows: dict[str, bytes]) -> None:
        nodes = {id: readable(unpack(packed).doc) for id, packed in sorted(rows.items())}
        text = msgspec.json.encode({"written_at": rfc3339(self._clock.now()), "nodes": nodes})
        replace(self._path, msgspec.json.format(text) + b"\n")


def readable(doc: bytes) -> object:
    """A document as JSON, or as text if it is none."""
    try:
        return msgspec.json.decode(doc)
    except (ValueError, RecursionError):
        return doc.decode(errors="replace")
