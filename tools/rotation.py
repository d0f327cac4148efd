"""Turns the token of a live fleet and counts who was refused: `make rotation`, or `--store file`.

A hub, workers with a `token_file` each, producers that never stop and never try twice. The commands are those of the
how-to "Rotate the token". After the window the old token must be refused, and until then nobody: by the hub's own
audit log and by what the clients were answered. Exit status 1 when anybody was, or a job was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import demo, demo_worker
from tools.demo import Processes, Site, console

WORKERS = PRODUCERS = 3
WINDOW_SECONDS = 10.0
AFTER_SECONDS = 1.0
COMMANDS_IN_WINDOW = 6
PAUSE_SECONDS = 0.02
NEARLY_SECONDS = 0.1
NODE_TTL_SECONDS = 6
GIVE_UP_SECONDS = 90
FILE = str(Path(demo_worker.__file__ or "").resolve())


class Told(NamedTuple):
    """One answer to a producer: when it came (s since 1970), its status and code."""

    at: float
    status: int
    code: str


class Counted(NamedTuple):
    """What is known at the end. `kept`: the statuses of the old token up to the end, `probes`: the answers to it after
    that. `locked_out`: who would have been, by `tokens status`, at the beginning and when all had the new token.
    `missed`: how often a node fell silent before the hub's restart at the end."""

    told: list[Told]
    jobs: list[dict[str, Any]]
    audit: Counter[str]
    kept: list[int]
    probes: list[tuple[int, str]]
    said: str
    locked_out: tuple[list[str], list[str]]
    missed: int


class Fleet:
    """The token files of everybody who has one, and the producers."""

    def __init__(self, site: Site, session: aiohttp.ClientSession) -> None:
        self.site, self.session = site, session
        self.old = site.environ["SHERATAN_HUB_TOKEN"]
        self.files = [site.folder / f"{name}-{n}.token" for name in ("worker", "producer") for n in range(1, 4)]
        for path in self.files:
            path.write_text(self.old)
        self.told: list[Told] = []
        self.job_ids: list[str] = []
        self.stop = asyncio.Event()

    def give(self, path: Path, token: str) -> None:
        """Put the token into somebody's file, as an operator does: by a rename."""
        draft = path.with_suffix(".new")
        draft.write_text(token)
        draft.replace(path)

    async def ask(self, token: str, method: str, url: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        headers = {"Authorization": f"Bearer {token}"}
        async with self.session.request(method, url, json=body, headers=headers) as answer:
            return answer.status, await answer.json(content_type=None)

    async def produce(self, path: Path) -> None:
        """Submit with whatever the file holds; each answer is written down, nothing is tried again."""
        url = self.site.environ["HUB_DATA_URL"] + "/api/jobs"
        while not self.stop.is_set():
            status, told = await self.ask(
                path.read_text(), "POST", url, {"kind": "text.stats", "params": {"path": FILE}}
            )
            self.told.append(Told(time.time(), status, told.get("code", "")))
            if status == 201:
                self.job_ids.append(told["job_id"])
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), PAUSE_SECONDS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", choices=["sqlite", "file"], default="sqlite", help="what the hub keeps its state in")
    parser.add_argument("--window", type=float, default=WINDOW_SECONDS, help="seconds in which both tokens are good")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="sheratan-rotation-") as folder, demo.owned_processes() as processes:
        site = demo.make_site(Path(folder), given.store)
        site.environ["SHERATAN_NODE_TTL_SEC"] = str(NODE_TTL_SECONDS)
        try:
            return verdict(asyncio.run(rotation(site, processes, given.window)))
        except KeyboardInterrupt:
            return 130
        except (TimeoutError, aiohttp.ClientError, RuntimeError) as error:
            console.print(f"[red]failed:[/red] {error or f'not done after {GIVE_UP_SECONDS} s'}")
            for out in sorted(Path(folder).glob("*.out")):
                console.print(f"--- {out.name}\n{out.read_text()[-2000:]}", markup=False)
            return 1


