"""Wires everything together: settings, store, engine, observers, both planes; starts it, stops it.

Longer than 300 lines because this is the one place where things are wired together.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from sheratan_hub import __version__
from sheratan_hub.audit import Audit
from sheratan_hub.audit_check import AuditView
from sheratan_hub.audit_lines import ALERTS_NAME, FILE_NAME
from sheratan_hub.clock import Clock
from sheratan_hub.config import Secrets, Settings, store_url, until_ms
from sheratan_hub.diagnosis_live import Inside
from sheratan_hub.hub import Hub
from sheratan_hub.items import HUB
from sheratan_hub.job_spans import JobSpans
from sheratan_hub.keyring import Keyring
from sheratan_hub.ledger import LedgerFile
from sheratan_hub.ledger_files import Rotation
from sheratan_hub.loops import Loop
from sheratan_hub.metrics import Lag, Looks, Metrics, Telling, TimedStore
from sheratan_hub.policy_files import load_policies
from sheratan_hub.rules.command import Event, Limits, Rate, Refused
from sheratan_hub.rules.integrity import Demand
from sheratan_hub.storage import Store, StoreDown, StoreRefused
from sheratan_hub.tracing import Tracing
from sheratan_hub.watching import Watch
from sheratan_hub.web.auth import HostCheck, Tokens
from sheratan_hub.web.callers import Failures, Proxies
from sheratan_hub.web.connections import Bounds
from sheratan_hub.web.manual import Manual
from sheratan_hub.web.plane import Plane, Services
from sheratan_hub.web.room import Room
from sheratan_hub.web.routes import ROUTES
from sheratan_hub.web.server import Listener
from sheratan_hub.web.tls import Certificates

log = logging.getLogger("sheratan.app")

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

    def __init__(
        self, settings: Settings, secrets: Secrets, store: Store, clock: Clock, tracing: Tracing | None = None
    ) -> None:
        self.settings, self.store, self.clock = settings, store, clock
        self.certificates = Certificates(settings.tls)
        self.metrics = Metrics(clock, settings.metrics.max_kinds)
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
        timed, self._lag = TimedStore(store), Lag()
        self.hub = Hub(
            timed.store,
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
        if tracing is not None:
            self.hub.observe(JobSpans(tracing, clock).committed)
        self.keyring = Keyring(clock)
        self.hub.observe(self.keyring.committed)
        self.keyring.changed = self.hub.waiting.review
        self._looks, self.telling = self._measured(timed)
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
            self.telling,
            Inside(),
            self._manuals(settings),
        )
        self.watch = self._watching() if settings.alerts.in_process else None
        self.listeners: dict[str, Listener] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._committing: asyncio.Task[None] | None = None

    def _measured(self, timed: TimedStore) -> tuple[Looks, Telling]:
        """What looks at what nobody reports, and what `/metrics` answers."""
        rules = (*self.settings.alerts.in_force(), "audit_chain")
        looks = Looks(self.hub, self.store, self.keyring, self.audit.path.with_name(ALERTS_NAME), rules)
        scheme, most_nodes = self.store_scheme(), self.settings.metrics.max_node_series
        sources = (self.metrics, self.hub, timed, self._lag, looks, self.audit, self.keyring)
        return looks, Telling(*sources, store=scheme, max_node_series=most_nodes)

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
        loops += self.watch.loops if self.watch else []
        if self.ledger is not None:
            loops.append(Loop("ledger", self.ledger.follow, self.clock))
        loops += self._looks.loops
        self.watch_loops(*loops)
        self._lag.start()
        self._tasks = [asyncio.create_task(loop.run(), name=loop.name) for loop in loops]
        self._tell("hub.start")
        for name, place in (("control", self.settings.control), ("data", self.settings.data)):
            hosts, proxies = HostCheck(place.host, place.hosts), Proxies(place.trusted_proxies)
            plane = Plane(name, ROUTES, self.services, hosts, proxies)
            tls = self.certificates.context
            listener = self.listeners[name] = Listener(plane, self.clock, bounds_of(self.settings), tls)
            self.watch_loops(listener.loop)
            self._tasks.append(asyncio.create_task(listener.loop.run(), name=listener.loop.name))
            self.telling.watch(name, listener.connections)
            self.services.inside.sockets[name] = listener.connections
            self.ports[name] = await listener.start(place.host, place.port)
        gc.collect()
        gc.freeze()

    def watch_loops(self, *loops: Loop) -> None:
        """Tell of the failures of these background loops, in metrics and in a diagnosis."""
        self.telling.watch_loops(loops)
        self.services.inside.loops += loops

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
        self._lag.stop()
        await asyncio.gather(*(listener.stop() for listener in self.listeners.values()))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.hub.committer.close()
        if self._committing is not None:
            await self._committing
            self._tell("hub.stop")
        self.audit.close()
        if self.watch is not None:
            self.watch.watcher.close()
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

    def adopt(self, settings: Settings, demand: Demand) -> None:
        """Go by other settings from now on, as far as a running hub can; `reload.py` decides which may differ."""
        self.settings, services = settings, self.services
        self.hub.adopt(limits_of(settings))
        services.settings, services.demand = settings, demand
        services.manuals = self._manuals(settings)
        services.failures.adopt(settings.auth.refusals_free, settings.auth.refusal_delay_ms)
        for name, place in (("control", settings.control), ("data", settings.data)):
            listener = self.listeners[name]
            listener.plane.adopt(HostCheck(place.host, place.hosts), Proxies(place.trusted_proxies))
            listener.connections.bounds = bounds_of(settings)
        self.audit.adopt(
            max_bytes=settings.audit.max_bytes,
            keep_files=settings.audit.keep_files,
            required=settings.audit.required,
            dead_letters=settings.dlq.enabled,
        )

    def _manuals(self, settings: Settings) -> dict[str, Manual]:
        return {plane: Manual(plane, ROUTES, settings, self.ports) for plane in ("control", "data")}

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
        self.metrics.fold()
        return None

    async def _tidy(self) -> int | None:
        if self.audit.file.untidy:
            await asyncio.to_thread(self.audit.file.tidy)
        return None
