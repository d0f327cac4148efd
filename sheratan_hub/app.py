"""Wires everything together: settings, store, engine, observers, both planes; starts it, stops it.

It is longer than 300 lines because everything is wired here, and only here.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from sheratan_hub import __version__
from sheratan_hub.audit import Audit
from sheratan_hub.audit_check import AuditView
from sheratan_hub.audit_lines import FILE_NAME
from sheratan_hub.clock import Clock, SystemClock
from sheratan_hub.config import BadConfig, Secrets, Settings, hide_password, store_url, until_ms
from sheratan_hub.hub import Hub
from sheratan_hub.items import HUB
from sheratan_hub.keyring import Keyring
from sheratan_hub.ledger import LedgerFile
from sheratan_hub.ledger_files import Rotation
from sheratan_hub.log import setup as setup_log
from sheratan_hub.loops import Loop
from sheratan_hub.metrics import Metrics
from sheratan_hub.policy_files import load_policies
from sheratan_hub.rules.command import Event, Limits, Rate, Refused
from sheratan_hub.rules.integrity import Demand
from sheratan_hub.storage import Store, StoreDown, StoreRefused, open_store
from sheratan_hub.watching import Watch
from sheratan_hub.web.auth import HostCheck, Tokens
from sheratan_hub.web.callers import Failures, Proxies
from sheratan_hub.web.connections import Bounds
from sheratan_hub.web.plane import Plane, Services
from sheratan_hub.web.room import Room
from sheratan_hub.web.routes import ROUTES
from sheratan_hub.web.server import Listener
from sheratan_hub.web.tls import server_context

log = logging.getLogger("sheratan.app")

EXIT_CONFIG = 78

RESERVED_FILES = 100
"""Files that are no connections: the store, the logs, what Python has open."""


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
        max_deliveries=queue.max_deliveries,
        **_kept(settings),
        age_ms=queue.age_seconds * 1000,
        max_leases_per_node=queue.max_leases_per_node,
        rates={source: Rate(one.per_minute, one.concurrent) for source, one in settings.rate_limits.items()},
        max_heartbeats=nodes.max_heartbeats_per_second,
        flip_window_ms=settings.attestation.flip_window_seconds * 1000,
        spoof_threshold=settings.attestation.spoof_threshold,
    )


def bounds_of(settings: Settings) -> Bounds:
    """How many connections a plane may have, at most those that the process may open, and for how long."""
    limits, spare = settings.limits, open_files() - RESERVED_FILES
    most = min(limits.connections or spare // 2, max(1, spare // 2))
    return Bounds(
        limits.header_seconds * 1000,
        limits.send_seconds * 1000,
        limits.idle_seconds * 1000,
        most,
        limits.connections_per_address,
    )


def open_files() -> int:
    """How many files the process may have open; it asks for as many as it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 30


def _kept(settings: Settings) -> dict[str, Any]:
    """How long finished jobs and events are kept. Without a dead-letter list, failed jobs are as completed ones."""
    retention = settings.retention
    failed_seconds = retention.failed_seconds if settings.dlq.enabled else retention.completed_seconds
    return {
        "completed_kept_ms": retention.completed_seconds * 1000,
        "cancelled_kept_ms": retention.cancelled_seconds * 1000,
        "mission_kept_ms": retention.mission_seconds * 1000,
        "failed_kept_ms": failed_seconds * 1000,
        "ledger_kept_ms": retention.ledger_days * 86_400_000,
        "dead_letters": settings.dlq.enabled,
        "dead_letters_max": settings.dlq.max_items,
    }


def _ledger_file(settings: Settings, path: Path, store: Store) -> LedgerFile | None:
    chosen = settings.ledger
    return (
        LedgerFile(path, store, Rotation(chosen.max_bytes, chosen.max_hours, chosen.keep_files))
        if chosen.file
        else None
    )


