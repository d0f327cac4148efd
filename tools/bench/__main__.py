"""`python -m tools.bench`: what `make bench` calls."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

from tools.bench import report, tooling
from tools.bench.figures import Failed, Line
from tools.bench.rows import ROWS, SUBMITS, Bench, client, empties
from tools.bench.servers import PLACES, ROOT, cores, empty_handler, pinned
from tools.bench.windows import Load

QUICK_SECONDS = 0.3


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    lines: list[Line] = []
    places = cores()
    machine = {**report.machine(places), "event_loop": "uvloop" if given.uvloop else "asyncio"}
    if places[0] == places[1]:
        say("one core only: servers and load share it, so every ratio is worse than it should be")
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with ExitStack() as stack:
            stack.enter_context(pinned(places[1]))
            for one in run(given, places, stack):
                say(f"{time.monotonic() - began:5.0f} s  {'  '.join(text for text in report.cells(one) if text)}")
                lines.append(one)
    except Failed as error:
        say(f"bench: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    lines += [*empties(lines)]
    print(report.table(lines))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine, "seconds": given.seconds, "windows": given.windows}
    document["lines"] = [one.document() for one in lines]
    given.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {given.json} after {time.monotonic() - began:.0f} s")
    failed = any(one.error for one in lines) or (given.strict and any(one.missed() for one in lines))
    return 1 if failed or not lines else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description="Measures hubs against an empty aiohttp handler, in one run."
    )
    parser.add_argument("--stores", type=names(PLACES), default=["sqlite", "file"], help="of memory,sqlite,file")
    parser.add_argument("--only", type=names(ROWS), default=list(ROWS), help=f"rows, of {','.join(ROWS)}")
    parser.add_argument("--seconds", type=float, help="of one window (2; with --quick 0.3)")
    parser.add_argument("--windows", type=int, help="of each row (3; with --quick 1); the medians are shown")
    parser.add_argument("--million", action=argparse.BooleanOptionalAction, help="the row with a million queued")
    parser.add_argument("--queued", type=int, default=1_000_000, help="how many jobs that row queues")
    parser.add_argument("--quick", action="store_true", help="under a minute: figures that only show that it works")
    parser.add_argument("--against", type=Path, metavar="DIR", help="measure the hub of another checkout beside it")
    parser.add_argument("--uvloop", action="store_true", help="all servers on its event loop, not on asyncio's own")
    parser.add_argument(
        "--dir", type=Path, help="where the stores are made; default: the directory for temporary files"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "var/bench.json", help="file for the figures")
    parser.add_argument("--strict", action="store_true", help="a missed target is a failure")
    given = parser.parse_args(arguments)
    given.seconds = given.seconds or (QUICK_SECONDS if given.quick else 2.0)
    given.windows = given.windows or (1 if given.quick else 3)
    if given.seconds < 0.2 or given.windows < 1:
        parser.error("a window needs 0.2 s, and there must be one")
    if given.million is False or (given.million is None and given.quick):
        given.only = [row for row in given.only if row != "million"]
    return given


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A type for argparse: some of the known names, separated by commas."""

    def read(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        return text.split(",")

    return read


def run(given: argparse.Namespace, places: tuple[set[int], set[int]], stack: ExitStack) -> Iterator[Line]:
    """Every row of every store; a row that fails says so and the others go on."""
    tooling.need("wrk")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sheratan-bench-", dir=given.dir)))
    empty = empty_handler(folder, places[0], uvloop=given.uvloop)
    stack.callback(empty.stop)
    empty.start()
    sides = {"": ROOT} if given.against is None else {"this": ROOT, "other": given.against.resolve()}
    shim = cache(partial(tooling.build_shim, folder))
    load, core = Load(places[1], folder), places[0]
    bench = Bench(folder, load, core, empty, sides, given.seconds, given.windows, given.queued, shim, given.uvloop)
    bench.empty_window()
    if set(given.only) - {*SUBMITS, "slow"}:
        yield from client(bench)
    for store in given.stores:
        for row in given.only:
            try:
                yield from ROWS[row](bench, store, row)
            except Failed as error:
                yield Line(store, row, error=str(error))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
