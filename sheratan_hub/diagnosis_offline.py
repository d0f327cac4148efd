"""A diagnosis without the help of a hub: of its files, and of its store beside whoever has it open, or nobody."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, ClassVar, NoReturn

import msgspec

from sheratan_hub import diagnosis, diagnosis_of
from sheratan_hub import diagnosis_files as files
from sheratan_hub.app import limits_of
from sheratan_hub.asking import Planes, Refusal, Silence
from sheratan_hub.bundle import Members
from sheratan_hub.clock import SystemClock, VirtualClock
from sheratan_hub.config import Settings, store_url
from sheratan_hub.diagnosis import Bundle, Looking, Pace, Part
from sheratan_hub.hub import Hub
from sheratan_hub.redact import Redactor
from sheratan_hub.rules.nodes import node_of
from sheratan_hub.rules.signs import Answering, AuditSign, StoreSign, state_by
from sheratan_hub.storage import API, Key, LedgerLine, Page, Row, Store, StoreDown, StoreRefused, Tx, open_store
from sheratan_hub.storage_tools import Reading, sizes_of, tools_of
from sheratan_hub.store_check import Report, check
from sheratan_hub.tails import Tail

CHECK_BYTES = 64 << 20
"""A store up to this size is checked whole; of a larger one so many rows of each kind are."""

CHECK_ROWS = 1000
PROBLEMS_SHOWN = 50


class Given(msgspec.Struct, frozen=True):
    """What a diagnosis of files goes by. `where` tells where settings come from; `planes` what was found of each."""

    settings: Settings
    environ: Mapping[str, str]
    where: Mapping[str, str]
    redactor: Redactor
    planes: tuple[Answering, ...]
    asked: Planes


async def of_files(given: Given) -> Bundle:
    """The bundle of a hub that does not make it itself. Changes no file and takes no lock."""
    members, settings = Members(given.redactor), given.settings
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        store, sign, reading = open_store(store_url(settings), clock), StoreSign(), None
        if store_url(settings).startswith("memory:"):
            sign = StoreSign("ok")
        else:
            try:
                reading = await stack.enter_async_context(_reading(store))
            except (StoreRefused, StoreDown, OSError) as no:
                sign = StoreSign(state_by(str(no)), given.redactor.name(str(no)))
        running = any(one.answers for one in given.planes)
        audit = _audit_tail(settings)
        now = clock.now() if running else await _last_sign(settings, audit, reading)
        hub = Hub(Beside(reading, now), VirtualClock(now), limits_of(settings))
        look = Looking(hub, settings, members, Pace(None))
        parts: dict[str, Part] = {
            "about": partial(diagnosis.about, look, given.environ, "diagnose", given.where),
            "logs": partial(diagnosis.logs, look),
            "audit": partial(_audit, look, audit),
            "store": partial(_store, look, store, reading, sign),
            "health": partial(_health, look, given),
        }
        if reading is not None:
            parts["engine"] = partial(_engine, look)
            parts |= {"queue": partial(diagnosis_of.queue, look), "waiting": partial(diagnosis_of.waiting, look)}
            parts["registry"] = partial(diagnosis_of.registry, look)
        if running:
            parts["metrics"] = partial(_metrics, look, given.asked)
        return await diagnosis.make(parts, members, look.pace, now, "files")


@asynccontextmanager
async def _reading(store: Store) -> AsyncIterator[Reading]:
    async with tools_of(store, "reading").reading() as reading:
        yield reading


def _audit_tail(settings: Settings) -> Tail | None:
    """The end of its audit log, None if it cannot be read."""
    with suppress(OSError):
        return files.audit_tail(diagnosis.logs_of(settings))
    return None


async def _last_sign(settings: Settings, audit: Tail | None, reading: Reading | None) -> int:
    """The last moment (ms) that the files of a hub tell of: its logs, its audit log, the last contact of a node."""
    last = files.newest(audit) if audit is not None else 0
    for name, _ in files.LOGS:
        with suppress(OSError):
            last = max(last, files.newest(files.read_log(diagnosis.logs_of(settings), name)))
    if reading is not None:
        with suppress(StoreRefused, ValueError, msgspec.MsgspecError):
            page = await Beside(reading, 0).page("node", ("ONLINE",), limit=diagnosis_of.NODES_SHOWN)
            last = max([last, *(node_of(row).last_seen for row in page.rows)])
    return last


# Parts


async def _engine(look: Looking) -> dict[str, Any]:
    """Make the engine know the lanes, pauses and policy of the store, without starting it."""
    await look.hub.committer.prepare()
    look.hub.committer.started_at = 0
    return {}


async def _audit(look: Looking, found: Tail | None) -> dict[str, Any]:
    if found is None:
        look.members.json("audit.json", {"chain": None, "writable": None})
        return {"killed": None}
    folder = look.logs
    began, killed = files.ended(found, folder)
    chain = files.chain(folder)
    look.members.json("audit.json", {"chain": chain, "writable": None})
    broken = chain["broken"]
    text = "" if broken is None else f"{broken['file']}, line {broken['line']}: {broken['text']}"
    told = await diagnosis.audit_lines(look, found)
    trouble = files.unwritable(folder)
    return {"began": began, "killed": killed, "audit": AuditSign(text, trouble), **told}


async def _store(look: Looking, store: Store, reading: Reading | None, sign: StoreSign) -> dict[str, Any]:
    """What the store is, how large, and whether it contradicts itself."""
    url = look.redactor.name(files.shown_url(store_url(look.settings)))
    if reading is None:
        look.members.json("store.json", {"url": url, "state": sign.state, "text": sign.text, "check": None})
        return {"store": sign}
    sizes = await sizes_of(store)
    small = sizes is not None and sizes.store_bytes <= CHECK_BYTES
    report = await check(reading, None if small else CHECK_ROWS)
    about = reading.about
    told = {
        "url": url,
        "state": "ok",
        "place": look.redactor.name(about.place),
        "format": about.format,
        "held_by": about.held_by or None,
        "next_event": reading.seq,
        "sizes": None if sizes is None else {"store_bytes": sizes.store_bytes, "log_bytes": sizes.log_bytes},
        "check": _checked(look, report),
    }
    look.members.json("store.json", told, cut=not report.complete)
    problems = tuple(look.redactor.name(f"{one.text} ({one.place})") for one in report.problems[:PROBLEMS_SHOWN])
    damaged = next((one for one in report.problems if one.code == "damaged"), None)
    if damaged is not None:
        text = look.redactor.name(damaged.text)
        return {"store": StoreSign("damaged", text), "held_by": about.held_by}
    return {"store": StoreSign("ok", "", problems), "held_by": about.held_by}


def _checked(look: Looking, report: Report) -> dict[str, Any]:
    problems = [
        {"code": one.code, "place": look.redactor.name(one.place), "text": look.redactor.name(one.text)}
        for one in report.problems[:PROBLEMS_SHOWN]
    ]
    return {"complete": report.complete, "found": report.found, "problems": problems, "rows": report.rows}


async def _health(look: Looking, given: Given) -> dict[str, Any]:
    """What each plane says of itself, or why it says nothing."""
    told: dict[str, Any] = {}
    for one in given.planes:
        told[one.plane] = {
            "url": look.redactor.name(one.url),
            "answers": one.answers,
            "why": look.redactor.name(one.why),
        }
        if one.answers:
            with suppress(Refusal, Silence, ValueError):
                told[one.plane]["health"] = look.redactor.names(json.loads(given.asked.ask(one.plane, "/health")))
    look.members.json("health.json", told)
    return {"planes": given.planes}


async def _metrics(look: Looking, asked: Planes) -> dict[str, Any]:
    return await diagnosis.metrics(look, Scraped(asked))


class Scraped:
    """Metrics as a running hub answers them."""

    def __init__(self, planes: Planes) -> None:
        self._planes = planes

    async def json(self, plane: str) -> dict[str, Any]:
        """The fleet's JSON."""
        found: dict[str, Any] = json.loads(self._planes.ask(plane, "/metrics?format=json"))
        return found

    async def text(self, plane: str) -> tuple[bytes, str]:
        """Prometheus' text."""
        return self._planes.ask(plane, "/metrics"), ""


