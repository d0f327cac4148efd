"""The commands for missions, dead letters, the queue and limits, in this process, against a real hub."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from sheratan_hub.cli import main
from sheratan_hub.cli_output import in_short
from sheratan_hub.cli_queue import span
from sheratan_hub.cli_submit import by_flags
from tests.conftest import TOKEN, MakeSite, Site

HOWTO = (Path(__file__).parents[2] / "docs/howto.md").read_text()

Say = Callable[..., Awaitable[Result]]


@pytest.fixture
async def hub(make_site: MakeSite) -> Site:
    return await make_site()


@pytest.fixture
def say(hub: Site, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Runs a command line in a thread, as it has an event loop of its own."""
    monkeypatch.setenv("SHERATAN_HUB_TOKEN", TOKEN)
    urls = ["--control-url", hub.url("control", ""), "--data-url", hub.url("data", "")]

    async def run(*words: str, stdin: str = "") -> Result:
        return await asyncio.to_thread(CliRunner().invoke, main, [*urls, *words], input=stdin)

    return run


async def told(say: Say, *words: str, stdin: str = "") -> Any:
    done = await say(*words, "-o", "json", stdin=stdin)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


async def dead(hub: Site, kind: str = "work", **fields: Any) -> str:
    job_id = await hub.submit(kind, **fields)
    await hub.finish(await hub.lease(kinds=[kind]), ok=False, error={"type": "E", "message": "no\nway"}, retry=False)
    return job_id


async def test_dead_letters_are_listed_newest_first_with_their_error_on_one_line(hub: Site, say: Say) -> None:
    ids = [await dead(hub), await dead(hub, "other"), await dead(hub)]
    head, *rows = (await say("dlq", "list", "--kind", "work")).stdout.splitlines()
    assert head.split()[0] == "job_id"
    assert [row.split()[0] for row in rows] == [ids[2], ids[0]]
    assert rows[0].endswith("E: no way")
    assert [job["job_id"] for job in await told(say, "dlq", "list", "--limit", "1", "--oldest")] == ids[:1]


async def test_dead_letters_are_redriven_by_id_or_filter_and_a_refusal_is_told(hub: Site, say: Say) -> None:
    ids = [await dead(hub), await dead(hub, source="s"), await dead(hub)]
    some = await say("dlq", "redrive", ids[0], "nobody")
    assert (some.exit_code, "1 redriven, 1 refused" in some.stderr, "nobody: " in some.stderr) == (1, True, True)
    assert [one["job_id"] for one in await told(say, "dlq", "redrive", "--source", "s", "--rate", "5")] == [ids[1]]
    assert [one["job_id"] for one in await told(say, "dlq", "redrive", "--all")] == [ids[2]]


async def test_a_job_is_redriven_with_what_depends_on_it(hub: Site, say: Say) -> None:
    first = await dead(hub)
    second = await hub.submit(depends_on=[first])
    assert (await hub.job(second))["status"] == "cancelled"
    (done,) = await told(say, "jobs", "redrive", first, "--dependents")
    assert (done["job_id"], done["redriven"]) == (first, True)
    await hub.finish(await hub.lease())
    assert (await hub.lease(wait_seconds=5))["job_id"] == second


async def test_a_job_is_submitted_that_depends_on_others(hub: Site, say: Say) -> None:
    first = await hub.submit()
    given = ("submit", "work", "--depends-on", f"{first}, {first}", "--on-dependency-failure", "hold")
    made = await told(say, *given)
    await hub.data("POST", f"/api/jobs/{first}/cancel")
    async with asyncio.timeout(10):
        while (await hub.job(made["job_id"]))["root_cause"] != first:
            await asyncio.sleep(0)
    (listed,) = await told(say, "jobs", "list", "--status", "quarantined")
    assert listed["job_id"] == made["job_id"]


async def test_jobs_are_cancelled_by_filter(hub: Site, say: Say) -> None:
    await hub.submit("a")
    kept = await hub.submit("b")
    assert (await told(say, "jobs", "cancel", "--kind", "a", "--dry-run"))["cancelled"] == 0
    assert (await told(say, "jobs", "cancel", "--kind", "a"))["cancelled"] == 1
    assert [job["job_id"] for job in await told(say, "jobs", "list", "--status", "pending")] == [kept]


