"""`sheratan-hub diagnose` on a hub that runs, that was killed, that was never there; and never a secret in it."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sheratan_hub import asking
from sheratan_hub.cli import main
from tests.e2e.serving import Served
from tools.canaries import encodings

POSTGRES = "postgresql://hub:{}@db.example/hub"


class Hub(Served):
    """A hub and the command beside it."""

    def diagnose(self, *options: str, **environ: str) -> tuple[int, str, str]:
        """(exit status, what it prints, what it says); in this process, where all is imported already."""
        given = {name: None for name in os.environ if name.startswith(("SHERATAN_", "HUB_"))}
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.directory)
            done = CliRunner().invoke(main, options, env={**given, **self.environ, **environ})
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.stdout, done.stderr

    def told(self, *options: str, **environ: str) -> tuple[int, dict[str, Any]]:
        status, out, _ = self.diagnose("diagnose", "--json", *options, **environ)
        return status, json.loads(out)


@pytest.fixture
def hub(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Hub]:
    scheme = getattr(request, "param", "sqlite")
    url = f"{scheme}://{tmp_path}/var/{'hub.db' if scheme == 'sqlite' else 'hub'}"
    hub = Hub(tmp_path, SHERATAN_STORE_URL=url)
    yield hub
    hub.kill()


def codes(told: dict[str, Any]) -> list[str]:
    return [one["code"] for one in told["findings"]]


def opened(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as bundle:
        return {name: bundle.read(name) for name in bundle.namelist()}


def stamps(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file with its size, its time of change and what is in it; SQLite's index of its log is no data."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and not path.name.endswith("-shm")]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize("hub", ["sqlite", "file"], indirect=True)
def test_a_hub_that_runs_makes_it_and_one_that_was_killed_leaves_its_files(hub: Hub, tmp_path: Path) -> None:
    hub.start()
    hub.ask("POST", "/api/hosts/heartbeat", {"node_id": "n1", "capabilities": ["gpu"]}, port=hub.control_port)
    status, told = hub.told()
    assert (status, told["ok"], told["source"], codes(told)) == (0, True, "hub", [])
    assert Path(tmp_path, told["path"]).name.startswith("diag_bundle_2")
    job = hub.ask("POST", "/api/jobs", {"kind": "work", "required_capabilities": ["tpu"]})
    status, out, _ = hub.diagnose("diagnose", "--explain", "--output", "up.zip")
    assert (status, out.splitlines()[0]) == (1, "1 thing looks wrong.")
    assert "no node offers tpu" in out
    assert out.splitlines()[-1] == "up.zip"

    hub.kill()
    before = stamps(tmp_path / "var")
    status, out, _ = hub.diagnose("diagnose", "--explain", "--output", "killed.zip")
    assert status == 1
    assert "CRITICAL hub-down: The hub is down: it was killed or has crashed." in out
    assert "WARNING no-capable-node: No node can run jobs of kind work: no node offers tpu." in out
    assert out.index("hub-down") < out.index("no-capable-node") < out.index("killed.zip")
    status, told = hub.told("--output", "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "killed.zip").read_bytes()
    assert stamps(tmp_path / "var") == before, "nothing is touched"
    members = opened(tmp_path / "killed.zip")
    assert not [name for name in members if name.startswith("errors/")]
    [waiting] = json.loads(members["waiting.json"])["jobs"]
    assert waiting["job_id"] == job["job_id"]
    assert json.loads(members["registry.json"])["nodes"]["n1"]["status"] == "ONLINE", "as when it was killed"
    assert json.loads(members["store.json"])["check"]["complete"]
    assert json.loads(members["health.json"])["data"]["answers"] is False
    assert len(members["logs/hub_security_audit.jsonl"].splitlines()) >= 2


def test_a_hub_that_hangs_is_named_with_its_process(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "PROBE_SECONDS", 0.3)
    hub.start()
    assert hub.process is not None
    hub.process.send_signal(signal.SIGSTOP)
    try:
        status, told = hub.told()
    finally:
        hub.process.send_signal(signal.SIGCONT)
    assert (status, codes(told)[0], told["source"]) == (1, "hub-down", "files")
    assert f"process {hub.process.pid} on " in told["findings"][0]["text"]


def test_a_hub_that_refuses_the_token_is_looked_at_from_outside(hub: Hub, tmp_path: Path) -> None:
    hub.start()
    hub.ask("POST", "/api/jobs", {"kind": "work"})
    status, out, said = hub.diagnose("diagnose", "--explain", "--output", "b.zip", SHERATAN_HUB_TOKEN="another-token-1")
    assert (status, "no-capable-node" in out) == (1, True)
    assert "the hub answers, but makes no bundle: this token is not valid here" in said
    members = opened(tmp_path / "b.zip")
    assert json.loads(members["manifest.json"])["source"] == "files"
    assert json.loads(members["health.json"])["data"]["health"]["status"] == "ok"
    assert b"sheratan_jobs" in members["metrics/data.txt"]
    assert "hub-down" not in out


def test_one_plane_that_does_not_answer_is_named(hub: Hub) -> None:
    hub.start()
    status, told = hub.told(SHERATAN_DATA_PORT="1")
    assert (status, codes(told)) == (1, ["hub-down"])
    assert "The data plane does not answer" in told["findings"][0]["text"]


# Bad input


def damage(path: Path) -> None:
    """Zeros in all pages but the first, where the tables are described."""
    data = path.read_bytes()
    path.write_bytes(data[:4096] + bytes(len(data) - 4096))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()


def newer(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = 99 WHERE key = 'format'")
    db.close()


def text(path: Path) -> None:
    path.write_text("this is not a store\n" * 100)


def gone(path: Path) -> None:
    path.unlink()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of a hub that was stopped."""
    directory = tmp_path_factory.mktemp("stopped")
    hub = Hub(directory)
    hub.start()
    hub.ask("POST", "/api/jobs", {"kind": "work"})
    assert hub.end(signal.SIGTERM) == 0
    return directory / "var"


