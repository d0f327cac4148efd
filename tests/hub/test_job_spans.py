"""The hub's spans, from what is committed; and what the variables of OpenTelemetry ask for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import messaging_attributes as convention
from opentelemetry.trace import SpanKind, StatusCode

from sheratan_hub import tracing
from sheratan_hub.clock import VirtualClock
from sheratan_hub.hub import Hub
from sheratan_hub.job_spans import JobSpans
from sheratan_hub.rules.command import Limits
from sheratan_hub.rules.finish import Finish, Release
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.submit import Submit
from sheratan_hub.tracing import Tracing, from_environment, traceparent_of

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
MakeHub = Callable[..., Awaitable[Hub]]


class Spans:
    """What a hub would export."""

    def __init__(self, hub: Hub, clock: VirtualClock) -> None:
        self.out = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.out))
        hub.observe(JobSpans(Tracing(provider), clock).committed)

    def told(self) -> list[tuple[str, int, bool]]:
        """(name, ms, error) of each, in the order of their ends."""
        return [
            (span.name, (span.end_time - span.start_time) // 1_000_000, span.status.status_code is StatusCode.ERROR)
            for span in self.out.get_finished_spans()
            if span.start_time is not None and span.end_time is not None
        ]


@pytest.fixture
async def hub(make_hub: MakeHub) -> Hub:
    return await make_hub(Limits(lease_ms=5000, loss_delay_ms=0), loops=True)


@pytest.fixture
def spans(hub: Hub, clock: VirtualClock) -> Spans:
    return Spans(hub, clock)


async def lease(hub: Hub, secret: str) -> Any:
    return (await hub.pull(Pull("n1", secret, capabilities=frozenset()), 0)).jobs[0]


async def test_each_step_has_its_time(hub: Hub, spans: Spans, clock: VirtualClock) -> None:
    await hub.execute(Submit("j1", "k", traceparent=TRACE))
    await clock.advance(300)
    job = await lease(hub, "s")
    await clock.advance(700)
    await hub.execute(Finish("j1", True, job.lease_id))
    assert spans.told() == [("accept k", 0, False), ("wait k", 300, False), ("lease k", 700, False)]
    for span in spans.out.get_finished_spans():
        assert span.context is not None
        assert span.parent is not None
        assert f"{span.context.trace_id:032x}" == TRACE.split("-")[1]
        assert f"{span.parent.span_id:016x}" == TRACE.split("-")[2]
        assert span.parent.is_remote


async def test_a_lost_lease_is_an_error_and_the_job_waits_again(hub: Hub, spans: Spans, clock: VirtualClock) -> None:
    await hub.execute(Submit("j1", "k", traceparent=TRACE))
    await lease(hub, "s")
    await clock.advance(6000)
    job = await lease(hub, "t")
    await hub.execute(Release("j1", job.lease_id))
    names = [(name, error) for name, _, error in spans.told()]
    assert names == [("accept k", False), ("wait k", False), ("lease k", True), ("wait k", False), ("lease k", False)]
    lost, released = (span for span in spans.out.get_finished_spans() if span.name == "lease k")
    assert lost.attributes is not None
    assert released.attributes is not None
    assert (lost.attributes["sheratan.job.outcome"], lost.attributes["error.type"]) == ("lost", "lease_expired")
    assert (released.attributes["sheratan.job.outcome"], released.attributes["sheratan.job.attempt"]) == ("released", 2)


async def test_a_late_result_makes_no_second_lease(hub: Hub, spans: Spans, clock: VirtualClock) -> None:
    await hub.execute(Submit("j1", "k", traceparent=TRACE))
    job = await lease(hub, "s")
    await clock.advance(6000)
    await hub.execute(Finish("j1", True, job.lease_id))
    assert [name for name, *_ in spans.told()].count("lease k") == 1


async def test_a_job_without_a_trace_has_no_spans(hub: Hub, spans: Spans) -> None:
    await hub.execute(Submit("j1", "k"))
    await lease(hub, "s")
    assert spans.told() == []


async def test_names_are_those_of_the_semantic_conventions(hub: Hub, spans: Spans) -> None:
    await hub.execute(Submit("j1", "k", traceparent=TRACE))
    [span] = spans.out.get_finished_spans()
    assert span.kind is SpanKind.SERVER
    assert span.attributes == {
        convention.MESSAGING_SYSTEM: "sheratan_hub",
        convention.MESSAGING_OPERATION_NAME: "accept",
        convention.MESSAGING_DESTINATION_NAME: "k",
        convention.MESSAGING_MESSAGE_ID: "j1",
    }
    known = {value for name, value in vars(convention).items() if name.startswith("MESSAGING_")}
    assert {name for name in tracing._NAMES.values() if name.startswith("messaging.")} <= known
    types = {one.value for one in convention.MessagingOperationTypeValues}
    assert set(tracing._TYPES.values()) <= types


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (TRACE, TRACE),
        (TRACE.replace("-01", "-00"), TRACE.replace("-01", "-00")),
        (None, None),
        ("", None),
        ("nonsense", None),
        (TRACE.upper(), None),
        (TRACE + "-", None),
        (TRACE + "-more", None),
        (" " + TRACE, None),
        (TRACE + "\n", None),
        ("ff" + TRACE[2:], None),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", None),
        (f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01", None),
        (TRACE[:-1], None),
        (TRACE.replace("-01", "-0g"), None),
        ("cc" + TRACE[2:], TRACE),
        ("cc" + TRACE[2:] + "-what-comes", TRACE),
        ("cc" + TRACE[2:] + "x", None),
        ("cc" + TRACE[2:].replace("-01", "-ff"), TRACE),
    ],
)
def test_a_traceparent_is_read_as_the_w3c_says(text: str | None, kept: str | None) -> None:
    assert traceparent_of(text) == kept


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, None),
        ({"OTEL_SERVICE_NAME": "x"}, None),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, None),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, None),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "zipkin"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc"),
    ],
)
def test_without_a_word_or_with_one_that_is_not_understood_nothing_is_traced(
    environ: dict[str, str], said: str | None
) -> None:
    lines: list[str] = []
    assert from_environment("s", lines.append, environ) is None
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]


def test_without_the_extra_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry.sdk")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    lines: list[str] = []
    assert from_environment("s", lines.append, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}) is None
    assert lines == ["nothing is traced, although OTEL variables ask for it: install the extra sheratan-hub[otel]"]


def test_a_hub_and_a_worker_that_do_not_trace_import_nothing_for_it() -> None:
    code = (
        "import sys, sheratan_hub.app, sheratan_hub.worker, sheratan_hub.cli\n"
        "from sheratan_hub.tracing import from_environment\n"
        "assert from_environment('s', print, {}) is None\n"
        "assert not [name for name in sys.modules if 'opentelemetry' in name or 'requests' in name]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def test_a_span_is_current_while_its_block_runs_and_knows_how_it_ended() -> None:
    from opentelemetry import trace

    out = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(out))

    async def cancelled() -> None:
        with Tracing(provider).span("producer", "submit", "k") as span:
            current = trace.get_current_span().get_span_context()
            assert span.traceparent.split("-")[2] == f"{current.span_id:016x}"
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await cancelled()
    assert not trace.get_current_span().get_span_context().is_valid
    [ended] = out.get_finished_spans()
    assert ended.attributes is not None
    assert ended.attributes["error.type"] == "CancelledError"
