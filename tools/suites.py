"""Runs the test suites one after the other and holds each to its budget of seconds: what `make test` calls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

BUDGETS = {"rules": 20, "stores": 60, "hub": 30, "web": 150, "world": 20, "e2e": 150}
"""Seconds a suite may take on two cores; about three times what it took when this was written."""

TOOLS = ("curl", "strace")

COUNTS = re.compile(r"(\d+) (passed|failed|errors?)")


def run(suite: str) -> tuple[int, int, float, str]:
    """(passed, failed, seconds, what went wrong with the suite as a whole)"""
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", f"tests/{suite}", *sys.argv[1:]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line if line.strip() else last
    status, seconds = process.wait(), time.monotonic() - began
    found = {word.rstrip("s"): int(n) for n, word in COUNTS.findall(last)}
    failed = found.get("failed", 0) + found.get("error", 0)
    wrong = ""
    if seconds > BUDGETS[suite]:
        wrong = f"over its budget of {BUDGETS[suite]} s"
    elif status and not failed:
        wrong = f"pytest ended with {status}"
    return found.get("passed", 0), failed, seconds, wrong


def install_tools() -> None:
    """Debian's packages that some tests run: installed if they are missing and this may be done."""
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if not missing or shutil.which("apt-get") is None:
        return
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    print(f"installing {', '.join(missing)}")
    for command in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
        subprocess.run([*sudo, "apt-get", "-qq", *command], env=quiet, stdout=subprocess.DEVNULL, check=False)


def main() -> int:
    install_tools()
    missing = {path.name for path in Path("tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    unknown = missing - set(BUDGETS)
    if unknown:
        print(f"without a budget in tools/suites.py: {', '.join(sorted(unknown))}")
        return 1
    results = {suite: run(suite) for suite in BUDGETS if suite in missing}
    print("\nsuite      passed  failed  seconds  budget")
    for suite, (passed, failed, seconds, wrong) in results.items():
        print(f"{suite:9} {passed:7} {failed:7} {seconds:8.1f} {BUDGETS[suite]:7}  {wrong}".rstrip())
    passed = sum(result[0] for result in results.values())
    failed = sum(result[1] + bool(result[3]) for result in results.values())
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
