"""The documents against the code: what the code has is told, what is told exists."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import re
import shlex
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from sheratan_hub import audit, audit_read, canonical, cli_store, config, handlers
from sheratan_hub.alerts import Alert
from sheratan_hub.audit import Audit
from sheratan_hub.clock import VirtualClock
from sheratan_hub.config import FIELDS, SECRETS, Settings
from sheratan_hub.explaining import NODES_MAX
from sheratan_hub.metrics.fleet_json import fleet_json
from sheratan_hub.metrics.table import FAMILIES
from sheratan_hub.reload import is_reloaded
from sheratan_hub.rules import consistency, evidence, explain, jobs, missions, pull, sweep, verdict
from sheratan_hub.rules.access import GRANTS
from sheratan_hub.rules.attestation import Attested
from sheratan_hub.rules.command import Code, Event
from sheratan_hub.rules.edges import AT_ONCE, PARENTS_MAX
from sheratan_hub.rules.explain import SHOWN
from sheratan_hub.rules.finish import Finished
from sheratan_hub.rules.graph import EDGES_MAX
from sheratan_hub.rules.nodes import Node
from sheratan_hub.rules.pull import Pulled
from sheratan_hub.web import admin_forms, forms, history, nodes, render, results, standing_forms
from sheratan_hub.web import explain as web_explain
from sheratan_hub.web.errors import STATUS
from sheratan_hub.web.query import PAGE_DEFAULT, PAGE_MAX
from sheratan_hub.web.routes import ROUTES
from tests.conftest import TOKEN, MakeSite
from tests.web.test_bundle import MEMBERS

ROOT = Path(__file__).parents[2]
PROTOCOL = (ROOT / "docs/protocol.md").read_text()
README = (ROOT / "README.md").read_text()
HOWTO = (ROOT / "docs/howto.md").read_text()
TELLING = ("README.md", "docs/howto.md", "docs/operations.md")
"""What tells people what to type."""
DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for folder in (".", "docs", "stores") for path in (ROOT / folder).glob("*.md")
)

FORMS: dict[str, type[msgspec.Struct]] = {
    "A job to submit": forms.JobForm,
    "Several jobs": forms.BatchForm,
    "A mission to submit": forms.MissionForm,
    "A pull": forms.PullForm,
    "A result": forms.ResultForm,
    "Several results": forms.ResultsForm,
    "An extension": forms.ExtendForm,
    "A release": forms.ReleaseForm,
    "Heartbeat": forms.BeatForm,
    "A redrive": admin_forms.RedriveForm,
    "A redrive of many": admin_forms.RedriveManyForm,
    "A purge": admin_forms.PurgeForm,
    "A cancel of many": admin_forms.CancelManyForm,
    "A pause": standing_forms.PauseForm,
    "A resume": standing_forms.ResumeForm,
    "A rate limit": standing_forms.RateForm,
    "A drain": nodes.DrainForm,
    "A rotation": forms.RotationForm,
    "A scoped token": forms.AccessForm,
}
ANSWERS: dict[str, type[msgspec.Struct]] = {
    "Answer to a submit": render.SubmitAnswer,
    "A job": render.JobAnswer,
    "A lease": render.LeaseAnswer,
    "An attempt": history.AttemptAnswer,
    "A late result": history.LateAnswer,
    "An explanation": web_explain.ExplainAnswer,
    "A reason": web_explain.ReasonAnswer,
    "Nodes of an explanation": web_explain.NodesAnswer,
    "A node of an explanation": web_explain.NodeAnswer,
}


def section(heading: str) -> str:
    """What stands below a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", PROTOCOL, re.MULTILINE | re.DOTALL)
    assert found, f"docs/protocol.md has no heading {heading!r}"
    return found[1]