async def test_a_mission_is_submitted_from_a_file_shown_cancelled_and_redriven(
    hub: Site, say: Say, tmp_path: Path
) -> None:
    file = tmp_path / "mission.json"
    examples = re.findall(r"^```json\n(.*?)^```", HOWTO, re.MULTILINE | re.DOTALL)
    (example,) = (one for one in examples if "nightly report" in one)
    file.write_text(example)
    done = await say("missions", "submit", str(file))
    mission_id, _, *rows = done.stdout.splitlines()
    assert [row.split()[1:] for row in rows] == [["accepted", "a"], ["accepted", "b"], ["accepted", "-"]]
    shown = await told(say, "missions", "show", mission_id)
    assert (shown["title"], shown["jobs"], shown["status"]) == ("nightly report", 3, "pending")
    assert [one["mission_id"] for one in await told(say, "missions", "list")] == [mission_id]
    assert (await told(say, "missions", "cancel", mission_id))["cancelled"] == 3
    assert (await told(say, "missions", "redrive", mission_id))["redriven"] == 3
    again = [
        (await told(say, "missions", "submit", "-", "--idempotency-key", "k", stdin=example))["dedup"] for _ in "ab"
    ]
    assert again == [False, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "Expecting value"),
        ("[]", "a mission is"),
        ('{"title": "t", "tasks": []}', "it has tasks"),
        ('{"title": "t", "jobs": [1]}', "each of its jobs is a JSON object"),
        ('{"title": "t", "jobs": {}}', "a mission is"),
    ],
)
async def test_a_file_that_holds_no_mission_is_wrong_usage(hub: Site, say: Say, text: str, said: str) -> None:
    done = await say("missions", "submit", "-", stdin=text)
    assert (done.exit_code, said in done.stderr) == (2, True), done.output
    assert await told(say, "missions", "list") == []


async def test_the_queue_is_paused_shown_and_resumed(hub: Site, say: Say) -> None:
    await hub.submit()
    (pause,) = await told(say, "queue", "pause", "work", "--for", "10m", "--reason", "disk")
    assert (pause["kind"], pause["reason"]) == ("work", "disk")
    assert "work" in (await say("queue", "pause", "work")).stdout
    shown = await say("queue", "show")
    assert re.search(r"^depth +1 of 1000$", shown.stdout, re.MULTILINE)
    assert "\npauses:\n" in shown.stdout
    assert "\nlanes:\n" in shown.stdout
    assert (await told(say, "queue", "show"))["counts"]["pending"] == 1
    assert "nothing is paused" in (await say("queue", "resume")).stderr


