"""The file store killed at every change it makes to the disk, and after power cuts that leave what a disk may leave.

Nothing is killed here but in the last tests: a session is recorded once, and `disk.py` says what each end would leave.
What was acknowledged is there, nothing is there by half, whatever is opened again and killed while it is opened.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.storage import Changes, Row
from sheratan_stores import file_ledger
from sheratan_stores.memory import MemoryStore
from tests.stores.disk import Cut, Disk, Left, Mark, Names, Write, beginning, everything, nothing, some
from tests.stores.history import History, file_store, opened, save, seen

TORTURE = int(os.environ.get("STORE_TORTURE", "1"))
"""How many times as much of everything random; `make torture` has more time than `make test`."""


@pytest.fixture(autouse=True)
def small_ledger_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_ledger, "FILE_BYTES", 700)


class Session:
    """A recorded session: its history and its disk."""

    def __init__(self, base: Path, seed: int, **options: Any) -> None:
        self.history, self.disk = History(seed, **options), Disk(base)
        self._base = base

    async def run(self, steps: int = 50, sessions: int = 2) -> Session:
        with self.disk.recorded():
            for number in range(sessions):
                store = file_store(self._base / "var" / "hub", self.history.clock)
                await store.open()
                await self.history.tell(store, steps // sessions, self.disk.mark)
                if number < sessions - 1:
                    await store.close()
            self.disk.mark("closing", 0)
            await store.close()
        return self

    def allowed(self, upto: int, mark: str) -> list[Any]:
        """What may be seen after an end at this change: all up to the last such mark, and nothing not begun."""
        return self.history.pictures[self._last(mark, upto) : self._last("begun", upto) + 1]

    def _last(self, text: str, upto: int) -> int:
        numbers = [each.number for each in self.disk.changes[:upto] if isinstance(each, Mark) and each.text == text]
        return max(numbers, default=0)


class Places:
    """Empty folders."""

    def __init__(self, root: Path) -> None:
        self._root, self._number = root, 0

    def new(self, left: Left) -> Path:
        self._number += 1
        place = self._root / f"{self._number}"
        place.mkdir()
        left.put(place)
        return place


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    """In the place of pytest's."""
    place = in_memory / "session"
    place.mkdir()
    return place


@pytest.fixture
def places(in_memory: Path) -> Places:
    left = in_memory / "left"
    left.mkdir()
    return Places(left)


async def check(place: Path, allowed: list[Any], *, goes_on: bool) -> None:
    folder = place / "var" / "hub"
    if (folder / "nodes_registry.json").exists():
        json.loads((folder / "nodes_registry.json").read_text())
    now = await opened(folder)
    assert now in allowed, "something acknowledged is missing, or half of something is there"
    assert not list(folder.glob("*.tmp"))
    newest = max((int(path.name[-12:]) for path in folder.glob("snapshot-*")), default=1)
    assert all(int(path.name[-12:]) >= newest for name in ("log-*", "snapshot-*") for path in folder.glob(name))
    if goes_on:
        await check_that_it_goes_on(folder, now)


async def check_that_it_goes_on(folder: Path, before: Any) -> None:
    """It takes a transaction, which is there afterwards with all that was there before."""
    store = file_store(folder)
    await store.open()
    numbers = [line.seq for line in before[-1]]
    seq = await save(store, Changes(new=[Row("job", "~", b"")], ledger=[b"next"]))
    assert seq == numbers[-1] + 1 if numbers else seq > 0
    now = await seen(store)
    await store.close()
    assert now[0][0] == [*before[0][0], Row("job", "~", b"")]
    assert [line.seq for line in now[-1]] == [*numbers, seq]
    assert await opened(folder) == now


async def test_killed_at_every_change(tmp_path: Path, places: Places) -> None:
    session = await Session(tmp_path, 1).run()
    for upto, change in enumerate(session.disk.changes):
        if isinstance(change, Write | Cut | Names):
            left = places.new(session.disk.after_kill(upto))
            await check(left, session.allowed(upto, "saved"), goes_on=upto % 11 == 0)
    everything = places.new(session.disk.after_kill(len(session.disk.changes)))
    assert {path.name: path.read_bytes() for path in (everything / "var/hub").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "var/hub").iterdir()
    }, "the record of changes is not what was done"
    names = {path.name.partition("-")[0] for path in (everything / "var/hub").iterdir()}
    assert names >= {"log", "snapshot", "events"}
    assert not list((everything / "var/hub").glob("log-000000000001"))