def table(heading: str) -> list[list[str]]:
    """The rows of all tables below a heading, their heads left out, backticks and bars kept apart."""
    rows = [line for line in section(heading).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    heads = {place - 1 for place, row in enumerate(cells) if all(set(cell) <= {"-"} for cell in row)}
    return [row for place, row in enumerate(cells) if place not in heads and place - 1 not in heads]


def column(heading: str, place: int = 0) -> list[str]:
    return [row[place].strip("`") for row in table(heading)]


def told_once(told: list[str], there: Iterable[str]) -> None:
    assert sorted(told) == sorted(set(there))


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


# Routes, codes, reasons, states


def test_the_reference_lists_every_route_on_its_plane_and_no_other():
    for heading, plane in (("Control plane", "control"), ("Data plane", "data"), ("Both planes", "both")):
        told_once(column(heading), (f"{route.method} {route.path}" for route in ROUTES if route.plane == plane))


def test_the_reference_tells_the_right_of_every_route():
    told = {row[0].strip("`"): row[1].strip("`") for plane in PLANE_HEADINGS for row in table(plane)}
    assert told == {f"{route.method} {route.path}": route.right for route in ROUTES}
    assert {row[0].strip("`") for row in table("Credentials")} == {route.right for route in ROUTES}


def test_the_reference_tells_the_rights_of_every_role():
    told = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in table("Scoped tokens")}
    served = {route.right for route in ROUTES}
    assert told == {role: rights & served for role, rights in GRANTS.items()}


def test_the_reference_tells_whether_a_route_takes_a_body_and_may_do_without():
    for heading in PLANE_HEADINGS:
        for name, _, body, _ in table(heading):
            route = next(route for route in ROUTES if f"{route.method} {route.path}" == name.strip("`"))
            assert bool(body) == (route.form is not None), name
            assert ("none" in body) == route.body_optional, name


PLANE_HEADINGS = ("Control plane", "Data plane", "Both planes")


def test_the_reference_lists_every_code_with_its_status_and_no_other():
    told = {row[0].strip("`"): int(row[1]) for row in table("Codes")}
    assert told.keys() == {str(code) for code in Code}
    assert told == {str(code): status for code, status in STATUS.items()}
    assert len(told) == len(table("Codes"))


def test_the_reference_lists_every_reason_of_jobs_pulls_and_explanations_and_no_other():
    told_once(column("Of jobs"), jobs.REASONS)
    told_once(column("Of pulls"), pull.REASONS)
    told_once(column("Of explanations"), explain.REASONS)


def test_the_reference_lists_every_reason_of_audit_lines_and_no_other():
    guards = {f"{theirs}_path_on_{mine}_port" for theirs, mine in (("data", "control"), ("control", "data"))}
    audited = set(reasons_in_code()) - {"not_holder"}  # which is no audit event
    audited |= {*sweep.CAUSES.values(), "drain_deadline"}
    assert '_path_on_{self.name}_port"' in (ROOT / "sheratan_hub/web/plane.py").read_text()
    told_once(column("Of audit lines"), audited | guards | set(evidence.VERDICTS.values()))
    assert {row[1] for row in table("Of audit lines")} <= audit_events()


def reasons_in_code() -> Iterator[str]:
    """The texts that refusals and lost leases are given as their reason."""
    for path in sorted((ROOT / "sheratan_hub").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            given = [word.value for word in node.keywords if word.arg == "reason" and node.func.id == "Refused"]
            given += node.args[1:2] if node.func.id == "_fail" else node.args[2:3] if node.func.id == "_ended" else []
            yield from (one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str))


def test_the_reference_lists_every_transition_and_no_other():
    told = [tuple(cell.strip("`") for cell in row[:3]) for row in table("States and transitions")]
    assert sorted(told) == sorted((*key, to) for key, to in jobs.TRANSITIONS.items())


def test_the_reference_names_every_state_and_no_other():
    sentence = re.search(r"A job is (.*?)\.", section("States and transitions"), re.DOTALL)
    assert sentence
    states = set(jobs.TRANSITIONS.values()) | {state for state, _ in jobs.TRANSITIONS}
    told_once(re.findall(r"`(\w+)`", sentence[1]), states)


