"""The diagnosis bundle as a file: members, each within its bounds, a manifest with their hashes, the zip of them.

The same members make the same bytes: names are sorted, JSON is canonical, every time in the zip is that of its format's
beginning.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from sheratan_hub.clock import rfc3339
from sheratan_hub.redact import Redactor

FORMAT = 1
MANIFEST = "manifest.json"

MEMBER_BYTES = 1 << 20
"""A member holds no more than this; what is cut is told."""

EPOCH = (1980, 1, 1, 0, 0, 0)


class Member(msgspec.Struct, frozen=True):
    """A file of the bundle. `cut`: something was left out for want of room. `error`: it tells why a part is missing."""

    name: str
    data: bytes
    cut: bool = False
    error: bool = False


class Members:
    """The members of one bundle, as they are made. Every text passes the redactor."""

    def __init__(self, redactor: Redactor) -> None:
        self.redactor = redactor
        self._made: dict[str, Member] = {}

    def json(self, name: str, value: Any, *, cut: bool = False) -> None:
        """A JSON document, canonical. One that is too large is replaced by a word about its size."""
        data = canonical(value)
        if len(data) > MEMBER_BYTES:
            data, cut = canonical({"cut": f"{len(data)} bytes, more than {MEMBER_BYTES}"}), True
        self._add(Member(name, data, cut))

    def lines(self, name: str, lines: Sequence[Any], *, cut: bool = False) -> None:
        """JSON values, one a line, the newest last; the oldest are left out if they are too many."""
        kept: list[bytes] = []
        room = MEMBER_BYTES
        for line in reversed(lines):
            text = canonical(line) + b"\n"
            room -= len(text)
            if room < 0:
                cut = True
                break
            kept.append(text)
        self._add(Member(name, b"".join(reversed(kept)), cut))

    def text(self, name: str, text: str) -> None:
        """A text of lines that hold no free words, such as metrics; its end is cut off if it is too long."""
        data = text.encode()
        cut = len(data) > MEMBER_BYTES
        if cut:
            data = data[: data.rfind(b"\n", 0, MEMBER_BYTES) + 1]
        self._add(Member(name, data, cut))

    def failed(self, part: str, error: BaseException) -> None:
        """A part that could not be made: why stands in its place."""
        told = {"part": part, "error": type(error).__name__, "text": self.redactor.text(str(error))}
        self._add(Member(f"errors/{part}.json", canonical(told), error=True))

    def _add(self, member: Member) -> None:
        self._made[member.name] = msgspec.structs.replace(member, data=self.redactor.last_look(member.data))

    def sealed(self, about: Mapping[str, Any]) -> list[Member]:
        """All of them and the manifest, by name. `about` stands at the manifest's beginning."""
        members = sorted(self._made.values(), key=lambda one: one.name)
        manifest = canonical({"format": FORMAT, **about, "members": [_listed(one) for one in members]})
        return sorted([*members, Member(MANIFEST, manifest)], key=lambda one: one.name)


def _listed(member: Member) -> dict[str, Any]:
    told = {"name": member.name, "bytes": len(member.data), "sha256": hashlib.sha256(member.data).hexdigest()}
    return {**told, "cut": member.cut, "error": member.error}


def canonical(value: Any) -> bytes:
    """The value as JSON with sorted keys and without white space; msgspec structs as objects."""
    plain = msgspec.to_builtins(value, str_keys=True)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def zipped(members: Iterable[Member]) -> bytes:
    """The zip file of these members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipping:
        for member in members:
            info = zipfile.ZipInfo(member.name, EPOCH)
            info.compress_type, info.create_system = zipfile.ZIP_DEFLATED, 3
            info.external_attr = 0o600 << 16
            zipping.writestr(info, member.data)
    return out.getvalue()


def read_member(data: bytes, name: str) -> Any:
    """A JSON member of a bundle. Raises `ValueError` if that is no bundle, or has no such member."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as zipped_file:
            return json.loads(zipped_file.read(name))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"this is no bundle: {error}") from error


def put(data: bytes, output: str, when: str) -> Path:
    """Write a bundle into a directory under its own name, or to a file; readable by its owner only.

    Raises `OSError`: it cannot be written, or the file is there already and is no bundle. Then nothing is left behind.
    """
    path = _free_name(Path(output), when) if Path(output).is_dir() else Path(output)
    if path.exists() and not _is_bundle(path):
        raise FileExistsError(17, "it is there already, and is no bundle", str(path))
    descriptor, made = tempfile.mkstemp(dir=path.parent, prefix=".diag_bundle_")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(made, path)
    except OSError:
        Path(made).unlink(missing_ok=True)
        raise
    return path


def stamp(ms: int) -> str:
    """A moment as it stands in a bundle's name: `20261121T103107Z`."""
    return f"{rfc3339(ms)[:19].replace('-', '').replace(':', '')}Z"


def _free_name(directory: Path, when: str) -> Path:
    """`diag_bundle_<when>.zip`; with a number if there was another within the same second."""
    names = (f"diag_bundle_{when}{f'_{n}' if n > 1 else ''}.zip" for n in range(1, 10_000))
    return next(directory / name for name in names if not (directory / name).exists())


def _is_bundle(path: Path) -> bool:
    """Whether the file is a bundle, or empty, so that it may be replaced."""
    if not path.is_file():
        return False
    if path.stat().st_size == 0:
        return True
    try:
        with zipfile.ZipFile(path) as zipped_file:
            return MANIFEST in zipped_file.namelist()
    except (zipfile.BadZipFile, OSError):
        return False
