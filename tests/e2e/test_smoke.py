"""The operators' checklist in a real process: on a hub of its own, and on one in use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sheratan_hub.web.routes import ROUTES
from tests.e2e.serving import TOKEN, Served
from tools import canaries
from tools.ports import free_ports

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
    assert served.ask("GET", "/api/access", port=served.control_port)["access"] == []


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
