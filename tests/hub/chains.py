"""Audit logs made for tests: lines of different kinds, over one file or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sheratan_hub.audit_file import AuditFile


def record(n: int, **fields: Any) -> dict[str, Any]:
    """The fields of a line but those that chain it."""
    return {
        "ts": f"2026-11-21T10:{n // 60 % 60:02d}:{n % 60:02d}.000Z",
        "event": ("AUTH_FAILURE", "PORT_MISMATCH", "NODE_ONLINE")[n % 3],
        "plane": "data",
        "remote_addr": f"10.0.0.{n % 250}",
        "node_id": f"n{n % 7}" if n % 3 == 2 else None,
        "path": "/api/jobs",
        "reason": "invalid_token" if n % 3 == 0 else "",
        "detail": {},
        **fields,
    }


def written(path: Path, count: int, *, first: int = 1, **options: Any) -> AuditFile:
    """A log with so many lines, closed."""
    file = AuditFile(path, **options)
    for n in range(first, first + count):
        file.add(record(n))
        file.write()
    file.close()
    return file
