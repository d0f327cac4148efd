"""Runs a watcher and its webhook as loops: by themselves for `sheratan-hub watch`, or inside a hub."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from sheratan_hub.clock import Clock, settle
from sheratan_hub.config import AlertSettings
from sheratan_hub.loops import Loop
from sheratan_hub.watcher import Watcher
from sheratan_hub.webhook import Webhook, webhook_url

log = logging.getLogger("sheratan.watch")

LOOK_MS = 500


class Watch:
    """A watcher with its webhook. Raises `BadConfig` when the webhook cannot be used."""

    def __init__(self, folder: Path, settings: AlertSettings, clock: Clock, say: Callable[[str], None]) -> None:
        url = webhook_url(settings)
        self.watcher = Watcher(folder, settings, clock, say, posting=url is not None)
        self._webhook = None if url is None else Webhook(url, settings, self.watcher, clock, say)
        self._clock, self._say = clock, say
        self._waits = False

    def prepare(self, settings: AlertSettings) -> Callable[[], None]:
        """What makes it go by other settings. Raises `BadConfig` when their webhook cannot be used."""
        url = webhook_url(settings)

        def adopt() -> None:
            self.watcher.adopt(settings, posting=url is not None)
            self._webhook = None if url is None else Webhook(url, settings, self.watcher, self._clock, self._say)

        return adopt

    @property
    def loops(self) -> list[Loop]:
        """Reading, and posting."""
        return [Loop("watch", self._step, self._clock, LOOK_MS), Loop("webhook", self._post, self._clock, LOOK_MS)]

    async def _step(self) -> int | None:
        if not self.watcher.is_open and not self._open():
            return None
        more = self.watcher.step()
        await settle(1)
        return self._clock.now() if more else None

    def _open(self) -> bool:
        """Begin, once no other watcher holds the alerts."""
        try:
            self.watcher.open()
        except BlockingIOError:
            if not self._waits:
                log.warning("another process watches this audit log; waiting until it ends")
            self._waits = True
            return False
        self._waits = False
        return True

    async def _post(self) -> int | None:
        if self._webhook is None or not self.watcher.is_open:
            return None
        return await self._webhook.step()

    async def once(self) -> None:
        """Read all that is there, post what is due, stop. Raises `BlockingIOError` if another one watches."""
        self.watcher.open()
        try:
            while self.watcher.step():
                pass
            while self.watcher.posts and self._webhook is not None and self.watcher.posts[0].at <= self._clock.now():
                await self._webhook.step()
        finally:
            self.watcher.close()

    async def run(self, stop: asyncio.Event) -> None:
        """Watch until `stop`. Raises `BlockingIOError` if another one does."""
        self.watcher.open()
        tasks = [asyncio.create_task(loop.run(), name=loop.name) for loop in self.loops]
        try:
            await stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.watcher.close()
