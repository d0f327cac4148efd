"""Secrets are planted in every input of a real hub that logs at DEBUG; all that it wrote is then searched for them."""

from __future__ import annotations

import base64
import json
import signal
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.clock import SystemClock, rfc3339
from tests.e2e.serving import Served
from tools.canaries import found

ACTIVE = 'canary/"active"+\\token%0123456789'
NEXT = 'canary/"next"+\\token%9876543210'
HMAC = 'canary/"hmac"+\\key%0123456789abcdef'
GIVEN = 'canary/"given"+\\token%abcdefgh'
WRONG = 'canary/"wrong"+\\token%zyxwvuts'


@pytest.mark.parametrize(
    ("form", "hidden"),
    [
        ("raw", lambda raw: raw),
        ("base64", lambda raw: base64.b64encode(b"x: " + raw + b"!")),
        ("base64", lambda raw: base64.b64encode(b"Bearer" + b"xx" + raw)),
        ("base64url", lambda raw: base64.urlsafe_b64encode(b"y" + raw + b"?")),
        ("hex", lambda raw: raw.hex().encode()),
        ("url", lambda raw: urllib.parse.quote(raw).encode()),
        ("json", lambda raw: json.dumps({"token": raw.decode()}).encode()),
    ],
)
def test_the_search_finds_what_is_there(form: str, hidden: Any) -> None:
    content = b"before " + hidden(ACTIVE.encode()) + b" after"
    assert ("active", form) in found(content, {"active": ACTIVE, "next": NEXT})
    assert not any(name == "next" for name, _ in found(content, {"active": ACTIVE, "next": NEXT}))


class Canaried(Served):
    """A hub whose every secret is a canary."""

    def say(self, method: str, url: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as no:
            with no:
                return no.code, no.read()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Canaried]:
    (tmp_path / "hub.toml").write_text("[log]\nlevel = 'debug'\n")
    hub = Canaried(
        tmp_path,
        SHERATAN_HUB_TOKEN_ACTIVE=ACTIVE,
        SHERATAN_HUB_TOKEN_NEXT=NEXT,
        SHERATAN_HUB_TOKEN_ROTATION_UNTIL=rfc3339(SystemClock().now() + 3_600_000),
        SHERATAN_RESULT_HMAC_KEY=HMAC,
        SHERATAN_RESULT_INTEGRITY="hmac",
        PYTHONASYNCIODEBUG="1",
    )
    hub.start()
    yield hub
    hub.kill()


def exercise(hub: Canaried) -> list[bytes]:
    """Put each secret wherever a client may, rightly or by mistake. The answers, and secrets that the hub made."""
    control, data = f"http://127.0.0.1:{hub.control_port}", f"http://127.0.0.1:{hub.data_port}"
    answers: list[bytes] = []
    for secret in (ACTIVE, NEXT, WRONG, HMAC):
        headers = {"Authorization": f"Bearer {secret}"}
        quoted = urllib.parse.quote(secret, safe="")
        for method, url, body in (
            ("GET", f"{control}/api/hosts", None),
            ("GET", f"{data}/api/jobs?token={quoted}", None),
            ("GET", f"{data}/metrics", None),
            ("GET", f"{control}/metrics?format=json", None),
            ("POST", f"{control}/api/hosts/heartbeat", {"node_id": "n1", "token": secret, "x_secret": secret}),
            ("POST", f"{data}/api/jobs", {"kind": "x", "params": {}, "token": secret}),
            ("POST", f"{data}/api/jobs", b"not JSON " + secret.encode()),
            ("GET", f"{data}/api/registry", None),
        ):
            answers.append(hub.say(method, url, body, **headers)[1])
            answers.append(hub.say(method, url, body, **{"X-Sheratan-Token": secret, "X-Request-ID": secret})[1])
        echoed = b'{"kind": "x", "priority": "' + quoted.encode() + b'"}'  # the sender is told its own word
        hub.say("POST", f"{data}/api/jobs", echoed, **headers)
        with socket.create_connection(("127.0.0.1", hub.data_port)) as peer:
            peer.sendall(f"GET / HTTP/1.1\r\nHost: localhost\r\nBad Header: {secret}\r\n\r\n".encode())
            answers.append(peer.recv(65536))
    right = {"X-Sheratan-Token": ACTIVE}
    _, job = hub.say("POST", f"{data}/api/jobs", {"kind": "x"}, **right)
    _, pulled = hub.say("POST", f"{data}/api/jobs/pull", {"node_id": "n1"}, **right)
    lease = json.loads(pulled)["jobs"][0]
    wrong = {"lease_id": lease["lease_id"], "ok": True, "integrity": {"mode": "hmac", "sig": "0"}}
    answers += [job, pulled, hub.say("POST", f"{data}/api/jobs/{lease['job_id']}/result", wrong, **right)[1]]
    answers.append(hub.say("DELETE", f"{control}/api/tokens/rotation", **right)[1])
    body = {"seconds": 600, "token": GIVEN}
    assert hub.say("POST", f"{control}/api/tokens/rotation", body, **right)[0] == 201
    answers.append(hub.say("GET", f"{control}/api/tokens", **right)[1])
    hub.say("GET", f"{control}/api/hosts", **{"X-Sheratan-Token": GIVEN})
    return answers


@pytest.mark.parametrize("scheme", ["sqlite", "file"])
def test_no_secret_is_in_anything_that_the_hub_wrote_or_said(hub: Canaried, tmp_path: Path, scheme: str) -> None:
    secrets = {"active": ACTIVE, "next": NEXT, "hmac": HMAC, "given": GIVEN, "wrong": WRONG}
    if scheme == "file":
        hub.kill()
        hub.environ["SHERATAN_STORE_URL"] = f"file://{tmp_path / 'var' / 'hub'}"
        hub.start()
    answers = exercise(hub)
    control = f"http://127.0.0.1:{hub.control_port}"
    made = json.loads(hub.say("POST", f"{control}/api/access", {"role": "viewer"}, **{"X-Sheratan-Token": ACTIVE})[1])
    secrets["scoped"] = made["token"]
    hub.say("GET", f"{control}/api/hosts", **{"X-Sheratan-Token": made["token"]})
    assert hub.process is not None
    command = Path(f"/proc/{hub.process.pid}/cmdline").read_bytes()
    hub.process.send_signal(signal.SIGTERM)
    out, err = hub.process.communicate(timeout=20)
    places = {"output": out.encode(), "errors": err.encode(), "command line": command, "answers": b"\n".join(answers)}
    places |= {str(path): path.read_bytes() for path in (tmp_path / "var").rglob("*") if path.is_file()}
    assert any(name.endswith("hub_security_audit.jsonl") for name in places)
    assert len(places) >= 7
    assert {name: hits for name, content in places.items() if (hits := found(content, secrets))} == {}
