"""Handlers that the worker's end-to-end tests run in real processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from sheratan_hub.worker import Attempt, Fail, handler


@handler("add")
def add(params: dict[str, int]) -> int:
    return params["a"] + params["b"]


@handler("where")
async def where(params: dict[str, Any], job: Attempt) -> dict[str, Any]:
    return {"pid": os.getpid(), "attempt": job.attempt}


@handler("pid")
def pid(params: dict[str, Any]) -> int:
    return os.getpid()


@handler("hold")
def hold(params: dict[str, str], job: Attempt) -> str:
    """Tell a fifo that it runs, with its process id, then wait until the file `until` is there."""
    if job.attempt > 1:
        return f"attempt {job.attempt}"
    with Path(params["tell"]).open("w") as fifo:
        fifo.write(f"{os.getpid()}\n")
    while not Path(params["until"]).exists():
        time.sleep(0.01)
    return "held"


@handler("stubborn")
def stubborn(params: dict[str, str]) -> None:
    """Ignore every polite signal."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hold(params, Attempt(job_id="", kind=""))


@handler("raise")
def raises(params: dict[str, Any]) -> None:
    raise Fail("told to", retry=False)


@handler("die")
def die(params: dict[str, Any]) -> None:
    os._exit(3)


@handler("exit")
def leave(params: dict[str, Any]) -> None:
    sys.exit("leaving")
