"""Ports for hubs that are killed and started again."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress

FIRST, MANY = 20_000, 12_000
"""Below those that Linux gives to clients: one of these could have the port while the hub is dead."""


def free_ports(n: int = 2) -> list[int]:
    """So many ports of this machine's loopback that nobody listens on now."""
    free: set[int] = set()
    while len(free) < n:
        port = FIRST + secrets.randbelow(MANY)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            free.add(port)
    return list(free)
