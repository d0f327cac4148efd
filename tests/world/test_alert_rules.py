"""The shipped rules for Prometheus: they are valid, tried, speak of metrics that there are, and the dashboard too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.metrics.table import FAMILIES
from tests.prometheus import ALERTS, CASES, DEPLOY, RULES, alerts, names_of, promtool, recorded

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "tools/deploy/grafana/sheratan-hub.json"
ASKED = (
    *("QueueStuck", "NodeDown", "FleetSilent", "DeadLettersGrowing", "AuthBurst", "PortMismatch", "IntegrityFailure"),
    *("CommitSlow", "DiskFilling", "RotationStragglers", "AuditNotWritable", "EventLoopStuck"),
)
"""What must be watched, whatever else is."""

OTHERS = {"up", "ALERTS", "process_start_time_seconds", "process_resident_memory_bytes", "process_cpu_seconds_total"}
"""Names that come from Prometheus itself and from the process."""


def test_promtool_finds_the_configuration_and_the_rules_valid() -> None:
    promtool("check", "config", DEPLOY / "prometheus.yml")
    promtool("check", "rules", RULES, ALERTS)


def test_every_alert_fires_when_it_should_and_is_silent_when_it_should_not() -> None:
    assert "SUCCESS" in promtool("test", "rules", CASES)


def test_every_alert_has_a_case_of_each_kind() -> None:
    cases = re.findall(r"alertname: (\w+)\n +exp_alerts:( \[\])?", CASES.read_text())
    names = [one.name for one in alerts()]
    assert {name for name, silent in cases if silent} == set(names)
    assert {name for name, silent in cases if not silent} == set(names)
    assert {f"Sheratan{name}" for name in ASKED} <= set(names)
    assert len(set(names)) == len(names)


def test_every_alert_says_how_bad_it_is_what_it_is_and_where_to_look() -> None:
    for alert in alerts():
        assert alert.labels["severity"] in ("critical", "warning"), alert.name
        assert alert.annotations.keys() == {"summary", "description", "runbook_url"}, alert.name
        assert re.fullmatch(r"docs/runbook\.md#[\w-]+", alert.annotations["runbook_url"]), alert.name


def expressions() -> dict[str, str]:
    """All that is asked of Prometheus, by where it stands."""
    found = {alert.name: alert.expr for alert in alerts()}
    text = re.sub(r"^ *#.*\n", "", RULES.read_text(), flags=re.MULTILINE)
    found |= dict(re.findall(r"record: (\S+)\n +expr: (?:>-\n)?(.*?)(?=\n\n|\Z)", text, re.DOTALL))
    return found | dict(panel_queries())


def panel_queries() -> list[tuple[str, str]]:
    """(panel, query) of the dashboard, what it draws beside the panels included."""
    board = json.loads(DASHBOARD.read_text())
    found = [(panel["title"], one["expr"]) for panel in board["panels"] for one in panel.get("targets", ())]
    return found + [(one["name"], one["expr"]) for one in board["annotations"]["list"]]


@pytest.mark.parametrize("place", expressions())
def test_every_metric_and_label_that_is_asked_for_exists(place: str) -> None:
    expr = expressions()[place]
    labels = {family.name: family for family in FAMILIES}
    plain = re.sub(r'"[^"]*"', '""', expr)
    named = set(re.findall(r"\b(?:hub:)?sheratan_\w+(?::\w+)?", plain))
    assert named <= names_of() | recorded(), place
    for name, selector in re.findall(r"(?<![\w:])(\w+)\{([^}]*)\}", expr):
        family = labels.get(re.sub(r"_(bucket|sum|count)$", "", name) if name not in labels else name)
        if family is None:
            assert name in OTHERS, name
            continue
        for label, operator, value in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', selector):
            if label in ("hub", "job"):
                continue
            assert label in family.labels, (place, name, label)
            known = {one[family.labels.index(label)] for one in family.known}
            if known and operator != "!~" and value not in ("5..",):
                assert set(value.split("|")) <= known, (place, name, value)


def test_the_dashboard_asks_of_one_hub_only_and_lays_its_panels_beside_each_other() -> None:
    board: dict[str, Any] = json.loads(DASHBOARD.read_text())
    for panel, query in panel_queries():
        assert 'hub="$hub"' in query, panel
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not mine & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= mine
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert {one["name"] for one in board["templating"]["list"]} == {"datasource", "hub"}
