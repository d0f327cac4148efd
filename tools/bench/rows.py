"""The rows of the table: what each sends, over how many connections, and what it is compared with."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.bench import requests
from tools.bench.figures import Failed, Line, Window, alternate, line, middle
from tools.bench.servers import Hub, Server, hub
from tools.bench.windows import CONNECTIONS, Load

BULK_CONNECTIONS, BATCH_CONNECTIONS = 4, 8
FILL_SECONDS = 300
WARM_SECONDS = 0.3
FEW = 1000
SLOW_MS = 2

EMPTY = "empty handler"

Fire = Callable[[Load, Hub, float], tuple[int, Window]]
"""Loads a hub for so many seconds: (jobs done, the window)."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One run: where it works, with what, and on which sides (a name and the root of a checkout each)."""

    folder: Path
    load: Load
    core: set[int]
    empty: Server
    sides: dict[str, Path]
    seconds: float
    windows: int
    queued: int
    shim: Callable[[], Path]
    uvloop: bool = False
    """Whether all servers run on its event loop, or on asyncio's own."""

    def hub(self, root: Path, store: str, **environ: str) -> AbstractContextManager[Hub]:
        """A hub of that checkout on a new store."""
        return hub(root, store, self.folder, self.core, uvloop=self.uvloop, **environ)

    def empty_window(self) -> Window:
        """The empty handler under wrk, with the request of a submit."""
        return self.load.wrk(self.empty, requests.submit(self.empty.wire), self.seconds)[1]

    def empty_own(self, connections: int) -> Window:
        """The empty handler under our own client."""
        return self.load.own(self.empty, "empty", self.seconds, connections)[1]

    def fill(self, one: Hub, depth: int, chain: str = "fill") -> None:
        """Submit in bulk until at least so many jobs wait."""
        missing = depth - one.depth()
        if missing > 0:
            bulks = -(-missing // requests.BULK_JOBS)
            self.load.own(one, chain, FILL_SECONDS, BULK_CONNECTIONS, bulks * requests.BULK_JOBS)
        if one.depth() < depth:
            raise Failed(f"the queue has {one.depth()} jobs, not {depth}, after it was filled")

    def drain(self, one: Hub, depth: int) -> None:
        """Work until no more than so many jobs wait."""
        surplus = one.depth() - depth
        if surplus > 0:
            self.load.own(one, "drain", FILL_SECONDS, BATCH_CONNECTIONS, surplus)

    def submits(self, fire: Fire, one: Hub, seconds: float) -> Window:
        """A window of submits, all of which must be found in the queue afterwards."""
        before = one.depth()
        jobs, window = fire(self.load, one, seconds)
        if (found := one.depth() - before) < jobs:
            raise Failed(f"{jobs} jobs were acknowledged, but the queue has only {found} more")
        return window

    def works(self, fire: Fire, per_second: int, filled_by: str, one: Hub, seconds: float) -> Window:
        """A window of work on a queue that is filled up for it; `per_second` is more than can be done."""
        self.fill(one, int(per_second * seconds), filled_by)
        return fire(self.load, one, seconds)[1]

    def idles(self, one: Hub, seconds: float) -> Window:
        """A window of single jobs, each submitted when the one before was done."""
        return self.load.own(one, "idle", seconds, 1)[1]


def submit(load: Load, one: Hub, seconds: float, connections: int = CONNECTIONS) -> tuple[int, Window]:
    return load.wrk(one, requests.submit(one.wire), seconds, connections)


def mixed(load: Load, one: Hub, seconds: float) -> tuple[int, Window]:
    return load.wrk(one, requests.mixed(one.wire), seconds)


def keys(load: Load, one: Hub, seconds: float) -> tuple[int, Window]:
    return load.wrk(one, requests.keyed(one.wire, secrets.token_hex(4)), seconds)


def bulk(load: Load, one: Hub, seconds: float) -> tuple[int, Window]:
    return load.wrk(one, [requests.bulk(one.wire)], seconds, BULK_CONNECTIONS, requests.BULK_JOBS)


def chain(name: str, connections: int = CONNECTIONS) -> Fire:
    return lambda load, one, seconds: load.own(one, name, seconds, connections)


SUBMITS: dict[str, Fire] = {"submit": submit, "mixed": mixed, "keys": keys, "bulk": bulk}
WORKS: dict[str, tuple[Fire, int, str]] = {
    "pull+result": (chain("pull+result"), 20_000, "fill"),
    "result-pull": (chain("result-pull"), 30_000, "fill"),
    "mixed-pull": (chain("result-pull"), 30_000, "fill-mixed"),
    "batches": (chain("batches", BATCH_CONNECTIONS), 60_000, "fill"),
}
"""With how many jobs a second of the window the queue is filled before it, and how. A window ends early when it runs
dry."""


def against_empty(bench: Bench, store: str, row: str) -> Iterator[Line]:
    """A row that is compared with the empty handler under wrk."""
    window = partial(bench.submits, SUBMITS[row]) if row in SUBMITS else partial(bench.works, *WORKS[row])
    with ExitStack() as stack:
        measures = {}
        for side, root in bench.sides.items():
            try:
                one = stack.enter_context(bench.hub(root, store))
                window(one, WARM_SECONDS)
            except Failed as error:
                yield Line(store, row, side, error=str(error))
                continue
            measures[side] = partial(window, one, bench.seconds)
        samples = alternate(bench.empty_window, measures, bench.windows) if measures else {}
    for side, found in samples.items():
        yield line(store, row, side, EMPTY, found, {"ratio": "rate", "CPU ratio": "cpu_s"})


def idle(bench: Bench, store: str, row: str) -> Iterator[Line]:
    """Submit to done through a worker that long-polls, one job at a time."""
    for side, root in bench.sides.items():
        with bench.hub(root, store) as one:
            measure = partial(bench.idles, one)
            measure(WARM_SECONDS)
            samples = alternate(partial(bench.empty_own, 1), {side: partial(measure, bench.seconds)}, bench.windows)
        yield line(store, row, side, "empty, 1 connection", samples[side], {"p50 ratio": "p50_ms"})


def million(bench: Bench, store: str, row: str) -> Iterator[Line]:
    """The same work on a deep queue and on one with a thousand jobs; the deep one's start and memory."""
    for side, root in bench.sides.items():
        with (
            bench.hub(root, store) as few,
            bench.hub(root, store) as many,
        ):
            for name, measure in (("million-submit", submits_at), ("million-pull", pulls_at)):
                shallow = partial(measure, bench, few, FEW)
                deep = partial(measure, bench, many, bench.queued)
                for window in (shallow, deep):
                    window(WARM_SECONDS)
                samples = alternate(
                    partial(shallow, bench.seconds), {side: partial(deep, bench.seconds)}, bench.windows
                )
                ratios = {"ratio": "rate", "p99 ratio": "p99_ms"}
                yield line(store, name, side, f"{FEW:,} queued", samples[side], ratios)
            yield Line(store, "million-start", side, figures=restarts(many))


def submits_at(bench: Bench, one: Hub, depth: int, seconds: float) -> Window:
    """A window of submits on a queue of that depth; what they added is worked off again."""
    bench.fill(one, depth)
    window = bench.submits(submit, one, seconds)
    bench.drain(one, depth)
    return window


def pulls_at(bench: Bench, one: Hub, depth: int, seconds: float) -> Window:
    """A window of pulls and results on a queue of that depth, with bulks between them that keep it so."""
    bench.fill(one, depth)
    return chain("steady")(bench.load, one, seconds)[1]


def restarts(one: Hub) -> dict[str, float]:
    """Memory after the load; how long (s) a start takes after a proper end and after a kill, memory after that."""
    figures = {"MiB": one.resident_mib()}
    depth = one.depth()
    one.stop()
    figures["start s"] = one.start()
    one.kill()
    figures["start after kill s"] = one.start()
    figures["MiB after start"] = one.resident_mib()
    if (now := one.depth()) != depth:
        raise Failed(f"{depth} jobs were queued before the restarts, {now} after")
    return figures


def slow(bench: Bench, store: str, row: str) -> Iterator[Line]:
    """Submits when each flush takes 2 ms more: many connections must share one flush."""
    environ = {"LD_PRELOAD": str(bench.shim()), "SLOW_FLUSH_MS": str(SLOW_MS)}
    for side, root in bench.sides.items():
        with bench.hub(root, store, **environ) as one:
            bench.submits(submit, one, WARM_SECONDS)
            base = partial(bench.submits, partial(submit, connections=1), one, bench.seconds)
            samples = alternate(base, {side: partial(bench.submits, submit, one, bench.seconds)}, bench.windows)[side]
        lone = [samples[0].before, *(sample.after for sample in samples)]
        if max(window.p50_ms for window in lone) < SLOW_MS:
            raise Failed(f"a submit took less than the {SLOW_MS} ms of one flush: the shim is not in force")
        yield Line(store, "slow-1", side, window=middle(lone))
        yield line(store, row, side, "1 connection", samples)


def client(bench: Bench) -> Iterator[Line]:
    """Our own client on the empty handler against wrk: whether the client is what limits the rows it drives."""
    samples = alternate(bench.empty_window, {"": partial(bench.empty_own, CONNECTIONS)}, bench.windows)[""]
    yield line("-", "client", "", "wrk", samples)


def empties(lines: Sequence[Line]) -> Iterator[Line]:
    """A line with the median of all windows of the empty handler that rows were compared with."""
    windows = {sample.before: None for one in lines if one.against == EMPTY for sample in one.samples}
    windows |= {sample.after: None for one in lines if one.against == EMPTY for sample in one.samples}
    if windows:
        yield Line("-", "empty", window=middle(list(windows)))


Rows = Callable[[Bench, str, str], Iterator[Line]]
ROWS: dict[str, Rows] = {
    **dict.fromkeys((*SUBMITS, *WORKS), against_empty),
    "idle": idle,
    "million": million,
    "slow": slow,
}
