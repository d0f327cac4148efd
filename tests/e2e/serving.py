"""A real hub in a process of its own, on free ports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tools import canaries
from tools.ports import free_ports

TOKEN = canaries.ACTIVE


class Served:
    """`start`, `kill`, `terminate`, and HTTP in between; the ports and the data stay the same over restarts."""

    def __init__(self, directory: Path, **environ: str) -> None:
        self.directory = directory
        self.control_port, self.data_port = free_ports(2)
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SHERATAN_", "HUB_"))},
            "SHERATAN_HUB_TOKEN": TOKEN,
            "SHERATAN_CONTROL_PORT": str(self.control_port),
            "SHERATAN_DATA_PORT": str(self.data_port),
            "SHERATAN_DATA_DIR": str(directory / "var"),
            **environ,
        }
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it and wait until it says where it listens."""
        self.process = self.begin()
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("store"):
                return
        raise AssertionError(self.process.communicate()[1])

    def begin(self) -> subprocess.Popen[str]:
        if not (self.directory / "hub.toml").exists():
            (self.directory / "hub.toml").write_text("[log]\nlevel = 'debug'\n")
        return subprocess.Popen(
            [sys.executable, "-m", "sheratan_hub", "serve"],
            cwd=self.directory,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def fails(self) -> tuple[int, str]:
        """Start it when it cannot: (exit status, what it says)."""
        process = self.begin()
        out, err = process.communicate(timeout=20)
        return process.returncode, out + err

    def end(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.communicate(timeout=20)
        return self.process.returncode

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.end(signal.SIGKILL)

    def ask(self, method: str, path: str, body: Any = None, port: int | None = None, timeout: float = 30) -> Any:
        """The JSON answer of the data plane (or of `port`), whatever its status."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{port or self.data_port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {self.environ.get('SHERATAN_HUB_TOKEN', TOKEN)}"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return json.load(error)
