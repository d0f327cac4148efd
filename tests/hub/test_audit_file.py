"""The audit log's writer: rotation, crashes between files, a disk that is full and then is not, strangers."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub import audit_file
from sheratan_hub.audit import Audit, clean
from sheratan_hub.audit_file import AuditFile
from sheratan_hub.audit_lines import EVENTS, chain_files
from sheratan_hub.audit_verify import verify
from sheratan_hub.clock import VirtualClock
from sheratan_hub.items import Committed, Happened, Origin
from sheratan_hub.rules.command import Event
from sheratan_hub.storage import Changes
from tests.hub.chains import record, written


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "hub_security_audit.jsonl"


def seqs(path: Path) -> list[int]:
    return [json.loads(line)["seq"] for file in chain_files(path) for line in file.read_bytes().splitlines()]


def put(file: AuditFile, n: int) -> None:
    file.add(record(n))
    file.write()


# Rotation


def test_a_full_file_is_rotated_and_the_chain_goes_on(path: Path) -> None:
    written(path, 60, max_bytes=6000)
    files = chain_files(path)
    assert len(files) > 3
    assert all(file.stat().st_size <= 6000 for file in files)
    assert seqs(path) == list(range(1, 61))
    for before, after in pairwise(files):
        last, first = before.read_bytes().splitlines()[-1], after.read_bytes().splitlines()[0]
        assert json.loads(first)["prev_hash"] == json.loads(last)["hash"]
        assert after.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in files[:2]] == [
        "hub_security_audit.000000000001.jsonl",
        f"hub_security_audit.{json.loads(files[1].read_bytes().splitlines()[0])['seq']:012d}.jsonl",
    ]


def test_all_rotated_files_are_kept_unless_a_number_is_given(path: Path) -> None:
    file = AuditFile(path, max_bytes=3000, keep_files=2)
    for n in range(1, 61):
        put(file, n)
        if file.untidy:
            file.tidy()
            assert not file.untidy
    file.close()
    assert len(chain_files(path)) == 3
    assert seqs(path)[-1] == 60
    assert verify(chain_files(path)).broken is None


def test_a_crash_between_two_files_leaves_no_hole(path: Path) -> None:
    written(path, 10)
    path.rename(path.with_name("hub_security_audit.000000000001.jsonl"))
    written(path, 5, first=11)
    assert seqs(path) == list(range(1, 16))
    assert verify(chain_files(path)).broken is None


def test_a_cut_line_is_accounted_for_in_its_own_file_even_if_that_is_full(path: Path) -> None:
    written(path, 15, max_bytes=6000)
    path.write_bytes(path.read_bytes()[:-30])
    written(path, 10, first=16, max_bytes=path.stat().st_size)
    verdict = verify(chain_files(path))
    assert verdict.broken is None
    assert len(verdict.cuts) == 1


def test_a_name_that_is_taken_stops_no_line(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.with_name("hub_security_audit.000000000001.jsonl").mkdir()
    file = AuditFile(path, max_bytes=1000)
    for n in range(1, 20):
        put(file, n)
    assert file.trouble is None
    assert "cannot be rotated" in caplog.text
    file.close()
    assert len(path.read_bytes().splitlines()) == 19


# What cannot be written


@pytest.fixture
def full(path: Path) -> Path:
    """A log on a disk that is always full."""
    path.parent.mkdir()
    path.symlink_to("/dev/full")
    return path


def test_lines_that_find_no_room_are_written_later_in_their_order(full: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = AuditFile(full)
    for n in range(1, 4):
        put(file, n)
    assert file.trouble == "No space left on device"
    assert file.check() == "No space left on device"
    assert caplog.text.count("cannot be written") == 1, "told once, not at each line"
    full.unlink()
    assert file.check() is None
    put(file, 4)
    file.close()
    assert seqs(full) == [1, 2, 3, 4]
    assert verify([full]).broken is None


def test_lines_that_could_not_be_written_until_the_end_are_counted_in_the_log(
    full: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = AuditFile(full)
    for n in range(1, 4):
        put(file, n)
    file.close()
    assert "3 lines of the audit log" in caplog.text


def test_what_waits_in_memory_is_bounded_and_what_is_lost_is_told(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_file, "OWED_MAX", 3)
    file = AuditFile(full)
    for n in range(1, 11):
        put(file, n)
    full.unlink()
    put(file, 11)
    file.close()
    first, *others = [json.loads(line) for line in full.read_bytes().splitlines()]
    assert first["detail"]["lost"] == 8
    assert len(others) == 2
    assert verify([full]).broken is None


def test_a_part_of_a_line_that_found_room_is_cut_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = AuditFile(path)
    put(file, 1)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:40]))
    put(file, 2)
    assert file.trouble
    assert seqs(path) == [1]
    monkeypatch.undo()
    put(file, 3)
    file.close()
    assert seqs(path) == [1, 2, 3]
    assert verify([path]).cuts == []


def test_a_part_of_a_line_that_could_not_be_cut_back_is_accounted_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> None:
        raise OSError("no")

    file = AuditFile(path)
    put(file, 1)
    write = os.write
    monkeypatch.setattr(os, "ftruncate", refuses)
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:40]))
    put(file, 2)
    monkeypatch.undo()
    put(file, 3)
    file.close()
    verdict = verify([path])
    assert (verdict.broken, len(verdict.cuts), verdict.head.seq) == (None, 1, 3)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("f_bfree", 3, "its disk is full"), ("f_flag", os.ST_RDONLY, "its disk is read-only")],
)
def test_a_full_or_read_only_disk_is_noticed_before_a_line_is_lost(
    path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: int, said: str
) -> None:
    class Disk:
        f_bavail = f_bfree = f_blocks = 1_000_000
        f_frsize, f_flag = 4096, 0

    file = AuditFile(path)
    disk = Disk()
    monkeypatch.setattr(os, "fstatvfs", lambda _: disk)
    assert file.check() is None
    setattr(disk, field, value)
    disk.f_bavail = disk.f_bfree
    assert file.check() == said
    setattr(disk, field, getattr(Disk, field))
    disk.f_bavail = disk.f_bfree
    assert file.check() is None
    file.close()


def test_a_first_line_of_a_new_file_that_finds_no_room_leaves_nothing_in_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = AuditFile(path, max_bytes=3000)
    write = os.write
    n = 0
    while len(chain_files(path)) == 1:
        n += 1
        full = path.stat().st_size > 2700
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:40])) if full else None
        put(file, n)
    assert (file.trouble is None, path.stat().st_size) == (False, 0)
    monkeypatch.undo()
    assert file.check() is None
    file.close()
    assert seqs(path) == list(range(1, n + 1))
    assert verify(chain_files(path)).cuts == []


def test_something_else_in_the_place_of_the_log_is_noticed_before_a_line_is_lost(path: Path) -> None:
    file = AuditFile(path)
    put(file, 1)
    kept = path.rename(path.with_name("kept.jsonl"))
    path.mkdir()
    assert file.check() == "Is a directory"
    path.rmdir()
    kept.rename(path)
    assert file.check() is None
    put(file, 2)
    file.close()
    assert seqs(path) == [1, 2]


# Strangers


def test_a_log_that_was_moved_away_goes_on_in_a_new_file(path: Path) -> None:
    file = AuditFile(path)
    put(file, 1)
    moved = path.rename(path.with_name("elsewhere.jsonl"))
    assert file.check() is None
    put(file, 2)
    file.close()
    assert seqs(path) == [2]
    assert verify([path, moved]).broken is None


def test_a_log_that_was_emptied_goes_on_where_it_was(path: Path) -> None:
    file = AuditFile(path)
    for n in range(1, 4):
        put(file, n)
    os.truncate(path, 0)
    put(file, 4)
    file.close()
    assert seqs(path) == [4]
    assert verify([path]).broken is not None, "three lines are missing"


def test_a_folder_that_was_removed_is_made_again(path: Path) -> None:
    import shutil

    file = AuditFile(path)
    put(file, 1)
    shutil.rmtree(path.parent)
    assert file.check() is None
    put(file, 2)
    file.close()
    assert seqs(path) == [2]


def test_every_change_by_somebody_else_is_noticed(path: Path) -> None:
    file = AuditFile(path)
    put(file, 1)
    file.look()
    assert file.foreign == 0
    path.write_bytes(path.read_bytes() + b"x\n")
    file.look()
    file.look()
    assert file.foreign == 1
    file.close()


# What is in a line


def tell(audit: Audit, name: str, origin: Origin, **meta: Any) -> None:
    audit.committed(Committed([Happened([Event(0, name, "client", meta=meta)], origin)], Changes(), 1))


def test_a_line_is_ascii_whatever_a_client_sends(path: Path, clock: VirtualClock) -> None:
    audit = Audit(path, clock)
    strange = "/api/jobs/\udcff\u2028\x85\x00\n\ud83d\ude00é"
    for n, text in enumerate((strange, strange * 100)):
        tell(audit, "refused.port_mismatch", Origin("data", f"10.0.0.{n}", text, text), why=strange)
    audit.close()
    text = path.read_bytes()
    assert text.isascii()
    assert len(text.decode().splitlines()) == 2
    assert all(len(json.loads(line)["path"]) < 2000 for line in text.splitlines())
    assert verify([path]).broken is None


def test_nothing_that_must_not_be_told_is_in_a_detail() -> None:
    detail = clean(
        {
            "job_id": "j1",
            "params": "canary",
            "error": {"deep": "canary"},
            "lease_id": "canary",
            "token": "canary",
            "key": "12345678canary",
            "idempotency_key": "canary",
            "big": 2**70,
            "nodes": ["a"] * 100,
            "text": "x" * 5000,
        }
    )
    assert "canary" not in json.dumps(detail)
    assert detail["key"] == "12345678"
    assert detail["big"] == str(2**70)
    assert (len(detail["nodes"]), len(detail["text"])) == (20, 200)


def test_one_event_that_follows_becomes_a_line_with_its_count_too(path: Path, clock: VirtualClock) -> None:
    audit = Audit(path, clock)
    for _ in range(2):
        tell(audit, "refused.invalid_token", Origin("data", "10.0.0.7"), reason="invalid_token")
    clock._now += 1000
    audit.flush()
    audit.close()
    assert [json.loads(line).get("count") for line in path.read_bytes().splitlines()] == [None, 1]


def test_every_event_is_one_of_the_contract() -> None:
    from sheratan_hub.audit import NAMES

    assert {*NAMES.values(), "LEASE_REAP"} <= EVENTS