async def rotation(site: Site, processes: Processes, window: float) -> Counted:
    """A fleet at work, its token turned, everything counted."""
    async with asyncio.timeout(GIVE_UP_SECONDS + window), aiohttp.ClientSession() as session:
        fleet = Fleet(site, session)
        hub = demo.start_hub(site, processes)
        await ready(fleet)
        for n in range(WORKERS):
            start_worker(site, processes, fleet.files[n])
        producing = [asyncio.create_task(fleet.produce(path)) for path in fleet.files[WORKERS:]]
        await at_work(fleet)
        new, until, before = await begin(fleet, window)
        await hand_out(fleet, new, until)
        after = (await command(fleet, new, "tokens", "status"))["locked_out"]
        kept = [status async for status in old_until(fleet, until - NEARLY_SECONDS)]
        await asyncio.sleep(max(0.0, until - time.time()) + NEARLY_SECONDS)
        probes = [await probe(fleet) for _ in range(3)]
        await asyncio.sleep(AFTER_SECONDS)
        fleet.stop.set()
        await asyncio.gather(*producing)
        jobs = [await ended(fleet, new, job_id) for job_id in fleet.job_ids]
        missed = audited(site)["NODE_STALE"]  # before the restart, in which nobody is heard
        hub.terminate()
        await asyncio.to_thread(hub.wait)
        site.environ["SHERATAN_HUB_TOKEN"] = new
        demo.start_hub(site, processes)
        await ready(fleet)
        probes.append(await probe(fleet))
        demo.end(processes)
        await command(fleet, new, "audit", "verify", str(site.folder / "logs"), json_out=False)
    said = "".join((site.folder / f"{path.stem}.out").read_text() for path in fleet.files[:WORKERS])
    return Counted(fleet.told, jobs, audited(site), kept, probes, said, (before, after), missed)


def start_worker(site: Site, processes: Processes, path: Path) -> None:
    module = ("worker", FILE, "--node-id", path.stem, "--concurrency", "2", "--wait", "2")
    demo.start(site, processes, path.stem, "--token-file", str(path), *module)


async def ready(fleet: Fleet) -> None:
    url = fleet.site.environ["HUB_CONTROL_URL"] + "/readyz"
    while True:
        with suppress(aiohttp.ClientConnectionError):
            if (await fleet.ask("", "GET", url))[0] == 200:
                return
        await asyncio.sleep(0.05)


async def at_work(fleet: Fleet) -> None:
    """Every node has a heartbeat on record, and jobs are being done."""
    control, data = fleet.site.environ["HUB_CONTROL_URL"], fleet.site.environ["HUB_DATA_URL"]
    while True:
        nodes = (await fleet.ask(fleet.old, "GET", f"{control}/api/registry"))[1]["nodes"]
        done = (await fleet.ask(fleet.old, "GET", f"{data}/api/jobs?status=completed&limit=1"))[1]["jobs"]
        if len(nodes) == WORKERS and done:
            return
        await asyncio.sleep(0.05)


async def begin(fleet: Fleet, window: float) -> tuple[str, float, list[str]]:
    """Begin the rotation: the new token, when it ends (s since 1970), and who would be locked out if that were now.

    On a machine that is so busy that a command takes long the window is longer.
    """
    path = fleet.site.folder / "new-token"
    started = time.monotonic()
    await command(fleet, fleet.old, "tokens", "status")
    window = max(window, COMMANDS_IN_WINDOW * (time.monotonic() - started))
    begun = await command(fleet, fleet.old, "tokens", "rotate", "--until", f"{window:g}s", "--to", str(path))
    until = datetime.fromisoformat(begun["until"]).timestamp()
    state = await command(fleet, fleet.old, "tokens", "status")
    if begun["until"] != state["until"] or len(state["locked_out"]) != WORKERS:
        raise RuntimeError(f"the rotation did not begin as it should: {state}")
    return path.read_text().strip(), until, state["locked_out"]


async def hand_out(fleet: Fleet, new: str, until: float) -> None:
    """Give everybody the new token, one after the other over the first half of the window; wait until all use it."""
    step = max(0.0, until - time.time()) / 2 / len(fleet.files)
    for path in fleet.files:
        fleet.give(path, new)
        await asyncio.sleep(step)
    url = fleet.site.environ["HUB_CONTROL_URL"] + "/api/tokens"
    while (await fleet.ask(new, "GET", url))[1]["locked_out"]:
        if time.time() > until:
            raise RuntimeError("not every node went over within the window; give it longer with --window")
        await asyncio.sleep(0.05)


