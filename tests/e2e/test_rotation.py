"""Rotations of real hubs: killed at random moments, driven from the command line, followed by a worker.

`ROTATIONS=20` makes as many runs with kills; `make torture` does.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.clock import SystemClock, rfc3339
from sheratan_hub.storage import open_store
from tests.e2e.serving import TOKEN, Served
from tests.e2e.test_worker import SECONDS
from tools import canaries

OLD, NEW = canaries.ACTIVE, canaries.NEXT
RUNS = int(os.environ.get("ROTATIONS", "3"))
WINDOW_SECONDS = 3.0


def asked(url: str, token: str) -> tuple[int, str] | None:
    """(status, code) of a request with this token, None if nobody answered."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as no:
        with no:
            return no.code, json.load(no)["code"]
    except (OSError, ValueError):
        return None


@pytest.fixture
def served(tmp_path: Path) -> Iterator[list[Served]]:
    hubs: list[Served] = []
    yield hubs
    for hub in hubs:
        hub.kill()


class Clients(threading.Thread):
    """One that switches at a moment of the window and must never be refused; one that stays with the old token."""

    def __init__(self, url: str, switches_at: float, until: float) -> None:
        super().__init__()
        self.url, self.switches_at, self.until = url, switches_at, until
        self.wrong: list[Any] = []
        self.answers = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.02):
            began = time.time()
            token = OLD if began < self.switches_at else NEW
            mine = asked(self.url, token)
            in_time = token == NEW or time.time() < self.until
            began = time.time()
            late = asked(self.url, OLD)
            if mine is not None and in_time:
                self.answers += 1
                if mine[0] != 200:
                    self.wrong.append((began - self.until, mine))
            if late is not None and began >= self.until and late != (403, "old_token"):
                self.wrong.append((began - self.until, late))


@pytest.mark.parametrize("run", range(RUNS))
def test_a_rotation_that_is_killed_at_random_moments_refuses_nobody(
    tmp_path: Path, served: list[Served], run: int
) -> None:
    rng = random.Random(run)
    scheme = ("sqlite", "file")[run % 2]
    store = f"{scheme}://{tmp_path / 'store'}"
    until = time.time() + WINDOW_SECONDS
    hub = Served(
        tmp_path,
        SHERATAN_STORE_URL=store,
        SHERATAN_HUB_TOKEN_ACTIVE=OLD,
        SHERATAN_HUB_TOKEN_NEXT=NEW,
        SHERATAN_HUB_TOKEN_ROTATION_UNTIL=rfc3339(int(until * 1000)),
    )
    served.append(hub)
    hub.start()
    until = int(until * 1000) / 1000
    clients = Clients(f"http://127.0.0.1:{hub.control_port}/api/hosts", until - rng.random() * 2, until)
    clients.start()
    try:
        while time.time() < until + 1:
            time.sleep(min(rng.random() * 1.5, max(0.0, until - time.time()) + rng.random() * 0.05))
            hub.end(signal.SIGKILL)
            hub.start()
        time.sleep(0.5)
    finally:
        clients.stop.set()
        clients.join(30)
    assert clients.wrong == []
    assert clients.answers > 5
    assert hub.end(signal.SIGTERM) == 0
    assert ends(store) == 1
    lines = (tmp_path / "var/logs/hub_security_audit.jsonl").read_text()
    assert lines.count('"TOKEN_ROTATION_FINALIZED"') <= 1


def ends(url: str) -> int:
    """How often the ledger tells of a rotation's end."""
    import asyncio

    async def count() -> int:
        store = open_store(url, SystemClock())
        await store.open()
        try:
            return sum(b"rotation_finalized" in line.line for line in await store.events(limit=100_000))
        finally:
            await store.close()

    return asyncio.run(count())