async def test_killed_in_the_middle_of_every_write(tmp_path: Path, places: Places) -> None:
    session = await Session(tmp_path, 2).run()
    for upto, change in enumerate(session.disk.changes):
        if isinstance(change, Write) and len(change.data) > 1:
            for seed in range(TORTURE):
                torn = (some if (upto + seed) % 3 else beginning)(100 * upto + seed)
                left = places.new(session.disk.after_kill(upto, torn))
                await check(left, session.allowed(upto, "saved"), goes_on=upto % 17 == 0)


@pytest.mark.parametrize("seed", range(3 * TORTURE))
async def test_the_power_goes(tmp_path: Path, places: Places, seed: int) -> None:
    session = await Session(tmp_path, seed, durable=0.6).run()
    changes = len(session.disk.changes)
    for cut in range(80):
        keep: Callable[[], bool] = (beginning if cut % 4 == 0 else some)(1000 * seed + cut)
        upto = cut * 997 % changes
        left = session.disk.after_power_cut(upto, keep)
        await check(places.new(left), session.allowed(upto, "synced"), goes_on=cut % 7 == 0)


async def test_the_power_goes_when_a_name_has_just_changed(tmp_path: Path, places: Places) -> None:
    session = await Session(tmp_path, 77).run()
    changes = session.disk.changes
    for upto in range(1, len(changes)):
        if isinstance(changes[upto - 1], Names):
            for keep, last in ((nothing, everything), (everything, nothing), (some(upto), some(upto))):
                left = session.disk.after_power_cut(upto, keep, last)
                await check(places.new(left), session.allowed(upto, "synced"), goes_on=False)


@pytest.mark.parametrize("seed", range(2 * TORTURE))
async def test_the_power_goes_again_while_it_is_opened(tmp_path: Path, places: Places, seed: int) -> None:
    session = await Session(tmp_path, 50 + seed, durable=0.5).run()
    for cut in range(8):
        upto = len(session.disk.changes) * (cut + 2) // 10
        first = places.new(session.disk.after_power_cut(upto, some(cut)))
        disk = Disk(first)
        with disk.recorded():
            await opened(first / "var" / "hub")
        for again in range(0, len(disk.changes), 3):
            left = disk.after_power_cut(again, some(again)) if again % 2 else disk.after_kill(again)
            await check(places.new(left), session.allowed(upto, "synced"), goes_on=again % 5 == 0)


KILLS = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.stores.history import History, file_store

def killed_at(number, folder):
    calls = iter(range(1, 1_000_000))

    def counted(name, real):
        def call(file, *rest):
            if name == "open" and not rest[0] & os.O_CREAT:
                return real(file, *rest)
            if next(calls) == number:
                if name == "pwrite":
                    real(file, rest[0][: len(rest[0]) // 4096 * 2048], rest[1])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(file, *rest)
        return call

    for name in ("open", "pwrite", "ftruncate", "fsync", "fdatasync", "replace", "unlink"):
        setattr(os, name, counted(name, getattr(os, name)))
    told = os.fdopen(1, "w", buffering=1)

    async def session():
        history = History(9)
        for _ in range(2):
            store = file_store(folder, history.clock)
            await store.open()
            await history.tell(store, 30, lambda text, n: told.write(f"{number} {text} {n}\\n"))
            await store.close()

    asyncio.run(session())
    os._exit(0)

for number in map(int, sys.argv[3:]):
    child = os.fork()
    if child == 0:
        killed_at(number, Path(sys.argv[2]) / str(number) / "hub")
    os.waitpid(child, 0)
"""


async def test_a_process_that_kills_itself_at_every_so_many_calls(tmp_path: Path) -> None:
    """The model above is right in what it says of a kill: here is a real one."""
    history = History(9)
    await history.tell(MemoryStore("memory://", history.clock), 60)
    numbers = range(1, 400, 29 if TORTURE == 1 else 1)
    command = [sys.executable, "-c", KILLS, str(Path(__file__).parents[2]), str(tmp_path), *map(str, numbers)]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, **PIPED)
    assert run.stderr == ""
    told = [line.split() for line in run.stdout.splitlines()]
    ends = set()
    for number in numbers:
        begun, saved = (
            max((int(n) for killed, mark, n in told if (int(killed), mark) == (number, text)), default=0)
            for text in ("begun", "saved")
        )
        now = await opened(tmp_path / f"{number}" / "hub")
        assert now in history.pictures[saved : begun + 1], number
        ends.add(begun)
    assert len(ends) > 8


PIPED: Any = {"capture_output": True, "text": True, "timeout": 300, "check": True}
