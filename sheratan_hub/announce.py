"""What `serve` prints when it is up: where everything is and how to go on. Never a secret, only where it comes from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from sheratan_hub.app import App
from sheratan_hub.asking import url_at, url_of
from sheratan_hub.client import DATA_URL
from sheratan_hub.config import hide_password, store_url

WIDTH = 15


def urls(app: App) -> dict[str, str]:
    """The URL of each plane, at the address that it is bound to."""
    hosts = {"control": app.settings.control.host, "data": app.settings.data.host}
    return {plane: url_at(app.settings, host, app.ports[plane]) for plane, host in hosts.items()}


def announcement(app: App, origins: Mapping[str, str]) -> str:
    """Some lines for the person at the terminal. `origins` tells where each setting and secret comes from."""
    return "\n".join(f"{name:{WIDTH}}{text}" for name, text in _lines(app, origins))


def _lines(app: App, origins: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    settings, planes = app.settings, urls(app)
    logs = Path(settings.hub.data_dir) / "logs"
    yield "control plane", planes["control"]
    yield "data plane", planes["data"]
    yield "store", f"{hide_password(store_url(settings))}, logs in {settings.hub.data_dir}/logs"
    yield (
        "audit log",
        f"{logs / 'hub_security_audit.jsonl'}{_more(settings.alerts.in_process, 'watched, see alerts.jsonl')}",
    )
    yield "settings", _settings(origins)
    yield "token", _token(app, origins["token"])
    yield "TLS", _tls(app)
    yield "stop", f"Ctrl-C, or kill {os.getpid()}; kill -HUP {os.getpid()} reads the settings again"
    here = url_of(settings, "data", app.ports["data"])
    there = "" if here == DATA_URL else f"--data-url {here} "
    yield "try next", f"sheratan-hub {there}submit my.kind --params '{{\"n\": 1}}'"
    yield "", f"sheratan-hub {there}jobs list"


def _more(true: bool, text: str) -> str:
    return f" ({text})" if true else ""


def _settings(origins: Mapping[str, str]) -> str:
    """From where those that are not left at their defaults come."""
    kinds: dict[str, int] = {}
    for key, origin in origins.items():
        if origin != "default" and "." in key:
            name = "variables" if origin.startswith("SHERATAN_") else origin
            kinds[name] = kinds.get(name, 0) + 1
    return (
        ", ".join(f"{n} from {name}" for name, n in kinds.items()) + ", the others default" if kinds else "all default"
    )


def _token(app: App, origin: str) -> str:
    if not app.settings.auth.token_required:
        return "none is asked for: whoever reaches these ports may do everything"
    if origin == "default":
        return "the default one, which is public and good on this machine only"
    return f"from {origin}"


def _tls(app: App) -> str:
    tls = app.settings.tls
    if not tls.cert:
        return "off"
    return f"certificate {tls.cert}{_more(bool(tls.client_ca), f'clients must show one of {tls.client_ca}')}"