class App:
    """A hub with both planes in one process. `start`, then `stop`; `ports` tells where it listens."""

    def __init__(self, settings: Settings, secrets: Secrets, store: Store, clock: Clock) -> None:
        self.settings, self.store, self.clock = settings, store, clock
        self._tls = server_context(settings.tls)
        self.metrics = Metrics(clock)
        logs = Path(settings.hub.data_dir) / "logs"
        self.audit = Audit(
            logs / FILE_NAME,
            clock,
            max_bytes=settings.audit.max_bytes,
            keep_files=settings.audit.keep_files,
            required=settings.audit.required,
            dead_letters=settings.dlq.enabled,
        )
        self.ledger = _ledger_file(settings, logs / "ledger.jsonl", store)
        self.hub = Hub(
            store,
            clock,
            limits_of(settings),
            max_waiting=settings.hub.max_waiting_commands,
            max_batch=settings.hub.max_batch_commands,
            max_polls=settings.hub.max_long_polls,
        )
        self.hub.committer.gate = self.audit.refusal
        self.hub.observe(self.audit.committed)
        self.hub.observe(self.metrics.committed)
        if self.ledger is not None:
            self.hub.observe(self.ledger.committed)
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
            Room(self.hub, clock),
            AuditView(self.audit, clock),
            Failures(clock, settings.auth.refusals_free, settings.auth.refusal_delay_ms),
        )
        self._watch = self._watching() if settings.alerts.in_process else None
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
        await self._open_keyring()
        for made in await load_policies(self.hub, self.settings.policies.dir):
            log.info("policy version %d was loaded from %s", made.version, made.file)
        turn = Loop("rotate", partial(self.keyring.turn, self.hub), self.clock)
        loops = [*self.hub.loops, Loop("fold", self._fold, self.clock), turn]
        loops.append(Loop("tidy", self._tidy, self.clock, 10_000))
        loops += self._watch.loops if self._watch else []
        if self.ledger is not None:
            loops.append(Loop("ledger", self.ledger.follow, self.clock))
        self._tasks = [asyncio.create_task(loop.run(), name=loop.name) for loop in loops]
        self._tell("hub.start")
        for name, place in (("control", self.settings.control), ("data", self.settings.data)):
            hosts, proxies = HostCheck(place.host, place.hosts), Proxies(place.trusted_proxies)
            plane = Plane(name, ROUTES, self.services, hosts, proxies)
            listener = self._listeners[name] = Listener(plane, self.clock, bounds_of(self.settings), self._tls)
            self._tasks.append(asyncio.create_task(listener.loop.run(), name=listener.loop.name))
            self.metrics.watch(name, listener.connections)
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
        if self._watch is not None:
            self._watch.watcher.close()
        await self._close_ledger()
        await self.store.close()

    async def _close_ledger(self) -> None:
        """Bring the ledger's file up to what was committed, if that can be done; the next start does the rest."""
        if self.ledger is None:
            return
        try:
            if self._committing is not None:
                await self.ledger.follow()
        except (StoreDown, OSError) as error:
            log.warning("%s is behind: %s", self.ledger.path, error)
        self.ledger.close()

    def _watching(self) -> Watch:
        return Watch(self.audit.path.parent, self.settings.alerts, self.clock, log.warning)

    def _tell(self, event: str) -> None:
        meta = {"version": __version__, "store": self.store_scheme()}
        self.hub.report(Event(self.clock.now(), event, "hub", meta=meta), HUB)

    def store_scheme(self) -> str:
        """The store's scheme; the rest of its URL may hold a password."""
        return store_url(self.settings).partition("://")[0]

    async def _fold(self) -> int | None:
        self.audit.flush()
        return None

    async def _tidy(self) -> int | None:
        if self.audit.file.untidy:
            await asyncio.to_thread(self.audit.file.tidy)
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
    except (StoreRefused, BadConfig, OSError) as no:
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
    scheme = "https" if app.settings.tls.cert else "http"
    print(f"control plane  {scheme}://{control}:{app.ports['control']}", flush=True)
    print(f"data plane     {scheme}://{data}:{app.ports['data']}", flush=True)
    place = hide_password(store_url(app.settings))
    print(f"store          {place}, logs in {app.settings.hub.data_dir}/logs", flush=True)
    url = f"{scheme}://{data}:{app.ports['data']}"
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
