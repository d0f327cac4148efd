"""Proving, reading and watching the audit log in real processes: exit codes, rotation, kill -9 in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from sheratan_hub.audit_file import AuditFile
from sheratan_hub.audit_lines import FILE_NAME, chain_files
from sheratan_hub.clock import SystemClock, rfc3339
from tests.e2e.serving import Served
from tests.e2e.test_cli import Line
from tests.hub.chains import record, written


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "var" / "logs"


@pytest.fixture
def log(logs: Path) -> Path:
    """A log of a hundred lines in several files."""
    written(logs / FILE_NAME, 100, max_bytes=10_000)
    return logs / FILE_NAME


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(tmp_path)


def test_a_sound_log_is_proved_with_exit_status_0(line: Line, log: Path) -> None:
    for arguments in ([], [str(log.parent)], [str(file) for file in reversed(chain_files(log))], ["--data-dir", "var"]):
        done = line("audit", "verify", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith("ok: 100 lines, 1 to 100, hash ")


def test_the_first_broken_line_is_named_and_the_exit_status_is_1(line: Line, log: Path) -> None:
    victim = chain_files(log)[1]
    lines = victim.read_bytes().splitlines(keepends=True)
    victim.write_bytes(b"".join([*lines[:4], lines[4].replace(b"data", b"date", 1), *lines[5:]]))
    done = line("audit", "verify")
    assert done.returncode == 1
    assert f"{victim.name}:5: was changed" in done.stdout
    assert "BROKEN after line" in done.stdout


def test_a_head_kept_elsewhere_proves_that_nothing_was_cut_off(line: Line, log: Path) -> None:
    head = line("audit", "head")
    assert head.returncode == 0
    (line.directory / "head.json").write_text(head.stdout)
    known = json.loads(head.stdout)
    assert known.keys() == {"seq", "hash", "ts"}
    assert known["seq"] == 100
    for given in ("head.json", known["hash"], f"100:{known['hash']}"):
        assert line("audit", "verify", "--head", given).returncode == 0
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    assert line("audit", "verify").returncode == 0
    for given in ("head.json", known["hash"], f"100:{known['hash']}"):
        done = line("audit", "verify", "--head", given)
        assert done.returncode == 1
        assert "cut off" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["verify", "nowhere.jsonl"], 2, "does not exist"),
        (["verify", "--head", "nonsense"], 2, "no hash"),
        (["verify", "--data-dir", "elsewhere"], 1, "there is no audit log"),
        (["head", "--data-dir", "elsewhere"], 1, "there is no audit log"),
        (["search", "--since", "yesterday"], 2, "RFC 3339"),
        (["search", "--event", "PORT_MISMACH"], 2, "no audit event; did you mean PORT_MISMATCH?"),
        (["verify", "--config", "nowhere.toml"], 78, "nowhere.toml"),
    ],
)
def test_what_cannot_be_done_is_said(line: Line, log: Path, arguments: list[str], status: int, said: str) -> None:
    done = line("audit", *arguments)
    assert done.returncode == status
    assert said in done.stderr


def test_lines_are_searched_as_a_table_and_as_json(line: Line, log: Path) -> None:
    found = line.json("audit", "search", "--event", "NODE_ONLINE", "--since", "2026-11-21T10:00:30Z", "--node-id", "n1")
    assert [one["seq"] for one in found] == [50, 71, 92]
    head, *rows = line("audit", "search", "--event", "PORT_MISMATCH", "--limit", "3").stdout.splitlines()
    assert head.split()[:3] == ["seq", "ts", "event"]
    assert [row.split()[2] for row in rows] == ["PORT_MISMATCH"] * 3
    assert line.json("audit", "search", "--reason", "invalid_token", "--until", "2026-11-21T10:00:04+00:00") == [
        json.loads(chain_files(log)[0].read_text().splitlines()[2])
    ]


def test_the_last_lines_are_shown_and_new_ones_followed_over_a_rotation(line: Line, log: Path) -> None:
    assert [json.loads(text)["seq"] for text in line("audit", "tail", "-n", "3", "-o", "json").stdout.splitlines()] == [
        98,
        99,
        100,
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "sheratan_hub", "audit", "tail", "-n", "2", "--follow"],
        cwd=line.directory,
        env=line.environ,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            shown = [process.stdout.readline() for _ in range(2)]
            written(log, 60, first=101, max_bytes=10_000)
            shown += [process.stdout.readline() for _ in range(60)]
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    assert len(shown) == 62
    assert all(text.startswith("2026-11-21T") for text in shown)


# The watcher


RULES = """
[alerts]
auth_failure = { event = "AUTH_FAILURE", on = false }
port_mismatch = { event = "PORT_MISMATCH", on = false }
rules = [{ name = "dead", event = "NODE_DEAD", cooldown_seconds = 0 }]
"""


class Watching:
    """A watcher in a process of its own, and the log that it watches."""

    def __init__(self, directory: Path, line: Line) -> None:
        self.directory, self.line = directory, line
        (directory / "hub.toml").write_text(RULES)
        self.folder = directory / "var" / "logs"
        self.log = AuditFile(self.folder / FILE_NAME, max_bytes=20_000)
        self.clock, self.written = SystemClock(), 0
        self.process: subprocess.Popen[str] | None = None

    def write(self, count: int) -> None:
        for _ in range(count):
            self.written += 1
            self.log.add(record(self.written, event="NODE_DEAD") | {"ts": rfc3339(self.clock.now())})
            self.log.write()

    def start(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sheratan_hub", "watch"],
            cwd=self.directory,
            env=self.line.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        assert self.process.stderr.readline().startswith("watching ")
        return self.process

    def end(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.communicate(timeout=20)
        return self.process.returncode

    def raised(self) -> list[int]:
        lines = (self.folder / "alerts.jsonl").read_text().splitlines()
        return [alert["to_seq"] for alert in map(json.loads, lines) if alert["rule"] == "dead"]

    def until(self, count: int) -> list[int]:
        """What was raised, once there are so many, or after ten seconds."""
        until = monotonic() + 10
        while monotonic() < until and ((found := self.raised_yet()) is None or len(found) < count):
            sleep(0.02)
        return self.raised()

    def raised_yet(self) -> list[int] | None:
        try:
            return self.raised()
        except (FileNotFoundError, json.JSONDecodeError):
            return None


@pytest.fixture
def watching(tmp_path: Path, line: Line) -> Iterator[Watching]:
    found = Watching(tmp_path, line)
    yield found
    found.log.close()
    if found.process is not None and found.process.poll() is None:
        found.end(signal.SIGKILL)


def test_a_watcher_that_sees_no_log_says_where_it_looks(line: Line, tmp_path: Path) -> None:
    done = line("watch", "--once", "--data-dir", str(tmp_path / "elsewhere"))
    assert (done.returncode, f"no audit log in {tmp_path}/elsewhere/logs yet" in done.stderr) == (0, True)


def test_alerts_are_written_and_printed_and_it_ends_well(watching: Watching) -> None:
    process = watching.start()
    watching.write(3)
    assert watching.until(3) == [1, 2, 3]
    second = watching.line("watch")
    assert (second.returncode, "another process" in second.stderr) == (1, True)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert [text.split(" ")[1:3] for text in out.splitlines()] == [["ALERT", "dead:"]] * 3


def test_killed_again_and_again_under_rotations_it_raises_each_alert_once(watching: Watching) -> None:
    for n in range(6):
        watching.start()
        watching.write(150)
        if n % 2:
            watching.until(watching.written - 100)
        watching.end(signal.SIGKILL)
        watching.write(70)
    watching.start()
    assert watching.until(watching.written) == list(range(1, watching.written + 1))
    assert len(chain_files(watching.folder / FILE_NAME)) > 10
    assert watching.end(signal.SIGTERM) == 0


def test_a_log_that_is_emptied_under_it_is_followed_on(watching: Watching) -> None:
    watching.start()
    watching.write(10)
    watching.until(10)
    (watching.folder / FILE_NAME).write_bytes(b"")
    watching.write(30)
    assert watching.until(40) == list(range(1, 41))


def test_once_reads_what_is_there_and_ends(watching: Watching) -> None:
    watching.write(4)
    done = watching.line("watch", "--once")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 4)
    assert watching.line("watch", "--once").stdout == ""


def test_a_misspelt_rule_stops_it_with_its_full_key(watching: Watching) -> None:
    for text, said in (
        ('auth_failure = { event = "AUTH_FAILURE", more_then = 3 }', "alerts.auth_failure.more_then"),
        ('auth_failure = { event = "AUTH_FAILURE", more_than = -3 }', "alerts.auth_failure.more_than"),
        ('rules = [{ name = "a", event = "AUTH_FAILURES" }]', "did you mean AUTH_FAILURE?"),
        ('rules = [{ event = "AUTH_FAILURE", per = "moon" }]', "alerts.rules[0].per"),
        ('poison = "much"', "alerts.poison"),
        ('webhook_file = "nowhere"', "alerts.webhook_file"),
    ):
        (watching.directory / "hub.toml").write_text(f"[alerts]\n{text}\n")
        done = watching.line("watch", "--once")
        assert done.returncode == 78, done.stderr
        assert said in done.stderr


# With a real hub


def failures(served: Served, count: int) -> None:
    import urllib.error
    import urllib.request

    for _ in range(count):
        request = urllib.request.Request(f"http://127.0.0.1:{served.control_port}/api/hosts")
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=10)


def alerts_of(served: Served, count: int) -> list[dict[str, Any]]:
    until = monotonic() + 10
    while monotonic() < until:
        found = served.ask("GET", "/api/alerts", port=served.control_port)["alerts"]
        if len(found) >= count:
            return list(found)
        sleep(0.05)
    raise AssertionError("no alert came")


def test_a_burst_of_wrong_tokens_raises_an_alert_in_the_hub_itself(tmp_path: Path) -> None:
    (tmp_path / "hub.toml").write_text("[alerts]\nin_process = true\n")
    served = Served(tmp_path, SHERATAN_STORE_URL="memory://")
    served.start()
    try:
        failures(served, 30)
        (alert,) = alerts_of(served, 1)
        assert (alert["rule"], alert["event"], alert["count"] > 20) == ("auth_failure", "AUTH_FAILURE", True)
        assert served.end(signal.SIGTERM) == 0
    finally:
        served.kill()


def test_a_hub_that_is_killed_leaves_a_log_that_is_proved(tmp_path: Path, line: Line) -> None:
    (tmp_path / "hub.toml").write_text("[audit]\nmax_bytes = 3000\n")
    served = Served(tmp_path, SHERATAN_STORE_URL="memory://")
    path = tmp_path / "var" / "logs" / FILE_NAME
    for _ in range(3):
        served.start()
        for n in range(10):
            served.ask("POST", "/api/hosts/heartbeat", {"node_id": f"n{n}"}, port=served.control_port)
        served.kill()
        path.write_bytes(path.read_bytes()[:-15])
    served.start()
    assert served.end(signal.SIGTERM) == 0
    done = line("audit", "verify")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("cut by a crash") == 3
    assert len(chain_files(path)) > 2
