"""Tells the service manager how the hub is: systemd's sd_notify protocol, datagrams of `NAME=value` lines.

Source: sd_notify(3). Without `NOTIFY_SOCKET` in the environment nothing is sent.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

from sheratan_hub.clock import monotonic_us

log = logging.getLogger("sheratan.notify")

SEND_SECONDS = 1.0
BEATS = 3
"""How often the watchdog is told in the time that it waits, so that a late beat or two do no harm."""


class Notifier:
    """One process's line to its service manager. A message that cannot be sent is logged once and passed over."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self.beat_ms = _beat_ms(environ) if self._address else 0
        """How often `alive` must be told, 0: nobody waits for it."""
        self._failed = False

    @property
    def listening(self) -> bool:
        """Whether there is a service manager."""
        return self._address is not None

    def ready(self, status: str) -> None:
        """Everything is up, at the start or again after a reload."""
        self._send("READY=1", f"STATUS={_line(status)}")

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={monotonic_us()}", "STATUS=reading the settings again")

    def stopping(self, status: str) -> None:
        """The end has begun."""
        self._send("STOPPING=1", f"STATUS={_line(status)}")

    def status(self, text: str) -> None:
        """One line for people, shown by `systemctl status`."""
        self._send(f"STATUS={_line(text)}")

    def alive(self) -> None:
        """The watchdog may wait for another while."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(SEND_SECONDS)
                sender.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
        except OSError as error:
            if not self._failed:
                log.warning("the service manager cannot be told anything: %s", error.strerror or error)
            self._failed = True
        else:
            self._failed = False


def _address(text: str) -> str | None:
    """Where to send: a path, or `@` and a name that is no file. What else systemd may name is for virtual machines."""
    if text.startswith("/"):
        return text
    return "\0" + text[1:] if text.startswith("@") and len(text) > 1 else None


def _beat_ms(environ: Mapping[str, str]) -> int:
    """A third of what the watchdog waits, 0 when there is none or it is meant for another process."""
    wait_us, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not (wait_us.isascii() and wait_us.isdigit()) or pid not in ("", str(os.getpid())):
        return 0
    return max(1, int(wait_us) // BEATS // 1000) if int(wait_us) else 0


def _line(text: str) -> str:
    return " ".join(text.split())
