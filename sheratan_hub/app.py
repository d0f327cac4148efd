"""Wires everything together: settings, store, engine, observers, both planes; starts it, stops it."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sheratan_hub import __version__
from sheratan_hub.audit import Audit
from sheratan_hub.clock import Clock, SystemClock
from sheratan_hub.config import Secrets, Settings, hide_password, store_url, until_ms
from sheratan_hub.hub import Hub
from sheratan_hub.items import HUB
from sheratan_hub.keyring import Keyring
from sheratan_hub.log import setup as setup_log
from sheratan_hub.loops import Loop
from sheratan_hub.metrics import Metrics
from sheratan_hub.rules.command import Event, Limits, Refused
from sheratan_hub.rules.integrity import Demand
from sheratan_hub.storage import Store, StoreDown, StoreRefused, open_store
from sheratan_hub.web.auth import HostCheck, Tokens
from sheratan_hub.web.callers import Failures, Proxies
from sheratan_hub.web.plane import Plane, Services
from sheratan_hub.web.routes import ROUTES
from sheratan_hub.web.server import Listener

log = logging.getLogger("sheratan.app")

EXIT_CONFIG = 78


def limits_of(settings: Settings) -> Limits:
    """The numbers that rules decide by."""
    queue, retry, nodes = settings.queue, settings.retry, settings.nodes
    return Limits(
        max_depth=queue.max_depth,
        max_inflight=queue.max_inflight,
        lease_ms=queue.lease_seconds * 1000,
        item_ttl_ms=queue.item_ttl_seconds * 1000,
        max_losses=queue.max_losses,
        loss_delay_ms=queue.loss_delay_ms,
        cancel_grace_ms=queue.cancel_grace_seconds * 1000,
        max_retries=retry.max_attempts - 1,
        backoff_base_ms=retry.backoff_base_ms,
        backoff_cap_ms=retry.backoff_cap_ms,
        key_ttl_ms=settings.idempotency.ttl_seconds * 1000,
        node_ttl_ms=nodes.ttl_seconds * 1000,
        node_dead_ms=nodes.dead_seconds * 1000,
        restart_grace_ms=settings.hub.restart_grace_seconds * 1000,
    )


class App:
    """A hub with both planes in one process. `start`, then `stop`; `ports` tells where it listens."""

    def __init__(self, settings: Settings, secrets: Secrets, store: Store, clock: Clock) -> None:
        self.settings, self.store, self.clock = settings, store, clock
        self.metrics = Metrics(clock)
        self.audit = Audit(Path(settings.hub.data_dir) / "logs" / "hub_security_audit.jsonl", clock)
        self.hub = Hub(
            store,
            clock,
            limits_of(settings),
            max_waiting=settings.hub.max_waiting_commands,
            max_batch=settings.hub.max_batch_commands,
            max_polls=settings.hub.max_long_polls,
        )
        self.hub.observe(self.audit.committed)
        self.hub.observe(self.metrics.committed)
        self.keyring = Keyring(clock)
        self.hub.observe(self.keyring.committed)
        self._secrets: Secrets | None = secrets
        self.ports = {"control": settings.control.port, "data": settings.data.port}
        self.services = Services(
            self.hub,
            clock,
            settings,
            self.metrics,
            Tokens(self.keyring, clock, settings.auth.token_required),
            Demand(settings.integrity.mode, settings.integrity.required, secrets.hmac_key),
            self.ports,
            Failures(clock, settings.auth.refusals_free, settings.auth.refusal_delay_ms),
        )
        self._listeners: dict[str, Listener] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._committing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Open the store, begin to commit, listen. Raises `StoreRefused`, `StoreDown`, `OSError`."""
        await self.store.open()
        await self.hub.start()
        self._committing = asyncio.create_task(self.hub.committer.run(), name="committer")
        try:
            await self.hub.sweep()
        except Refused as no:
            log.warning("what fell due while the hub was away has to wait: %s", no.text)
        self._tell("hub.start")
        await self._open_keyring()
        turn = Loop("rotate", partial(self.keyring.turn, self.hub), self.clock)
        loops = [*self.hub.loops, Loop("fold", self._fold, self.clock), turn]
        self._tasks = [asyncio.create_task(loop.run(), name=loop.name) for loop in loops]
        for name, place in (("control", self.settings.control), ("data", self.settings.data)):
            plane = Plane(
                name, ROUTES, self.services, HostCheck(place.host, place.hosts), Proxies(place.trusted_proxies)
            )
            self._listeners[name] = Listener(plane)
            self.ports[name] = await self._listeners[name].start(place.host, place.port)
        gc.collect()
        gc.freeze()

    async def _open_keyring(self) -> None:
        """Let settings and store agree on the tokens; from then on nobody here knows their values."""
        secrets, self._secrets = self._secrets, None
        if secrets is None:
            raise RuntimeError("a hub is started once")
        try:
            until = until_ms(self.settings.auth.rotation_until)
            await self.keyring.open(self.hub, secrets.token, secrets.token_next, until)
        except Refused as no:
            raise StoreRefused(no.text) from no

    async def stop(self) -> None:
        """Answer long polls, finish running requests and commits, close everything. Safe after a failed start."""
        self.hub.stop()
        await asyncio.gather(*(listener.stop() for listener in self._listeners.values()))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.hub.committer.close()
        if self._committing is not None:
            await self._committing
            self._tell("hub.stop")
        self.audit.close()
        await self.store.close()

    def _tell(self, event: str) -> None:
        meta = {"version": __version__, "store": self.store_scheme()}
        self.hub.report(Event(self.clock.now(), event, "hub", meta=meta), HUB)

    def store_scheme(self) -> str:
        """The store's scheme; the rest of its URL may hold a password."""
        return store_url(self.settings).partition("://")[0]

    async def _fold(self) -> int | None:
        self.audit.flush()
        return None


