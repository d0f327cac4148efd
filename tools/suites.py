"""Runs the test suites one after the other and holds each to its budget of seconds: what `make test` calls.

All that they leave behind, and all that they and their processes say, is then searched for the secrets of their hubs.
Options of pytest may follow. A suite that has not ended after twice its budget is killed with all it started.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from threading import Timer
from time import monotonic as now
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import canaries, prometheus

BUDGETS = {"rules": 60, "stores": 100, "hub": 110, "model": 210, "web": 450, "world": 80, "e2e": 360}
"""Seconds a suite may take on two cores: about three times what it takes on a machine that does nothing else."""

AT_ONCE = 2
"""How many tests of a suite run at once, each in a process of its own."""

TOOLS = {
    **{"curl": "curl", "gcc": "gcc", "node": "nodejs", "openssl": "openssl", "strace": "strace", "wrk": "wrk"},
    "systemd-analyze": "systemd",
}
"""Programs that some tests run, and the packages of Debian that bring them."""

NO_TESTS = 5
COUNTS = re.compile(r"(\d+) (passed|failed|errors?)")


def run(suite: str, kept: Path) -> tuple[int, int, float, str]:
    """(passed, failed, seconds, what went wrong with the suite as a whole); files and outputs go below `kept`."""
    began = now()
    said = kept / f"{suite}-said"
    said.mkdir()
    workers = ["-p", "xdist", "-n", str(AT_ONCE), "--dist", "worksteal"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *workers,
        f"tests/{suite}",
        f"--basetemp={kept / suite}",
        *sys.argv[1:],
    ]
    with (
        (said / "pytest.out").open("w") as out,
        subprocess.Popen(
            command,
            env=environment() | {canaries.KEPT: str(said)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        limit = Timer(2 * BUDGETS[suite], kill_all, (process,))
        limit.start()
        try:
            last = tell(process, out)
            status = process.wait()
        finally:
            limit.cancel()
            if process.poll() is None:
                kill_all(process)
    seconds = now() - began
    found = {word.rstrip("s"): int(n) for n, word in COUNTS.findall(last)}
    failed = found.get("failed", 0) + found.get("error", 0)
    wrong = ""
    if seconds > BUDGETS[suite]:
        wrong = f"over its budget of {BUDGETS[suite]} s"
    elif status and not failed and not (status == NO_TESTS and sys.argv[1:]):
        wrong = f"pytest ended with {status}"
    return found.get("passed", 0), failed, seconds, wrong


def environment() -> dict[str, str]:
    """This process's, but bytecode is kept: suites start hundreds of processes, and each would compile it all anew."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def tell(process: subprocess.Popen[str], out: TextIO) -> str:
    """Print what it prints, also to `out`; the last line with something on it."""
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        out.write(line)
        last = line if line.strip() else last
    return last


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill the process and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def install_tools() -> None:
    """Debian's packages that some tests run: installed if they are missing and this may be done. Prometheus, a service
    there, is unpacked only."""
    try:
        prometheus.install()
    except prometheus.Lacking as lacking:
        print(lacking)
    missing = [package for name, package in TOOLS.items() if shutil.which(name) is None]
    if not missing or shutil.which("apt-get") is None:
        return
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    print(f"installing {', '.join(missing)}")
    for command in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
        subprocess.run([*sudo, "apt-get", "-qq", *command], env=quiet, stdout=subprocess.DEVNULL, check=False)


def main() -> int:
    install_tools()
    present = {path.name for path in Path("tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    unknown = present - set(BUDGETS)
    if unknown:
        print(f"without a budget in tools/suites.py: {', '.join(sorted(unknown))}")
        return 1
    kept = Path(mkdtemp(prefix="sheratan-tests-"))
    leaks: list[str] = []
    try:
        results = {suite: run(suite, kept) for suite in BUDGETS if suite in present}
        leaks = [f"{hits} in {path}" for path, hits in canaries.left_in(kept)]
    finally:
        if not leaks:
            shutil.rmtree(kept, ignore_errors=True)
    print("\nsuite      passed  failed  seconds  budget")
    for suite, (passed, failed, seconds, wrong) in results.items():
        print(f"{suite:9} {passed:7} {failed:7} {seconds:8.1f} {BUDGETS[suite]:7}  {wrong}".rstrip())
    passed = sum(result[0] for result in results.values())
    failed = sum(result[1] + bool(result[3]) for result in results.values()) + len(leaks)
    print("\n".join(f"SECRET: {leak}" for leak in leaks) or "no secret in anything that was left")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
