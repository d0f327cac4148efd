"""TLS for both planes, from PEM files."""

from __future__ import annotations

import ssl

from sheratan_hub.config import BadConfig, TlsSettings

HANDSHAKE_SECONDS = 10.0


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
