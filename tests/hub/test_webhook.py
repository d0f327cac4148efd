"""Posting alerts: only where it is allowed, again when it failed, never for ever, and never a secret in it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sheratan_hub.audit_file import AuditFile
from sheratan_hub.audit_lines import FILE_NAME
from sheratan_hub.clock import VirtualClock, rfc3339
from sheratan_hub.config import AlertSettings, BadConfig
from sheratan_hub.watcher import Watcher
from sheratan_hub.webhook import Webhook, webhook_url, what_is_wrong
from tests.hub.chains import record


class Receiver:
    """A webhook that answers as it is told."""

    def __init__(self) -> None:
        self.statuses: list[int] = [200]
        self.got: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.elsewhere = 0

    async def take(self, request: web.Request) -> web.Response:
        self.got.append((await request.json(), dict(request.headers)))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return web.Response(status=status, headers={"Location": "/elsewhere"} if status == 302 else {})

    async def wander(self, _: web.Request) -> web.Response:
        self.elsewhere += 1
        return web.Response()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    found = Receiver()
    app = web.Application()
    app.router.add_post("/hook", found.take)
    app.router.add_route("*", "/elsewhere", found.wander)
    found.server = TestServer(app)
    await found.server.start_server()
    yield found
    await found.server.close()


class Scene:
    """A watcher with an alert to post."""

    def __init__(self, tmp_path: Path, clock: VirtualClock, url: str, **options: Any) -> None:
        self.folder, self.clock, self.url = tmp_path / "logs", clock, url
        self.settings = AlertSettings(webhook_hosts=("127.0.0.1",), **options)
        self.said: list[str] = []
        log = AuditFile(self.folder / FILE_NAME)
        log.add(record(1, event="FLEET_SILENT") | {"ts": rfc3339(clock.now())})
        log.write()
        log.close()
        self.start()

    def start(self) -> None:
        self.watcher = Watcher(self.folder, self.settings, self.clock, self.said.append, posting=True)
        self.watcher.open()
        self.webhook = Webhook(self.url, self.settings, self.watcher, self.clock, self.said.append)
        while self.watcher.step():
            pass


@pytest.fixture
def scene(tmp_path: Path, clock: VirtualClock, receiver: Receiver) -> Scene:
    return Scene(tmp_path, clock, str(receiver.server.make_url("/hook")), webhook_tries=3)


async def test_an_alert_is_posted_once_as_it_stands_in_its_file(scene: Scene, receiver: Receiver) -> None:
    for _ in range(3):
        await scene.webhook.step()
    ((body, headers),) = receiver.got
    assert body == json.loads((scene.folder / "alerts.jsonl").read_text())
    assert headers["Idempotency-Key"] == body["id"]
    assert headers["Content-Type"] == "application/json"
    assert not {"Authorization", "Cookie"} & set(headers)
    scene.watcher.close()
    scene.start()
    await scene.webhook.step()
    assert len(receiver.got) == 1


async def test_what_was_not_posted_is_posted_after_a_restart(scene: Scene, receiver: Receiver) -> None:
    scene.watcher._alerts.close()  # killed
    scene.start()
    await scene.webhook.step()
    assert len(receiver.got) == 1


async def test_an_alert_that_was_raised_but_not_noted_for_posting_is_posted(scene: Scene, receiver: Receiver) -> None:
    (scene.folder / "watcher_state.json").unlink()
    scene.watcher._alerts.close()  # killed between the alert and the state
    scene.start()
    await scene.webhook.step()
    assert len(receiver.got) == 1
    assert len((scene.folder / "alerts.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("status", [500, 503, 429, 408])
async def test_a_post_that_failed_is_tried_again_later_and_later(scene: Scene, receiver: Receiver, status: int) -> None:
    receiver.statuses = [status, status, 204]
    waits = []
    while scene.watcher.posts:
        at = await scene.webhook.step()
        if at is not None:
            assert await scene.webhook.step() == at, "not before its time"
            waits.append(at - scene.clock.now())
            scene.clock._now = at
    assert len(receiver.got) == 3
    assert len({body["id"] for body, _ in receiver.got}) == 1
    assert 500 <= waits[0] <= 1000 <= waits[1] <= 2000
    assert len(scene.said) == 1


async def test_it_is_given_up_after_its_tries_and_that_is_said_without_the_url(
    scene: Scene, receiver: Receiver
) -> None:
    receiver.statuses = [500]
    while scene.watcher.posts:
        scene.clock._now = await scene.webhook.step() or scene.clock.now()
    assert len(receiver.got) == 3
    assert "given up: status 500" in scene.said[-1]
    assert "/hook" not in scene.said[-1]


@pytest.mark.parametrize("status", [302, 400, 403, 404])
async def test_no_redirect_is_followed_and_what_is_refused_is_not_tried_again(
    scene: Scene, receiver: Receiver, status: int
) -> None:
    receiver.statuses = [status]
    await scene.webhook.step()
    assert (len(receiver.got), receiver.elsewhere, scene.watcher.posts) == (1, 0, [])


async def test_a_receiver_that_is_not_there_holds_up_nothing(tmp_path: Path, clock: VirtualClock) -> None:
    scene = Scene(tmp_path, clock, "http://127.0.0.1:1/hook", webhook_tries=2)
    while scene.watcher.posts:
        scene.clock._now = await scene.webhook.step() or scene.clock.now()
    assert "given up" in scene.said[-1]
    scene.watcher.close()


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("https://hooks.example/x", None),
        ("HTTPS://Hooks.Example:8443/x", None),
        ("http://127.0.0.1:9/x", None),
        ("http://[::1]:9/x", None),
        ("http://hooks.example/x", "loopback only"),
        ("https://hooks.example.evil.test/x", "not in alerts.webhook_hosts"),
        ("https://evil.test/hooks.example", "not in alerts.webhook_hosts"),
        ("https://hooks.example@evil.test/", "user or a password"),
        ("https://a:b@hooks.example/", "user or a password"),
        ("https://evil.test\\@hooks.example/", ""),
        ("ftp://hooks.example/", "no https URL"),
        ("file:///etc/passwd", "no https URL"),
        ("hooks.example/x", "no https URL"),
        ("https://", "no https URL"),
        ("", "no https URL"),
        ("https://[::1", "no URL"),
        ("http://2130706433/", ""),
        ("http://169.254.169.254/", "loopback only"),
    ],
)
def test_only_https_or_loopback_and_only_hosts_that_are_allowed(url: str, wrong: str | None) -> None:
    found = what_is_wrong(url, ["hooks.example", "127.0.0.1", "::1"])
    assert (found is None) == (wrong is None)
    assert wrong is None or wrong in (found or "")


def test_a_url_that_cannot_be_used_stops_the_start_and_is_not_told(tmp_path: Path) -> None:
    file = tmp_path / "hook"
    settings = AlertSettings(webhook_file=str(file))
    with pytest.raises(BadConfig, match=r"alerts\.webhook_file"):
        webhook_url(settings)
    file.write_text("https://hooks.example/canary\n")
    with pytest.raises(BadConfig) as bad:
        webhook_url(settings)
    assert "canary" not in str(bad.value)
    allowed = msgspec.structs.replace(settings, webhook_hosts=("hooks.example",))
    assert webhook_url(allowed) == "https://hooks.example/canary"
    assert webhook_url(AlertSettings()) is None