def test_the_reference_lists_every_finding_of_a_diagnosis_with_its_severity_and_no_other():
    assert {row[0].strip("`"): row[1] for row in table("Findings")} == {
        code: severity for code, (severity, _) in verdict.CODES.items()
    }


def test_the_reference_lists_every_member_of_a_bundle_and_no_other():
    told = {name.partition("/")[0] for name in column("Diagnosis bundle")}
    assert told == {name.partition("/")[0] for name in MEMBERS} | {"errors"}


# Bodies and answers


@pytest.mark.parametrize("heading", FORMS)
def test_the_reference_lists_every_field_of_a_body_with_its_default(heading: str):
    fields = {field.encode_name: field for field in msgspec.structs.fields(FORMS[heading])}
    told_once(column(heading), fields)
    for name, _, default, *_ in table(heading):
        field = fields[name.strip("`")]
        assert default == ("needed" if field.required else f"`{json_of(field.default)}`"), name


def test_the_example_of_a_pull_with_a_result_is_a_result_with_a_pull():
    asked, answered = fenced(section("A pull with a result"), "json")
    form = msgspec.json.decode(asked, type=forms.ResultForm)
    assert form.pull is not None
    told = json.loads(answered)
    finished = results.finished(Finished(told["job_id"], "completed"))
    assert told == render.pulled(Pulled(reason=told["reason"]), told["defer_ms"], 0, **finished)


def json_of(value: Any) -> str:
    return bytes(value).decode() if isinstance(value, msgspec.Raw) else json.dumps(value)


@pytest.mark.parametrize("heading", FORMS)
def test_the_reference_tells_the_bounds_of_every_number_in_a_body(heading: str):
    types = {field.encode_name: field.type for field in msgspec.structs.fields(FORMS[heading])}
    for name, bounds, *_ in table(heading):
        schema = msgspec.json.schema(types[name.strip("`")])
        for kind in schema.get("anyOf", [schema]):
            numbers = [kind[key] for key in ("minimum", "exclusiveMinimum", "maximum") if key in kind]
            for number in numbers:
                assert re.search(rf"\b{number:g}\b" if number < 1e5 else rf"\b{int(number)}\b", bounds), name
            for choice in kind.get("enum", ()):
                assert str(choice) in bounds, name


@pytest.mark.parametrize("heading", ANSWERS)
def test_the_reference_lists_every_field_of_an_answer(heading: str):
    told_once(column(heading), ANSWERS[heading].__struct_fields__)


def test_the_reference_lists_every_field_of_a_node():
    answer = render.node_answer(Node("n", 0, 0, attested=Attested()), "ONLINE")
    told_once(column("A node"), answer)
    said = next(row[1] for row in table("A node") if row[0] == "`attestation`")
    assert all(f"`{name}`" in said for name in answer["attestation"])


async def test_the_reference_lists_every_field_of_a_mission(make_site: MakeSite):
    site = await make_site()
    _, made = await site.data("POST", "/api/missions", {"title": "t"})
    _, told = await site.data("GET", f"/api/missions/{made['mission_id']}")
    told_once(column("A mission"), told.keys() - {"ok"})
    states = next(row[1] for row in table("A mission") if row[0] == "`status`")
    assert states.rpartition(": ")[2].split(", ") == list(missions.STATES)


def test_the_reference_tells_the_bounds_of_explanations():
    for text in (section("Explain"), section("Nodes of an explanation")):
        assert str(NODES_MAX) in text
        assert f" {SHOWN}" in text


def test_the_reference_tells_the_limits_of_dependencies():
    text = section("Dependencies")
    for number in (PARENTS_MAX, EDGES_MAX, AT_ONCE):
        assert str(number) in text


