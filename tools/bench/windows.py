"""Windows of load: starts wrk or our own client on the core of load, and makes a window of what it prints."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from tools.bench.client import Order, Report
from tools.bench.figures import Failed, Window
from tools.bench.servers import ROOT, Server, pinned

SCRIPT = Path(__file__).with_name("wrk.lua")
CONNECTIONS = 64
ANSWER_SECONDS = 10
LATE_SECONDS = 30


class Load:
    """Where load comes from: a core of its own, and a folder for what wrk sends."""

    def __init__(self, core: set[int], folder: Path) -> None:
        self.core, self.folder = core, folder

    def wrk(
        self, server: Server, requests: list[bytes], seconds: float, connections: int = CONNECTIONS, each: int = 1
    ) -> tuple[int, Window]:
        """(jobs done, the window) of wrk's; `each` is how many jobs a request has. Raises `Failed` on any error."""
        file = self.folder / "requests"
        file.write_bytes(b"\0".join(requests))
        url = f"http://127.0.0.1:{server.port}/"
        command = ["wrk", "-t1", f"-c{connections}", f"-d{int(seconds) + LATE_SECONDS}s"]
        command += [f"--timeout={ANSWER_SECONDS}s", "-s", str(SCRIPT), url, "--", str(file)]
        spent = children_cpu_s()
        told, cpu_s = self.timed(server, command, seconds)
        busy = (children_cpu_s() - spent) / told["seconds"]
        wrong = {name: told[name] for name in ("bad_status", "connect", "read", "write", "timeout") if told[name]}
        if wrong or not told["requests"]:
            raise Failed(f"of {told['requests']} requests of wrk some went wrong: {wrong}")
        jobs = told["requests"] * each
        return jobs, Window(jobs / told["seconds"], told["p50_ms"], told["p99_ms"], cpu_s / jobs * 10_000, busy)

    def own(
        self, server: Server, chain: str, seconds: float, connections: int = CONNECTIONS, jobs: int = 0
    ) -> tuple[int, Window]:
        """The same by our own client: for so many seconds, or until so many jobs are done."""
        order = Order(server.port, server.token, chain, connections, seconds, jobs)
        command = [sys.executable, "-m", "tools.bench.client", msgspec.json.encode(order).decode()]
        told, cpu_s = self.timed(server, command)
        report = msgspec.convert(told, Report)
        if report.error:
            raise Failed(report.error)
        if not report.jobs or (report.dry and report.seconds < min(0.2, seconds / 2)):
            raise Failed(f"the queue ran dry after {report.jobs} jobs, too soon to count")
        rate = report.jobs / report.seconds
        return report.jobs, Window(rate, report.p50_ms, report.p99_ms, cpu_s / report.jobs * 10_000, report.busy)

    def timed(self, server: Server, command: list[str], seconds: float | None = None) -> tuple[dict[str, Any], float]:
        """(what it prints as JSON in its last line, CPU seconds of the server meanwhile); SIGINT after `seconds`."""
        before = server.cpu_s()
        with pinned(self.core):
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        try:
            if seconds is not None:
                time.sleep(seconds)
                process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=600)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        cpu_s = server.cpu_s() - before
        lines = [line for line in out.splitlines() if line.startswith(b"{")]
        if process.returncode or not lines:
            raise Failed(f"{command[0]} ended with {process.returncode}: {(err or out).decode()[-400:]}")
        told: dict[str, Any] = json.loads(lines[-1])
        return told, cpu_s


def children_cpu_s() -> float:
    """CPU seconds of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
