"""Fixtures: a scripted hub, and a client of it on a hasty clock."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sheratan_hub.client import HubClient
from tests.conftest import TOKEN
from tests.web.faking import Fake, HastyClock


@pytest.fixture
async def fake() -> AsyncIterator[Fake]:
    found = Fake()
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_route("*", "/{path:.*}", found.answer)
    found.server = TestServer(app)
    await found.server.start_server()
    yield found
    await found.server.close()


@pytest.fixture
def hasty() -> HastyClock:
    return HastyClock()


@pytest.fixture
async def client(fake: Fake, hasty: HastyClock) -> AsyncIterator[HubClient]:
    url = str(fake.server.make_url("/"))
    async with HubClient(url, url, TOKEN, clock=hasty, patience_seconds=30) as hub:
        yield hub