def test_the_reference_tells_the_bounds_of_pages():
    (limit,) = (row for row in table("Query") if row[0] == "`limit`")
    assert limit[1:] == [f"1 to {PAGE_MAX}", str(PAGE_DEFAULT)]


# Integrity


def test_the_worked_example_of_integrity_is_right():
    text = section("Integrity")
    result, sha, sig = fenced(text, "json")
    (checked,) = fenced(text, "text")
    job_id = re.search(r"Job `([^`]+)`", text)
    key = re.search(r"under the key `([^`]+)`", text)
    assert job_id
    assert key
    given = (job_id[1], True, result.strip().encode(), b"null")
    assert canonical.result_text(*given).decode() == checked.strip()
    assert canonical.result_sha256(*given) == json.loads(sha)["sha256"]
    assert canonical.result_sig(key[1], *given) == json.loads(sig)["sig"]


# Configuration


def test_the_reference_lists_every_setting_with_its_default_bounds_and_variables_and_no_other():
    rows = [row for row in table("Configuration") if len(row) == 5]
    told = {row[0].strip("`"): (json.loads(row[1].strip("`")), row[2], re.findall(r"`(\w+)`", row[3])) for row in rows}
    assert told == {
        key: (
            changed(field.default),
            config._allowed(key),
            [name for name, of in config.ENVIRONMENT.items() if of == key],
        )
        for key, field in FIELDS.items()
    }
    assert len(rows) == len(FIELDS)


def changed(default: Any) -> Any:
    """A default as hub.toml and the reference write it: of a rule only what differs from any rule."""
    if not isinstance(default, config.AlertRule):
        return list(default) if isinstance(default, tuple) else default
    plain = msgspec.to_builtins(config.AlertRule(""))
    return {name: value for name, value in msgspec.to_builtins(default).items() if value != plain[name]}


def test_the_reference_lists_every_field_of_a_rule_and_of_an_alert_and_no_other():
    rules = {row[0].strip("`"): row[1] for row in table("Alert rules")}
    told_once(list(rules), config.AlertRule.__struct_fields__)
    plain = msgspec.to_builtins(config.AlertRule("AUTH_FAILURE"))
    for name in ("more_than", "window_seconds", "per", "ignore_loopback", "cooldown_seconds", "on"):
        assert rules[name] == str(plain[name]).replace("True", "true").replace("False", "false"), name
    told_once(column("Alerts"), Alert.__struct_fields__)


async def test_the_reference_lists_every_field_of_the_chain_and_every_query(make_site: MakeSite):
    site = await make_site()
    _, body = await site.control("GET", "/api/audit")
    told_once(column("The chain over HTTP"), body["chain"])
    assert set(column("Reading the audit log over HTTP")) == {"limit", "cursor", "last", *audit_read.Filter._fields}


def test_the_reference_lists_every_setting_that_waits_for_a_restart_and_no_other():
    told_once(column("Reload"), (key for key in FIELDS if not is_reloaded(key)))


def test_the_reference_lists_every_secret_and_no_variable_that_does_not_exist():
    secrets = {row[0].strip("`"): row for row in table("Configuration") if len(row) == 4}
    assert secrets.keys() == SECRETS.keys()
    for name, source in SECRETS.items():
        assert tuple(re.findall(r"`(\w+)`", secrets[name][1])) == source.variables
        assert secrets[name][2] == f"`{source.file_key}`"
    ours = {*config.ENVIRONMENT, *(name for one in SECRETS.values() for name in one.variables)}
    assert set(re.findall(r"\bSHERATAN_[A-Z_]+\b", section("Configuration"))) == ours
    for text in (PROTOCOL, *(read(name) for name in TELLING)):
        assert set(re.findall(r"`(SHERATAN_[A-Z_]+)`", text)) <= ours


def test_settings_that_the_documents_name_exist():
    for text in map(read, DOCUMENTS):
        for name, key in re.findall(r"`\[(\w+)\]\s(\w+)`", text):
            assert f"{name}.{key}" in FIELDS


