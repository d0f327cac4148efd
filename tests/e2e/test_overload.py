"""A crowd far above the limit: it is told to come later, nothing is lost, and the hub is well during it and after."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.clock import SystemClock
from sheratan_hub.storage import open_store
from tests.e2e.serving import TOKEN, Served
from tools.overload import ALLOWED, Crowd

CLIENTS, SECONDS = 8, 1.5


@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_a_flood_is_answered_with_429_and_loses_nothing(tmp_path: Path, store: str) -> None:
    url = f"{store}://{tmp_path}/var/hub.db"
    served = Served(tmp_path, SHERATAN_STORE_URL=url, SHERATAN_MAX_QUEUE_DEPTH="20")
    try:
        served.start()
        healthy, statuses, accepted = flood(served)
        assert healthy
        assert all(healthy)
        assert set(statuses) <= ALLOWED
        assert statuses[429] > CLIENTS
        served.ask("POST", "/api/jobs", {"kind": "after"})
        (lease,) = served.ask("POST", "/api/jobs/pull", {"node_id": "n", "kinds": ["after"]})["jobs"]
        done = {"lease_id": lease["lease_id"], "ok": True, "result": 1}
        assert served.ask("POST", f"/api/jobs/{lease['job_id']}/result", done)["status"] == "completed"
        assert served.end(signal.SIGTERM) == 0
    finally:
        served.kill()
    counted = asyncio.run(counts(url))
    assert counted == {"job:completed": accepted + 1}


def flood(served: Served) -> tuple[list[bool], dict[int, int], int]:
    """(what /health said meanwhile, how often each status was answered, how many submits were taken)"""
    crowd = Crowd(served.data_port, TOKEN, CLIENTS)
    healthy: list[bool] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            healthy.append(served.ask("GET", "/health")["ok"])
            over.wait(0.05)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        crowd.run(SECONDS, works=True, offered=1e6, connections=5 * CLIENTS)
        statuses = crowd.statuses
        while served.ask("GET", "/metrics?format=json")["queue_depth"]:
            crowd.run(0.2, works=True, offered=0, connections=0)
    finally:
        over.set()
        asking.join(timeout=30)
        crowd.close()
    return healthy, statuses, statuses[201]


async def counts(url: str) -> dict[str, int]:
    store: Any = open_store(url, SystemClock())
    await store.open()
    try:
        return {facet: n for facet, n in (await store.counts()).items() if facet.startswith("job:")}
    finally:
        await store.close()
