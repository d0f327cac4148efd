"""The operators' checklist in a real process: on a hub of its own, and on one in use."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sheratan_hub.clock import SystemClock
from sheratan_hub.smoke import Answer, Target, on_running_hub
from sheratan_hub.web.routes import ROUTES
from tests.conftest import MakeSite
from tests.e2e.serving import TOKEN, Served
from tests.web.test_tls import Files, files
from tools import canaries
from tools.ports import free_ports

__all__ = ["files"]

HMAC_KEY = canaries.HMAC


def smoke(directory: Path, environ: dict[str, str], *options: str) -> tuple[int, list[str]]:
    """(exit status, lines)"""
    done = subprocess.run(
        [sys.executable, "-m", "sheratan_hub", *options, "smoke"],
        cwd=directory,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout.splitlines()


def skipped(lines: list[str]) -> list[str]:
    return [line.partition(":")[0] for line in lines if line.startswith("SKIP")]


UNBUILT = [] if any(route.path.endswith("/explain") for route in ROUTES) else ["SKIP  explain"]
"""What the list asks for and a hub may lack."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    one = Served(
        tmp_path,
        SHERATAN_RESULT_INTEGRITY="hmac",
        SHERATAN_RESULT_INTEGRITY_REQUIRED="1",
        SHERATAN_RESULT_HMAC_KEY=HMAC_KEY,
    )
    one.start()
    yield one
    one.kill()


def options(served: Served) -> tuple[str, ...]:
    control, data = (f"http://127.0.0.1:{port}" for port in (served.control_port, served.data_port))
    return "--control-url", control, "--data-url", data


@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_a_hub_of_its_own_keeps_every_promise_and_leaves_nothing_behind(tmp_path: Path, store: str) -> None:
    (tmp_path / "hub.toml").write_text("not read by the hub under check")
    environ = {"PATH": "/usr/bin", "TMPDIR": str(tmp_path), "SHERATAN_RESULT_HMAC_KEY": "x"}
    status, lines = smoke(tmp_path, {**environ, "SHERATAN_STORE_URL": f"{store}://"})
    assert [line for line in lines if line.startswith("FAIL")] == []
    assert (status, skipped(lines)) == (0, UNBUILT)
    assert len(lines) - 1 >= 20
    assert lines[-1].startswith(f"smoke: {len(lines) - 1 - len(UNBUILT)} passed, 0 failed")
    assert lines[-1].endswith(", on a hub of its own")
    assert [path.name for path in tmp_path.iterdir()] == ["hub.toml"]


def test_a_hub_in_use_is_checked_without_harm_to_its_jobs(served: Served) -> None:
    mine = served.ask("POST", "/api/jobs", {"kind": "mine"})["job_id"]
    tokens = served.ask("GET", "/api/tokens", port=served.control_port)
    status, lines = smoke(served.directory, served.environ, *options(served))
    assert [line for line in lines if line.startswith("FAIL")] == []
    for_its_own = ["SKIP  node", "SKIP  back-pressure", "SKIP  rotation", "SKIP  policy", "SKIP  audit"]
    assert (status, sorted(skipped(lines))) == (0, sorted([*UNBUILT, *for_its_own]))
    left = [
        job["job_id"]
        for word in ("pending", "quarantined", "running", "failed")
        for job in served.ask("GET", f"/api/jobs?status={word}")["jobs"]
    ]
    assert left == [mine]
    assert served.ask("GET", "/admin/queue")["pauses"] == []
    assert {**served.ask("GET", "/api/tokens", port=served.control_port), "nodes": {}} == tokens
    assert served.ask("GET", "/api/hosts", port=served.control_port)["nodes"] == []
    assert served.ask("GET", "/api/access", port=served.control_port)["access"] == []
    (said,) = (line for line in lines if line.startswith("left"))
    finished = [job for job in served.ask("GET", "/api/jobs?limit=1000")["jobs"] if job["kind"] != "mine"]
    assert said.startswith(f"left  {len(finished)} finished jobs of kind {finished[0]['kind']}, which the hub forgets")


def test_a_rotation_that_is_under_way_is_left_alone(served: Served) -> None:
    begun = {"seconds": 3600, "token": "somebody-elses-next-token"}
    served.ask("POST", "/api/tokens/rotation", begun, port=served.control_port)
    tokens = served.ask("GET", "/api/tokens", port=served.control_port)
    status, lines = smoke(served.directory, served.environ, *options(served))
    assert status == 0
    assert "a rotation is under way" in next(line for line in lines if line.startswith("SKIP  rotation: once"))
    left = served.ask("GET", "/api/tokens", port=served.control_port)
    assert [left[name] for name in ("active", "next", "until")] == [
        tokens[name] for name in ("active", "next", "until")
    ]


