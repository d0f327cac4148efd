"""A real `serve` under a service manager that is the test: the notify protocol; and the unit that ships."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import TOKEN, Served

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "tools/deploy/systemd/sheratan-hub.service"
STUCK = ROOT / "tests/e2e/stuck_hub.py"


class Service(Served):
    """A hub whose service manager is the test. It beats every 100 ms."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, SHERATAN_STORE_URL="memory://")
        self.ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ear.bind(str(directory / "notify"))
        self.ear.settimeout(20)
        self.environ |= {"NOTIFY_SOCKET": str(directory / "notify"), "WATCHDOG_USEC": "300000"}
        self.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "stores")))

    def begin(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(STUCK)],
            cwd=self.directory,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until(self, text: str, times: int = 1) -> list[str]:
        """What it says until it has said this so often."""
        heard: list[str] = []
        while sum(text in one for one in heard) < times:
            heard.append(self.ear.recv(4096).decode())
        return heard


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    one = Service(tmp_path)
    one.process = one.begin()
    yield one
    one.kill()
    one.ear.close()


def test_ready_comes_when_both_planes_listen_then_beats_then_stopping(service: Service) -> None:
    before = service.until("READY=1")
    assert before[0] == "STATUS=opening the store memory"
    assert not any("WATCHDOG=1" in one for one in before)
    assert before[-1] == (
        f"READY=1\nSTATUS=control http://127.0.0.1:{service.control_port}, data http://127.0.0.1:{service.data_port}"
    )
    for port in (service.control_port, service.data_port):
        assert service.ask("GET", "/livez", port=port)["ok"]
    service.until("WATCHDOG=1", 3)
    assert service.process is not None
    service.process.send_signal(signal.SIGTERM)
    assert service.until("STOPPING=1")[-1].startswith("STOPPING=1\n")
    assert service.end(signal.SIGTERM) == 0


def test_a_stuck_committer_gets_no_beats_until_it_goes_on(service: Service) -> None:
    service.until("WATCHDOG=1")
    (service.directory / "stuck").touch()
    service.until("nothing has been committed")
    assert not any("WATCHDOG=1" in one for one in service.until("nothing has been committed", 4))
    (service.directory / "stuck").unlink()
    assert "STATUS=the committer works again" in service.until("WATCHDOG=1")


def test_sighup_reloads_between_reloading_and_ready(service: Service) -> None:
    service.until("READY=1")
    assert service.process is not None
    (service.directory / "hub.toml").write_text("[queue]\nmax_depth = 1\n[hub]\nmax_long_polls = 5\n")
    service.process.send_signal(signal.SIGHUP)
    heard = service.until("READY=1")
    began = next(one for one in heard if one.startswith("RELOADING=1\nMONOTONIC_USEC="))
    assert int(began.splitlines()[1].partition("=")[2]) > 0
    told = "settings reloaded: queue.max_depth; only a restart changes hub.max_long_polls"
    assert heard[-1].startswith(f"READY=1\nSTATUS={told} (control http://")
    assert service.ask("POST", "/api/jobs", {"kind": "k"})["ok"]
    assert service.ask("POST", "/api/jobs", {"kind": "k"})["code"] == "queue_full"
    (service.directory / "hub.toml").write_text("[queue]\nmax_depht = 9\n")
    service.process.send_signal(signal.SIGHUP)
    assert "the old ones stay: queue.max_depht in hub.toml" in service.until("READY=1")[-1]
    assert service.ask("POST", "/api/jobs", {"kind": "k"})["code"] == "queue_full"
    log = [json.loads(line) for line in (service.directory / "var/logs/hub_data.jsonl").read_text().splitlines()]
    lines = [line for line in log if line["logger"] == "sheratan.reload"]
    assert [line["event"].partition(":")[0] for line in lines] == [
        "settings reloaded",
        "the settings were not taken over, the old ones stay",
    ]
    assert lines[0]["changed"] == {"queue.max_depth": "1000 -> 1"}


