"""Writes metrics down for Prometheus, as text or OpenMetrics. prometheus-client stops here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from sheratan_hub.metrics.table import Family
from sheratan_hub.metrics.tally import Buckets

Labels = tuple[str, ...]
"""The values of a series' labels, in the order of its family."""

SANE_KIND = re.compile(r"[\w/+.;= -]{1,120}", re.ASCII)

Encode = Callable[[Iterable[Metric]], bytes]


def encoder(accept: str) -> tuple[Encode, str]:
    """What writes the format that the header names, the process's own metrics behind the given ones; its Content-Type.

    A header that makes no sense means plain text.
    """
    try:
        encode, kind = choose_encoder(accept)
    except (TypeError, ValueError):
        kind = ""
    if not SANE_KIND.fullmatch(kind):  # the client's own words come back in it
        encode, kind = generate_latest, CONTENT_TYPE_PLAIN_0_0_4
    return lambda metrics: encode(cast(Collector, _Told(metrics))), kind


class _Told:
    """What an encoder is given."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Every metric."""
        yield from self._metrics
        yield from PROCESS.collect()


def _of_process() -> CollectorRegistry:
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


PROCESS = _of_process()
"""What Python and the kernel say of this process."""


def as_metric(family: Family, values: Mapping[Labels, float]) -> Metric:
    """A counter or gauge, as prometheus-client wants it."""
    metric = Metric(family.name.removesuffix("_total"), family.text, family.type)
    for labels, value in values.items():
        metric.add_sample(family.name, dict(zip(family.labels, labels, strict=True)), value)
    return metric


def of_buckets(family: Family, series: Mapping[Labels, Buckets]) -> Metric:
    """A histogram, as prometheus-client wants it: its buckets count all that is at most their bound."""
    metric = Metric(family.name, family.text, "histogram")
    for labels, buckets in series.items():
        named, total = dict(zip(family.labels, labels, strict=True)), 0
        for bound, n in zip((*buckets.bounds, float("inf")), buckets.counts, strict=True):
            total += n
            metric.add_sample(f"{family.name}_bucket", {**named, "le": _as_text(bound)}, total)
        metric.add_sample(f"{family.name}_count", named, total)
        metric.add_sample(f"{family.name}_sum", named, buckets.sum)
    return metric


def _as_text(bound: float) -> str:
    """A bucket's bound, the same in both formats."""
    return "+Inf" if bound == float("inf") else str(bound)
