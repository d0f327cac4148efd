"""How fast an audit log is proved, beside sha256sum over the same bytes: `python -m tools.audit_bench [MB]`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from sheratan_hub.audit_file import AuditFile
from sheratan_hub.audit_lines import FILE_NAME

ROUNDS = 3


def fill(path: Path, size: int) -> None:
    """Write a log of so many bytes."""
    file = AuditFile(path)
    count = 0
    while not path.exists() or path.stat().st_size < size:
        for n in range(count, count + 1000):
            file.add(
                {
                    "ts": "2026-11-21T10:20:43.123Z",
                    "event": "AUTH_FAILURE",
                    "plane": "data",
                    "remote_addr": f"10.0.{n >> 8 & 255}.{n & 255}",
                    "node_id": None,
                    "path": "/api/jobs",
                    "reason": "invalid_token",
                    "detail": {},
                }
            )
        file.write()
        count += 1000
    file.close()


def seconds(*command: str) -> float:
    """The shortest of a few runs."""
    times = []
    for _ in range(ROUNDS):
        began = perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(perf_counter() - began)
    return min(times)


def main(megabytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE_NAME
        fill(path, megabytes * 1_000_000)
        size = path.stat().st_size / 1e6
        plain = seconds("sha256sum", str(path))
        proved = seconds(sys.executable, "-m", "sheratan_hub", "audit", "verify", str(path))
    print(f"sha256sum     {size / plain:7.0f} MB/s")
    print(f"audit verify  {size / proved:7.0f} MB/s, {plain / proved:.2f} of it")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
