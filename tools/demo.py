"""The demo: a hub, two workers, two jobs for every file of Python's standard library; the hub is killed halfway.

With `--move` it is then stopped, backed up, restored, and copied to the other kind of store, where it goes on. With
`--stay` hub and workers stay when all is done, to be looked at. Beside the jobs a mission, a graph of jobs in three
stages, begins before the kill and ends after it. At the end every result is compared with one computed here. Exit
status 1 when any is lost or wrong, or ran out of order. Everything that was started is ended, whatever happens.
Longer than 300 lines so that it can be read from top to bottom.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sheratan_hub.answers_admin import Mission
from sheratan_hub.client import HubClient, HubUnreachable, Job, Refusal
from tools import demo_worker
from tools.ports import free_ports

KINDS: dict[str, Callable[[dict[str, str]], Any]] = {"text.stats": demo_worker.stats, "text.words": demo_worker.words}
FOREIGN = {"site-packages", "dist-packages"}
WORKERS = 2
LOOK_SECONDS = 0.2
GIVE_UP_SECONDS = 110
MISSION = "stdlib"
STAGES = (4, 2, 1)
"""How many jobs each stage of the graph has; each of them depends on two of the stage before."""

console = Console(highlight=False)
Processes = list[subprocess.Popen[bytes]]
Show = Callable[[int], None]


class Site(NamedTuple):
    """Where the demo's hub lives, and what its processes find in their environment."""

    folder: Path
    environ: dict[str, str]
    ports: tuple[str, str]
    moves: bool = False


class Seen(NamedTuple):
    """Every job at the end, the seconds from the first submit to the last result, those without a hub, how many of
    the jobs that were handed in a second time became new ones, and how the graph ended."""

    jobs: list[Job]
    seconds: float
    away_seconds: float
    doubled: int
    graph: Graph | None = None


class Graph(NamedTuple):
    """The mission that is a graph: at the kill, at the end, its jobs in the order of their stages, and whether handing
    it in again gave the same one."""

    at_kill: Mission
    mission: Mission
    jobs: list[Job]
    known: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", choices=["sqlite", "file"], default="sqlite", help="what the hub keeps its state in")
    parser.add_argument("--move", action="store_true", help="move the hub to the other kind of store on the way")
    parser.add_argument("--stay", action="store_true", help="leave hub and workers running at the end, until Ctrl-C")
    parser.add_argument("--files", type=int, help="only so many of the files")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    bodies = [body(kind, path) for path in islice(stdlib_files(), given.files) for kind in KINDS]
    root = sysconfig.get_path("stdlib")
    what = f"{len(bodies)} jobs: {' and '.join(KINDS)} for every .py file of {root}"
    console.print(f"{what}; and a mission in {len(STAGES)} stages", soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="sheratan-demo-") as folder, owned_processes() as processes:
        site = make_site(Path(folder), given.store, given.move)
        try:
            status = verdict(bodies, asyncio.run(demo(site, bodies, processes)))
            if given.stay:
                show_ways(site)
                signal.pause()
            return status
        except KeyboardInterrupt:
            return 130
        except (TimeoutError, HubUnreachable, RuntimeError) as error:
            console.print(f"[red]failed:[/red] {error or f'not done after {GIVE_UP_SECONDS} s'}")
            for out in sorted(Path(folder).glob("*.out")):
                console.print(f"--- {out.name}\n{out.read_text()[-2000:]}", markup=False)
            return 1