async def old_until(fleet: Fleet, until: float) -> AsyncIterator[int]:
    """What somebody is answered who stays with the old token until then."""
    while time.time() < until:
        yield (await probe(fleet))[0]
        await asyncio.sleep(PAUSE_SECONDS)


async def probe(fleet: Fleet) -> tuple[int, str]:
    """Show the old token: (status, code)."""
    status, told = await fleet.ask(fleet.old, "GET", fleet.site.environ["HUB_CONTROL_URL"] + "/api/hosts")
    return status, told.get("code", "")


async def ended(fleet: Fleet, token: str, job_id: str) -> dict[str, Any]:
    url = f"{fleet.site.environ['HUB_DATA_URL']}/api/jobs/{job_id}?wait_seconds=30"
    return (await fleet.ask(token, "GET", url))[1]


async def command(fleet: Fleet, token: str, *arguments: str, json_out: bool = True) -> Any:
    """What `sheratan-hub ARGUMENTS` prints as JSON; it is shown as it is typed. Raises RuntimeError if it fails."""
    console.print(f"$ sheratan-hub {' '.join(arguments)}", markup=False, soft_wrap=True)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sheratan_hub", *arguments, *(("-o", "json") if json_out else ())),
        env={**fleet.site.environ, "SHERATAN_HUB_TOKEN": token},
        cwd=fleet.site.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"sheratan-hub {' '.join(arguments)}: {err.decode().strip()}")
    return json.loads(out) if json_out else None


def audited(site: Site) -> Counter[str]:
    """How often each event stands in the audit log; a folded line counts for all it stands for."""
    counts: Counter[str] = Counter()
    for line in (site.folder / "logs" / "hub_security_audit.jsonl").read_text().splitlines():
        one = json.loads(line)
        counts[one["event"]] += one.get("count", 1)
    return counts


def verdict(seen: Counted) -> int:
    """Show what was counted; 0 if nobody was refused who should not have been, and nothing was lost."""
    refused = [one for one in seen.told if one.status >= 400]
    unfinished = [job for job in seen.jobs if (job["status"], job["losses"], job["failures"]) != ("completed", 0, 0)]
    failures = seen.audit["AUTH_FAILURE"] - len(seen.probes)
    wrong = [
        text
        for bad, text in (
            (bool(refused), f"{len(refused)} requests of producers were refused: {refused[:3]}"),
            (failures != 0, f"the audit log has {failures} refusals beside the probes"),
            (set(seen.kept) != {200}, f"in the window the old token was answered {set(seen.kept)}"),
            (set(seen.probes) != {(403, "old_token")}, f"the old token was answered {seen.probes}"),
            (seen.audit["TOKEN_RETIRED"] != len(seen.probes), "the audit log does not tell of each use of the old one"),
            (seen.audit["TOKEN_ROTATION_FINALIZED"] != 1, "the end of the rotation was not told once"),
            (not seen.audit["TOKEN_ACCEPTED_OLD"] or not seen.audit["TOKEN_ACCEPTED_NEXT"], "one token was never used"),
            (bool(seen.missed), "a node missed its heartbeats"),
            ("AUTH_FAIL" in seen.said, "a worker was refused"),
            (len(seen.locked_out[0]) != WORKERS or bool(seen.locked_out[1]), f"locked out: {seen.locked_out}"),
            (bool(unfinished), f"{len(unfinished)} jobs were lost or had to be tried again"),
            (not seen.jobs, "no job was done"),
        )
        if bad
    ]
    events = {name: seen.audit[name] for name in ("TOKEN_ACCEPTED_OLD", "TOKEN_ACCEPTED_NEXT", "TOKEN_RETIRED")}
    console.print(f"{len(seen.told)} requests of {PRODUCERS} producers, {len(refused)} refused")
    console.print(f"{len(seen.jobs)} jobs by {WORKERS} workers, {len(unfinished)} lost or tried again")
    console.print(f"audit log: {', '.join(f'{n} {name}' for name, n in events.items())}")
    for text in wrong:
        console.print(f"[red]{text}[/red]")
    if not wrong:
        console.print("[green]the token was turned; nobody was refused, and the old one is now[/green]")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
