"""Runs a hub as a process: from its settings to its exit status, with signals and a service manager in between."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial

from sheratan_hub import config
from sheratan_hub.announce import announcement, urls
from sheratan_hub.app import App
from sheratan_hub.clock import SystemClock
from sheratan_hub.config import BadConfig, Flags, store_url
from sheratan_hub.log import setup as setup_log
from sheratan_hub.loops import Loop
from sheratan_hub.notify import Notifier
from sheratan_hub.pulse import Pulse
from sheratan_hub.reload import Load, Reload
from sheratan_hub.storage import StoreDown, StoreRefused, open_store
from sheratan_hub.tracing import from_environment

log = logging.getLogger("sheratan.app")

EXIT_CONFIG = 78


class Signals:
    """What the process was told: to stop, to read its settings again."""

    def __init__(self) -> None:
        self.stop = False
        self.again = False
        self._told = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._hear, "stop")
        loop.add_signal_handler(signal.SIGHUP, self._hear, "again")

    def _hear(self, name: str) -> None:
        setattr(self, name, True)
        self._told.set()

    async def next(self) -> None:
        """Return when there is something to do."""
        await self._told.wait()
        self._told.clear()


def serve(path: str | None, environ: Mapping[str, str], flags: Flags) -> int:
    """Run a hub until SIGTERM or SIGINT; the exit status: 0, or 78 when it cannot start as configured.

    `path`, `environ` and `flags` are what `config.load` takes. Raises `BadConfig`.
    """
    load = partial(config.load, path, environ, flags)
    settings, _ = load()
    origins = {key: origin for key, _, origin in config.explain(path, environ, flags)}
    close_log = setup_log(settings, settings.hub.data_dir)
    gc.set_threshold(50_000, 50, 100)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(run(load, origins, Notifier(environ)))
    finally:
        close_log()


async def run(load: Load, origins: Mapping[str, str], notifier: Notifier) -> int:
    """Start, serve, stop. What `serve` has made ready."""
    clock = SystemClock()
    signals = Signals()
    settings, secrets = load()
    notifier.status(f"opening the store {store_url(settings).partition('://')[0]}")
    tracing = from_environment("sheratan-hub", log.warning)
    try:
        app = App(settings, secrets, open_store(store_url(settings), clock), clock, tracing)
    except (StoreRefused, BadConfig, OSError) as no:
        return _cannot_start(no, notifier)
    try:
        await app.start()
    except (StoreRefused, StoreDown, OSError) as no:
        await app.stop()
        return _cannot_start(no, notifier)
    if not settings.auth.token_required:
        log.warning("SHERATAN_HUB_TOKEN_REQUIRED is off: whoever reaches these ports may do everything")
    print(announcement(app, origins), flush=True)
    await _until_stopped(app, load, signals, notifier)
    notifier.stopping("finishing what was begun")
    log.info("stopping")
    await app.stop()
    if tracing is not None:
        await asyncio.to_thread(tracing.close)
    return 0


async def _until_stopped(app: App, load: Load, signals: Signals, notifier: Notifier) -> None:
    status = "control {control}, data {data}".format(**urls(app))
    reload = Reload(app, load, with_logs=True)
    pulse = Pulse(app.hub, notifier)
    loop = Loop("watchdog", pulse.step, app.clock, notifier.beat_ms)
    beating = None
    if notifier.beat_ms:
        app.watch_loops(loop)
        beating = asyncio.create_task(loop.run(), name=loop.name)
    notifier.ready(status)
    while not signals.stop:
        if signals.again:
            signals.again = False
            notifier.reloading()
            outcome = await reload.run()
            notifier.ready(f"{outcome.text} ({status})")
            continue
        await signals.next()
    if beating is not None:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


def _cannot_start(no: Exception, notifier: Notifier) -> int:
    taken = isinstance(no, OSError) and no.errno == errno.EADDRINUSE
    hint = "; choose another with SHERATAN_CONTROL_PORT or SHERATAN_DATA_PORT" if taken else ""
    if isinstance(no, StoreRefused) and " is damaged" in str(no):
        hint = "; `sheratan-hub store repair` makes a store of what can be read (docs/operations.md)"
    text = f"sheratan-hub cannot start: {no}{hint}"
    notifier.status(text)
    print(text, file=sys.stderr)
    return EXIT_CONFIG


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, if the extra `speed` is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
