"""The runbook beside alerts, audit events, code and benchmarks: each knows the others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sheratan_hub import audit
from sheratan_hub.cli import main
from sheratan_hub.config import DEFAULT_TOKEN, ENVIRONMENT, FIELDS, SECRETS, AlertSettings
from sheratan_hub.metrics.table import CAUSES
from sheratan_hub.rules import explain, jobs
from sheratan_hub.rules.command import Code
from sheratan_hub.rules.verdict import CODES
from tests.prometheus import alerts, names_of
from tests.web.test_docs import anchors, changed, resolve

ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
BENCHMARKS = (ROOT / "docs/benchmarks.md").read_text()
EVENTS = {*audit.NAMES.values(), "LEASE_REAP"}


def part(heading: str, level: int = 2) -> str:
    """What stands below a heading, up to the next of its level."""
    marks = "#" * level
    found = re.search(
        rf"^{marks} {re.escape(heading)}\n(.*?)(?=^#{{1,{level}}} |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL
    )
    assert found, heading
    return found[1]


def entries() -> dict[str, str]:
    """The failure modes by their anchor."""
    pieces = re.split(r"^### (.+)\n", part("Failure modes"), flags=re.MULTILINE)
    return {anchors(f"### {title}").pop(): text for title, text in zip(pieces[1::2], pieces[2::2], strict=True)}


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ") or line.startswith("|---")]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    heads = {place - 1 for place, row in enumerate(cells) if set(row[0]) == {"-"}}
    return [row for place, row in enumerate(cells) if place not in heads and set(row[0]) != {"-"}]


ENTRIES = entries()


def test_every_alert_is_linked_to_its_entry_and_the_entry_names_it() -> None:
    told = {name: anchor for anchor, text in ENTRIES.items() for name in re.findall(r"`(Sheratan\w+)`", head(text))}
    linked = {one.name: one.annotations["runbook_url"].removeprefix("docs/runbook.md#") for one in alerts()}
    there = {name: anchor for name, anchor in told.items() if name in linked}
    assert linked == {**there, "SheratanHubDown": "hub-down"}
    assert set(re.findall(r"`(Sheratan\w+)`", RUNBOOK)) == set(linked)


def head(text: str) -> str:
    """An entry's first paragraph, which names its alerts and events."""
    return text.strip().split("\n\n")[0]


def test_every_finding_of_a_diagnosis_leads_to_an_entry() -> None:
    assert {anchor for _, anchor in CODES.values()} <= ENTRIES.keys()


@pytest.mark.parametrize("anchor", ENTRIES)
def test_every_entry_says_what_is_seen_what_it_means_and_what_to_do(anchor: str) -> None:
    text = ENTRIES[anchor]
    assert "alert" in head(text).lower()
    assert "**Do.**" in text
    assert "**Seen.**" in text or anchor == "registry-lost"
    assert "**Means.**" in text or "| means |" in text


def test_every_audit_event_is_in_the_table_and_in_the_entry_that_it_names() -> None:
    told = {row[0].strip("`"): row[2] for row in rows(part("Audit events"))}
    assert told.keys() == EVENTS
    for event, link in told.items():
        (anchor,) = re.findall(r"\]\(#([\w-]+)\)", link)
        text = ENTRIES[anchor]
        if not event.startswith(("NODE_DR", "NODE_RE", "ADMIN")):  # an operator's own doing
            assert f"`{event}`" in text, event


def test_what_looks_like_an_audit_event_is_one() -> None:
    others = {str(code).upper() for code in Code} | set(jobs.REASONS) | {"DRIFT", "RED", "YELLOW", "STALE", "DEAD"}
    assert set(re.findall(r"`([A-Z]{2,}_[A-Z_]+)`", RUNBOOK)) - others - set(ENVIRONMENT) - EVENTS - secrets() <= {
        *("HUB_CONTROL_URL", "HUB_DATA_URL")
    }


def secrets() -> set[str]:
    return {name for one in SECRETS.values() for name in one.variables}


def test_the_watchers_rules_are_all_in_their_entries() -> None:
    told = {name for text in ENTRIES.values() for name in re.findall(r"The watcher's rule:\s`(\w+)`", text)}
    rules = {name for name in AlertSettings.__struct_fields__ if f"alerts.{name}" in FIELDS and is_rule(name)}
    assert told == rules | {"audit_chain"}


