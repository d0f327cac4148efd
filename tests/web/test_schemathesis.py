"""Schemathesis reads the OpenAPI document and holds a running hub to it: thousands of fitting and unfitting requests.

Some 5000 in all; `EXAMPLES=400`, as `make torture` has it, makes them 50 000, and `SEED` others.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.clock import SystemClock
from sheratan_hub.config import QueueSettings
from sheratan_hub.web.routes import ROUTES
from tests.conftest import TOKEN, MakeSite

EXAMPLES = int(os.environ.get("EXAMPLES", "5"))
"""Random requests for each route; the edges of all bounds, which are tried besides, do not grow with it."""

LEAST = {"token": 1500 + 25 * EXAMPLES, "nobody": 25 * EXAMPLES}
SEED = os.environ.get("SEED", "1")
CONFIG = Path(__file__).with_name("schemathesis.toml")
PHASES = {"token": "examples,coverage,fuzzing,stateful", "nobody": "examples,fuzzing"}
"""What is tried: given values, the edges of every bound, random ones, and whole stories along the links."""


class ShortClock(SystemClock):
    """Nobody waits half a minute for work that will not come."""

    async def wait(self, event: Awaitable[object], ms: float) -> bool:
        return await super().wait(event, min(ms, 5))


@pytest.mark.parametrize("plane", ["control", "data"])
@pytest.mark.parametrize("who", ["token", "nobody"])
async def test_a_hub_does_what_its_document_says(make_site: MakeSite, tmp_path: Path, plane: str, who: str) -> None:
    site = await make_site(clock=ShortClock(), queue=QueueSettings(max_depth=1_000_000))
    said, told = await schemathesis(
        *("run", site.url(plane, "/openapi.json"), "--phases", PHASES[who], "--seed", SEED),
        *("--max-examples", str(EXAMPLES)),
        *(("-H", f"Authorization: Bearer {TOKEN}") if who == "token" else ()),
        folder=tmp_path,
    )
    assert told is not None, said
    assert told["exit_code"] == 0, said
    assert (told["failures"], told["errors"]) == ([], []), said
    operations = sum(route.plane in (plane, "both") for route in ROUTES)
    assert told["operations"]["tested"] == operations - 1, "all but /openapi.json, which it has read"
    assert told["test_cases"]["generated"] >= LEAST[who]


async def schemathesis(*arguments: str, folder: Path) -> tuple[str, Any]:
    """(the end of what it says, what it reports, None if it came to nothing)"""
    report = folder / "report.json"
    run = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", CONFIG),
        *(*arguments, "--report", "json", "--report-json-path", report),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=folder,
    )
    try:
        said, _ = await run.communicate()
    finally:
        with suppress(ProcessLookupError):
            run.kill()
    return said.decode()[-20_000:], json.loads(report.read_text()) if report.exists() else None
