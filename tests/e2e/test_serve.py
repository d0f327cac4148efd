"""The real command in real processes: started, stopped, killed, refused."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import lacking
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


def test_it_prints_where_everything_is_and_no_secret(tmp_path: Path) -> None:
    (tmp_path / "hub.toml").write_text("[queue]\nmax_depth = 7\n[store]\nurl = 'memory://'\n")
    one = Served(tmp_path)
    one.process = one.begin()
    try:
        assert one.process.stdout is not None
        said = [one.process.stdout.readline() for _ in range(10)]
        told = {line[:15].strip(): line[15:].rstrip("\n") for line in said if line[:15].strip()}
        url = f"http://127.0.0.1:{one.data_port}"
        assert told == {
            "control plane": f"http://127.0.0.1:{one.control_port}",
            "data plane": f"http://127.0.0.1:{one.data_port}",
            "store": f"memory://, logs in {tmp_path}/var/logs",
            "audit log": f"{tmp_path}/var/logs/hub_security_audit.jsonl",
            "settings": "3 from variables, 2 from hub.toml, the others default",
            "token": "from SHERATAN_HUB_TOKEN",
            "TLS": "off",
            "stop": f"Ctrl-C, or kill {one.process.pid}; kill -HUP {one.process.pid} reads the settings again",
            "try next": f"sheratan-hub --data-url {url} submit my.kind --params '{{\"n\": 1}}'",
        }
        assert TOKEN not in "".join(said)
    finally:
        one.kill()


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


def test_the_file_store_keeps_what_was_acknowledged_and_shows_its_nodes(tmp_path: Path) -> None:
    folder = tmp_path / "var" / "hub"
    served = Served(tmp_path, SHERATAN_STORE_URL=f"file://{folder}")
    try:
        served.start()
        job = served.ask("POST", "/api/jobs", {"kind": "k", "idempotency_key": "key"})
        served.ask("POST", "/api/hosts/heartbeat", {"host_id": "n"}, port=served.control_port)
        served.kill()
        served.start()
        again = served.ask("POST", "/api/jobs", {"kind": "k", "idempotency_key": "key"})
        assert (again["job_id"], again["dedup"]) == (job["job_id"], True)
        assert served.end(signal.SIGTERM) == 0
    finally:
        served.kill()
    registry = json.loads((folder / "nodes_registry.json").read_text())
    assert registry["nodes"]["n"]["id"] == "n"
    names = {path.name.partition("-")[0] for path in folder.iterdir()}
    assert names == {"lock", "store.json", "closed.json", "log", "events", "nodes_registry.json"}
    for path in (tmp_path / "var").rglob("*"):
        assert path.is_dir() or (path.stat().st_mode & 0o077 == 0 and TOKEN.encode() not in path.read_bytes()), path


# Bad places of a store: each stops the start with one sentence, status 78, and nothing touched

Harm = Callable[[Path], None]


def is_a_folder(place: Path) -> None:
    place.unlink()
    place.mkdir()


def is_a_file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("mine")


def holds_other_things(place: Path) -> None:
    shutil.rmtree(place)
    place.mkdir()
    (place / "notes.txt").write_text("mine")


def is_no_database(place: Path) -> None:
    place.write_text("mine\n" * 1000)


def lies_in_a_file(place: Path) -> None:
    shutil.rmtree(place.parent)
    place.parent.write_text("mine")


def of_a_newer_mark(place: Path) -> None:
    (place / "store.json").write_text('{"store": "file", "format": 99}')


def of_a_newer_format(place: Path) -> None:
    with closing(sqlite3.connect(place)) as db:
        db.execute("UPDATE meta SET value = 99 WHERE key = 'format'")
        db.commit()


def damaged_log(place: Path) -> None:
    path = place / "log-000000000001"
    content = path.read_bytes()
    path.write_bytes(content[:4500] + b"\xff" * 300 + content[4800:])


def damaged_pages(place: Path) -> None:
    content = place.read_bytes()
    pages = [content[at : at + 4096] for at in range(0, len(content), 4096)]
    place.write_bytes(pages[0] + b"".join(b"\xff" * 200 + page[200:] for page in pages[1:]))


def without_its_log(place: Path) -> None:
    (place / "log-000000000001").unlink()


def without_its_mark(place: Path) -> None:
    (place / "store.json").unlink()


def cut_in_half(place: Path) -> None:
    place.write_bytes(place.read_bytes()[: place.stat().st_size // 2])


BAD: list[tuple[str, Harm, str]] = [
    ("file", is_a_file, "is no folder"),
    ("file", holds_other_things, "holds other things"),
    ("file", lies_in_a_file, "is no folder"),
    ("file", of_a_newer_mark, "format 99"),
    ("file", damaged_log, "damaged"),
    ("file", without_its_log, "missing"),
    ("file", without_its_mark, "holds other things"),
    ("sqlite", is_a_folder, ""),
    ("sqlite", is_no_database, ""),
    ("sqlite", lies_in_a_file, ""),
    ("sqlite", of_a_newer_format, "format 99"),
    ("sqlite", damaged_pages, "damaged"),
    ("sqlite", cut_in_half, "damaged"),
]


@pytest.mark.parametrize(("scheme", "harm", "words"), BAD, ids=[f"{scheme}-{harm.__name__}" for scheme, harm, _ in BAD])
def test_a_store_that_cannot_be_opened_stops_the_start(tmp_path: Path, scheme: str, harm: Harm, words: str) -> None:
    place = filled_store(tmp_path, scheme)
    harm(place)
    before = contents(tmp_path / "data")
    refused_with(Served(tmp_path, SHERATAN_STORE_URL=f"{scheme}://{place}"), str(place), words)
    assert contents(tmp_path / "data") == before


@pytest.mark.parametrize("scheme", ["file", "sqlite"])
def test_a_disk_that_is_full_or_read_only_stops_the_start(tmp_path: Path, scheme: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        lacking("only root can mount a small disk")
    try:
        url = f"{scheme}://{disk / 'hub'}"
        refused_with(Served(tmp_path, SHERATAN_STORE_URL=url), str(disk), "")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        refused_with(Served(tmp_path, SHERATAN_STORE_URL=url), str(disk), "")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("scheme", ["file", "sqlite"])
def test_a_store_that_is_held_names_the_holder(tmp_path: Path, scheme: str) -> None:
    place = tmp_path / "data" / "hub"
    one = Served(tmp_path, SHERATAN_STORE_URL=f"{scheme}://{place}")
    try:
        one.start()
        assert one.process is not None
        said = refused_with(Served(tmp_path, SHERATAN_STORE_URL=f"{scheme}://{place}"), str(place), "is held by")
        assert f"process {one.process.pid} on " in said
    finally:
        one.kill()


def filled_store(directory: Path, scheme: str) -> Path:
    """A store with some jobs in a folder of its own, its hub stopped; where it is."""
    place = directory / "data" / "hub"
    one = Served(directory, SHERATAN_STORE_URL=f"{scheme}://{place}")
    one.start()
    try:
        assert one.ask("POST", "/api/jobs", {"jobs": [{"kind": "k", "params": {"text": "x" * 90}}] * 60})["ok"]
        assert one.end(signal.SIGTERM) == 0
    finally:
        one.kill()
    assert place.exists()
    return place


def contents(folder: Path) -> dict[str, object]:
    """All that is in it but the locks, and SQLite's map of the log, which it makes anew."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if not path.name.endswith(("lock", "-shm"))
    }


def refused_with(served: Served, place: str, words: str) -> str:
    """It does not start, and says why in a line that names the place; what it says."""
    served.process = served.begin()
    try:
        said = "".join(served.process.communicate(timeout=20))
    finally:
        served.kill()
    assert served.process.returncode == 78, said
    (line,) = (line for line in said.splitlines() if place in line)
    assert words in line
    assert "Traceback" not in said
    return said
