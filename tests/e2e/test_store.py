"""Backup, restore and copy beside and between real hubs: what was acknowledged goes on on the other store."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import Served

POLICY = {"title": "t", "rules": [{"effect": "allow", "actions": ["pull"], "kinds": ["*"]}]}


class Place:
    """A folder with a hub and its commands."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.hub = Served(folder, SHERATAN_STORE_URL=url, SHERATAN_MAX_QUEUE_DEPTH="100000")

    def command(self, *arguments: str) -> tuple[int, str]:
        """(exit status, what it prints) of `sheratan-hub store ...`."""
        done = subprocess.run(
            [sys.executable, "-m", "sheratan_hub", "store", *arguments],
            cwd=self.folder,
            env=self.hub.environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout + done.stderr

    def told(self, *arguments: str) -> Any:
        """What it prints as JSON, having gone well."""
        status, text = self.command(*arguments, "--json")
        assert status == 0, text
        return json.loads(text)

    def moved(self, url: str) -> Served:
        """Another hub in the same folder, on another store."""
        self.hub.kill()
        self.hub.environ["SHERATAN_STORE_URL"] = url
        self.hub.start()
        return self.hub


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path, f"sqlite://{tmp_path}/a.db")
    yield made
    made.hub.kill()


def fill(hub: Served) -> dict[str, Any]:
    """A bit of everything that a hub keeps; what it answered."""
    control = hub.control_port
    beat = {"node_id": "n1", "capabilities": ["gpu"], "attestation": {"build_id": "b1"}}
    assert hub.ask("POST", "/api/hosts/heartbeat", beat, control)["ok"]
    made = hub.ask("POST", "/api/policies", {"policy": POLICY}, control)
    assert made["ok"], made
    access = hub.ask("POST", "/api/access", {"role": "viewer", "name": "v"}, control)
    keyed = hub.ask("POST", "/api/jobs", {"kind": "a", "idempotency_key": "k1", "params": {"x": "y" * 5000}})
    jobs = [{"ref": "p", "kind": "a"}, {"kind": "b", "depends_on": ["p"], "on_dependency_failure": "hold"}]
    mission = hub.ask("POST", "/api/missions", {"title": "m", "jobs": jobs})
    assert mission["ok"], mission
    lease = hub.ask("POST", "/api/jobs/pull", {"node_id": "n1", "max": 1, "pull_id": "p1"})["jobs"][0]
    hub.ask("POST", "/api/jobs", {"kind": "c", "source": "s", "delay_seconds": 3600})
    failing = hub.ask("POST", "/api/jobs", {"kind": "d", "max_retries": 0})["job_id"]
    taken = hub.ask("POST", "/api/jobs/pull", {"node_id": "n2", "kinds": ["d"]})["jobs"][0]
    failed = {"lease_id": taken["lease_id"], "ok": False, "error": {"message": "no"}}
    assert hub.ask("POST", f"/api/jobs/{failing}/result", failed)["ok"]
    return {"keyed": keyed, "mission": mission, "lease": lease, "access": access, "failing": failing}


def seen(hub: Served) -> dict[str, Any]:
    """What can be seen over HTTP of all that is kept."""
    control = hub.control_port
    jobs = hub.ask("GET", "/api/jobs?limit=1000")["jobs"]
    events = hub.ask("GET", "/api/ledger?limit=1000")["events"]
    return {
        "jobs": jobs,
        "nodes": [one["node_id"] for one in hub.ask("GET", "/api/hosts", port=control)["nodes"]],
        "attested": hub.ask("GET", "/api/registry", port=control)["nodes"]["n1"]["attestation"],
        "policies": hub.ask("GET", "/api/policies", port=control),
        "tokens": hub.ask("GET", "/api/tokens", port=control)["active"]["id"],
        "access": hub.ask("GET", "/api/access", port=control),
        "missions": hub.ask("GET", "/api/missions"),
        "events": [event for event in events if event["event"] not in ("hub.start", "hub.stop")],
    }


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "logs" not in path.parts
    }


def go_on(hub: Served, made: dict[str, Any]) -> None:
    """The lease lives, its pull is the same one, the key names the same job, and the mission comes to its end."""
    again = hub.ask("POST", "/api/jobs", {"kind": "a", "idempotency_key": "k1", "params": {"x": "y" * 5000}})
    assert (again["job_id"], again["dedup"]) == (made["keyed"]["job_id"], True)
    leases = hub.ask("POST", "/api/jobs/pull", {"node_id": "n1", "max": 1, "pull_id": "p1"})["jobs"]
    assert [one["lease_id"] for one in leases] == [made["lease"]["lease_id"]]


def finish_all(hub: Served) -> None:
    """Every job that can be done is done."""
    while jobs := hub.ask("POST", "/api/jobs/pull", {"node_id": "n1", "max": 100})["jobs"]:
        for job in jobs:
            assert hub.ask("POST", f"/api/jobs/{job['job_id']}/result", {"lease_id": job["lease_id"], "ok": True})["ok"]


def test_a_backup_of_a_busy_hub_goes_on_on_the_other_store_and_back_again(place: Place) -> None:
    hub = place.hub
    hub.start()
    made = fill(hub)
    done, acknowledged = threading.Event(), []

    def submit() -> None:
        while not done.is_set():
            acknowledged.append(hub.ask("POST", "/api/jobs", {"kind": "flood"})["job_id"])

    busy = threading.Thread(target=submit)
    busy.start()
    try:
        while len(acknowledged) < 20:
            pass
        sure = list(acknowledged)
        backup = place.told("backup", "saved")
        assert place.told("check")["ok"]
        assert "process" in place.told("info")["held_by"]
    finally:
        done.set()
        busy.join()
    assert place.told("check", "saved")["problems"] == []
    assert place.told("restore", "saved", "--to", f"file://{place.folder}/b")["sha256"] == backup["holds"]["sha256"]
    status, text = place.command("restore", "saved", "--to", f"file://{place.folder}/b")
    assert (status, "nothing is overwritten" in text) == (78, True)
    before = seen(hub)
    hub.kill()
    kept = hashes(place.folder)
    assert place.told("check")["ok"]
    assert place.told("check", f"file://{place.folder}/b")["ok"]
    assert {name: one for name, one in hashes(place.folder).items() if not name.endswith("-shm")} == {
        name: one for name, one in kept.items() if not name.endswith("-shm")
    }
    hub = place.moved(f"file://{place.folder}/b")
    there = {job["job_id"] for job in hub.ask("GET", "/api/jobs?limit=1000")["jobs"]}
    assert set(sure) <= there
    go_on(hub, made)
    lease = made["lease"]
    assert hub.ask("POST", f"/api/jobs/{lease['job_id']}/result", {"lease_id": lease["lease_id"], "ok": True})["ok"]
    finish_all(hub)
    after = seen(hub)
    assert {name: after[name] for name in ("policies", "tokens", "access", "nodes", "attested")} == {
        name: before[name] for name in ("policies", "tokens", "access", "nodes", "attested")
    }
    assert place.told("backup", "saved2")["ok"]
    assert place.told("copy", f"file://{place.folder}/b", f"sqlite://{place.folder}/c.db")["ok"]
    mission = hub.ask("GET", f"/api/missions/{made['mission']['mission_id']}")
    assert mission["status"] == "completed", mission
    hub = place.moved(f"sqlite://{place.folder}/c.db")
    assert seen(hub) == after
    hub.end(15)
    assert place.told("check")["ok"]
    assert place.told("compact")["ok"]
    assert place.told("check")["ok"]