# Audit, ledger, metrics


def audit_events() -> set[str]:
    return {f"`{name}`" for name in (*audit.NAMES.values(), "LEASE_REAP")}


def test_the_reference_lists_every_audit_event_and_no_other():
    told = [row[0] for row in table("Audit log") if row[0].strip("`").isupper()]
    assert sorted(told) == sorted(audit_events())


def test_the_reference_lists_every_field_of_an_audit_line_and_its_check_finds_a_change(tmp_path: Path):
    clock = VirtualClock()
    log = Audit(tmp_path / "audit.jsonl", clock)
    from sheratan_hub.items import Committed, Happened, Origin
    from sheratan_hub.storage import Changes

    event = Event(clock.now(), "refused.invalid_token", "client", meta={"reason": "invalid_token"})
    for _ in range(4):
        log.committed(Committed([Happened([event], Origin("data", "127.0.0.1", "/api/jobs"))], Changes(), 0))
    log.close()
    lines = log.path.read_bytes().splitlines()
    told = [row[0].strip("`") for row in table("Audit log") if not row[0].strip("`").isupper()]
    assert told == list(json.loads(lines[-1]))

    space: dict[str, Any] = {}
    exec(fenced(section("The chain"), "python")[0], space)
    space["check"](log.path)
    log.path.write_bytes(log.path.read_bytes().replace(b"127.0.0.1", b"127.0.0.2", 1))
    with pytest.raises(AssertionError):
        space["check"](log.path)


def test_the_reference_lists_every_event_of_the_ledger_and_no_other():
    silent = {"due", "expired"}  # a delay that is over is no event, and what expired is told as failed
    told_once(
        column("Ledger"),
        {f"job.{happened}" for _, happened in jobs.TRANSITIONS if happened not in silent}
        | {"job.submitted", "job.cancel_requested", "job.superseded", "job.judged", "job.pruned", "jobs.pruned"}
        | {"mission.submitted", "mission.pruned", "fleet.silent", "fleet.reap"}
        | {f"node.{state.lower()}" for state in ("ONLINE", "STALE", "DEAD")}
        | {f"node.{name}" for name in ("forgotten", "restarted", "drain", "resume")}
        | {f"attestation.{name}" for name in ("first_seen", "drift", "spoof_suspect", "accepted")}
        | {f"token.rotation_{what}" for what in ("started", "finalized", "abandoned")}
        | {"access.created", "access.revoked", "policy.created", "policy.activated"}
        | {"ledger.lost", "store.recovered"},
    )
    known = set(column("Ledger")) | set(
        re.findall(r"`((?:hub|integrity|key|pull|dlq|admin|queue|rate_limit|token)\.\w+)`", section("Ledger"))
    )
    assert set(events_in_code()) <= known


def test_the_reference_lists_every_problem_and_note_of_a_store():
    for heading, there in (("Store problems", consistency.PROBLEMS), ("Store notes", consistency.NOTES)):
        assert [row[:2] for row in table(heading)] == [[f"`{code}`", text] for code, text in there.items()]


def test_the_reference_lists_every_command_of_stores():
    told = {re.sub(r"[^a-z].*", "", one) for one in column("Stores")}
    assert told == set(cli_store.store.commands)


