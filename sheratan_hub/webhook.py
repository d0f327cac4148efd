"""Posts alerts to a webhook: only to an allowed host, never where that redirects to, a bounded number of times.

A post may arrive twice, when the watcher is killed before it has noted the first; both carry the alert's id.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import aiohttp
import msgspec
from yarl import URL

from sheratan_hub import __version__
from sheratan_hub.alerts import Alert
from sheratan_hub.clock import Clock
from sheratan_hub.config import AlertSettings, BadConfig, is_loopback
from sheratan_hub.watcher import Watcher

BACKOFF_MS = 1000
BACKOFF_CAP_MS = 60_000
TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


def webhook_url(settings: AlertSettings) -> str | None:
    """The URL in the configured file, None if none is. Raises `BadConfig`, which never tells the URL."""
    if not settings.webhook_file:
        return None
    try:
        text = Path(settings.webhook_file).read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise BadConfig(f"alerts.webhook_file: {settings.webhook_file} cannot be read.") from error
    if (wrong := what_is_wrong(text, settings.webhook_hosts)) is not None:
        raise BadConfig(f"alerts.webhook_file: {wrong}.")
    return text


def what_is_wrong(text: str, hosts: Collection[str]) -> str | None:
    """Why alerts may not be posted there, None if they may."""
    try:
        url = URL(text)
        host = url.host or ""
    except ValueError:
        return "it holds no URL"
    if url.scheme not in ("http", "https") or not host:
        return "it holds no https URL"
    if url.user is not None or url.password is not None:
        return "the URL may not hold a user or a password"
    if url.scheme == "http" and not is_loopback(host):
        return "http is allowed on loopback only; use https"
    if host.lower() not in {name.lower() for name in hosts}:
        return f"the host {host} is not in alerts.webhook_hosts"
    return None


class Webhook:
    """Posts what a watcher has queued, one after the other."""

    def __init__(
        self, url: str, settings: AlertSettings, watcher: Watcher, clock: Clock, say: Callable[[str], None]
    ) -> None:
        self._url, self._host = url, URL(url).host
        self._timeout = aiohttp.ClientTimeout(total=settings.webhook_timeout_seconds)
        self._tries, self._watcher, self._clock, self._say = settings.webhook_tries, watcher, clock, say

    async def step(self) -> int | None:
        """Post the oldest that is due; when the next one is (ms), None if there is none."""
        posts = self._watcher.posts
        if not posts:
            return None
        post = posts[0]
        if post.at > self._clock.now():
            return post.at
        failed, again = await self._post(post.alert)
        post.tries += 1
        if failed and again and post.tries < self._tries:
            delay = min(BACKOFF_MS * 2 ** (post.tries - 1), BACKOFF_CAP_MS)
            post.at = self._clock.now() + int(delay * (0.5 + self._clock.jitter() / 2))
        else:
            if failed:
                self._say(f"alert {post.alert.id} was not taken by {self._host}, given up: {failed}")
            with suppress(ValueError):
                posts.remove(post)
        self._watcher.save()
        return posts[0].at if posts else None

    async def _post(self, alert: Alert) -> tuple[str | None, bool]:
        """(why it was not taken, whether to try again)"""
        headers = {
            "Content-Type": "application/json",
            "Idempotency-Key": alert.id,
            "User-Agent": f"sheratan-hub/{__version__}",
        }
        try:
            async with (
                aiohttp.ClientSession(timeout=self._timeout, cookie_jar=aiohttp.DummyCookieJar()) as session,
                session.post(
                    self._url, data=msgspec.json.encode(alert), headers=headers, allow_redirects=False
                ) as answer,
            ):
                if 200 <= answer.status < 300:
                    return None, False
                return f"status {answer.status}", answer.status in TRY_AGAIN
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return type(error).__name__, True
