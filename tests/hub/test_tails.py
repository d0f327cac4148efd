"""The ends of logs: how much of them is read, and what of a line may be told."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub import tails
from sheratan_hub.redact import GONE, Redactor
from sheratan_hub.tails import alert_line, audit_line, cleaned, ledger_line, log_line, tail

REDACTOR = Redactor(["a-known-secret"])


def told(clean: tails.Clean, **record: Any) -> dict[str, Any]:
    return cleaned(json.dumps(record).encode(), clean, REDACTOR)


def test_the_last_lines_come_from_as_many_files_as_it_takes(tmp_path: Path) -> None:
    old, new = tmp_path / "a.1", tmp_path / "a"
    old.write_text("".join(f"{n}\n" for n in range(10)))
    new.write_text("10\n11\n12")
    assert tail([old, new], 5).lines == [b"8", b"9", b"10", b"11", b"12"]
    assert tail([old, new], 2).lines == [b"11", b"12"]
    assert len(tail([old, new], 100).lines) == 13
    assert tail([]) == ([], False)


def test_no_more_than_so_many_bytes_are_read_and_this_is_told(tmp_path: Path) -> None:
    log = tmp_path / "a"
    log.write_text("".join(f"{n:09}\n" for n in range(1000)))
    found = tail([log], 200, most_bytes=1000)
    assert found.cut
    assert found.lines == [b"%09d" % n for n in range(901, 1000)]
    log.write_bytes(b"x" * 5000)
    assert tail([log], 200, most_bytes=1000) == ([], True)


def test_of_a_line_that_is_no_object_or_too_long_only_the_length_is_told() -> None:
    for line in (b"GET / a-known-secret", b"[1]", b'{"event": "' + b"x" * 70_000 + b'"}'):
        assert cleaned(line, log_line, REDACTOR) == {"unreadable_bytes": len(line)}


def test_of_an_exception_its_way_is_told_but_not_the_words_of_others() -> None:
    try:
        try:
            int("a payload")
        except ValueError as error:
            raise OSError(28, "No space left on device", "/var/hub") from error
    except OSError:
        text = traceback.format_exc()
    found = told(log_line, event="request failed", exception=text)["exception"]
    assert "a payload" not in str(found)
    assert "ValueError" in found
    assert found[-1] == "OSError: [Errno 28] No space left on device: '/var/hub'"
    assert any(line.startswith("tests/hub/test_tails.py:") for line in found)


def test_a_request_id_is_told_if_the_hub_has_made_it() -> None:
    assert told(log_line, request_id="0123456789ab-1f")["request_id"] == "0123456789ab-1f"
    assert "request_id" not in told(log_line, request_id="from-a-client")


def test_other_fields_pass_the_filter() -> None:
    found = told(log_line, ts="t", level="info", logger="l", event="listening", host="127.0.0.1", port=1, token="x1")
    assert found == {
        **{"ts": "t", "level": "info", "logger": "l", "event": "listening"},
        **{"host": "127.0.0.1", "port": 1, "token": GONE},
    }


def test_an_audit_line_keeps_its_number_and_hash_and_loses_what_is_free() -> None:
    found = told(
        audit_line,
        seq=4,
        ts="t",
        event="AUTH_FAILURE",
        plane="data",
        remote_addr="10.0.0.1",
        node_id=None,
        path="/api/jobs?token=abc",
        reason="invalid_token",
        detail={"key": "order-17", "n": 3, "who": "a-known-secret"},
        count=7,
        prev_hash="0" * 64,
        hash="f" * 64,
        more="not told",
    )
    assert found == {
        **{"seq": 4, "ts": "t", "event": "AUTH_FAILURE", "plane": "data", "remote_addr": "10.0.0.1", "node_id": None},
        **{"path": f"/api/jobs?token: {GONE}", "reason": "invalid_token", "count": 7, "hash": "f" * 64},
        "detail": {"key": GONE, "n": 3, "who": GONE},
    }


@pytest.mark.parametrize("clean", [alert_line, ledger_line])
def test_alerts_and_ledger_tell_named_fields_only(clean: tails.Clean) -> None:
    found = told(clean, ts="t", event="job.failed", secretly="x", artifact_path="/x", meta={"result": "r", "n": 1})
    assert found["event"] == "job.failed"
    assert not {"secretly", "artifact_path"} & set(found)
    assert "'r'" not in str(found)
