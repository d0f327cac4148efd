"""Proves an audit log: that every line follows from the one before, over any number of files.

What it cannot know by itself is whether lines are missing at the end: that takes a head kept elsewhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from sheratan_hub.audit_lines import (
    CUT,
    END_BYTES,
    START_HASH,
    Head,
    chain_files,
    cut_detail,
    first_seq,
    head_of,
    is_cut,
    parsed,
    seq_of,
)

CHUNK_BYTES = 1 << 20


class Place(NamedTuple):
    """A line that is not as it should be, or was cut by a crash: file, number of the line in it, what is wrong."""

    file: str
    line: int
    text: str


class Chain:
    """Follows a chain line by line. Feed it files in order; `broken` is the first line that does not fit.

    `cuts` are lines that a crash has cut, each accounted for by the line after it. `wanted` is the hash of a line
    that must be among them. After a break nothing more is looked at.
    """

    def __init__(self, seq: int = 0, prev_hash: str = START_HASH, wanted: str | None = None) -> None:
        self.seq, self.prev_hash, self.ts = seq, prev_hash, None
        self.began_at = seq + 1
        self.broken: Place | None = None
        self.cuts: list[Place] = []
        self.found: int | None = seq if wanted == prev_hash else None
        self._wanted = (wanted or "").encode()
        self._prev = prev_hash.encode()
        self._pieces: list[tuple[Place, bytes]] = []

    @property
    def head(self) -> Head:
        """The last line that fits."""
        return Head(self.seq, self._prev.decode())

    def begin_at(self, line: bytes) -> None:
        """Take on trust what the first line says of the lines before it, which are not there."""
        record = parsed(line)
        if record is not None and isinstance(record.get("seq"), int):
            self.seq, self._prev = record["seq"] - 1, str(record.get("prev_hash")).encode()
            self.began_at = record["seq"]

    def feed(self, lines: Sequence[bytes], file: str, first_line: int) -> None:
        """Take the next lines, without their newlines; `first_line` is the number of the first in its file."""
        at = 0
        while at < len(lines) and self.broken is None:
            if not self._pieces:
                at += self._follow(lines, at)
            if at < len(lines) and self.broken is None:
                self._look(lines[at], Place(file, first_line + at, ""))
                at += 1

    def end(self) -> None:
        """Nothing more comes."""
        if self._pieces and self.broken is None:
            self.broken = self._pieces[0][0]._replace(
                text="is cut short and no line after it accounts for that: the hub was killed while writing it and has "
                "not been started since, or somebody cut it"
            )

    def _follow(self, lines: Sequence[bytes], start: int) -> int:
        """How many lines from `start` on fit; the fast way, which handles all lines of a sound log."""
        sha, seq, prev, wanted, at = hashlib.sha256, self.seq, self._prev, self._wanted, start
        for at in range(start, len(lines)):
            line = lines[at]
            digest = sha(line[:-END_BYTES] + b"}").hexdigest().encode()
            if (
                not line.endswith(b',"prev_hash":"%b","hash":"%b"}' % (prev, digest))
                or not line.startswith(b'{"seq":%d,' % (seq + 1))
                or CUT in line
            ):
                break
            seq, prev = seq + 1, digest
            if digest == wanted:
                self.found = seq
        else:
            at = len(lines)
        self.seq, self._prev = seq, prev
        return at - start

    def _look(self, line: bytes, place: Place) -> None:
        """Take one line that is not plain: it follows a cut one, or is one, or is wrong."""
        head = head_of(line)
        fits = head is not None and head.seq == self.seq + 1 and self._ends_well(line, head.hash)
        if head is not None and fits:
            self._join(line, head, place)
        elif head is None and is_cut(line, self.seq + 1):
            self._pieces.append((place, line))
        elif self._pieces:
            self.broken = self._pieces[0][0]._replace(text="is cut short and the line after it does not account for it")
        else:
            self.broken = place._replace(text=self._why(line, head))

    def _ends_well(self, line: bytes, digest: str) -> bool:
        return line.endswith(b',"prev_hash":"%b","hash":"%b"}' % (self._prev, digest.encode()))

    def _join(self, line: bytes, head: Head, place: Place) -> None:
        record = parsed(line) or {}
        detail = record.get("detail")
        said = detail.get("cut") if isinstance(detail, dict) else None
        there = b"\n".join(piece for _, piece in self._pieces)
        if said != (cut_detail(there) if self._pieces else None):
            at = self._pieces[0][0] if self._pieces else place
            told = "accounts for a cut line that is not there, or is not what was left of it"
            self.broken = at._replace(
                text=told if said else "is cut short and the line after it does not account for it"
            )
            return
        self.cuts += [at._replace(text="was cut by a crash; the next line accounts for it") for at, _ in self._pieces]
        self._pieces = []
        self.seq, self._prev = head.seq, head.hash.encode()
        if self._prev == self._wanted:
            self.found = self.seq

    def _why(self, line: bytes, head: Head | None) -> str:
        """What is wrong with it, in words."""
        if head is None:
            whole = seq_of(line) is not None and line.endswith(b'"}')
            return "was changed: its text does not match its hash" if whole else "is no line of an audit log"
        if head.seq > self.seq + 1:
            return f"is number {head.seq} where {self.seq + 1} should stand: lines are missing before it"
        if head.seq <= self.seq:
            return f"is number {head.seq} where {self.seq + 1} should stand: it stands here again, or was moved"
        return f"does not follow from line {self.seq}: that one was changed, or this one is from another chain"


class Verdict(NamedTuple):
    """What `verify` found. `head` is the last line that fits, `notes` are sentences for people."""

    broken: Place | None
    cuts: list[Place]
    head: Head
    began_at: int
    notes: list[str]


def verify(files: Iterable[Path], head: Head | None = None, *, begin: int | None = None) -> Verdict:
    """Prove these files, given in any order. Raises `OSError` for one that cannot be read.

    `head` (its `seq` 0 if only the hash is known) must be among the lines. A chain that does not begin with line 1 is
    broken, unless it begins with line `begin`, in a rotated file whose name says so, or where one beside it ends.
    """
    ordered = sorted(files, key=lambda file: (first_seq(file) or 0, file.name))
    chain = Chain(wanted=head.hash if head else None)
    notes = []
    if ordered and (note := _begin(chain, ordered[0], begin)):
        notes.append(note)
    for file in ordered:
        follow(chain, file)
    chain.end()
    if chain.broken is None and head is not None:
        _hold_against(chain, head, ordered[-1] if ordered else Path("-"))
    return Verdict(chain.broken, chain.cuts, chain.head, chain.began_at, notes)


def verify_listed(find: Callable[[], list[Path]], head: Head | None = None, *, begin: int | None = None) -> Verdict:
    """Prove what `find` lists of a log that may be in use, as `verify` does.

    A bad verdict, or a file that has gone, is looked at again as long as the list is another by then: it was rotated.
    """
    found = find()
    while True:
        try:
            verdict = verify(found, head, begin=begin)
            if not verdict.broken or found == (found := find()):
                return verdict
        except FileNotFoundError:
            if found == (found := find()):
                raise


def follow(chain: Chain, file: Path) -> None:
    """Take a whole file; an end without a newline is a line too."""
    number = 1
    rest = b""
    with file.open("rb") as opened:
        while chain.broken is None and (chunk := opened.read(CHUNK_BYTES)):
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            chain.feed(lines, str(file), number)
            number += len(lines)
    if rest:
        chain.feed([rest], str(file), number)


def _begin(chain: Chain, file: Path, begin: int | None) -> str | None:
    """Let the chain begin where the files do, if it may; the sentence that says so."""
    seq = first_seq(file)
    if seq is None or seq == 1:
        return None
    with file.open("rb") as opened:
        line = opened.readline().rstrip(b"\n")
    named = re.search(r"\.(\d+)\.[^.]+$", file.name)
    if begin == seq or (named and int(named[1]) == seq):
        chain.begin_at(line)
        return f"the files begin with line {seq}; lines 1 to {seq - 1} were not given and are not proved"
    before = _ended_by(file, seq - 1, line)
    if before is not None:
        chain.begin_at(line)
        return f"{file} goes on where {before} ends, which was not given and is not proved"
    return None


def _ended_by(file: Path, seq: int, line: bytes) -> Path | None:
    """The rotated file beside it that ends with the line before `line`."""
    for other in reversed(chain_files(file)[:-1]):
        head = last_head(other)
        if head is not None and head.seq == seq:
            return other if b'"prev_hash":"%b"' % head.hash.encode() in line else None
    return None


def _hold_against(chain: Chain, head: Head, last: Path) -> None:
    if chain.found is None or head.seq not in (0, chain.found):
        number = f" number {head.seq}" if head.seq else ""
        text = (
            f"is the last one, and the line{number} that the head names is not there: lines were cut off or exchanged"
        )
        with last.open("rb") as opened:
            lines = sum(1 for _ in opened)
        chain.broken = Place(str(last), lines, text)


def last_head(file: Path) -> Head | None:
    """The last whole line of a file, None if there is none."""
    end = file.stat().st_size
    size = 65_536
    with file.open("rb") as opened:
        while True:
            opened.seek(max(0, end - size))
            lines = opened.read(end).split(b"\n")
            for line in reversed(lines if size >= end else lines[1:]):
                if line and (head := head_of(line)) is not None:
                    return head
            if size >= end:
                return None
            size *= 8