def stdlib_files() -> Iterator[str]:
    """Every .py file of the running Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    return (str(path) for path in sorted(root.rglob("*.py")) if not FOREIGN & set(path.parts))


def body(kind: str, path: str) -> dict[str, Any]:
    """A job as it is submitted; its key makes it one job however often that happens."""
    return {"kind": kind, "params": {"path": path}, "idempotency_key": f"{kind} {path}", "mission_id": MISSION}


async def demo(site: Site, bodies: list[dict[str, Any]], processes: Processes) -> Seen:
    control_url, data_url, token = (
        site.environ[name] for name in ("HUB_CONTROL_URL", "HUB_DATA_URL", "SHERATAN_HUB_TOKEN")
    )
    start_hub(site, processes)
    async with asyncio.timeout(GIVE_UP_SECONDS), HubClient(control_url, data_url, token) as client:
        await client.health()
        start_workers(site, processes)
        with progress(len(bodies) + sum(STAGES)) as show:
            began = time.monotonic()
            graph = graph_of([one["params"]["path"] for one in bodies])
            mission = await client.submit_mission("in stages", graph, idempotency_key="graph")
            total = len(bodies) + len(graph)
            await submit(client, bodies)
            await until_done(client, total, total // 2, show)
            at_kill = await client.mission(mission.mission_id)
            away_seconds = await kill_and_restart(site, client, processes)
            again = bodies[:500]
            known = await submit(client, again)
            same = await client.submit_mission("in stages", graph, idempotency_key="graph")
            if site.moves:
                await until_done(client, total, total * 3 // 4, show)
                away_seconds += await move(site, client, processes)
            await until_done(client, total, total, show)
            seconds = time.monotonic() - began
        jobs = [job async for job in client.jobs(mission_id=MISSION, page=1000)]
        staged = [await client.job(one.job_id) for one in mission.jobs]
        ended = Graph(at_kill, await client.mission(mission.mission_id), staged, same.mission_id == mission.mission_id)
    return Seen(jobs, seconds, away_seconds, len(again) - known, ended)


def graph_of(paths: list[str]) -> list[dict[str, Any]]:
    """The jobs of the graph. The first stage goes before all others, the next ones after them: so they see the kill."""
    jobs: list[dict[str, Any]] = []
    for stage, size in enumerate(STAGES):
        for place in range(size):
            after = [f"{stage - 1}.{2 * place + one}" for one in (0, 1)] if stage else []
            path = paths[len(jobs) % len(paths)]
            priority = "LOW" if stage else "CRITICAL"
            job = {"kind": "text.stats", "params": {"path": path}, "depends_on": after, "priority": priority}
            jobs.append({**job, "ref": f"{stage}.{place}", "task_id": f"{stage}.{place}"})
    return jobs


async def submit(client: HubClient, bodies: list[dict[str, Any]]) -> int:
    """Hand in the jobs; how many of them the hub knew already."""
    outcomes = await client.submit_many(bodies)
    refused = [outcome for outcome in outcomes if isinstance(outcome, Refusal)]
    if refused:
        raise RuntimeError(f"{len(refused)} jobs were refused, the first: {refused[0]}")
    return sum(outcome.dedup for outcome in outcomes if not isinstance(outcome, Refusal))


async def until_done(client: HubClient, total: int, goal: int, show: Show) -> None:
    """Wait until `goal` jobs are neither waiting nor running."""
    while True:
        metrics = await client.metrics("data")
        done = total - metrics["queue_depth"] - metrics["inflight_jobs"]
        show(done)
        if done >= goal:
            return
        await asyncio.sleep(LOOK_SECONDS)


async def kill_and_restart(site: Site, client: HubClient, processes: Processes) -> float:
    """Kill the hub with SIGKILL, start another on the same ports and store; how long (s) there was none."""
    gone = await end_hub(processes, signal.SIGKILL)
    start_hub(site, processes)
    await client.health()
    away_seconds = time.monotonic() - gone
    console.print(f"[yellow]the hub was killed (SIGKILL) and is back after {away_seconds:.1f} s[/yellow]")
    return away_seconds


async def end_hub(processes: Processes, number: signal.Signals) -> float:
    """End the hub that was started last; when it was gone, by the monotonic clock (s)."""
    hub = [process for process in processes if "'serve'" in str(process.args)][-1]
    hub.send_signal(number)
    await asyncio.to_thread(hub.wait)
    return time.monotonic()


async def move(site: Site, client: HubClient, processes: Processes) -> float:
    """Back the hub up while it runs; then stop it, restore what it had, copy that to the other kind of store, go on
    there; how long (s) there was none."""
    old, folder = site.environ["SHERATAN_STORE_URL"], site.folder
    scheme = old.partition("://")[0]
    other = "file" if scheme == "sqlite" else "sqlite"
    restored, new = f"{scheme}://{folder}/restored", f"{other}://{folder}/moved"
    await store_command(site, "backup", f"{folder}/beside")
    gone = await end_hub(processes, signal.SIGTERM)
    await store_command(site, "backup", f"{folder}/backup")
    await store_command(site, "restore", f"{folder}/backup", "--to", restored)
    await store_command(site, "copy", restored, new)
    site.environ["SHERATAN_STORE_URL"] = new
    start_hub(site, processes)
    await client.health()
    away_seconds = time.monotonic() - gone
    console.print(f"[yellow]the hub was moved from {scheme} to {other} and is back after {away_seconds:.1f} s[/yellow]")
    return away_seconds


async def store_command(site: Site, *arguments: str) -> None:
    """Run `sheratan-hub store ...` as its operator would; what it says is shown. RuntimeError if it fails."""
    command = [sys.executable, "-m", "sheratan_hub", "store", *arguments]
    run = partial(subprocess.run, env=site.environ, cwd=site.folder, capture_output=True, text=True, check=False)
    done = await asyncio.to_thread(run, command)
    console.print(f"sheratan-hub store {' '.join(arguments)}", style="bold", soft_wrap=True)
    console.print((done.stdout + done.stderr).strip(), soft_wrap=True, markup=False)
    if done.returncode:
        raise RuntimeError(f"store {arguments[0]} ended with {done.returncode}")


def verdict(bodies: list[dict[str, Any]], seen: Seen) -> int:
    """Compare every result with one computed here, show what happened; the exit status."""
    found: dict[str, list[Job]] = {}
    for job in seen.jobs:
        found.setdefault(f"{job.kind} {job.params['path']}", []).append(job)
    with ProcessPoolExecutor() as pool:
        expected = list(pool.map(expect, bodies, chunksize=50))
    wrong = lost = 0
    for one, result in zip(bodies, expected, strict=True):
        jobs = found.get(one["idempotency_key"], [])
        lost += not any(job.status == "completed" for job in jobs)
        wrong += any(job.status == "completed" and job.result != result for job in jobs)
    doubled = len(seen.jobs) - len(found) + seen.doubled
    show_counts(seen, lost, wrong, doubled)
    show_slowest(seen.jobs)
    good = not lost and not wrong and not doubled
    console.print("[green]every result is right[/green]" if good else "[red]results are lost, wrong or doubled[/red]")
    in_order = seen.graph is None or graph_is_right(seen.graph)
    return 0 if good and in_order else 1


def graph_is_right(graph: Graph) -> bool:
    """Whether each job of the graph has its result, and none began before what it depends on had ended; shows it."""
    before, after = (round(one.progress * one.jobs) for one in (graph.at_kill, graph.mission))
    console.print(
        f"mission of {graph.mission.jobs} jobs in {len(STAGES)} stages: {before} done before the kill, {after} now"
    )
    asked = graph_of([job.params["path"] for job in graph.jobs])
    ran = {one["ref"]: job for one, job in zip(asked, graph.jobs, strict=True)}
    right = all(
        job.status == "completed" and job.result == expect(one) for one, job in zip(asked, ran.values(), strict=True)
    )
    ordered = all(
        (ran[name].finished_at or "") <= (ran[one["ref"]].started_at or "")
        for one in asked
        for name in one["depends_on"]
    )
    good = right and ordered and graph.known and graph.mission.status == "completed"
    console.print("[green]its stages ran in order[/green]" if good else "[red]it went wrong[/red]")
    return good


def expect(one: dict[str, Any]) -> Any:
    """What a job's result must be, as it comes out of JSON."""
    result = KINDS[one["kind"]](one["params"])
    return [list(pair) for pair in result] if isinstance(result, list) else result