async def test_a_purge_asks_on_a_terminal_only(hub: Site, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    await hub.submit()
    assert (await told(say, "queue", "purge", "--all", "--dry-run"))["matched"] == 1
    monkeypatch.setattr("sheratan_hub.cli_queue.on_terminal", lambda: True)
    no = await say("queue", "purge", "--kind", "work", stdin="n\n")
    assert (no.exit_code, "Cancel 1 waiting jobs?" in no.stderr) == (1, True)
    assert (await hub.app.hub.counts())["job:pending"] == 1
    assert (await told(say, "queue", "purge", "--kind", "work", "--yes"))["purged"] == 1
    await hub.submit()
    monkeypatch.setattr("sheratan_hub.cli_queue.on_terminal", lambda: False)
    assert (await told(say, "queue", "purge", "--kind", "work"))["purged"] == 1


async def test_limits_are_set_shown_and_dropped(hub: Site, say: Say) -> None:
    assert (await told(say, "limits", "set", "s", "--concurrent", "1"))["per_minute"] == 10
    await hub.submit(source="s")
    await hub.submit(source="s")
    await hub.lease()
    assert len(await told(say, "jobs", "list", "--status", "throttled")) == 1
    assert (await told(say, "limits", "show", "s"))["throttled"] is True
    assert (await told(say, "limits", "drop", "s"))["origin"] is None
    gone = await say("limits", "show", "s")
    assert (gone.exit_code, "rate_limit_not_found" in gone.stderr) == (1, True)


@pytest.mark.parametrize(
    "words",
    [
        "dlq redrive",
        "dlq redrive --all --kind k",
        "dlq redrive j --all",
        "queue purge",
        "queue purge --all --kind k",
        "queue pause --for soon",
        "jobs cancel",
        "jobs cancel j --kind k",
        "jobs cancel j --dry-run",
        "submit --wait 5",
        "submit --params @-",
    ],
)
async def test_what_says_too_little_or_too_much_is_wrong_usage(hub: Site, say: Say, words: str) -> None:
    before = await hub.stored()
    done = await say(*words.split(), stdin='{"kind": "k"}\n')
    assert (done.exit_code, "Error: " in done.stderr) == (2, True), done.output
    assert await hub.stored() == before


async def test_with_a_kind_standard_input_is_left_alone(hub: Site, say: Say) -> None:
    made = await told(say, "submit", "work", stdin='{"kind": "other"}\n')
    assert [job["job_id"] for job in await told(say, "jobs", "list")] == [made["job_id"]]


async def test_a_refused_submit_speaks_of_flags(hub: Site, say: Say) -> None:
    done = await say("submit", "work", "--timeout", "-1", "--not-before", "2030-01-01T00:00:00Z")
    assert (done.exit_code, "--timeout" in done.stderr, "timeout_seconds" in done.stderr) == (1, True, False)
    bad = await say("submit", "work", "--not-before", "tomorrow")
    assert "--not-before is not an RFC 3339 time - at --not-before" in bad.stderr


def test_fields_without_a_flag_keep_their_names() -> None:
    assert by_flags("a batch_size - at `$.other_field[0]`") == "a batch_size - at `$.other_field[0]`"
    assert by_flags("Expected `array` - at `$.required_capabilities[0]`") == "Expected `array` - at --needs"


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("2d", 172_800)])
def test_time_spans_are_read(text: str, seconds: float) -> None:
    assert span(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-5", "5 m", "1w", "nan"])
def test_what_is_no_time_span_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        span(text)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (None, None),
        ("plain\ntext", "plain text"),
        ({"type": "E", "message": "m", "trace": "long"}, "E: m"),
        ({"x": 1}, "{'x': 1}"),
        ({"message": "x" * 500}, "x" * 200),
    ],
)
def test_errors_are_told_in_short(error: Any, text: str | None) -> None:
    assert in_short(error) == text


async def test_the_commands_of_the_how_tos_work_as_printed(hub: Site, say: Say) -> None:
    await dead(hub, "text.stats")
    blocks = re.findall(r"^```sh\n(.*?)^```", HOWTO, re.MULTILINE | re.DOTALL)
    lines = [
        line for block in blocks for line in block.splitlines() if re.match("sheratan-hub (dlq|limits|queue)", line)
    ]
    assert len(lines) == 9
    for line in lines:
        done = await say(*shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.output)


async def test_the_dependency_of_the_how_tos_works_as_printed(hub: Site, say: Say) -> None:
    (block,) = (
        block for block in re.findall(r"^```sh\n(.*?)^```", HOWTO, re.MULTILINE | re.DOTALL) if "first=" in block
    )
    environ = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "SHERATAN_HUB_TOKEN": TOKEN,
        "HUB_DATA_URL": hub.url("data", ""),
    }
    shell = await asyncio.create_subprocess_exec(
        "sh", "-e", "-c", block, env=environ, stdout=asyncio.subprocess.DEVNULL
    )
    assert await asyncio.wait_for(shell.wait(), 30) == 0
    first, second = await told(say, "jobs", "list")
    assert [first["depends_on_left"], second["depends_on_left"]] == [0, 1]


# What people are shown


async def test_attempts_are_lines_and_flags_are_words(hub: Site, say: Say) -> None:
    job_id = await hub.submit("work")
    trace = {"type": "E", "message": "no\nway", "trace": "Traceback\nE: no way"}
    await hub.finish(await hub.lease("n1"), ok=False, error=trace, retry=False)
    shown = (await say("jobs", "show", job_id)).stdout
    attempts = next(line for line in shown.splitlines() if line.startswith("attempts"))
    assert "attempt 1, node_id n1, outcome failed, error E: no way, at 2" in attempts
    assert "{" not in attempts
    await hub.control("POST", "/api/hosts/heartbeat", {"node_id": "n1"})
    assert re.search(r"draining +no\n", (await say("nodes", "show", "n1")).stdout)


