"""Spans over OpenTelemetry (extra `otel`): who makes them, where they go. OpenTelemetry stops here.

Nothing of it is imported before somebody asks for it: `from_environment` when a variable of OpenTelemetry says where
spans go, `from_application` when the application that embeds a client has set it up itself.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import TracerProvider

Kind = Literal["producer", "consumer", "client", "server", "internal"]
Value = str | int | bool

SYSTEM = "sheratan_hub"
"""`messaging.system` of every span."""

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
HTTP = ("", "http/protobuf")
CLOSE_SECONDS = 2.0

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)


def traceparent_of(text: str | None) -> str | None:
    """The W3C `traceparent` that is kept of this one: itself, or in version 00 if it is of a later one; None for what
    must be ignored (another form, version ff, a trace or parent id of zeros)."""
    found = _TRACEPARENT.fullmatch(text) if text else None
    if found is None:
        return None
    version, trace_id, parent_id, flags, more = found.groups()
    if version == "ff" or trace_id.strip("0") == "" or parent_id.strip("0") == "":
        return None
    if version == "00":
        return None if more is not None else text
    return f"00-{trace_id}-{parent_id}-{int(flags, 16) & 1:02x}"


class Span:
    """Something that takes time, or took it. As a context manager it is the current span, and ends with the block."""

    def __init__(self, span: OtelSpan) -> None:
        self._span = span
        self._token: object = None

    @property
    def traceparent(self) -> str:
        """What those who continue it are given."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags) & 1:02x}"

    def set(self, **attributes: Value | None) -> None:
        """Set attributes; `_` in a name stands for `.`; None is left out."""
        for name, value in attributes.items():
            if value is not None:
                self._span.set_attribute(_NAMES[name], value)

    def failed(self, error_type: str) -> None:
        """It ended in an error of this kind."""
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("error.type", error_type)
        self._span.set_status(StatusCode.ERROR)

    def end(self, at_ms: int | None = None) -> None:
        """It is over, now or at a time (ms since 1970)."""
        self._span.end(None if at_ms is None else at_ms * 1_000_000)

    def __enter__(self) -> Span:
        from opentelemetry import context, trace

        self._token = context.attach(trace.set_span_in_context(self._span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from opentelemetry import context

        context.detach(self._token)  # type: ignore[arg-type]
        if error is not None:
            self.failed(str(getattr(error, "code", None) or type(error).__name__))
        self.end()


class Tracing:
    """Makes spans with the names and attributes of the semantic conventions for messaging.

    `close` sends what waits, for two seconds at most.
    """

    def __init__(self, provider: TracerProvider, close: Callable[[], None] = lambda: None) -> None:
        from sheratan_hub import __version__

        self._tracer = provider.get_tracer(SYSTEM, __version__)
        self.close = close

    def span(
        self,
        kind: Kind,
        operation: str,
        destination: str,
        *,
        parent: str | None = None,
        start_ms: int | None = None,
        **attributes: Value | None,
    ) -> Span:
        """A span that has begun, now or at `start_ms`. Its parent is the span of that `traceparent`, else the current
        one. `operation` and `destination` (the kind of job) are its name; attributes are as in `Span.set`."""
        from opentelemetry.trace import SpanKind

        begun = Span(
            self._tracer.start_span(
                f"{operation} {destination}" if destination else operation,
                context=_context(parent),
                kind=SpanKind[kind.upper()],
                start_time=None if start_ms is None else start_ms * 1_000_000,
            )
        )
        begun.set(system=SYSTEM, operation=operation, destination=destination or None, **attributes)
        if operation in _TYPES:
            begun.set(operation_type=_TYPES[operation])
        return begun


def from_environment(
    service: str, say: Callable[[str], None], environ: Mapping[str, str] | None = None
) -> Tracing | None:
    """What the variables of OpenTelemetry ask for: spans over OTLP (HTTP) or to the console; None if nothing.

    `service` is the service's name unless a variable gives one. `say` gets a sentence when something is asked for that
    cannot be had; then nothing is traced.
    """
    environ = os.environ if environ is None else environ
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    asked = exporter not in ("", "none") or (not exporter and any(environ.get(name) for name in ENDPOINTS))
    if not asked or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    protocol = next((environ[name] for name in PROTOCOLS if environ.get(name)), "").strip().lower()
    if exporter not in ("", "otlp", "console") or (exporter != "console" and protocol not in HTTP):
        say(
            f"nothing is traced: {exporter or 'otlp'} {protocol} is not supported; otlp over http/protobuf, console are"
        )
        return None
    try:
        return _exporting(service, console=exporter == "console")
    except ImportError:
        say("nothing is traced, although OTEL variables ask for it: install the extra sheratan-hub[otel]")
    except ValueError as error:
        say(f"nothing is traced: {error}")
    return None


def from_application() -> Tracing:
    """Spans go where the application's own tracer provider sends them. Raises ImportError without the extra `otel`."""
    from opentelemetry.trace import get_tracer_provider

    return Tracing(get_tracer_provider())


def _exporting(service: str, *, console: bool) -> Tracing:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(
        resource=Resource.create({} if named else {"service.name": service}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(_exporter(console=console)))

    def close() -> None:
        last = threading.Thread(target=provider.shutdown, daemon=True)  # it may try again for longer than that
        last.start()
        last.join(CLOSE_SECONDS)

    return Tracing(provider, close)


def _exporter(*, console: bool) -> SpanExporter:
    if console:
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _context(traceparent: str | None) -> Context | None:
    """The context of the span that a `traceparent` names; None: the current one."""
    if traceparent is None:
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    _, trace_id, span_id, flags = traceparent.split("-")
    remote = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
    return set_span_in_context(NonRecordingSpan(remote), Context())


_TYPES = {"submit": "send", "process": "process", "settle": "settle"}
"""The operations of the semantic conventions; what the hub does in between has no type there."""

_NAMES = {
    "system": "messaging.system",
    "operation": "messaging.operation.name",
    "operation_type": "messaging.operation.type",
    "destination": "messaging.destination.name",
    "job_id": "messaging.message.id",
    "count": "messaging.batch.message_count",
    "node_id": "messaging.client.id",
    "attempt": "sheratan.job.attempt",
    "outcome": "sheratan.job.outcome",
}
