"""Asks a running hub on this machine for what a diagnosis needs, without any library's help but the standard one."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from typing import Any, NamedTuple

from sheratan_hub.config import Settings, is_loopback
from sheratan_hub.rules.signs import Answering

PROBE_SECONDS, BUNDLE_SECONDS = 3.0, 120.0
ANSWER_BYTES = 64 << 20


class Refusal(Exception):
    """The hub answers, and says no."""

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status, self.code, self.text = status, code, text


class Silence(Exception):
    """Nobody answers there. The text says why."""


class Planes(NamedTuple):
    """Where both planes are, and how to speak to them."""

    control: str
    data: str
    token: str
    tls: ssl.SSLContext | None = None

    def url(self, plane: str) -> str:
        """The URL of a plane."""
        return (self.control if plane == "control" else self.data).rstrip("/")

    def ask(self, plane: str, path: str, seconds: float = 0) -> bytes:
        """The body of a successful answer. Raises `Refusal`, `Silence`."""
        seconds = seconds or PROBE_SECONDS
        request = urllib.request.Request(  # noqa: S310 - the scheme is that of the settings
            self.url(plane) + path, headers={"Authorization": f"Bearer {self.token}", "Accept": "*/*"}
        )
        handlers: list[Any] = [urllib.request.ProxyHandler({})]
        handlers += [urllib.request.HTTPSHandler(context=self.tls)] if self.tls is not None else []
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=seconds) as answer:
                body: bytes = answer.read(ANSWER_BYTES)
                return body
        except urllib.error.HTTPError as no:
            with no:
                raise _refusal(no.code, no.read(65_536)) from None
        except urllib.error.URLError as error:
            raise Silence(str(getattr(error.reason, "strerror", None) or error.reason)) from None
        except TimeoutError:
            raise Silence(f"no answer within {seconds:g} s") from None
        except (OSError, ValueError) as error:
            raise Silence(type(error).__name__) from None

    def probe(self, plane: str) -> Answering:
        """Whether a plane answers at all."""
        try:
            self.ask(plane, "/livez")
        except Refusal:
            return Answering(plane, self.url(plane), True)
        except Silence as error:
            return Answering(plane, self.url(plane), False, str(error))
        return Answering(plane, self.url(plane), True)


def _refusal(status: int, body: bytes) -> Refusal:
    try:
        told = json.loads(body)
        return Refusal(status, str(told["code"]), str(told["detail"]))
    except (ValueError, KeyError, TypeError):
        return Refusal(status, "", f"status {status}")


def url_of(settings: Settings, plane: str, port: int = 0) -> str:
    """Where a hub with these settings is asked from its own machine; `port`: the one that it was given, if any."""
    place = settings.control if plane == "control" else settings.data
    host = "127.0.0.1" if place.host in ("0.0.0.0", "") else "::1" if place.host == "::" else place.host  # noqa: S104
    return url_at(settings, host, port or place.port)


def url_at(settings: Settings, host: str, port: int) -> str:
    """The URL of a plane at this address."""
    name = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls.cert else 'http'}://{name}:{port}"


def is_here(url: str) -> bool:
    """Whether a URL means this machine."""
    host = url.partition("://")[2].partition("/")[0]
    return is_loopback(host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0])