def serve(settings: Settings, secrets: Secrets) -> int:
    """Run a hub until SIGTERM or SIGINT; the exit status: 0, or 78 when it cannot start as configured."""
    close_log = setup_log(settings, settings.hub.data_dir)
    gc.set_threshold(50_000, 50, 100)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_serve(settings, secrets))
    finally:
        close_log()


async def _serve(settings: Settings, secrets: Secrets) -> int:
    clock = SystemClock()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        app = App(settings, secrets, open_store(store_url(settings), clock), clock)
    except (StoreRefused, OSError) as no:
        return _cannot_start(no)
    try:
        await app.start()
    except (StoreRefused, StoreDown, OSError) as no:
        await app.stop()
        return _cannot_start(no)
    if not settings.auth.token_required:
        log.warning("SHERATAN_HUB_TOKEN_REQUIRED is off: whoever reaches these ports may do everything")
    _say(app)
    await stop.wait()
    log.info("stopping")
    await app.stop()
    return 0


def _cannot_start(no: Exception) -> int:
    taken = isinstance(no, OSError) and no.errno == errno.EADDRINUSE
    hint = "; choose another with SHERATAN_CONTROL_PORT or SHERATAN_DATA_PORT" if taken else ""
    print(f"sheratan-hub cannot start: {no}{hint}", file=sys.stderr)
    return EXIT_CONFIG


def _say(app: App) -> None:
    control, data = app.settings.control.host, app.settings.data.host
    print(f"control plane  http://{control}:{app.ports['control']}", flush=True)
    print(f"data plane     http://{data}:{app.ports['data']}", flush=True)
    place = hide_password(store_url(app.settings))
    print(f"store          {place}, logs in {app.settings.hub.data_dir}/logs", flush=True)
    url = f"http://{data}:{app.ports['data']}"
    print(f"try next       sheratan-hub --data-url {url} submit my.kind --params '{{\"n\": 1}}'", flush=True)
    print(f"               sheratan-hub --data-url {url} jobs list", flush=True)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, if the extra `speed` is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
