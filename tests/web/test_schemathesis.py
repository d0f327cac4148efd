"""Schemathesis reads the OpenAPI document and holds a running hub to it: thousands of fitting and unfitting requests.

`CASES=50000` asks for as many in all instead of 2000, as `make torture` does; `SEED` for others.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path

import pytest

from sheratan_hub.clock import SystemClock
from sheratan_hub.config import LimitSettings, QueueSettings
from tests.conftest import TOKEN, MakeSite

CASES = int(os.environ.get("CASES", "2000"))
SEED = os.environ.get("SEED", "1")
CONFIG = Path(__file__).with_name("schemathesis.toml")
OPERATIONS = 70
"""About so many are on both planes."""


class ShortClock(SystemClock):
    """Nobody waits half a minute for work that will not come."""

    async def wait(self, event: Awaitable[object], ms: float) -> bool:
        return await super().wait(event, min(ms, 5))


@pytest.mark.parametrize("plane", ["control", "data"])
@pytest.mark.parametrize("who", ["token", "nobody"])
async def test_a_hub_does_what_its_document_says(make_site: MakeSite, tmp_path: Path, plane: str, who: str) -> None:
    site = await make_site(
        clock=ShortClock(), queue=QueueSettings(max_depth=100_000), limits=LimitSettings(connections_per_address=1000)
    )
    report = tmp_path / "report.json"
    options = ["--phases", "examples,coverage,fuzzing" if who == "token" else "examples,fuzzing"]
    headers = ["-H", f"Authorization: Bearer {TOKEN}"] if who == "token" else []
    run = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", CONFIG),
        *("run", site.url(plane, "/openapi.json"), *headers, *options),
        *("--seed", SEED, "--max-examples", str(max(1, CASES // (4 * OPERATIONS)))),
        *("--report", "json", "--report-json-path", report),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=tmp_path,
    )
    try:
        said, _ = await run.communicate()
    finally:
        with suppress(ProcessLookupError):
            run.kill()
    assert run.returncode == 0, said.decode()[-20_000:]
    print(json.dumps(json.loads(report.read_text()))[:2000])