def is_rule(name: str) -> bool:
    return type(FIELDS[f"alerts.{name}"].default).__name__ == "AlertRule"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", RUNBOOK):
        file, _, anchor = target.partition("#")
        text = (ROOT / "docs" / file).read_text() if file else RUNBOOK
        assert not anchor or anchor in anchors(text), target


def test_files_that_it_names_in_the_project_are_there() -> None:
    found = re.findall(r"`(tools/[\w./-]+)`|python (tools/\w+\.py)", RUNBOOK)
    assert len(found) > 3
    for names in found:
        assert (ROOT / (names[0] or names[1])).exists(), names


def test_commands_exist() -> None:
    spoken = re.findall(r"`sheratan-hub ([^`\n]+)`", RUNBOOK) + re.findall(
        r"^sheratan-hub ([^#\n]+)", RUNBOOK, re.MULTILINE
    )
    assert len(spoken) > 40
    for text in spoken:
        words = text.split()
        if words[0] != "cannot":  # "cannot start: ...", which it says itself
            resolve(main, words, text)


def test_variables_have_the_defaults_that_it_tells() -> None:
    table = rows(part("Variables", 3))
    assert len(table) > 15
    for name, default, _ in table:
        variable = name.strip("`")
        if variable in secrets():
            assert default.strip("`") == (DEFAULT_TOKEN if variable == "SHERATAN_HUB_TOKEN" else "none"), variable
            continue
        real = changed(FIELDS[ENVIRONMENT[variable]].default)
        said = real if isinstance(real, str) else json.dumps(real)
        if variable == "SHERATAN_STORE_URL":
            said = "sqlite://<data dir>/hub.db"
        assert default.strip("`") == (said or "none"), variable


def test_settings_metrics_codes_and_reasons_that_it_names_exist() -> None:
    for name, key in re.findall(r"`\[(\w+)\]\s(\w+)", RUNBOOK):
        assert f"{name}.{key}" in FIELDS, (name, key)
    named = set(re.findall(r"`(sheratan_\w+)", RUNBOOK))
    assert len(named) > 10
    assert named <= names_of()
    known = set(explain.REASONS)
    for row in rows(ENTRIES["queue-stuck"]):
        assert {word.strip(" `") for word in row[0].split(",")} <= known, row
    assert {row[0].strip("`") for row in rows(ENTRIES["dead-letters-growing"])} == set(jobs.REASONS) - {
        *("CANCELLED", "PURGED", "DEPENDENCY_FAILED")
    }
    assert {row[0].strip("`") for row in rows(ENTRIES["leases-lost"])} == set(CAUSES)


def test_the_default_ports_are_told() -> None:
    assert [(int(row[0]), row[1]) for row in rows(part("Ports", 3))] == [
        (FIELDS["control.port"].default, "control"),
        (FIELDS["data.port"].default, "data"),
    ]


def test_sizes_are_those_of_the_benchmarks() -> None:
    """Ratios and rows are copied from there; a rate is the lowest ratio times the slowest empty handler."""
    measured = {row[0].split("`")[1]: row for row in rows(BENCHMARKS) if len(row) == 4 and row[0].startswith("`")}
    slowest = re.search(r"handler did ([\d,]+) to", BENCHMARKS)
    assert slowest
    assert f"({slowest[1]} requests a second at least)" in RUNBOOK
    sizes = rows(part("Sizing"))
    rates = [row for row in sizes if row[0].startswith("`")]
    assert len(rates) == 6
    for row in rates:
        theirs = measured[row[0].split("`")[1]]
        assert row[1:3] == theirs[2:4], row
        for ratio, rate in zip(row[1:3], row[3:5], strict=True):
            lowest = float(ratio.split("-")[0]) * int(slowest[1].replace(",", ""))
            assert rate == f"{lowest:,.0f}", row
    disk = [row for row in rows(BENCHMARKS) if row[0].startswith(("the store", "of these"))]
    for name, theirs in (
        ("in the store while", "queued"),
        ("in the store when", "with its ledger"),
        ("of these", "of these"),
    ):
        (mine,) = (row[1:] for row in sizes if row[0].startswith(name))
        (other,) = (row[1:] for row in disk if theirs in row[0])
        assert mine == other
    assert next(row[1:] for row in sizes if row[0] == "memory, MiB") == [
        cell.split(";")[0] for cell in next(row for row in rows(BENCHMARKS) if row[0].startswith("memory"))[2:]
    ]