def test_a_hub_that_is_busy_is_no_broken_hub(tmp_path: Path) -> None:
    """Its leases are in use by what others do; that is said, and nothing is left waiting."""
    one = Served(tmp_path, SHERATAN_MAX_INFLIGHT="1", SHERATAN_STORE_URL="memory://")
    one.start()
    try:
        one.ask("POST", "/api/jobs", {"kind": "mine"})
        assert one.ask("POST", "/api/jobs/pull", {"node_id": "n"})["jobs"]
        status, lines = smoke(one.directory, one.environ, *options(one))
        assert [line for line in lines if line.startswith("FAIL")] == []
        assert status == 0
        assert (
            "SKIP  job: submit, lease, extend, result, completed: all leases that this hub allows are in use" in lines
        )
        assert one.ask("GET", "/api/jobs?status=pending")["jobs"] == []
    finally:
        one.kill()


def test_a_scoped_admin_token_is_enough(served: Served) -> None:
    made = served.ask("POST", "/api/access", {"role": "admin"}, port=served.control_port)
    environ = {**served.environ, "SHERATAN_HUB_TOKEN": made["token"]}
    status, lines = smoke(served.directory, environ, *options(served))
    assert [line for line in lines if line.startswith("FAIL")] == []
    assert status == 0
    assert made["token"] not in "\n".join(lines)
    (left,) = served.ask("GET", "/api/access", port=served.control_port)["access"]
    assert left["access_id"] == made["access_id"]


def test_a_hub_with_tls_is_checked_with_its_authority(tmp_path: Path, files: Files) -> None:
    (tmp_path / "hub.toml").write_text(f'[tls]\ncert = "{files.hub_pem}"\nkey = "{files.key_pem}"\n')
    one = Served(tmp_path, SHERATAN_STORE_URL="memory://")
    one.start()
    urls = (f"https://127.0.0.1:{port}" for port in (one.control_port, one.data_port))
    named = [word for pair in zip(("--control-url", "--data-url"), urls, strict=True) for word in pair]
    try:
        status, lines = smoke(one.directory, one.environ, "--ca", files.ca_pem, *named)
        assert [line for line in lines if line.startswith("FAIL")] == []
        assert status == 0
        status, lines = smoke(one.directory, one.environ, *named)
        assert (status, len(lines)) == (1, 1)
        assert "certificate" in lines[0]
    finally:
        one.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_it_takes_away_what_it_made(served: Served, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "sheratan_hub", *options(served), "smoke"],
        cwd=served.directory,
        env=served.environ,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in iter(process.stdout.readline, ""):
        if "job: submit" in line:
            process.send_signal(number)
            break
    process.communicate(timeout=60)
    assert process.returncode != 0
    for word in ("pending", "quarantined"):
        assert served.ask("GET", f"/api/jobs?status={word}")["jobs"] == []
    assert served.ask("GET", "/admin/queue")["pauses"] == []
    assert served.ask("GET", "/api/hosts", port=served.control_port)["nodes"] == []


class Unheard(Target):
    """What begins a rotation is done, and its answer lost."""

    async def ask(self, plane: str, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        answer = await super().ask(plane, method, path, body, **options)
        if (method, path) == ("POST", "/api/tokens/rotation"):
            raise aiohttp.ServerDisconnectedError
        return answer


async def test_a_rotation_whose_beginning_was_not_answered_is_abandoned(make_site: MakeSite) -> None:
    site = await make_site()
    urls = (f"http://127.0.0.1:{site.app.ports[plane]}" for plane in ("control", "data"))
    async with aiohttp.ClientSession() as session:
        said: list[str] = []
        assert await on_running_hub(Unheard(session, *urls, TOKEN, SystemClock()), said.append) == 1
    assert next(line for line in said if line.startswith("FAIL")).startswith("FAIL  rotation: once begun")
    assert (await site.control("GET", "/api/tokens"))[1]["next"] is None


def test_a_broken_promise_is_said_and_its_jobs_are_cancelled(served: Served) -> None:
    environ = {**served.environ, "SHERATAN_RESULT_HMAC_KEY": "another"}
    status, lines = smoke(served.directory, environ, *options(served))
    assert status == 1
    assert "FAIL  job: submit, lease, extend, result, completed" in "\n".join(lines)
    assert served.ask("GET", "/api/jobs?status=pending")["jobs"] == []


def test_a_wrong_token_fails(served: Served) -> None:
    environ = {**served.environ, "SHERATAN_HUB_TOKEN": "wrong"}
    status, lines = smoke(served.directory, environ, *options(served))
    assert status == 1
    assert "FAIL  token: X-Sheratan-Token is accepted on both planes" in "\n".join(lines)
    assert TOKEN not in "\n".join(lines)


def test_where_no_hub_is_one_line_says_so(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    status, lines = smoke(tmp_path, {"PATH": "/usr/bin"}, "--control-url", f"http://127.0.0.1:{port}")
    assert status == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"FAIL  the hub: nothing answers at http://127.0.0.1:{port}: ")
