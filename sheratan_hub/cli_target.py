"""The hub that a command talks to, the options commands share, and how what goes wrong becomes an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sheratan_hub.cli_output import say

if TYPE_CHECKING:
    import ssl

    from sheratan_hub.client import HubClient
    from sheratan_hub.tracing import Tracing

EXIT_FAILED, EXIT_UNREACHABLE, EXIT_UNFINISHED, EXIT_REFUSED, EXIT_CONFIG = 1, 69, 75, 77, 78
PATIENCE_SECONDS = 2.0

output_option = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)


class Target:
    """The hub that a command talks to, and with which token."""

    def __init__(
        self,
        control_url: str | None,
        data_url: str | None,
        token_file: str | None,
        ca: str | None = None,
        cert: str | None = None,
        cert_key: str | None = None,
    ) -> None:
        self._ca, self._cert, self._cert_key = ca, cert, cert_key
        self.control_url = control_url
        self.data_url = data_url
        self.token_file = token_file
        self.token: str | None = os.environ.get("SHERATAN_HUB_TOKEN_ACTIVE") or os.environ.get("SHERATAN_HUB_TOKEN")
        if token_file is not None:
            with open(token_file, encoding="utf-8") as file:
                self.token = file.read().strip()

    def tls(self) -> ssl.SSLContext | None:
        """What the hub's certificate is held against, and what is shown to it; None: as the system does."""
        from sheratan_hub.client import client_tls

        try:
            return client_tls(self._ca, self._cert, self._cert_key) if self._ca or self._cert else None
        except OSError as error:
            raise click.UsageError(str(error)) from None

    def client(self, **options: Any) -> HubClient:
        """A client for it. Without a token the default one of a hub on this machine is tried."""
        from sheratan_hub.client import CONTROL_URL, DATA_URL, HubClient
        from sheratan_hub.config import DEFAULT_TOKEN

        token = self.token if self.token is not None else DEFAULT_TOKEN
        try:
            return HubClient(
                self.control_url or CONTROL_URL,
                self.data_url or DATA_URL,
                token,
                tls=self.tls(),
                token_file=self.token_file,
                **options,
            )
        except (ValueError, OSError) as error:
            raise click.UsageError(str(error)) from None


@contextmanager
def traced(service: str) -> Iterator[Tracing | None]:
    """What the variables of OpenTelemetry ask for; what is not sent at the end is sent then."""
    from sheratan_hub.tracing import from_environment

    tracing = from_environment(service, lambda text: say(f"sheratan-hub: {text}"))
    try:
        yield tracing
    finally:
        if tracing is not None:
            tracing.close()


def run(work: Coroutine[Any, Any, int]) -> NoReturn:
    """Run a command against a hub and exit: with its code, 69, 77 or 1."""
    import asyncio

    from sheratan_hub.client import HubRefused, HubUnreachable

    try:
        sys.exit(asyncio.run(work))
    except HubUnreachable as error:
        give_up(str(error), EXIT_UNREACHABLE)
    except HubRefused as no:
        give_up(str(no), EXIT_REFUSED if no.status == 403 else EXIT_FAILED)


def give_up(text: str, code: int) -> NoReturn:
    """Exit with `code` and one line on stderr that tells why."""
    say(f"sheratan-hub: {text}")
    sys.exit(code)


def url(context: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The value of an option that names a plane; without a scheme it would look like a hub that does not answer."""
    if value and not value.startswith(("http://", "https://")):
        raise click.BadParameter(f"{value!r} is no URL such as http://127.0.0.1:8788")
    return value or None


def words(text: str) -> list[str]:
    """The words of a comma-separated list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}
