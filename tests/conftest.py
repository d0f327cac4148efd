"""Fixtures: an engine on a virtual clock, and a whole hub with both planes on free ports."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import pytest

from sheratan_hub.app import App
from sheratan_hub.clock import Clock, SystemClock, VirtualClock
from sheratan_hub.config import (
    AuthSettings,
    ControlSettings,
    DataSettings,
    HubSettings,
    Secrets,
    Settings,
    StoreSettings,
)
from sheratan_hub.hub import Hub
from sheratan_hub.rules.command import Limits
from sheratan_hub.storage import open_store
from tests import promised
from tools import canaries

TOKEN = canaries.ACTIVE
canaries.keep_outputs()


def lacking(what: str) -> NoReturn:
    """A test cannot run for want of this: a failure in CI, elsewhere a skip that is shown."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)
    raise AssertionError(what)


def pytest_configure(config: pytest.Config) -> None:
    """Where outputs are kept, all that is logged in this process is, at DEBUG; of aiosqlite, which tells of every
    statement twice, what a hub would say too: warnings."""
    folder = os.environ.get(canaries.KEPT)
    if folder is not None:
        config.option.log_file = f"{folder}/{os.getpid()}.log"
        config.option.log_file_level = "DEBUG"
        logging.getLogger("aiosqlite").setLevel(logging.WARNING)


class Site:
    """A running hub and a client for each plane."""

    def __init__(self, app: App, session: aiohttp.ClientSession) -> None:
        self.app, self.session = app, session

    def url(self, plane: str, path: str) -> str:
        return f"http://127.0.0.1:{self.app.ports[plane]}{path}"

    async def ask(self, plane: str, method: str, path: str, **options: Any) -> tuple[int, Any, dict[str, str]]:
        """(status, the JSON body or the text, headers)"""
        async with self.session.request(method, self.url(plane, path), **options) as answer:
            body = await answer.read()
            kind = answer.headers.get("Content-Type", "")
            parsed = await answer.json(content_type=None) if "json" in kind else body.decode(errors="replace")
            promised.check(plane, method, path, answer.status, answer.headers, parsed)
            return answer.status, parsed, dict(answer.headers)

    async def data(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        if body is not None:
            options["json"] = body
        return (await self.ask("data", method, path, **options))[:2]

    async def control(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        if body is not None:
            options["json"] = body
        return (await self.ask("control", method, path, **options))[:2]

    async def submit(self, kind: str = "work", **fields: Any) -> str:
        status, body = await self.data("POST", "/api/jobs", {"kind": kind, **fields})
        assert status in (200, 201), body
        job_id: str = body["job_id"]
        return job_id

    async def lease(self, node_id: str = "n1", **fields: Any) -> dict[str, Any]:
        _, body = await self.data("POST", "/api/jobs/pull", {"node_id": node_id, **fields})
        assert body["jobs"], body
        lease: dict[str, Any] = body["jobs"][0]
        return lease

    async def finish(self, lease: dict[str, Any], **fields: Any) -> tuple[int, Any]:
        body = {"lease_id": lease["lease_id"], "ok": True, **fields}
        return await self.data("POST", f"/api/jobs/{lease['job_id']}/result", body)

    async def job(self, job_id: str) -> dict[str, Any]:
        status, body = await self.data("GET", f"/api/jobs/{job_id}")
        assert status == 200, body
        job: dict[str, Any] = body
        return job

    async def stored(self) -> tuple[dict[str, int], int]:
        """What is in the store: the counters but those of single nodes and sources, and the number of events."""
        events = await self.app.store.events()
        return await self.app.hub.counts(), len(events)

    def audit(self) -> list[dict[str, Any]]:
        import json

        return [json.loads(line) for line in self.app.audit.path.read_text().splitlines()]


MakeSite = Callable[..., Awaitable[Site]]


@pytest.fixture
async def make_site(tmp_path: Path) -> AsyncIterator[MakeSite]:
    """Starts hubs: `make_site(scheme, clock, **settings)`; settings are whole tables by name."""
    sites: list[Site] = []

    async def make(
        scheme: str = "memory", clock: Clock | None = None, secrets: Secrets | None = None, **tables: Any
    ) -> Site:
        settings = Settings(
            **{
                "control": ControlSettings(port=0),
                "data": DataSettings(port=0),
                "hub": HubSettings(data_dir=str(tmp_path)),
                "auth": AuthSettings(refusal_delay_ms=0),
                "store": StoreSettings(url=f"{scheme}://{tmp_path / 'hub.db' if scheme != 'memory' else ''}"),
                **tables,
            }
        )
        clock = clock or SystemClock()
        app = App(
            settings,
            secrets or Secrets(token=TOKEN, hmac_key=canaries.HMAC),
            open_store(settings.store.url, clock),
            clock,
        )
        await app.start()
        session = aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"})
        sites.append(Site(app, session))
        return sites[-1]

    yield make
    for site in sites:
        await site.session.close()
        await site.app.stop()


@pytest.fixture(params=["memory", "sqlite", "file"])
async def site(request: pytest.FixtureRequest, make_site: MakeSite) -> Site:
    """A running hub, once on each store."""
    return await make_site(request.param)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
async def make_hub(clock: VirtualClock) -> AsyncIterator[Callable[..., Awaitable[Hub]]]:
    """Starts engines on the virtual clock: `make_hub(limits)`; the loops run only if asked."""
    running: list[tuple[Hub, list[asyncio.Task[None]]]] = []

    async def make(limits: Limits | None = None, store: Any = None, *, loops: bool = False, **options: Any) -> Hub:
        if store is None:
            store = open_store("memory://", clock)
            await store.open()
        hub = Hub(store, clock, limits, **options)
        await hub.start()
        tasks = [asyncio.create_task(hub.committer.run())]
        tasks += [asyncio.create_task(loop.run()) for loop in hub.loops] if loops else []
        running.append((hub, tasks))
        return hub

    yield make
    for hub, tasks in running:
        hub.stop()
        hub.committer.close()
        for task in tasks[1:]:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
        await hub.store.close()
