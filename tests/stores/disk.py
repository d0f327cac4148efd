"""A disk for tests: every change that a store makes to it, in order, and what a kill or a power cut leaves of it.

The model of a power cut: of a file that was written since its last sync, each sector is as it was after any of these
writes or before them; of the names that changed in a folder since its last sync, any have changed and any have not.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SECTOR = 512
FOLDER = -1
"""What a name stands for that is a folder's; a file's stands for its number."""


class Write(NamedTuple):
    file: int
    at: int
    data: bytes


class Cut(NamedTuple):
    file: int
    size: int


class Names(NamedTuple):
    """What these names stand for from now on; None: nothing."""

    names: dict[Path, int | None]


class Synced(NamedTuple):
    what: int | Path


class Mark(NamedTuple):
    """Something to be found between the changes."""

    text: str
    number: int


Change = Write | Cut | Names | Synced | Mark
Keep = Callable[[], bool]


class Disk:
    """What was under `base` when this was made, and all changes while `recorded` runs."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.changes: list[Change] = []
        self.contents: dict[int, bytes] = {}
        self.names: dict[Path, int] = {}
        for path in sorted(base.rglob("*")):
            self.names[path] = FOLDER if path.is_dir() else len(self.contents)
            if path.is_file():
                self.contents[self.names[path]] = path.read_bytes()
        self._now = dict(self.names)
        self._born = len(self.contents)
        self._files: dict[int, int | Path] = {}
        self._lock = threading.RLock()

    def mark(self, text: str, number: int) -> None:
        with self._lock:
            self.changes.append(Mark(text, number))

    @contextmanager
    def recorded(self) -> Iterator[Disk]:
        """Note what is done meanwhile. Nothing is really synced: what that is good for is up to the model."""
        noted = [self.open, self.close, self.pwrite, self.ftruncate, self.fsync, self.fdatasync]
        with pytest.MonkeyPatch.context() as patch:
            for note in (*noted, self.replace, self.unlink, self.mkdir):
                patch.setattr(os, note.__name__, self._wrapped(getattr(os, note.__name__), note))
            yield self

    def _wrapped(self, real: Any, note: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            with self._lock:
                done = None if real.__name__ in ("fsync", "fdatasync") else real(*args, **options)
                note(done, *args)
                return done

        return call

    # One for each function of `os`: what it has returned, and what it was called with

    def open(self, file: int, path: Any, flags: int, *_: Any) -> None:
        path = Path(path)
        if path.is_dir():
            self._files[file] = path
        elif flags & os.O_ACCMODE != os.O_RDONLY and path.is_relative_to(self.base):
            if path not in self._now:
                self._now[path] = self._born
                self.changes.append(Names({path: self._born}))
                self._born += 1
            elif flags & os.O_TRUNC:
                self.changes.append(Cut(self._now[path], 0))
            self._files[file] = self._now[path]

    def close(self, _: None, file: int) -> None:
        self._files.pop(file, None)

    def pwrite(self, done: int, file: int, data: Any, at: int) -> None:
        if file in self._files:
            self.changes.append(Write(self._number(file), at, bytes(data[:done])))

    def ftruncate(self, _: None, file: int, size: int) -> None:
        self.changes.append(Cut(self._number(file), size))

    def fsync(self, _: None, file: int) -> None:
        self.changes.append(Synced(self._files[file]))

    def fdatasync(self, _: None, file: int) -> None:
        self.changes.append(Synced(self._files[file]))

    def replace(self, _: None, source: Any, target: Any) -> None:
        self._now[Path(target)] = self._now.pop(Path(source))
        self.changes.append(Names({Path(source): None, Path(target): self._now[Path(target)]}))

    def unlink(self, _: None, path: Any) -> None:
        del self._now[Path(path)]
        self.changes.append(Names({Path(path): None}))

    def mkdir(self, _: None, path: Any, *__: Any) -> None:
        self._now[Path(path)] = FOLDER
        self.changes.append(Names({Path(path): FOLDER}))

    def _number(self, file: int) -> int:
        number = self._files[file]
        assert isinstance(number, int)
        return number

    # What is left

    def after_kill(self, upto: int, torn: Keep | None = None) -> Left:
        """Everything before the change `upto`; and of that, if it is a write, the sectors for which `torn` says so."""
        left = Left(self)
        for change in self.changes[:upto]:
            left.do(change, everything)
        if torn is not None and isinstance(self.changes[upto], Write):
            left.do(self.changes[upto], torn)
        return left

    def after_power_cut(self, upto: int, keep: Keep, last: Keep | None = None) -> Left:
        """Of the changes before `upto` all that was synced, and what `keep` says of the rest, `last` of the last."""
        left, waiting = Left(self), list[Change]()
        for change in self.changes[:upto]:
            if isinstance(change, Synced):
                for other in waiting:
                    if concerns(other, change.what):
                        left.do(other, everything)
                waiting = [other for other in waiting if not concerns(other, change.what)]
            else:
                waiting.append(change)
        for change in waiting[:-1]:
            left.do(change, keep)
        for change in waiting[-1:]:
            left.do(change, last or keep)
        return left


def concerns(change: Change, what: int | Path) -> bool:
    """Whether the sync of a file or a folder is one of this change."""
    if isinstance(change, Names):
        return isinstance(what, Path) and all(path.parent == what for path in change.names)
    return isinstance(change, Write | Cut) and change.file == what


def everything() -> bool:
    return True


def nothing() -> bool:
    return False


def some(seed: int) -> Keep:
    """Keeps nothing, everything, or some; the first so many, or any."""
    dice = random.Random(seed)
    share = dice.choice([0, 0.2, 0.5, 0.9, 1])
    return lambda: dice.random() < share


def beginning(seed: int) -> Keep:
    """Keeps what comes first, and nothing after that."""
    left = iter(range(random.Random(seed).choice([1, 2, 4, 8, 50])))
    return lambda: next(left, None) is not None


class Left:
    """A disk's content, to which changes are done or not."""

    def __init__(self, disk: Disk) -> None:
        self._base = disk.base
        self._names: dict[Path, int] = dict(disk.names)
        self._contents = {number: bytearray(content) for number, content in disk.contents.items()}
        self._stale: set[tuple[int, int]] = set()

    def do(self, change: Change, keep: Keep) -> None:
        match change:
            case Write(file, at, data):
                content = self._contents.setdefault(file, bytearray())
                place = at
                while place < at + len(data):
                    upto = min(place - place % SECTOR + SECTOR, at + len(data))
                    sector = file, place // SECTOR
                    if sector in self._stale or not keep():
                        self._stale.add(sector)
                    else:
                        content.extend(bytes(max(0, upto - len(content))))
                        content[place:upto] = data[place - at : upto - at]
                    place = upto
            case Cut(file, size) if keep():
                content = self._contents.setdefault(file, bytearray())
                del content[size:]
                content.extend(bytes(size - len(content)))
            case Names(names) if keep():
                for path, number in names.items():
                    self._names.pop(path, None)
                    if number is not None:
                        self._names[path] = number

    def put(self, folder: Path) -> None:
        """Make it real in an empty folder."""
        for path, number in sorted(self._names.items()):
            place = folder / path.relative_to(self._base)
            if number == FOLDER:
                place.mkdir(exist_ok=True, parents=True)
            elif place.parent.exists():
                place.write_bytes(self._contents.get(number, b""))
