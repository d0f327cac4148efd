"""Prometheus for tests: promtool, the shipped rules, a server of its own, and what hubs have told over time."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sheratan_hub.metrics.table import FAMILIES
from tools.ports import free_ports
from tools.prometheus import BY_HAND, program

DEPLOY = Path(__file__).parents[1] / "tools/deploy/prometheus"
RULES = DEPLOY / "sheratan-rules.yml"
ALERTS = DEPLOY / "sheratan-alerts.yml"
CASES = DEPLOY / "tests/sheratan-alerts.test.yml"
LOOKS = 1200
"""How often a test looks at Prometheus until it has what it waits for, a twentieth of a second apart."""


def needed(name: str) -> str:
    """The path of `prometheus` or `promtool`; without it the test fails."""
    found = program(name)
    if found is None:
        pytest.fail(f"{name} is missing: run `make test` or `.venv/bin/python tools/prometheus.py`, or {BY_HAND}")
    return found


def promtool(*arguments: str | Path, told: str = "") -> str:
    """What it says; the test fails if it finds anything wrong."""
    ran = subprocess.run(
        [needed("promtool"), *map(str, arguments)], input=told, capture_output=True, text=True, timeout=120, check=False
    )
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0, said
    return said


class Alert(NamedTuple):
    """A rule of the alerts file."""

    name: str
    expr: str
    labels: dict[str, str]
    annotations: dict[str, str]


def alerts() -> list[Alert]:
    """Those of the shipped file, in its order. It reads the form which that file has, not YAML at large."""
    found = []
    for block in re.split(r"^ +- alert: ", ALERTS.read_text(), flags=re.MULTILINE)[1:]:
        name, _, body = block.partition("\n")
        expr = re.search(r"^ +expr: (?:>-\n)?(.*?)\n +(?:for|labels):", body, re.DOTALL | re.MULTILINE)
        assert expr, name
        parts = dict(re.findall(r"^ +(labels|annotations):\n((?: {10,}.*\n?)+)", body, re.MULTILINE))
        found.append(Alert(name, " ".join(expr[1].split()), *(pairs(parts[one]) for one in ("labels", "annotations"))))
    return found


def pairs(lines: str) -> dict[str, str]:
    return {key: text.strip("'") for key, text in re.findall(r"^ +(\w+): (.+)$", lines, re.MULTILINE)}


def names_of() -> set[str]:
    """Every name under which a sample of ours may come, and every one that is recorded."""
    names = {family.name for family in FAMILIES}
    histograms = (family.name for family in FAMILIES if family.type == "histogram")
    return names | {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}


def recorded() -> set[str]:
    """The names of the recording rules."""
    return set(re.findall(r"record: (\S+)", RULES.read_text()))


class Prometheus:
    """A server on a free port that keeps its data in `folder`; a context. `hubs` are their ports by hub and plane.

    Its configuration is the shipped one, but for addresses and pace.
    """

    def __init__(self, folder: Path, ports: Mapping[str, int]) -> None:
        (self.port,) = free_ports(1)
        self.folder = folder
        text = (DEPLOY / "prometheus.yml").read_text()
        for plane, default in (("control", "8787"), ("data", "8788")):
            assert f"127.0.0.1:{default}" in text
            text = text.replace(f"127.0.0.1:{default}", f"127.0.0.1:{ports[plane]}")
        for rules in (RULES, ALERTS):
            (folder / rules.name).write_text(rules.read_text())
        paced = text.replace("_interval: 15s", "_interval: 200ms")
        assert paced != text
        (folder / "prometheus.yml").write_text(paced)

    def __enter__(self) -> Prometheus:
        self.process = subprocess.Popen(
            [
                *(needed("prometheus"), "--config.file", str(self.folder / "prometheus.yml")),
                *("--storage.tsdb.path", str(self.folder / "data"), "--web.listen-address", f"127.0.0.1:{self.port}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        said: list[str] = []
        for line in self.process.stderr:
            said.append(line)
            if "ready to receive" in line:
                break
        else:
            self.process.wait(10)
            pytest.fail("".join(said))
        self._rest = threading.Thread(target=self.process.stderr.read)
        self._rest.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stderr is not None
        self.process.kill()
        self.process.wait(10)
        self._rest.join(10)
        self.process.stderr.close()

    def ask(self, path: str, **query: str) -> Any:
        """The `data` of its answer; the test fails with what it says is wrong with the query."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                pytest.fail(f"{query}: {json.load(error)['error']}")

    def query(self, expr: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The value of each series by its labels, sorted and without the name."""
        found = self.ask("query", query=expr)["result"]
        return {
            tuple(sorted((key, text) for key, text in one["metric"].items() if key != "__name__")): float(
                one["value"][1]
            )
            for one in found
        }

    def value(self, expr: str) -> float:
        """That of the only series."""
        found = self.query(expr)
        assert len(found) == 1, (expr, found)
        return next(iter(found.values()))

    def until(self, true: Callable[[], object], what: str) -> None:
        """Look until it is true; at once no more if Prometheus has ended."""
        fd = os.pidfd_open(self.process.pid)
        try:
            for _ in range(LOOKS):
                if true():
                    return
                assert not select.select([fd], [], [], 0.05)[0], "prometheus has ended"
        finally:
            os.close(fd)
        pytest.fail(f"not in time: {what}")

    def scraped_since(self, moment: float) -> None:
        """Both planes were scraped, and the rules looked at that, after this time (seconds since 1970)."""
        seen = f"min(timestamp(sheratan_build_info)) > {moment}"
        self.until(lambda: len(self.query(f"count({seen})")) == 1, "a scrape")
        after = self.ask("query", query="time()")["result"][0]
        self.until(lambda: self._evaluated() > after, "an evaluation of the rules")

    def _evaluated(self) -> float:
        """When the recording rules were looked at last."""
        found = self.query("min(timestamp(hub:sheratan_queue_fill:ratio))")
        return next(iter(found.values()), 0)


Scrape = Mapping[str, float]
"""What both planes told at one time: the value of each series, as PromQL writes it, with the labels of the scrape."""


def scrape(texts: Mapping[str, str | None], hub: str = "main") -> Scrape:
    """A scrape of what each plane told; None for one that has not answered."""
    told: dict[str, float] = {}
    for plane, text in texts.items():
        target = {"job": f"sheratan-{plane}", "instance": f"hub-{plane}", "hub": hub}
        told[series("up", target)] = float(text is not None)
        for family in parse_text(text or ""):
            for sample in family.samples:
                told[series(sample.name, {**sample.labels, **target})] = sample.value
    return told


def series(name: str, labels: Mapping[str, str]) -> str:
    return f"{name}{{{','.join(f'{key}={json.dumps(text)}' for key, text in sorted(labels.items()))}}}"


def fires(folder: Path, minutes: list[Scrape], *, nothing_at: int, at_end: Iterable[str]) -> None:
    """Hold the shipped alerts against what was scraped once a minute.

    Nothing may fire in the minute `nothing_at`; at the end all of `at_end` must. promtool judges.
    """
    names = sorted({name for one in minutes for name in one})
    inputs = [
        {"series": name, "values": " ".join("_" if name not in one else f"{one[name]!r}" for one in minutes)}
        for name in names
        if not any(one.get(name, 0.0) != one.get(name, 0.0) for one in minutes)  # NaN
    ]
    firing = 'group by (alertname) (ALERTS{alertstate="firing"%s})'
    wanted = [
        {"expr": firing % f',alertname="{name}"', "eval_time": f"{len(minutes) - 1}m", "exp_samples": [fired(name)]}
        for name in at_end
    ]
    quiet = {"expr": firing % "", "eval_time": f"{nothing_at}m", "exp_samples": []}
    case = {"name": "scraped", "interval": "1m", "input_series": inputs, "promql_expr_test": [quiet, *wanted]}
    test = {"rule_files": [str(RULES), str(ALERTS)], "evaluation_interval": "1m", "tests": [case]}
    path = folder / "scraped.test.json"
    path.write_text(json.dumps(test))
    promtool("test", "rules", path)


def fired(name: str) -> dict[str, Any]:
    return {"labels": f'{{alertname="{name}"}}', "value": 1}
