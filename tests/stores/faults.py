"""A disk that fails or waits at a function of `os`, for tests of the file store; and rows that tell what is missing."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sheratan_hub.storage import Changes, Row
from sheratan_stores.file import FileStore
from tests.stores.history import save


async def add(store: FileStore, id: str, size: int = 10, *, durable: bool = True, kind: str = "job") -> int:
    changes = Changes(new=[Row(kind, id, b"x" * size, lane="l")], counts={"rows": 1}, ledger=[b"line " + id.encode()])
    return await save(store, changes, durable=durable)


async def whole(store: FileStore, *ids: str) -> None:
    """Exactly these rows are there; rows, counter and ledger agree."""
    page = await store.page("job", limit=100_000, examine=100_000)
    assert sorted(row.id for row in page.rows) == sorted(ids)
    assert [line.line for line in await store.events(limit=100_000)] == [b"line " + id.encode() for id in ids]
    assert await store.counts() == ({"rows": len(ids)} if ids else {})


async def whole_again(store: FileStore, *ids: str) -> None:
    """As `whole`, now and after opening it again."""
    await whole(store, *ids)
    await store.close()
    await store.open()
    await whole(store, *ids)


class Fault:
    """A function of `os` that fails so many times for the files whose path has this in it, and does not end so."""

    def __init__(self, function: str, part: str, number: int, left: int, but: str) -> None:
        self.part, self.number, self.left, self.but = part, number, left, but
        self.calls = 0
        self.real: Any = getattr(os, function)

    def __call__(self, file: Any, *rest: Any, **options: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else str(file)
        if self.part in path and not path.endswith(self.but):
            self.calls += 1
            if self.calls <= self.left:
                raise OSError(self.number, os.strerror(self.number), path)
        return self.real(file, *rest, **options)


@contextmanager
def failing(
    function: str, part: str, number: int = errno.EIO, *, left: int = 1_000_000, but: str = "?"
) -> Iterator[Fault]:
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(function, part, number, left, but)
        patch.setattr(os, function, fault)
        yield fault


class Gate:
    """Stops a thread in a function of `os` for a file, until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch, function: str, part: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        real = getattr(os, function)

        def wait(file: Any, *rest: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else str(file)
            if part in path:
                self.reached.set()
                assert self.opened.wait(30)
            return real(file, *rest)

        patch.setattr(os, function, wait)

    async def until_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 30)