def cli(hub: Served, *arguments: str, token: str = TOKEN) -> Any:
    """What `sheratan-hub ARGUMENTS -o json` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "sheratan_hub", *arguments, "-o", "json"],
        env={**hub.environ, **urls(hub), "SHERATAN_HUB_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def urls(hub: Served) -> dict[str, str]:
    return {
        "HUB_CONTROL_URL": f"http://127.0.0.1:{hub.control_port}",
        "HUB_DATA_URL": f"http://127.0.0.1:{hub.data_port}",
    }


class Followed:
    """A worker with a token file; what it says is in a file."""

    def __init__(self, hub: Served, secret: Path) -> None:
        self.spoken = hub.directory / "worker.txt"
        module = Path(__file__).with_name("handlers_for_tests.py")
        command = [sys.executable, "-m", "sheratan_hub", "--token-file", str(secret), "worker", str(module)]
        with self.spoken.open("w") as out:
            self.process = subprocess.Popen(
                [*command, "--node-id", "n1", "--concurrency", "2", "--wait", "1"],
                env={**hub.environ, **urls(hub), "SHERATAN_HUB_TOKEN": "unused"},
                stderr=out,
                start_new_session=True,
            )


def test_a_worker_follows_its_token_file_without_a_lost_beat_or_job(tmp_path: Path, served: list[Served]) -> None:
    hub = Served(tmp_path, SHERATAN_NODE_TTL_SEC="4")
    served.append(hub)
    hub.start()
    secret = tmp_path / "token"
    secret.write_text(TOKEN)
    worker = Followed(hub, secret)
    try:
        jobs = [submit(hub, TOKEN)]
        finished(hub, TOKEN, jobs[0])
        begun = cli(hub, "tokens", "rotate", "--until", "4s", "--to", str(secret))
        new = secret.read_text().strip()
        assert new not in json.dumps(begun)
        assert secret.stat().st_mode & 0o777 == 0o600
        until = time.time() + 4
        while time.time() < until + 1:
            jobs.append(submit(hub, new))
            time.sleep(0.1)
        for job_id in jobs:
            finished(hub, new, job_id)
        state = cli(hub, "tokens", "status", token=new)
        assert state["nodes"]["n1"]["token_id"] == state["active"]["id"] == begun["next"]
        assert state["locked_out"] == []
        audit = (tmp_path / "var/logs/hub_security_audit.jsonl").read_text()
        assert '"AUTH_FAILURE"' not in audit, "it went over before it was refused"
        refused = cli_refused(hub, "tokens", "abandon", token=TOKEN)
        assert "no longer valid" in refused
    finally:
        worker.process.send_signal(signal.SIGTERM)
        worker.process.wait(SECONDS)
    said = worker.spoken.read_text()
    assert "AUTH_FAIL" not in said
    lines = [json.loads(line) for line in (tmp_path / "var/logs/hub_security_audit.jsonl").read_text().splitlines()]
    assert not {"NODE_STALE", "NODE_DEAD", "LEASE_REAP"} & {line["event"] for line in lines}
    assert "TOKEN_ROTATION_FINALIZED" in {line["event"] for line in lines}


def submit(hub: Served, token: str) -> str:
    body = json.dumps({"kind": "add", "params": {"a": 1, "b": 2}}).encode()
    headers = {"X-Sheratan-Token": token}
    request = urllib.request.Request(f"http://127.0.0.1:{hub.data_port}/api/jobs", body, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        job_id: str = json.load(answer)["job_id"]
    return job_id


def finished(hub: Served, token: str, job_id: str) -> None:
    url = f"http://127.0.0.1:{hub.data_port}/api/jobs/{job_id}?wait_seconds={SECONDS}"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"X-Sheratan-Token": token}), timeout=60) as answer:
        job = json.load(answer)
    assert (job["status"], job["result"], job["losses"], job["failures"]) == ("completed", 3, 0, 0)


def cli_refused(hub: Served, *arguments: str, token: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sheratan_hub", *arguments],
        env={**hub.environ, **urls(hub), "SHERATAN_HUB_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 77, done
    return done.stderr


def test_scoped_tokens_from_the_command_line(tmp_path: Path, served: list[Served]) -> None:
    hub = Served(tmp_path)
    served.append(hub)
    hub.start()
    made = cli(hub, "access", "create", "node", "--node-id", "n1", "--expires", "7d", "--name", "first")
    assert made["token"].startswith("shn_node_")
    assert (made["role"], made["node_id"], made["name"]) == ("node", "n1", "first")
    assert "forbidden_role" in cli_refused(hub, "jobs", "list", token=made["token"])
    [shown] = cli(hub, "access", "list")
    assert (shown["access_id"], "token" in shown) == (made["access_id"], False)
    done = subprocess.run(
        [sys.executable, "-m", "sheratan_hub", "access", "revoke", made["access_id"]],
        env={**hub.environ, **urls(hub)},
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert b"revoked" in done.stderr
    assert cli(hub, "access", "list") == []
    assert "invalid_token" in cli_refused(hub, "jobs", "list", token=made["token"])


def test_a_hub_whose_settings_newly_name_only_a_retired_token_says_so_and_does_not_start(tmp_path: Path) -> None:
    settings = {
        "SHERATAN_HUB_TOKEN_ACTIVE": OLD,
        "SHERATAN_HUB_TOKEN_NEXT": NEW,
        "SHERATAN_HUB_TOKEN_ROTATION_UNTIL": "2020-01-01T00:00:00Z",
    }
    hub = Served(tmp_path, **settings)
    hub.start()
    assert hub.end(signal.SIGTERM) == 0
    again = Served(tmp_path, SHERATAN_HUB_TOKEN=OLD)
    status, said = again.fails()
    assert status == 78
    assert "retired and stays so" in said
    assert OLD not in said