def test_a_hub_that_cannot_start_tells_the_service_manager_why(tmp_path: Path) -> None:
    one = Service(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", one.data_port))
        taken.listen()
        assert one.fails()[0] == 78
    heard = one.until("cannot start")
    assert str(one.data_port) in heard[-1]
    assert not any("READY=1" in text for text in heard)
    one.ear.close()


def test_a_token_file_named_by_a_flag_is_the_hubs_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    one = Served(tmp_path)
    del one.environ["SHERATAN_HUB_TOKEN"]
    command = [sys.executable, "-m", "sheratan_hub", "serve", "--token-file", "token"]
    with subprocess.Popen(command, cwd=tmp_path, env=one.environ, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = [process.stdout.readline() for _ in range(6)]
            assert said[-1] == "token          from token\n"
            assert one.ask("GET", "/api/jobs")["ok"]
            assert TOKEN not in "".join(said)
        finally:
            process.kill()


# The unit


def unit() -> dict[str, dict[str, str]]:
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text())
    return {name: dict(parser[name]) for name in parser.sections()}


def test_the_unit_says_what_the_hub_speaks() -> None:
    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert int(service["WatchdogSec"]) >= 10
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert service["RestartPreventExitStatus"] == "78"
    assert service["LoadCredential"].startswith("token:")
    assert "--token-file %d/token" in service["ExecStart"]
    assert f"%S/{service['StateDirectory']}" in service["ExecStart"]
    for name, value in {"DynamicUser": "yes", "ProtectSystem": "strict", "NoNewPrivileges": "yes"}.items():
        assert service[name] == value


def test_the_unit_leaves_the_hub_what_its_process_metrics_are_read_from() -> None:
    """`ProcSubset=pid` hides /proc/stat; then none of the process's own metrics is told, and no restart is noticed."""
    assert unit()["Service"].get("ProcSubset", "all") == "all"


def installed(tmp_path: Path) -> Path:
    """The unit, with the program where this environment has it."""
    program = Path(sys.executable).with_name("sheratan-hub")
    assert program.is_file()
    text = UNIT.read_text()
    assert text.count("/opt/sheratan-hub/bin/sheratan-hub") == 1
    file = tmp_path / UNIT.name
    file.write_text(text.replace("/opt/sheratan-hub/bin/sheratan-hub", str(program)))
    return file


def analyze(*words: str) -> tuple[int, str]:
    assert shutil.which("systemd-analyze"), "systemd-analyze is not there: apt-get install systemd"
    done = subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    file = installed(tmp_path)
    assert analyze("verify", "--man=no", str(file)) == (0, "")
    file.write_text(file.read_text().replace("WatchdogSec=30", "WatchdogSecs=30"))
    assert "WatchdogSecs" in analyze("verify", "--man=no", str(file))[1]


def test_systemd_calls_the_unit_well_confined(tmp_path: Path) -> None:
    status, said = analyze("security", "--offline=true", "--threshold=20", "--no-pager", str(installed(tmp_path)))
    assert status == 0, said


def test_the_units_command_line_is_one_that_serve_takes(tmp_path: Path) -> None:
    """Its options, with the specifiers as systemd would fill them in, start a hub."""
    (tmp_path / "token").write_text(TOKEN)
    shutil.copy(ROOT / "hub.toml", tmp_path / "hub.toml")
    line = unit()["Service"]["ExecStart"].replace("/etc/sheratan-hub/", f"{tmp_path}/").replace("%d", str(tmp_path))
    words = line.replace("%S/sheratan-hub", str(tmp_path / "state")).split()[1:]
    one = Served(tmp_path)
    for name in ("SHERATAN_HUB_TOKEN", "SHERATAN_DATA_DIR"):
        del one.environ[name]
    command = [sys.executable, "-m", "sheratan_hub", *words]
    with subprocess.Popen(command, cwd=tmp_path, env=one.environ, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("control plane")
            assert one.ask("GET", "/api/jobs")["ok"]
            assert (tmp_path / "state" / "hub.db").is_file()
        finally:
            process.kill()