def show_counts(seen: Seen, lost: int, wrong: int, doubled: int) -> None:
    jobs = seen.jobs
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("jobs", len(jobs)),
        ("completed", sum(job.status == "completed" for job in jobs)),
        ("deliveries", sum(job.attempt for job in jobs)),
        ("jobs delivered again", sum(job.attempt > 1 for job in jobs)),
        ("leases lost", sum(job.losses for job in jobs)),
        ("lost", lost),
        ("wrong", wrong),
        ("doubled", doubled),
        ("seconds", f"{seen.seconds:.1f}"),
        ("of them without a hub", f"{seen.away_seconds:.1f}"),
        ("jobs a second", f"{len(jobs) / seen.seconds:.0f}"),
    ):
        table.add_row(name, str(value))
    console.print(table)


def show_slowest(jobs: list[Job]) -> None:
    root = sysconfig.get_path("stdlib")
    table = Table(box=None, pad_edge=False)
    table.add_column("slowest")
    table.add_column("kind")
    table.add_column("ms", justify="right")
    for job in sorted(jobs, key=took_ms, reverse=True)[:5]:
        table.add_row(os.path.relpath(job.params["path"], root), job.kind, f"{took_ms(job):.0f}")
    console.print(table)


def took_ms(job: Job) -> float:
    """From the last delivery to the end."""
    if job.started_at is None or job.finished_at is None:
        return 0.0
    return (datetime.fromisoformat(job.finished_at) - datetime.fromisoformat(job.started_at)).total_seconds() * 1000


