"""The command line in real processes: what goes to stdout, what to stderr, and the exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub import __version__
from sheratan_hub.config import FIELDS
from tests.e2e.serving import TOKEN, Served


class Line:
    """A command line with a hub behind it."""

    def __init__(self, directory: Path, served: Served | None = None) -> None:
        self.directory = directory
        self.environ = dict(served.environ) if served else {"PATH": "/usr/bin"}
        if served is not None:
            self.environ["HUB_CONTROL_URL"] = f"http://127.0.0.1:{served.control_port}"
            self.environ["HUB_DATA_URL"] = f"http://127.0.0.1:{served.data_port}"

    def __call__(self, *arguments: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sheratan_hub", *arguments],
            input=stdin,
            cwd=self.directory,
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def json(self, *arguments: str, **more: str) -> Any:
        done = self(*arguments, "-o", "json", **more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    one = Served(tmp_path_factory.mktemp("cli"), SHERATAN_STORE_URL="memory://", SHERATAN_MAX_QUEUE_DEPTH="50")
    one.start()
    yield one
    one.kill()


@pytest.fixture
def line(tmp_path: Path, served: Served) -> Line:
    return Line(tmp_path, served)


def test_help_and_version_load_nothing_heavy(tmp_path: Path) -> None:
    loaded = "print(*sys.modules, file=sys.stderr)"
    code = f"import sys; from sheratan_hub.cli import main\ntry: main(['--help'])\nfinally: {loaded}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0
    commands = ("config", "dlq", "jobs", "limits", "missions", "nodes", "queue", "serve", "smoke", "submit", "worker")
    assert all(f"\n  {name} " in done.stdout for name in commands)
    assert not {"aiohttp", "rich", "asyncio", "pebble", "msgspec"} & set(done.stderr.split())
    assert Line(tmp_path)("--version").stdout.strip() == f"sheratan-hub, version {__version__}"


def test_a_job_is_submitted_listed_shown_and_cancelled(line: Line) -> None:
    made = line.json(
        "submit", "one.job", "--params", '{"path": "[red]a[/red]"}', "--mission-id", "m1", "--needs", "gpu,eu",
        "--priority", "low", "--delay", "60",
    )  # fmt: skip
    assert made["status"] == "accepted"
    listed = line.json("jobs", "list", "--mission-id", "m1")
    assert [job["job_id"] for job in listed] == [made["job_id"]]
    shown = line.json("jobs", "show", made["job_id"])
    assert (shown["kind"], shown["priority"], shown["params"]) == ("one.job", 3, {"path": "[red]a[/red]"})
    assert shown["not_before"] is not None
    table = line("jobs", "show", made["job_id"])
    assert re.search(r'^params +\{"path":"\[red\]a\[/red\]"\}$', table.stdout, re.MULTILINE)
    (cancelled,) = line.json("jobs", "cancel", made["job_id"])
    assert cancelled["status"] == "cancelled"


def test_a_table_has_a_line_for_each_job_in_full_and_no_colours(line: Line, served: Served) -> None:
    source = "s" * 150
    ids = [served.ask("POST", "/api/jobs", {"kind": "k", "source": source})["job_id"] for _ in range(3)]
    done = line("jobs", "list", "--source", source, "--limit", "2")
    head, *rows = done.stdout.splitlines()
    assert head.split()[:3] == ["job_id", "status", "kind"]
    assert [row.split()[0] for row in rows] == ids[:2]
    assert all(source in row and row == row.rstrip() for row in rows)
    assert "\x1b" not in done.stdout
    assert "--limit shows more" in done.stderr


def test_on_a_narrow_screen_ids_stay_whole(line: Line, served: Served) -> None:
    job_id = served.ask("POST", "/api/jobs", {"kind": "a.kind.with.a.long.name", "source": "narrow"})["job_id"]
    command = f"{sys.executable} -m sheratan_hub jobs list --source narrow"
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        env={**line.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert job_id in done.stdout
    assert "pending" in done.stdout
    assert "\x1b[3" not in done.stdout


def test_parameters_come_from_a_file_or_standard_input(line: Line) -> None:
    (line.directory / "params.json").write_text('{"n": 1}')
    from_file = line.json("submit", "k", "--params", "@params.json")
    from_stdin = line.json("submit", "k", "--params", "@-", stdin='{"n": 2}')
    assert [line.json("jobs", "show", one["job_id"])["params"] for one in (from_file, from_stdin)] == [
        {"n": 1},
        {"n": 2},
    ]


def test_lines_of_standard_input_become_jobs_and_bad_ones_are_told_by_number(line: Line) -> None:
    lines = (
        '{"kind": "a", "idempotency_key": "line-1"}',
        "",
        "not json",
        '{"priority": 9, "kind": "b"}',
        '{"kind": "c", "source": "own"}',
        "[]",
    )
    jobs = "\n".join(lines)
    done = line("submit", "--mission-id", "m2", "--source", "default", "-o", "json", stdin=jobs)
    assert done.returncode == 1
    outcomes = [json.loads(one) for one in done.stdout.splitlines()]
    assert [(one["line"], one["ok"]) for one in outcomes] == [(1, True), (3, False), (4, False), (5, True), (6, False)]
    assert "line 3: " in done.stderr
    assert "2 submitted, 3 refused" in done.stderr
    found = line.json("jobs", "list", "--mission-id", "m2")
    assert [(job["kind"], job["source"]) for job in found] == [("a", "default"), ("c", "own")]


def test_lines_beyond_the_depth_limit_are_refused_when_patience_ends(line: Line) -> None:
    done = line("submit", "--patience", "0", "--mission-id", "m3", stdin='{"kind": "k"}\n' * 60)
    assert done.returncode == 1
    assert "queue_full" in done.stderr
    taken = [one.split()[0] for one in done.stdout.splitlines()]
    assert 0 < len(taken) < 60
    assert line("jobs", "cancel", *taken).returncode == 0


def test_cancelling_what_is_not_there_fails_but_the_rest_is_cancelled(line: Line, served: Served) -> None:
    job_id = served.ask("POST", "/api/jobs", {"kind": "k"})["job_id"]
    done = line("jobs", "cancel", "no-such-job", job_id)
    assert done.returncode == 1
    assert "no-such-job" in done.stderr
    assert served.ask("GET", f"/api/jobs/{job_id}")["status"] == "cancelled"


def test_waiting_for_a_job_that_does_not_end_in_time_is_75_and_says_so(line: Line) -> None:
    done = line("submit", "nobody.does.this", "--wait", "0.1", "-o", "json")
    assert (done.returncode, json.loads(done.stdout)["status"]) == (75, "pending")
    assert "has not ended within 0.1 s" in done.stderr


def test_nodes_are_listed(line: Line, served: Served) -> None:
    beat = {"node_id": "n1", "zone": "z", "capabilities": ["gpu", "eu"], "max_concurrent": 4}
    served.ask("POST", "/api/hosts/heartbeat", beat, port=served.control_port)
    assert sorted(line.json("nodes")[0]["capabilities"]) == ["eu", "gpu"]
    assert line.json("nodes", "list") == line.json("nodes")
    for words in (("nodes",), ("nodes", "list")):
        assert "eu, gpu" in line(*words).stdout


def test_nodes_are_drained_resumed_accepted_shown_and_forgotten(line: Line, served: Served) -> None:
    for build_id in ("b1", "b2"):
        beat = {"node_id": "rack/1", "attestation": {"build_id": build_id}}
        served.ask("POST", "/api/hosts/heartbeat", beat, port=served.control_port)
    [drained] = line.json("nodes", "drain", "rack/1", "--seconds", "3600")
    assert (drained["node_id"], drained["draining"], drained["health"]) == ("rack/1", True, "YELLOW")
    assert drained["drain_until"] == line.json("nodes", "show", "rack/1")["drain_until"]
    assert line.json("nodes", "attest", "rack/1")[0]["attestation"]["status"] == "OK"
    resumed = line("nodes", "resume", "rack/1", "nobody")
    assert (resumed.returncode, "rack/1" in resumed.stdout) == (1, True)
    assert "there is no node nobody" in resumed.stderr
    assert line.json("nodes", "show", "rack/1")["draining"] is False
    alive = line("nodes", "forget", "rack/1")
    assert (alive.returncode, "only a node that is DEAD" in alive.stderr) == (1, True)
    assert line("nodes", "drain", "rack/1", "--seconds", "1", "--until", "2099-01-01T00:00:00Z").returncode == 2
    assert line.json("nodes", "fleet")["silence"] is None
    assert "nothing to end" in line("nodes", "reap").stderr


def test_a_hub_that_is_not_there_is_69_and_one_that_refuses_77(line: Line) -> None:
    gone = line("--control-url", "http://127.0.0.1:1", "nodes")
    assert (gone.returncode, gone.stdout) == (69, "")
    assert "Connection refused" in gone.stderr
    refused = line("jobs", "list", SHERATAN_HUB_TOKEN="canary-wrong")
    assert (refused.returncode, refused.stdout) == (77, "")
    assert "invalid_token" in refused.stderr
    assert "canary" not in refused.stderr
    missing = line("jobs", "show", "no-such-job")
    assert missing.returncode == 1
    assert "job_not_found" in missing.stderr


def test_a_token_file_wins_over_the_environment(line: Line) -> None:
    (line.directory / "token").write_text(f"{TOKEN}\n")
    assert line("--token-file", "token", "nodes", SHERATAN_HUB_TOKEN="wrong").returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("submit",),
        ("jobs", "list", "--status", "nonsense"),
        ("submit", "k", "--params", "{"),
        ("submit", "k", "--params", "@nowhere"),
        ("--token", "secret", "nodes"),
        ("nonsense",),
    ],
)
def test_wrong_usage_is_2_and_says_why(line: Line, arguments: tuple[str, ...]) -> None:
    with_tty = ["script", "-qec", " ".join([sys.executable, "-m", "sheratan_hub", *arguments]), "/dev/null"]
    if arguments == ("submit",):
        done = subprocess.run(with_tty, env=line.environ, capture_output=True, text=True, timeout=30, check=False)
        assert "KIND" in done.stdout
    else:
        done = line(*arguments)
        assert "Error: " in done.stderr
    assert done.returncode == 2


def test_config_check_says_ok_or_78_with_the_key(tmp_path: Path) -> None:
    line = Line(tmp_path)
    assert line("config", "check").stdout == "ok\n"
    (tmp_path / "other.toml").write_text("[data]\nprot = 1\n")
    bad = line("config", "check", "--config", "other.toml")
    assert bad.returncode == 78
    assert "data.prot" in bad.stderr
    assert "data.port" in bad.stderr
    assert line("serve", "--config", "other.toml").returncode == 78
    assert line("serve", "--data-port", "99999").returncode == 78


def test_config_show_tells_every_setting_and_where_it_comes_from_but_no_secret(tmp_path: Path) -> None:
    line = Line(tmp_path)
    (tmp_path / "hub.toml").write_text("[queue]\nmax_depth = 7\n")
    rows = line.json("config", "show", SHERATAN_DATA_PORT="9999", SHERATAN_HUB_TOKEN="canary-token")
    found = {row["key"]: (row["value"], row["from"]) for row in rows}
    assert set(FIELDS) <= set(found)
    assert found["queue.max_depth"] == (7, "hub.toml")
    assert found["data.port"] == (9999, "SHERATAN_DATA_PORT")
    assert found["control.port"] == (8787, "default")
    assert "canary" not in str(rows)


def test_flags_of_serve_win_over_everything(tmp_path: Path) -> None:
    line = Line(tmp_path)
    (tmp_path / "hub.toml").write_text("[control]\nport = 0\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "sheratan_hub", "serve", "--data-port", "0", "--store", "memory://", "--data-dir", "d"],
        cwd=tmp_path,
        env={**line.environ, "SHERATAN_STORE_URL": "sqlite://never.db"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(3)]
        process.terminate()
        process.communicate(timeout=30)  # it may have more to say: nobody listening would be an error
    assert process.returncode == 0
    assert "8787" not in said[0]
    assert "8788" not in said[1]
    assert "memory" in said[2]
    assert (tmp_path / "d").is_dir()
    assert not (tmp_path / "never.db").exists()


def test_a_job_is_explained_to_people_and_to_programs(line: Line) -> None:
    made = line.json("submit", "explained", "--needs", "quantum", "--delay", "60")
    found = line.json("jobs", "explain", made["job_id"])
    assert [one["reason"] for one in found["reasons"]] == ["not_before", "no_capable_node"]
    done = line("jobs", "explain", made["job_id"])
    assert done.returncode == 0
    assert done.stderr.startswith(f"job {made['job_id']} is pending")
    rows = done.stdout.splitlines()
    assert rows[0].split() == ["reason", "until", "detail"]
    assert [row.split()[0] for row in rows[1:3]] == ["not_before", "no_capable_node"]
    assert line("jobs", "explain", "nonsense").returncode == 1
