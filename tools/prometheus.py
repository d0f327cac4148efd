"""Prometheus and promtool for the tests: those of this machine, else Debian's package, unpacked into .venv.

`make test` calls it; `python tools/prometheus.py` does the same alone. Nothing is installed, and nothing outside .venv
is changed, so it needs no root, unless apt has no package lists yet: fetching those does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "prometheus"
PROGRAMS = ("prometheus", "promtool")
HOME = Path(__file__).parents[1] / ".venv" / "prometheus"
"""Where the package is unpacked, and found again by the next `make test`."""

BY_HAND = (
    f"install it, as root: apt-get install --no-install-recommends {PACKAGE}; or put {' and '.join(PROGRAMS)} on PATH"
)


class Lacking(Exception):
    """Prometheus is not there and cannot be fetched; the text says why and what to install."""


def program(name: str) -> str | None:
    """The path of `prometheus` or `promtool`, None if it is not there. Both are always of the same place."""
    here = HOME / "usr" / "bin"
    if all(os.access(here / one, os.X_OK) for one in PROGRAMS):
        return str(here / name)
    return shutil.which(name) if all(shutil.which(one) for one in PROGRAMS) else None


def install() -> None:
    """Fetch and unpack the package unless both programs are there. Raises `Lacking`."""
    if program(PROGRAMS[0]) is not None:
        return
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise Lacking(f"the tests need Prometheus, and there is no {tool} to fetch it with; {BY_HAND}")
    print(f"fetching {PACKAGE}", flush=True)
    HOME.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOME.parent, prefix="prometheus-") as folder:
        said = fetch(Path(folder))
        if said is not None and refresh() is None:
            said = fetch(Path(folder))
        unpacked = Path(folder) / "unpacked"
        said = said or unpack(Path(folder), unpacked)
        if said is not None:
            raise Lacking(f"the tests need Prometheus, and Debian's package could not be fetched ({said}); {BY_HAND}")
        shutil.rmtree(HOME, ignore_errors=True)
        unpacked.rename(HOME)


def fetch(folder: Path) -> str | None:
    """Download the package into `folder`: what went wrong, None if nothing."""
    return run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", PACKAGE, cwd=folder)


def refresh() -> str | None:
    """Fetch apt's package lists, which root may do: what went wrong, None if nothing."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    return run(*sudo, "apt-get", "-qq", "update")


def unpack(folder: Path, into: Path) -> str | None:
    """Unpack the package that lies in `folder` and see that both programs run: what went wrong, None if nothing."""
    package = next(folder.glob("*.deb"), None)
    if package is None:
        return "apt-get has left no package"
    said = run("dpkg-deb", "-x", str(package), str(into))
    for name in PROGRAMS:
        said = said or run(str(into / "usr" / "bin" / name), "--version")
    return said


def run(*command: str, cwd: Path | None = None) -> str | None:
    """The last line of what it complained about if it failed, None if it did not."""
    try:
        ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    if not ran.returncode:
        return None
    said = [line.strip() for line in (ran.stderr or ran.stdout).splitlines() if line.strip()]
    return said[-1] if said else f"{command[0]} ended with {ran.returncode}"


def main() -> int:
    try:
        install()
    except Lacking as lacking:
        print(lacking, file=sys.stderr)
        return 1
    print(program(PROGRAMS[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
