"""The processes that are measured, each pinned to the core of servers: hubs, and the empty handler."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tools.bench.figures import Failed
from tools.bench.requests import Wire

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120
LIMITS = {"SHERATAN_MAX_QUEUE_DEPTH": "100000000", "SHERATAN_MAX_INFLIGHT": "10000000"}
READY = re.compile(r"^data plane +http://127\.0\.0\.1:(\d+)", re.MULTILINE)
PLAIN = "import runpy, sys; sys.modules['uvloop'] = None; runpy.run_module(sys.argv.pop(1), run_name='__main__')"
"""Runs a module in a process that finds no uvloop, as none is there unless somebody installs it."""

PLACES = {"memory": "memory://", "sqlite": "sqlite://{0}/hub.db", "file": "file://{0}/hub"}
"""How the URL of each store is made of a folder."""


def run_module(python: str, module: str, *arguments: str, uvloop: bool) -> list[str]:
    """The command that runs a module on asyncio's own event loop, or on that of uvloop."""
    return [python, *(("-m",) if uvloop else ("-c", PLAIN)), module, *arguments]


def cores() -> tuple[set[int], set[int]]:
    """(the core of servers, the core of load); the same one when there is no second."""
    mine = sorted(os.sched_getaffinity(0))
    return {mine[0]}, {mine[-1]}


@contextmanager
def pinned(to: set[int]) -> Iterator[None]:
    """What is started in here runs there and nowhere else, with all its threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, to)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Server:
    """A process that prints where its data plane listens. It ends with `stop`."""

    def __init__(self, command: list[str], folder: Path, environ: dict[str, str], core: set[int]) -> None:
        self.command, self.folder, self.environ, self.core = command, folder, environ, core
        self.token = environ.get("SHERATAN_HUB_TOKEN", "none")
        self.out = folder / "server.out"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it; the seconds until it listens. Raises `Failed` when it does not."""
        began = time.monotonic()
        with self.out.open("wb") as out, pinned(self.core):
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        while time.monotonic() < began + START_SECONDS:
            if found := READY.search(self.out.read_text(errors="replace")):
                self.port = int(found[1])
                return time.monotonic() - began
            if self.process.poll() is not None:
                break
            time.sleep(0.002)
        said = self.out.read_text(errors="replace").strip() or "nothing"
        self.stop()
        raise Failed(f"the server did not start; it said: {said[-400:]}")

    def stop(self) -> None:
        """End it, gently at first."""
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @property
    def wire(self) -> Wire:
        return Wire(self.port, self.token)

    def proc(self, name: str) -> str:
        assert self.process is not None
        try:
            return Path(f"/proc/{self.process.pid}/{name}").read_text()
        except OSError as error:
            raise Failed(f"the server has ended: {self.out.read_text(errors='replace')[-400:]}") from error

    def cpu_s(self) -> float:
        """CPU seconds of all its threads so far, in steps of 10 ms."""
        fields = self.proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mib(self) -> float:
        found = re.search(r"^VmRSS:\s+(\d+) kB", self.proc("status"), re.MULTILINE)
        assert found
        return int(found[1]) / 1024


class Hub(Server):
    """`serve` of a checkout on a store of its own, with everything switched on that is on by default."""

    def __init__(
        self, root: Path, store: str, folder: Path, core: set[int], *, uvloop: bool = False, **environ: str
    ) -> None:
        self.root = root
        python = root / ".venv/bin/python"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SHERATAN_", "HUB_"))}
        clean |= {
            "PYTHONPATH": f"{root}{os.pathsep}{root / 'stores'}",
            "SHERATAN_HUB_TOKEN": secrets.token_hex(16),
            "SHERATAN_STORE_URL": PLACES[store].format(folder),
            "SHERATAN_DATA_DIR": str(folder),
            "SHERATAN_CONTROL_PORT": "0",
            "SHERATAN_DATA_PORT": "0",
            **LIMITS,
            **environ,
        }
        executable = str(python) if python.exists() else sys.executable
        super().__init__(run_module(executable, "sheratan_hub", "serve", uvloop=uvloop), folder, clean, core)

    def depth(self) -> int:
        """How many jobs wait."""
        return int(self.ask("/metrics?format=json")["queue_depth"])

    def ask(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except (urllib.error.URLError, TimeoutError) as error:
            raise Failed(f"{path}: {error}") from error


def empty_handler(folder: Path, core: set[int], *, uvloop: bool = False) -> Server:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return Server(run_module(sys.executable, "tools.bench.empty", uvloop=uvloop), folder, environ, core)


@contextmanager
def hub(root: Path, store: str, parent: Path, core: set[int], *, uvloop: bool = False, **environ: str) -> Iterator[Hub]:
    """A hub on a new store in a folder below `parent`; both are gone at the end."""
    folder = parent / f"hub-{secrets.token_hex(4)}"
    folder.mkdir()
    one = Hub(root, store, folder, core, uvloop=uvloop, **environ)
    try:
        one.start()
        yield one
    finally:
        one.stop()
        with suppress(OSError):
            shutil.rmtree(folder)