@pytest.mark.parametrize("harm", [damage, cut, foreign, newer, text, gone], ids=lambda one: one.__name__)
def test_a_store_that_cannot_be_read_is_named_and_left_as_it_is(
    hub: Hub, tmp_path: Path, stopped: Path, harm: Any
) -> None:
    shutil.copytree(stopped, tmp_path / "var")
    harm(tmp_path / "var/hub.db")
    before = stamps(tmp_path / "var")
    status, told = hub.told("--output", "b.zip")
    assert stamps(tmp_path / "var") == before
    assert status == 1
    finding = next(one for one in told["findings"] if one["code"] == "store-damaged")
    states = {damage: "damaged", cut: "damaged", foreign: "foreign", newer: "newer", text: "foreign", gone: "missing"}
    assert finding["evidence"]["state"] == states[harm]
    assert "hub.db" in finding["text"]
    assert "logs/hub_security_audit.jsonl" in opened(tmp_path / "b.zip")


def test_a_file_store_with_a_flipped_byte_is_named(tmp_path: Path) -> None:
    hub = Hub(tmp_path, SHERATAN_STORE_URL=f"file://{tmp_path}/var/hub")
    hub.start()
    for _ in range(3):
        hub.ask("POST", "/api/jobs", {"kind": "work"})
    assert hub.end(signal.SIGTERM) == 0
    log = next((tmp_path / "var/hub").glob("log-*"))
    data = bytearray(log.read_bytes())
    data[200] ^= 1
    log.write_bytes(data)
    status, told = hub.told()
    assert (status, codes(told)) == (1, ["hub-down", "store-damaged"])
    assert log.name in told["findings"][1]["text"]


def test_a_hub_that_was_stopped_is_told_from_one_that_was_killed(hub: Hub, tmp_path: Path, stopped: Path) -> None:
    shutil.copytree(stopped, tmp_path / "var")
    status, told = hub.told()
    assert (status, codes(told)) == (1, ["hub-down", "no-capable-node"])
    assert "it was stopped" in told["findings"][0]["text"]


