"""What a run prints and writes: a table for people, a document for programs."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tools.bench.figures import Line

HEADS = ("store", "row", "rate/s", "p50 ms", "p99 ms", "CPU s/10k", "load", "against", "figures")
LIBRARIES = ("aiohttp", "orjson", "msgspec", "uvloop")


def machine(cores: tuple[set[int], set[int]]) -> dict[str, Any]:
    """Where it ran and on what."""
    model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cpus": os.cpu_count(),
        "server_core": sorted(cores[0]),
        "load_core": sorted(cores[1]),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libraries": {name: installed(name) for name in LIBRARIES},
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table(lines: Sequence[Line]) -> str:
    """All lines below their heads, with each figure's target and whether it was met."""
    rows = [HEADS, *(cells(one) for one in lines)]
    widths = [max(len(row[place]) for row in rows if place < len(row)) for place in range(len(HEADS) - 2)]
    return "\n".join(aligned(row, widths) for row in rows)


def aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right, and whatever comes last as it is."""
    names = [text.ljust(width) for text, width in zip(row[:2], widths, strict=False)]
    numbers = [text.rjust(width) for text, width in zip(row[2:7], widths[2:], strict=False)]
    return "  ".join((*names, *numbers, *(text.ljust(19) for text in row[7:8]), *row[8:])).rstrip()


def cells(one: Line) -> tuple[str, ...]:
    name = f"{one.row} ({one.side})" if one.side else one.row
    if one.error:
        return one.store, name, "", "", "", "", "", "FAILED", one.error
    numbers = ("", "", "", "", "")
    if one.window:
        rate, p50_ms, p99_ms, cpu_s, busy = one.window
        numbers = (f"{rate:,.0f}", f"{p50_ms:.2f}", f"{p99_ms:.2f}", f"{cpu_s:.3f}", f"{busy:.0%}")
    return one.store, name, *numbers, one.against, "  ".join(figures(one))


def figures(one: Line) -> list[str]:
    told = []
    for name, value, target in one.targets():
        word = "" if target is None else f" [{target} {'met' if target.met(value) else 'MISSED'}]"
        told.append(f"{name} {value:.2f}{word}")
    return told
