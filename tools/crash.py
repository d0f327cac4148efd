"""The crash test: a real hub is killed again and again under the load of clients that write down all they are told.

Producers and workers talk to it over HTTP while it is killed with SIGKILL at random moments, also in the middle of its
start-up, and started again on the same store. Then the workers finish all work, and an oracle that knows only
what the clients were told looks for broken promises: `tools/crash_oracle.py`. Exit status 1 if there is any.

What SIGKILL cannot show is whether the disk was synced: the machine goes on and keeps what was written.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.crash_case import Violation
from tools.crash_clients import Fleet, Producer, Watcher, ask_again, read
from tools.crash_history import History
from tools.crash_hub import Hub, HubGone, plan
from tools.crash_oracle import judge
from tools.crash_report import show, tally, write
from tools.crash_worker import Worker
from tools.demo import Processes, Site, console, owned_processes
from tools.ports import free_ports

PRODUCERS, WORKERS = 4, 7
GRACE_SECONDS = 1
DRAIN_SECONDS = 45
ASK_AGAIN = 150
STORES = {"sqlite": "hub.db", "file": "hub"}
HUB_TOML = "[queue]\nloss_delay_ms = 50\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--store", choices=sorted(STORES), default="sqlite", help="what the hub keeps its state in")
    parser.add_argument("--kills", type=int, default=10, help="how often it is killed, at least 3 times")
    parser.add_argument("--seed", type=int, help="what the clients do and when the hub is killed; any if not given")
    parser.add_argument("--dir", type=Path, help="where the hub's data is kept, with nothing in it yet")
    parser.add_argument("--json", type=Path, help="a file for the figures and the violations")
    given = parser.parse_args()
    seed = secrets.randbelow(10**6) if given.seed is None else given.seed
    history = History(grace_seconds=GRACE_SECONDS)
    found: list[Violation] = []
    with workplace(given.dir) as folder:
        try:
            with owned_processes() as processes:
                found += run(make_site(folder, given.store), processes, history, max(3, given.kills), seed)
        except KeyboardInterrupt:
            return 130
        except asyncio.CancelledError:
            return 128 + signal.SIGTERM
        found += judge(history)
        figures = {"store": given.store, "seed": seed, **tally(history, found)}
        show(console, figures, found, history)
        if given.json:
            write(given.json, figures, found, history)
        if found and given.dir is None:
            kept = shutil.copytree(folder, tempfile.mkdtemp(prefix="sheratan-crash-kept-"), dirs_exist_ok=True)
            console.print(f"the hub's folder is kept in {kept}", markup=False)
    return 1 if found else 0


def run(site: Site, processes: Processes, history: History, kills: int, seed: int) -> list[Violation]:
    """Fill the history; what kept the run from its end."""
    found = []
    skew = time.time() - monotonic()
    try:
        asyncio.run(torture(site, processes, history, kills, seed))
    except* HubGone as gone:
        said = (site.folder / "hub.out").read_text()[-3000:]
        found.append(Violation("the hub has gone", f"{gone.exceptions[0]}; it said:\n{said}"))
    except* TimeoutError:
        found.append(Violation("no end", "the run took too long"))
    history.tolerance += abs(time.time() - monotonic() - skew)
    return found


async def torture(site: Site, processes: Processes, history: History, kills: int, seed: int) -> None:
    """The whole run; SIGTERM cancels it. Raises `HubGone`, or TimeoutError when it takes far longer than it should."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _this_task().cancel)
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {site.environ['SHERATAN_HUB_TOKEN']}"}
    async with asyncio.timeout(60 + 6 * kills), aiohttp.ClientSession(connector=connector, headers=headers) as session:
        fleet = Fleet(session, site.environ["HUB_DATA_URL"], history, seed)
        hub = Hub(site, processes, fleet)
        await hub.start()
        async with asyncio.TaskGroup() as tasks:
            gauge = tasks.create_task(watch_backlog(fleet))
            producers = [tasks.create_task(Producer(fleet, f"producer-{n}").run()) for n in range(PRODUCERS)]
            for number in range(WORKERS):
                tasks.create_task(Worker(fleet, f"worker-{number}").run())
            tasks.create_task(Watcher(fleet, "watcher").run())
            for kill in plan(Random(seed), kills - 2):
                await hub.live(kill)
                await hub.restart()
            await hub.ready()
            await asyncio.sleep(0.5)
            await hub.restart(alone=True)
            await hub.read(drained=False)
            fleet.submitting, fleet.calm = False, True
            fleet.open.set()
            await asyncio.wait(producers)
            await drain(fleet)
            fleet.over = True
            gauge.cancel()
        await ask_again(fleet, ASK_AGAIN)
        await hub.read(drained=True)
        await hub.restart(alone=True)
        await hub.read(drained=True)
    await hub.stop()


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def watch_backlog(fleet: Fleet) -> None:
    """Keep the fleet's `backlog` up to date."""
    while True:
        with suppress(aiohttp.ClientError, TimeoutError, ConnectionError):
            metrics = await read(fleet, "/metrics?format=json")
            fleet.backlog = metrics["queue_depth"] + metrics["inflight_jobs"]
        await asyncio.sleep(0.1)


async def drain(fleet: Fleet) -> None:
    """Wait until no work is left, or for so long that there never will be."""
    until = monotonic() + DRAIN_SECONDS
    fleet.backlog = 1
    while fleet.backlog and monotonic() < until:
        await asyncio.sleep(0.05)


def make_site(folder: Path, scheme: str) -> Site:
    """A hub of its own: short leases, and jobs that no number of lost leases parks."""
    control, data = map(str, free_ports())
    (folder / "hub.toml").write_text(HUB_TOML)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SHERATAN_", "HUB_"))}
    environ |= {
        "HUB_DATA_URL": f"http://127.0.0.1:{data}",
        "SHERATAN_HUB_TOKEN": secrets.token_hex(16),
        "SHERATAN_STORE_URL": f"{scheme}://{folder / STORES[scheme]}",
        "SHERATAN_DATA_DIR": str(folder / "var"),
        "SHERATAN_MAX_QUEUE_DEPTH": "100000",
        "SHERATAN_MAX_INFLIGHT": "1000",
        "SHERATAN_MAX_LOSSES": str(History().max_losses),
        "SHERATAN_LEASE_TIMEOUT": "2",
        "SHERATAN_RESTART_GRACE_SEC": str(GRACE_SECONDS),
        "SHERATAN_RETRY_BACKOFF_BASE_MS": "100",
        "SHERATAN_RETRY_BACKOFF_CAP_MS": "400",
    }
    return Site(folder, environ, (control, data))


@contextmanager
def workplace(given: Path | None) -> Iterator[Path]:
    """The directory that was asked for, or one that is removed at the end."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="sheratan-crash-") as folder:
        yield Path(folder)


if __name__ == "__main__":
    sys.exit(main())
