"""What the benchmark needs beside Python: wrk, and a C compiler for the shim that slows flushes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tools.bench.figures import Failed

SOURCE = Path(__file__).with_name("slow_flush.c")


def need(*names: str) -> None:
    """Install missing programs, as Debian's packages of the same names. Raises `Failed` when one stays missing."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing and shutil.which("apt-get"):
        sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
            subprocess.run([*sudo, "apt-get", "-qq", *command], env=quiet, stdout=subprocess.DEVNULL, check=False)
    if lost := [name for name in names if shutil.which(name) is None]:
        raise Failed(f"{' and '.join(lost)} is missing and could not be installed: install it and try again")


def build_shim(folder: Path) -> Path:
    """Compile the shim into the folder."""
    need("gcc")
    built = folder / "slow_flush.so"
    command = ["gcc", "-O2", "-Wall", "-shared", "-fPIC", "-nostdlib", "-o", str(built), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"the shim could not be compiled: {done.stderr.strip()[-400:]}")
    return built
