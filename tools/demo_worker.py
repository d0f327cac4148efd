"""The demo's handlers: `text.stats` and `text.words` of one file of the machine that the worker runs on."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

from sheratan_hub.worker import handler

WORD = re.compile(rb"[A-Za-z]+")


@handler("text.stats")
def stats(params: dict[str, str]) -> dict[str, Any]:
    """Lines, words and bytes as `wc` counts them, and the SHA-256."""
    text = Path(params["path"]).read_bytes()
    return {
        "lines": text.count(b"\n"),
        "words": len(text.split()),
        "bytes": len(text),
        "sha256": hashlib.sha256(text).hexdigest(),
    }


@handler("text.words")
def words(params: dict[str, str]) -> list[tuple[str, int]]:
    """The ten most frequent words of ASCII letters, in lower case; equally frequent ones by alphabet."""
    found = Counter(word.decode() for word in WORD.findall(Path(params["path"]).read_bytes().lower()))
    return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:10]
