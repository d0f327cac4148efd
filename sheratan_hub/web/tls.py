"""TLS for both planes, from PEM files."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sheratan_hub.config import BadConfig, TlsSettings

HANDSHAKE_SECONDS = 10.0


class Certificates:
    """What the listeners show to clients, exchanged under them: `context` stays, new connections get the new files.

    Raises `BadConfig` as `server_context` does. `context` is None for plain HTTP.
    """

    def __init__(self, settings: TlsSettings) -> None:
        self._print, self._asks = _print(settings), bool(settings.client_ca)
        self.context = self._now = server_context(settings)
        if self.context is not None:
            self.context.sni_callback = self._choose  # called for each handshake, whether it names a server or not

    def _choose(self, shaking: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> int | None:
        if shaking.session_reused and self._now is not self.context and self._asks:
            return ssl.AlertDescription.ALERT_DESCRIPTION_HANDSHAKE_FAILURE  # its certificate was held to other files
        if self._now is not None:
            shaking.context = self._now
        return None

    def prepare(self, settings: TlsSettings) -> tuple[bool, Callable[[], None]]:
        """(whether the files hold something else than is shown now, what shows it). Raises `BadConfig`."""
        found, fresh = _print(settings), server_context(settings)

        def show() -> None:
            self._print, self._now = found, fresh

        return found != self._print, show


def _print(settings: TlsSettings) -> str:
    """What changes when one of the files does."""
    digest = hashlib.sha256()
    for file in (settings.cert, settings.key, settings.client_ca):
        with suppress(OSError):
            digest.update(Path(file).read_bytes() if file else b"")
        digest.update(b"\0")
    return digest.hexdigest()


def server_context(settings: TlsSettings) -> ssl.SSLContext | None:
    """What the listeners speak: None is plain HTTP. Raises `BadConfig` with the setting whose file will not do."""
    if not settings.cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _refuse_unreadable("tls.cert", settings.cert)
    _refuse_unreadable("tls.key", settings.key)
    try:
        context.load_cert_chain(settings.cert, settings.key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise BadConfig(
            f"tls.cert and tls.key: {settings.cert} and {settings.key} are not a PEM certificate and its unencrypted "
            f"private key: {_said(error)}."
        ) from None
    if settings.client_ca:
        _refuse_unreadable("tls.client_ca", settings.client_ca)
        try:
            context.load_verify_locations(settings.client_ca)
        except ssl.SSLError as error:
            raise BadConfig(f"tls.client_ca: {settings.client_ca} holds no PEM certificate: {_said(error)}.") from None
        context.verify_mode = ssl.CERT_REQUIRED
        context.options |= ssl.OP_NO_TICKET  # a ticket would be good after its holder's authority no longer is
        context.num_tickets = 0
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _refuse_unreadable(key: str, file: str) -> None:
    try:
        with open(file, "rb"):
            pass
    except OSError as error:
        raise BadConfig(f"{key}: the file {file} cannot be read: {error.strerror}.") from None


def _said(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else str(error)