class Beside:
    """A store as an engine sees it, of which one moment can be read and nothing written."""

    api: ClassVar[int] = API
    shared: ClassVar[bool] = False

    def __init__(self, reading: Reading | None, now: int) -> None:
        self._reading, self._now = reading, now

    @property
    def _found(self) -> Any:
        """The reading, which has the bounded reads of a store beside its own."""
        if self._reading is None:
            raise StoreDown("the store cannot be read")
        return self._reading

    async def now(self) -> int:
        """See `Store.now`."""
        return self._now

    async def fetch(self, keys: Sequence[Key]) -> list[Row]:
        """See `Store.fetch`."""
        rows: list[Row] = await self._found.fetch(keys)
        return rows

    async def page(
        self,
        kind: str,
        labels: Sequence[str | None] = (),
        after: str | None = None,
        limit: int = 100,
        examine: int = 2000,
        newest: bool = False,
    ) -> Page:
        """See `Store.page`."""
        page: Page = await self._found.page(kind, labels, after, limit, examine, newest)
        return page

    async def counts(self, prefix: str = "") -> dict[str, int]:
        """See `Store.counts`."""
        return {name: n for name, n in (await self._found.counts()).items() if name.startswith(prefix)}

    async def heads(self, prefix: str = "") -> dict[str, int]:
        """See `Store.heads`."""
        heads: dict[str, int] = await self._found.heads(prefix)
        return heads

    async def events(self, after: int = 0, limit: int = 1000) -> list[LedgerLine]:
        """See `Store.events`; a diagnosis takes them from their file."""
        return []

    def begin(self) -> AbstractAsyncContextManager[Tx]:
        """See `Store.begin`."""
        self._never()

    async def open(self) -> None:
        """See `Store.open`."""

    async def close(self) -> None:
        """See `Store.close`."""

    async def prune_events(self, before: int) -> int:
        """See `Store.prune_events`."""
        self._never()

    async def hint(self, timeout_ms: int) -> None:
        """See `Store.hint`."""
        self._never()

    def _never(self) -> NoReturn:
        raise StoreDown("this store is only read")