@contextmanager
def progress(total: int) -> Iterator[Show]:
    """A function that is told how many are done: a bar on a terminal, else a line for each tenth."""
    if not console.is_terminal:
        told = 0

        def tell(done: int) -> None:
            nonlocal told
            if done * 10 // total > told:
                told = done * 10 // total
                console.print(f"{done} of {total} done")

        yield tell
        return
    columns = TextColumn("jobs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("jobs", total=total)
        yield lambda done: bar.update(task, completed=done)


def show_ways(site: Site) -> None:
    """How to look at the hub that stays."""
    token = site.folder / "token"
    token.write_text(site.environ["SHERATAN_HUB_TOKEN"])
    control, data = site.environ["HUB_CONTROL_URL"], site.environ["HUB_DATA_URL"]
    to = f"--token-file {token} --control-url {control} --data-url {data}"
    console.print("the hub stays until Ctrl-C; look at it from another terminal:")
    for command in ("top", "nodes list", "smoke", f"diagnose --explain --data-dir {site.folder}"):
        console.print(f"  sheratan-hub {to} {command}", soft_wrap=True, markup=False)


def make_site(folder: Path, scheme: str, moves: bool = False) -> Site:
    control, data = map(str, free_ports())
    ports = control, data
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SHERATAN_", "HUB_"))}
    environ |= {
        "HUB_CONTROL_URL": f"http://127.0.0.1:{ports[0]}",
        "HUB_DATA_URL": f"http://127.0.0.1:{ports[1]}",
        "SHERATAN_HUB_TOKEN": secrets.token_hex(16),
        "SHERATAN_STORE_URL": f"{scheme}://{folder / 'hub.db'}",
        "SHERATAN_DATA_DIR": str(folder),
        "SHERATAN_MAX_QUEUE_DEPTH": "100000",
        "SHERATAN_LEASE_TIMEOUT": "10",
        "SHERATAN_RESTART_GRACE_SEC": "3",
    }
    return Site(folder, environ, ports, moves)


@contextmanager
def owned_processes() -> Iterator[Processes]:
    """A list of processes that are ended, and waited for, at the end."""
    processes: Processes = []
    try:
        yield processes
    finally:
        for command in ("'worker'", "'serve'"):  # the workers first, they have something to tell the hub
            end([process for process in processes if command in str(process.args)])


def end(processes: Processes) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def start_hub(site: Site, processes: Processes) -> subprocess.Popen[bytes]:
    return start(site, processes, "hub", "serve", "--control-port", site.ports[0], "--data-port", site.ports[1])


def start_workers(site: Site, processes: Processes) -> None:
    module = str(Path(__file__).resolve().with_name("demo_worker.py"))
    for number in range(1, WORKERS + 1):
        name = f"worker-{number}"
        start(site, processes, name, "worker", module, "--node-id", name, "--concurrency", "2")


def start(site: Site, processes: Processes, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A `sheratan-hub` of this Python, its output in a file, out of reach of the terminal's Ctrl-C."""
    with (site.folder / f"{name}.out").open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "sheratan_hub", *arguments],
            env=site.environ,
            cwd=site.folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    processes.append(process)
    return process


if __name__ == "__main__":
    sys.exit(main())