def test_files_that_only_the_hubs_user_may_read_tell_nothing_of_its_end(
    hub: Hub, tmp_path: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(stopped, tmp_path / "var")
    stat = Path.stat

    def forbidden(path: Path, **options: Any) -> Any:
        if "logs" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", forbidden)
    status, told = hub.told("--output", "b.zip")
    monkeypatch.undo()
    assert (status, codes(told)[0]) == (1, "hub-down")
    assert "its audit log cannot be read by who runs this" in told["findings"][0]["text"]
    members = opened(tmp_path / "b.zip")
    assert {"config.json", "audit.json", "store.json", "waiting.json"} <= set(members)


def test_a_touched_audit_log_is_named(hub: Hub, tmp_path: Path, stopped: Path) -> None:
    shutil.copytree(stopped, tmp_path / "var")
    log = tmp_path / "var/logs/hub_security_audit.jsonl"
    log.write_text(log.read_text().replace("HUB_START", "HUB_STARE"))
    [finding] = [one for one in hub.told()[1]["findings"] if one["code"] == "audit-broken"]
    assert "line 1: was changed" in finding["text"]


def test_the_command_itself_says_it_all_without_a_traceback(hub: Hub, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sheratan_hub", "diagnose", "--explain"]
    done = subprocess.run(command, cwd=tmp_path, env=hub.environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("2 things look wrong.")


def test_where_no_hub_has_ever_run_this_is_said(hub: Hub, tmp_path: Path) -> None:
    status, told = hub.told("--data-dir", "elsewhere")
    assert (status, codes(told)[0]) == (1, "hub-down")
    assert "none has ever run with this data directory" in told["findings"][0]["text"]
    assert not (tmp_path / "elsewhere").exists()


def test_what_cannot_be_done_is_one_sentence_and_78(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for output, why in (("no/such/place.zip", "No such file"), ("notes.txt", "it is there already, and is no bundle")):
        status, out, said = hub.diagnose("diagnose", "--output", output)
        assert (status, out) == (78, "")
        assert said.count("\n") == 1
        assert why in said
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]
    status, _, said = hub.diagnose("diagnose", SHERATAN_MAX_INFLIGHT="many")
    assert (status, said.count("\n")) == (78, 1)
    assert "SHERATAN_MAX_INFLIGHT" in said


def test_an_older_bundle_may_be_replaced_and_two_of_one_second_stand_side_by_side(hub: Hub, tmp_path: Path) -> None:
    for _ in range(2):
        status, _, said = hub.diagnose("diagnose", "--output", "b.zip")
        assert (status, "wrong. --explain tells more" in said) == (1, True)
    (tmp_path / "many").mkdir()
    for _ in range(2):
        hub.diagnose("diagnose", "--output", "many")
    assert len(list((tmp_path / "many").glob("diag_bundle_*.zip"))) == 2
    assert (tmp_path / "b.zip").stat().st_mode & 0o777 == 0o600


def test_a_hub_on_another_machine_cannot_be_diagnosed_from_here(hub: Hub, tmp_path: Path) -> None:
    hub.start()
    status, out, said = hub.diagnose("--control-url", "http://192.0.2.1:9", "diagnose", "--output", "b.zip")
    assert (status, out) == (69, "")
    assert "elsewhere" in said
    assert not (tmp_path / "b.zip").exists()


# Canaries


CANARIES = {
    name: f'canary/"{name}"+\\%0123456789'
    for name in ("active", "next", "hmac", "webhook", "params", "result", "failure", "label", "key", "header", "pause")
}
CANARIES |= {
    "password": "canary-password-0123456789",
    "env": "canary-env+0123456789",
    "scoped": "canary-scoped-0123456789",
}


def forms(secret: str) -> Iterator[bytes]:
    """Plain, escaped, quoted, hex, base64 at every place, turned round, packed."""
    yield from (text for texts in encodings(secret).values() for text in texts)
    yield from (secret[::-1].encode(), json.dumps(secret[::-1])[1:-1].encode())
    yield base64.b64encode(secret[::-1].encode())
    yield gzip.compress(secret.encode(), mtime=0)[10:-8]
    yield base64.b64encode(gzip.compress(secret.encode(), mtime=0))


def plant(hub: Hub, tmp_path: Path) -> None:
    """Secrets in everything that clients, operators and logs can hold."""
    can, control = CANARIES, hub.control_port
    hub.ask("POST", "/api/hosts/heartbeat", {"node_id": "n1", "note": can["label"], can["label"]: "x"}, port=control)
    hub.ask(
        "POST",
        "/api/hosts/heartbeat",
        {"node_id": "n2", "endpoint": POSTGRES.format(can["password"]), "attestation": {"runtime": can["label"]}},
        port=control,
    )
    body = {"kind": "work", "params": {"deep": [can["params"]]}, "idempotency_key": can["key"], "max_retries": 0}
    hub.ask("POST", "/api/jobs", body)
    hub.ask("POST", "/api/jobs", {**body, "params": {}})
    for ok in (True, False):
        hub.ask("POST", "/api/jobs", {"kind": "work", "params": {"a": can["params"] * 200}, "max_retries": 0})
        lease = hub.ask("POST", "/api/jobs/pull", {"node_id": "n1"})["jobs"][0]
        told = {"result": {"r": can["result"]}} if ok else {"error": {"trace": can["failure"]}}
        hub.ask("POST", f"/api/jobs/{lease['job_id']}/result", {"lease_id": lease["lease_id"], "ok": ok, **told})
    for _ in range(3):
        hub.ask("POST", "/api/jobs", {**body, "idempotency_key": None, "required_capabilities": ["tpu"]})
    hub.ask("POST", "/admin/pause", {"kind": "other", "reason": can["pause"]})
    line = {"ts": "2026-11-21T10:00:00.000Z", "level": "info", "logger": "sheratan.data", "request_id": can["header"]}
    headers = f"headers: {{'Authorization': 'Bearer {can['header']}', 'Cookie': '{can['header']}'}}"
    lines = [
        {**line, "event": f"GET /api/jobs?token={can['active']} {headers}"},
        {**line, "event": "failed", "headers": {"X-Sheratan-Token": can["header"]}, "params": can["params"]},
        {
            **line,
            "event": "failed",
            "exception": f'Traceback\n  File "x.py", line 3, in f\nValueError: {can["params"]}',
        },
        {**line, "event": f"connecting to {POSTGRES.format(can['password'])} with {can['hmac'][::-1]}"},
        {**line, "event": base64.b64encode(f"user:{can['active']}".encode()).decode()},
        {**line, "event": f"the words are {can['env']}, {can['env'][::-1]}, {can['next'][::-1]} and {can['active']}"},
        {**line, "event": f"posting to https://hooks.example/{can['webhook']}", "body": can["result"]},
    ]
    with (tmp_path / "var/logs/hub_data.jsonl").open("a") as log:
        log.writelines(json.dumps(one) + "\n" for one in lines)
        log.write(f"not JSON at all: {can['header']} {can['active']}\n")


@pytest.mark.parametrize("hub", ["sqlite", "file"], indirect=True)
def test_no_secret_and_nothing_of_a_job_is_in_a_bundle_of_either_kind(hub: Hub, tmp_path: Path) -> None:
    can = CANARIES
    (tmp_path / "next.token").write_text(can["next"])
    (tmp_path / "hook").write_text(f"https://hooks.example/services/{can['webhook']}")
    (tmp_path / "hub.toml").write_text(
        f"# {can['active']}\n[auth]\ntoken_next_file = '{tmp_path}/next.token'\n"
        "rotation_until = '2999-01-01T00:00:00Z'\n"
        f"[alerts]\nin_process = true\nwebhook_file = '{tmp_path}/hook'\nwebhook_hosts = ['hooks.example']\n"
        "[log]\nlevel = 'debug'\n"
    )
    hub.environ |= {
        "SHERATAN_HUB_TOKEN": can["active"],
        "SHERATAN_RESULT_HMAC_KEY": can["hmac"],
        "BACKUP_DSN": POSTGRES.format(can["password"]),
        "CLOUD_SECRET": can["env"],
    }
    hub.start()
    plant(hub, tmp_path)
    assert hub.diagnose("diagnose", "--output", "up.zip", "--explain")[0] in (0, 1)
    hub.kill()
    log = tmp_path / "var/logs/hub_data.jsonl"
    assert can["header"] in log.read_text().replace("\\\\", "\\").replace('\\"', '"'), "they were there to be found"
    _, out, said = hub.diagnose("diagnose", "--output", "down.zip", "--explain")
    places = {"output": out.encode(), "said": said.encode()}
    for name in ("up.zip", "down.zip"):
        members = opened(tmp_path / name)
        assert len(members["logs/hub_data.jsonl"].splitlines()) >= 8
        assert not [one for one in members if one.startswith("errors/")]
        assert json.loads(members["waiting.json"])["jobs"]
        places |= {f"{name}:{member}": data for member, data in members.items()}
        places[name] = (tmp_path / name).read_bytes()
    hits = [(place, name) for place, data in places.items() for name, secret in can.items() if hit(data, secret)]
    assert hits == []
    names = json.loads(opened(tmp_path / "up.zip")["environment.json"])
    assert {"CLOUD_SECRET", "SHERATAN_RESULT_HMAC_KEY"} <= set(names["names"])


def hit(data: bytes, secret: str) -> bool:
    return any(form in data for form in forms(secret))


def test_the_search_would_find_them() -> None:
    secret = CANARIES["active"]
    for hidden in (secret, secret[::-1], secret.encode().hex(), base64.b64encode(secret.encode()).decode()):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bundle:
            bundle.writestr("x", f"a {hidden} b")
        assert hit(bundle_text(packed.getvalue()), secret)


def bundle_text(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as bundle:
        return b"".join(bundle.read(name) for name in bundle.namelist())