async def test_what_nobody_could_do_shows_no_empty_table(hub: Site, say: Say) -> None:
    for words in (("nodes", "resume", "n9"), ("jobs", "cancel", "j9")):
        done = await say(*words)
        assert (done.exit_code, done.stdout, "there is no" in done.stderr) == (1, "", True)
    done = await say("policies", "plan", "--version", "0")
    assert (done.stdout, done.stderr.startswith("0 nodes change")) == ("", True)


def test_a_url_without_a_scheme_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(main, ["--data-url", "127.0.0.1:8788", "jobs", "list"])
    assert (done.exit_code, "no URL such as http://127.0.0.1:8788" in done.stderr) == (2, True)
    monkeypatch.setenv("HUB_DATA_URL", "localhost:8788")
    assert CliRunner().invoke(main, ["jobs", "list"]).exit_code == 2


# Policies


async def test_a_policy_is_tried_kept_put_in_force_and_compared(hub: Site, say: Say, tmp_path: Path) -> None:
    text = next(block for block in re.findall(r"```json\n(.*?)```", HOWTO, re.DOTALL) if "the DMZ" in block)
    file = tmp_path / "policy.json"
    file.write_text(text)
    await hub.control("POST", "/api/hosts/heartbeat", {"node_id": "n1", "zone": "dmz"})
    await hub.submit("other")
    plan = await told(say, "policies", "plan", str(file))
    assert (plan["nodes"], plan["stranded_jobs"]) == ([], 1), "it may still render"
    assert "1 waiting jobs would have nobody" in (await say("policies", "plan", str(file))).stderr
    assert (await told(say, "policies", "create", "-", "--note", "first", stdin=text))["version"] == 1
    await told(say, "policies", "create", str(file))
    assert (await say("policies", "activate", "1", "--active", "7")).exit_code == 1
    assert (await told(say, "policies", "activate", "1", "--active", "0"))["version"] == 1
    assert [one["active"] for one in await told(say, "policies", "list")] == [True, False]
    assert (await told(say, "policies", "show", "1"))["note"] == "first"
    assert (await say("policies", "diff", "1", "2")).stdout.strip() == ""
    assert (await told(say, "policies", "activate", "0"))["version"] == 0


async def test_what_is_no_policy_is_refused_with_a_sentence(say: Say) -> None:
    assert "is not JSON" in (await say("policies", "create", "-", stdin="{")).stderr
    assert "rules" in (await say("policies", "create", "-", stdin='{"rules": 5}')).stderr
    assert (await say("policies", "plan")).exit_code == 2
    assert (await say("policies", "show", "9")).exit_code == 1


@pytest.mark.parametrize("words", [("tokens", "rotate", "--until", "1h"), ("access", "create", "viewer")])
async def test_a_token_that_could_not_be_kept_is_not_made(
    hub: Site, say: Say, tmp_path: Path, words: tuple[str, ...]
) -> None:
    done = await say(*words, "--to", str(tmp_path / "nowhere" / "token"))
    assert (done.exit_code, "cannot be written" in done.output) == (2, True)
    assert (await hub.control("GET", "/api/tokens"))[1]["next"] is None
    assert (await hub.control("GET", "/api/access"))[1]["access"] == []


@pytest.mark.parametrize("words", [("tokens", "rotate", "--until", "1h"), ("access", "create", "viewer")])
async def test_a_token_is_kept_for_its_owner_only_and_a_refusal_leaves_the_file_alone(
    hub: Site, say: Say, tmp_path: Path, words: tuple[str, ...]
) -> None:
    path = tmp_path / "token"
    path.write_text("before")
    done = await say(*words, "--to", str(path))
    kept = path.read_text().strip()
    assert (done.exit_code, path.stat().st_mode & 0o777) == (0, 0o600)
    assert kept.startswith("shn_")
    assert kept not in done.output
    refused = (*words[:-1], "0s") if words[0] == "tokens" else (*words, "--node-id", "n1")
    assert (await say(*refused, "--to", str(path))).exit_code == 1
    assert not path.with_name("token.new").exists()
    assert path.read_text().strip() == kept
