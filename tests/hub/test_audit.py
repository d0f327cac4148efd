"""The audit log: chained over restarts, folded under floods, whole after a torn line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.audit import START_HASH, Audit
from sheratan_hub.clock import VirtualClock
from sheratan_hub.items import Committed, Happened, Origin
from sheratan_hub.rules.command import Event
from sheratan_hub.storage import Changes

WEB = Origin("data", "10.0.0.7", "/api/jobs", None)


def tell(audit: Audit, name: str, origin: Origin = WEB, **meta: Any) -> None:
    event = Event(0, name, "client", meta=meta)
    audit.committed(Committed([Happened([event], origin)], Changes(), 1))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def verified(path: Path) -> int:
    """How many lines hang together from the start."""
    prev = START_HASH
    for n, text in enumerate(path.read_bytes().splitlines()):
        line = json.loads(text)
        body = text[: text.rindex(b',"hash"')] + b"}"
        if line["prev_hash"] != prev or line["hash"] != hashlib.sha256(body).hexdigest() or line["seq"] != n + 1:
            return n
        prev = line["hash"]
    return len(path.read_bytes().splitlines())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "audit.jsonl"


def test_every_line_has_every_field_and_the_chain_goes_on_after_a_restart(path: Path, clock: VirtualClock) -> None:
    for name in ("refused.missing_token", "refused.queue_full", "hub.stop"):
        audit = Audit(path, clock)
        tell(audit, name, reason="why")
        audit.close()
    assert [line["event"] for line in lines(path)] == ["AUTH_FAILURE", "BACKPRESSURE_DROP", "HUB_STOP"]
    fields = ["seq", "ts", "event", "plane", "remote_addr", "node_id", "path", "reason", "detail", "prev_hash", "hash"]
    assert all(list(line) == fields for line in lines(path))
    assert verified(path) == 3
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_changed_line_breaks_the_chain_where_it_stands(path: Path, clock: VirtualClock) -> None:
    audit = Audit(path, clock)
    for n in range(5):
        tell(audit, "refused.invalid_token", Origin("data", f"10.0.0.{n}"))
    audit.close()
    text = path.read_text().splitlines()
    path.write_text("\n".join([*text[:2], text[2].replace("10.0.0.2", "10.0.0.9"), *text[3:]]) + "\n")
    assert verified(path) == 2


def test_equal_events_of_one_origin_within_a_second_become_one_line_with_a_count(
    path: Path, clock: VirtualClock
) -> None:
    audit = Audit(path, clock)
    for _ in range(1000):
        tell(audit, "refused.invalid_token", reason="invalid_token")
    tell(audit, "refused.invalid_token", Origin("data", "10.0.0.8", "/api/jobs"), reason="invalid_token")
    assert len(lines(path)) == 2
    clock._now += 1000
    audit.flush()
    assert [line.get("count", 1) for line in lines(path)] == [1, 1, 999]
    tell(audit, "refused.invalid_token", reason="invalid_token")
    assert len(lines(path)) == 4
    audit.close()
    assert verified(path) == 4


def test_a_flood_from_many_origins_keeps_its_memory_bounded(path: Path, clock: VirtualClock) -> None:
    audit = Audit(path, clock)
    for n in range(5000):
        tell(audit, "refused.invalid_token", Origin("data", f"10.{n >> 8}.{n & 255}.1"))
    assert len(audit._folded) <= 4096
    audit.close()
    assert verified(path) == 5000


def test_a_line_cut_short_by_a_crash_stays_visible_and_the_chain_goes_on(path: Path, clock: VirtualClock) -> None:
    audit = Audit(path, clock)
    tell(audit, "refused.queue_full")
    tell(audit, "hub.stop")
    audit.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    audit = Audit(path, clock)
    tell(audit, "hub.start")
    audit.close()
    first, torn, last = path.read_bytes().splitlines()
    assert whole.startswith(first + b"\n" + torn)
    assert json.loads(last)["seq"] == 2
    assert json.loads(last)["prev_hash"] == json.loads(first)["hash"]
