"""Secrets that stand in the configuration of the test suite, and the search for them in all that it leaves behind.

`tools/suites.py` keeps every file and output of a run in one directory and searches it at the end.
"""

from __future__ import annotations

import base64
import json
import mmap
import os
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ACTIVE = 'canary/"shared"+\\token%0123456789'
NEXT = 'canary/"coming"+\\token%9876543210'
HMAC = 'canary/"signing"+\\key%0123456789abcdef'
SECRETS = {"active token": ACTIVE, "next token": NEXT, "HMAC key": HMAC}

KEPT = "KEPT_OUTPUTS"
"""The variable that names the directory in which tests keep what processes said."""


def encodings(secret: str) -> dict[str, set[bytes]]:
    """Every form that a secret may take on its way into a file; of base64 the parts that no neighbour can change."""
    raw = secret.encode()
    forms: dict[str, set[bytes]] = {
        "raw": {raw},
        "hex": {raw.hex().encode(), raw.hex().upper().encode()},
        "url": {urllib.parse.quote(secret, safe=safe).encode() for safe in ("", "/", '/"+\\')},
        "json": {json.dumps(secret)[1:-1].encode(), json.dumps(json.dumps(secret)[1:-1])[1:-1].encode()},
    }
    for name, encode in (("base64", base64.b64encode), ("base64url", base64.urlsafe_b64encode)):
        forms[name] = {
            encode(b"\0" * shift + raw)[4 if shift else 0 : (shift + len(raw)) // 3 * 4] for shift in range(3)
        }
    return forms


def found(content: bytes | mmap.mmap, secrets: Mapping[str, str]) -> list[tuple[str, str]]:
    """Which secret stands there in which form."""
    return [
        (name, form)
        for name, secret in secrets.items()
        for form, texts in encodings(secret).items()
        if any(content.find(text) >= 0 for text in texts)
    ]


def left_in(folder: Path, secrets: Mapping[str, str] = SECRETS) -> Iterator[tuple[Path, list[tuple[str, str]]]]:
    """The files below `folder` that hold a secret. In a file of its own it is where it belongs."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file() or not path.stat().st_size:
            continue
        is_output = path.suffix in (".out", ".log")
        if (
            not is_output
            and path.stat().st_size < 1000
            and path.read_bytes().strip().decode("utf-8", "replace") in secrets.values()
        ):
            continue
        for piece in data_of(path):
            if hits := found(piece, secrets):
                yield path, hits
                break


def data_of(path: Path) -> Iterator[bytes]:
    """The parts of a file that were ever written: logs are made large beforehand and are mostly holes."""
    with path.open("rb") as file:
        at, size = 0, path.stat().st_size
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            file.seek(at)
            yield file.read(end - at)
            at = end


def keep_outputs() -> None:
    """From now on what the processes of this one say and `communicate` returns is also kept, if it is to be kept."""
    import subprocess

    folder = os.environ.get(KEPT)
    if folder is None:
        return
    plain = subprocess.Popen.communicate

    def communicate(self: Any, *given: Any, **more: Any) -> tuple[Any, Any]:
        said: tuple[Any, Any] = plain(self, *given, **more)
        with (Path(folder) / f"{os.getpid()}.out").open("ab") as out:
            for text in said:
                if text:
                    out.write(text.encode() if isinstance(text, str) else text)
        return said

    subprocess.Popen.communicate = communicate  # type: ignore[method-assign]
