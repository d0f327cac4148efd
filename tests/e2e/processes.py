"""What tests ask about processes that they did not start themselves."""

from __future__ import annotations

import os
import select
from contextlib import suppress
from pathlib import Path


def ended(pid: int) -> bool:
    """Whether the process is over, after waiting for that up to 5 seconds."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], 5)[0])
    finally:
        os.close(fd)


def left_in(directory: Path) -> list[int]:
    """The processes that work below `directory`."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):  # it has ended, or is another's
            if os.readlink(link).startswith(str(directory)):
                found.append(int(link.parent.name))
    return found