def events_in_code() -> Iterator[str]:
    """The names that events are made with."""
    for path in sorted((ROOT / "sheratan_hub").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                first = node.args[1:2] if node.func.id in ("Event", "job_event") else []
                prefix = "job." if node.func.id == "job_event" else ""
                yield from (prefix + one.value for one in first if isinstance(one, ast.Constant))


def test_the_reference_lists_every_metric_with_its_type_and_no_other():
    there = [(family.name, family.type, family.plane) for family in FAMILIES]
    assert [(name.strip("`"), kind, plane) for name, kind, plane, *_ in table("Prometheus")] == there


def test_the_reference_tells_the_labels_of_metrics():
    told = {row[0].strip("`"): re.findall(r"`(\w+)`", row[3]) for row in table("Prometheus")}
    assert told == {family.name: list(family.labels) for family in FAMILIES}


def test_the_reference_lists_every_json_key_of_metrics_and_no_other():
    nothing: Counter[str] = Counter()
    there = [name for plane in ("control", "data") for name in flat(fleet_json(plane, nothing, nothing))]
    assert column("JSON keys") == there


def flat(values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, dict) else (name,)


# Links, README and how-tos


def read(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_inside_the_documents_lead_somewhere(name: str):
    path = ROOT / name
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        other = path.parent / file if file else path
        assert other.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(other.read_text()), f"{name}: {target}"


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_how_to_has_its_heading_once_and_is_in_the_contents():
    headings = re.findall(r"^##+ (.+)$", HOWTO, re.MULTILINE)
    contents = HOWTO.partition("\n## ")[0]
    assert len(headings) == len(set(headings))
    assert anchors(HOWTO) - {"how-to"} == set(re.findall(r"\]\(#([^)]+)\)", contents))


@pytest.mark.parametrize("name", ["README.md", "docs/howto.md"])
def test_lines_for_beginners_fit_into_120_columns(name: str):
    wide = [line for line in read(name).splitlines() if len(line) > 120 and not line.startswith("|")]
    assert wide == []


def test_the_design_gives_a_reason_for_every_dependency_and_for_no_other():
    project = tomllib.loads(read("pyproject.toml"))
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    wanted += chain(*project["project"]["optional-dependencies"].values())
    wanted += (one for one in chain(*project["dependency-groups"].values()) if isinstance(one, str))
    heads = re.findall(
        r"^\*\*2026-\d\d-\d\d · (.+?)\.?\*\*", read("DESIGN.md").partition("## Dependencies")[2], re.MULTILINE
    )
    told = [name for head in heads for name in head.split(", ")]
    assert sorted(told) == sorted({re.split(r"[<>=]", one)[0] for one in wanted})


def test_no_decision_is_told_twice_or_inside_another():
    heads = Counter(re.findall(r"\*\*2026-\d\d-\d\d · [^*]+\*\*", read("DESIGN.md")))
    assert [head for head, times in heads.items() if times > 1] == []
    assert sum(heads.values()) == len(re.findall(r"^\n\*\*2026-", read("DESIGN.md"), re.MULTILINE))


def test_every_module_of_the_floors_stands_in_the_design():
    told = read("DESIGN.md").partition("| floor |")[2].partition("\n\n")[0]
    names = re.findall(r"`([\w*]+)(?:\.py|/)`", told)
    there = {path.name.removesuffix(".py") for path in (ROOT / "sheratan_hub").iterdir() if path.name[0] not in "_."}
    there = {name for name in there if name != "py.typed"} | {"__main__"}
    assert [name for name in there if not any(fnmatch(name, one) for one in names)] == []
    assert [one for one in names if not any(fnmatch(name, one) for name in there)] == []


@pytest.mark.parametrize("name", TELLING)
def test_make_targets_of_the_documents_exist(name: str):
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for names in re.findall(r"^([a-z][a-z ]*):(?!=)", makefile, re.MULTILINE) for name in names.split()}
    assert set(re.findall(r"\bmake ([a-z]+)\b(?=`|$|\s+#)", read(name), re.MULTILINE)) <= targets


def test_the_first_two_commands_are_the_demo_and_the_tests():
    first, second = re.findall(r"^make ([a-z]+)", README, re.MULTILINE)[:2]
    assert (first, second) == ("demo", "test")


@pytest.mark.parametrize("name", TELLING)
def test_commands_and_options_of_the_documents_exist(name: str):
    from sheratan_hub.cli import main

    text = read(name)
    inline = re.findall(r"`sheratan-hub\s([^`]+)`", text)
    typed = re.findall(r"^(?:\w+=\S+ )?sheratan-hub (.+)$", "".join(fenced(text, "sh")), re.MULTILINE)
    assert len(inline) > 2
    assert len(typed) > 1
    for line in [*inline, *typed]:
        resolve(main, shlex.split(line, comments=True), line)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_stands_in_fences_can_be_read(name: str):
    text = read(name)
    readers = {"json": json.loads, "toml": tomllib.loads, "python": ast.parse}
    for language, reader in readers.items():
        for block in fenced(text, language):
            reader(block)
    for block in fenced(text, "sh"):
        subprocess.run(["sh", "-n"], input=block, text=True, check=True)


@pytest.mark.parametrize("name", TELLING)
def test_paths_of_the_project_that_the_documents_name_exist(name: str):
    local = {"tools/deploy/docker/token"}  # made by who needs it
    for path in set(re.findall(r"(?<![\w/.-])(?:tools|tests|stores|docs)/[\w./-]*\w", read(name))) - local:
        assert (ROOT / path).exists() or (ROOT / name).parent.joinpath(path).exists(), path


def resolve(command: click.Command, words: list[str], text: str) -> None:
    """Follow the words down the groups; every option must be one of the command it stands at."""
    known = {option for param in command.params for option in param.opts} | {"--help"}
    for place, word in enumerate(words):
        if isinstance(command, click.Group) and word in command.commands:
            resolve(command.commands[word], words[place + 1 :], text)
            return
        assert not word.startswith("-") or word in known, text
    assert not isinstance(command, click.Group), text


async def test_the_curl_session_of_the_readme_completes_a_job(make_site: MakeSite, tmp_path: Path):
    site = await make_site()
    session = next(block for block in fenced(README, "sh") if block.startswith("hub()"))
    assert len(session.splitlines()) == 5
    header = "Authorization: Bearer shared-secret"
    session = session.replace(f'"{header}"', f"'{header}'").replace("shared-secret", TOKEN)
    session = session.replace(":8788", f":{site.app.ports['data']}")
    shell = await asyncio.create_subprocess_exec(
        "sh", "-e", "-c", session, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(shell.communicate(), 30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            shell.kill()
    assert shell.returncode == 0, err.decode()
    (listed,) = (await site.data("GET", "/api/jobs"))[1]["jobs"]
    assert (listed["status"], listed["result"]) == ("completed", {"said": "Hello Ada"})
    assert json.loads(out.splitlines()[-1]) == {"ok": True, **listed, "attempts": [], "late": []}


async def test_the_worker_and_the_client_of_the_readme_work_together(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    site = await make_site()
    monkeypatch.setattr(handlers, "_registered", {})
    worker, client = fenced(README, "python")
    assert len(worker.splitlines()) <= 10
    space: dict[str, Any] = {}
    exec(worker, space)
    assert set(handlers._registered) == {"text.stats"}
    text = tmp_path / "text"
    text.write_text("one two\nthree\n")

    urls = f'control_url="{site.url("control", "")}", data_url="{site.url("data", "")}", '
    exec(client.replace("HubClient(token", f"HubClient({urls}token").replace('"shared-secret"', repr(TOKEN)), space)
    counting = asyncio.create_task(space["count"](str(text)))
    lease = await site.lease(kinds=["text.stats"], wait_seconds=10)
    await site.finish(lease, result=space["stats"](lease["params"]))
    assert await asyncio.wait_for(counting, 30) == {"lines": 2, "words": 3}


def test_the_default_token_and_ports_of_the_documents_are_the_defaults():
    defaults = Settings()
    assert config.DEFAULT_TOKEN in README
    assert f"127.0.0.1:{defaults.data.port}" in README
    assert f"**control plane** ({defaults.control.port})" in PROTOCOL
    assert f"({defaults.data.port})" in PROTOCOL
