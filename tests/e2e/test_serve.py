"""The real command in real processes: started, stopped, killed, refused."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import TOKEN, Served


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    one = Served(tmp_path)
    yield one
    one.kill()


def test_sigterm_answers_long_polls_finishes_commits_and_exits_0(served: Served) -> None:
    served.start()
    answers: list[Any] = []
    pull = {"node_id": "n", "wait_seconds": 30, "capabilities": []}
    polls = [
        threading.Thread(target=lambda: answers.append(served.ask("POST", "/api/jobs/pull", pull))) for _ in range(5)
    ]
    for poll in polls:
        poll.start()
    while served.ask("GET", "/health")["ok"] and not _waiting(served):
        pass
    ended = served.end(signal.SIGTERM)
    for poll in polls:
        poll.join(timeout=10)
    assert ended == 0
    assert [answer["jobs"] for answer in answers] == [[]] * 5
    audit = (served.directory / "var/logs/hub_security_audit.jsonl").read_text()
    assert '"HUB_START"' in audit
    assert '"HUB_STOP"' in audit


def _waiting(served: Served) -> bool:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{served.data_port}/metrics", timeout=5) as answer:
        return b"sheratan_long_polls 5.0" in answer.read()


def test_what_was_acknowledged_is_there_after_kill_9(served: Served) -> None:
    served.start()
    acknowledged: list[str] = []
    results: list[str] = []

    def produce(n: int) -> None:
        try:
            while True:
                body = {"kind": "k", "params": {"n": n}, "capabilities": None}
                body.pop("capabilities")
                acknowledged.append(served.ask("POST", "/api/jobs", body)["job_id"])
        except (OSError, ValueError, KeyError):
            return

    def work() -> None:
        try:
            while True:
                for lease in served.ask("POST", "/api/jobs/pull", {"node_id": "w", "max": 5, "capabilities": []})[
                    "jobs"
                ]:
                    done = {"lease_id": lease["lease_id"], "ok": True, "result": lease["params"]}
                    assert served.ask("POST", f"/api/jobs/{lease['job_id']}/result", done)["ok"]
                    results.append(lease["job_id"])
        except (OSError, ValueError, KeyError):
            return

    threads = [threading.Thread(target=produce, args=(n,)) for n in range(3)] + [threading.Thread(target=work)]
    for thread in threads:
        thread.start()
    while len(results) < 100:
        assert any(thread.is_alive() for thread in threads)
    served.kill()
    for thread in threads:
        thread.join(timeout=10)
    served.start()
    for job_id in acknowledged:
        assert served.ask("GET", f"/api/jobs/{job_id}")["ok"], job_id
    for job_id in results:
        job = served.ask("GET", f"/api/jobs/{job_id}")
        assert (job["status"], job["result"]) == ("completed", job["params"])


def test_leases_nodes_and_keys_survive_a_restart(served: Served) -> None:
    served.start()
    served.ask("POST", "/api/hosts/heartbeat", {"host_id": "n"}, port=served.control_port)
    first = served.ask("POST", "/api/jobs", {"kind": "k", "idempotency_key": "key"})
    (lease,) = served.ask("POST", "/api/jobs/pull", {"node_id": "n"})["jobs"]
    served.kill()
    served.start()
    assert served.ask("GET", "/api/registry", port=served.control_port)["nodes"]["n"]["status"] == "ONLINE"
    again = served.ask("POST", "/api/jobs", {"kind": "k", "idempotency_key": "key"})
    assert (again["job_id"], again["dedup"]) == (first["job_id"], True)
    done = {"lease_id": lease["lease_id"], "ok": True, "result": 1}
    assert served.ask("POST", f"/api/jobs/{lease['job_id']}/result", done)["status"] == "completed"


def test_a_second_hub_on_the_same_store_is_refused_naming_the_holder(served: Served, tmp_path: Path) -> None:
    served.start()
    assert served.process is not None
    second = Served(tmp_path)
    status, said = second.fails()
    assert status == 78
    assert str(served.process.pid) in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"SHERATAN_DATA_PORT": "many"}, ["SHERATAN_DATA_PORT"]),
        ({"SHERATAN_CONTROL_PROT": "1"}, ["SHERATAN_CONTROL_PROT", "SHERATAN_CONTROL_PORT"]),
        ({"SHERATAN_STORE_URL": "redis://x"}, ["redis"]),
        ({"SHERATAN_STORE_URL": "sqlite:///proc/nowhere/hub.db"}, ["/proc/nowhere"]),
        ({"SHERATAN_CONTROL_HOST": "0.0.0.0", "SHERATAN_HUB_TOKEN": "shared-secret"}, ["SHERATAN_HUB_TOKEN"]),
    ],
)
def test_what_cannot_work_stops_the_start_with_one_sentence(
    tmp_path: Path, environ: dict[str, str], words: list[str]
) -> None:
    status, said = Served(tmp_path, **environ).fails()
    assert status == 78
    assert all(word in said for word in words), said
    assert "Traceback" not in said
    assert TOKEN not in said


def test_a_bad_hub_toml_names_the_key_and_suggests_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "hub.toml").write_text("[data]\nprot = 1\n")
    status, said = Served(tmp_path).fails()
    assert status == 78
    assert "data.prot" in said
    assert "data.port" in said


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    one = Served(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", one.data_port))
        taken.listen()
        status, said = one.fails()
    assert status == 78
    assert str(one.data_port) in said
    assert "Traceback" not in said


def test_files_are_private_and_hold_no_token(served: Served) -> None:
    served.start()
    served.ask("POST", "/api/jobs", {"kind": "k"})
    served.ask("GET", "/api/hosts", port=served.control_port)
    served.ask("GET", "/api/jobs", port=served.control_port)
    assert served.end(signal.SIGTERM) == 0
    files = [path for path in (served.directory / "var").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "hub.db",
        "hub_control.jsonl",
        "hub_data.jsonl",
        "hub_security_audit.jsonl",
    }
    for path in files:
        assert path.stat().st_mode & 0o077 == 0, path
        assert TOKEN.encode() not in path.read_bytes(), path
