"""The watcher reads the log from outside: over rotations, truncation and kills, no alert twice and none missed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sheratan_hub import watcher as watching
from sheratan_hub.audit_file import AuditFile
from sheratan_hub.audit_lines import FILE_NAME, chain_files
from sheratan_hub.clock import VirtualClock, rfc3339
from sheratan_hub.config import AlertRule, AlertSettings
from sheratan_hub.watcher import Watcher
from tests.hub.chains import record

QUIET = {
    name: AlertRule("HUB_STOP", on=False)
    for name in (
        "auth_failure",
        "port_mismatch",
        "result_integrity_fail",
        "attestation_spoof",
        "poison",
        "fleet_silent",
    )
}
EVERY = AlertSettings(**QUIET, rules=(AlertRule("NODE_DEAD", name="dead", cooldown_seconds=0),))
"""Each NODE_DEAD is an alert: which were raised tells which lines were read."""


class Scene:
    """A log, and watchers of it that come and go."""

    def __init__(self, folder: Path, clock: VirtualClock, **options: Any) -> None:
        self.folder, self.clock = folder, clock
        self.path = folder / FILE_NAME
        self.log = AuditFile(self.path, **options)
        self.written = 0
        self.said: list[str] = []

    def write(self, count: int = 1, event: str = "NODE_DEAD", **fields: Any) -> None:
        for _ in range(count):
            self.written += 1
            self.clock._now += 10
            ts = rfc3339(self.clock.now())
            self.log.add(record(self.written, event=event, node_id=f"n{self.written}", **fields) | {"ts": ts})
            self.log.write()

    def watcher(self, settings: AlertSettings = EVERY, **options: Any) -> Watcher:
        found = Watcher(self.folder, settings, self.clock, self.said.append, **options)
        found.open()
        return found

    def read(self, watcher: Watcher | None = None) -> None:
        """Read all there is, with this watcher or one that comes and goes."""
        mine = watcher or self.watcher()
        for _ in range(10_000):
            if not mine.step():
                break
        else:
            raise AssertionError("it never comes to an end")
        if watcher is None:
            mine.close()

    def alerts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "alerts.jsonl").read_text().splitlines()]

    def seqs(self, rule: str = "dead") -> list[int]:
        return [alert["to_seq"] for alert in self.alerts() if alert["rule"] == rule]

    def all_once(self) -> None:
        assert self.seqs() == list(range(1, self.written + 1))
        assert self.seqs("audit_chain") == []


@pytest.fixture
def scene(tmp_path: Path, clock: VirtualClock) -> Scene:
    return Scene(tmp_path / "logs", clock)


@pytest.fixture
def rotating(tmp_path: Path, clock: VirtualClock) -> Scene:
    return Scene(tmp_path / "logs", clock, max_bytes=4000)


def killed(watcher: Watcher) -> None:
    """What SIGKILL does: nothing is saved, the lock is gone."""
    watcher._alerts.close()
    if watcher._file >= 0:
        os.close(watcher._file)


def test_an_alert_is_written_said_and_readable_by_its_owner_only(scene: Scene) -> None:
    scene.write(1)
    scene.read()
    (alert,) = scene.alerts()
    assert (alert["rule"], alert["event"], alert["node_id"], alert["to_seq"]) == ("dead", "NODE_DEAD", "n1", 1)
    assert scene.said == [f"{alert['ts']} ALERT dead: 1 NODE_DEAD"]
    for name in ("alerts.jsonl", "watcher_state.json"):
        assert (scene.folder / name).stat().st_mode & 0o777 == 0o600


def test_what_is_written_while_it_watches_is_read_once(scene: Scene) -> None:
    watcher = scene.watcher()
    for _ in range(5):
        scene.read(watcher)
        scene.write(3)
    scene.read(watcher)
    watcher.close()
    scene.all_once()


def test_it_waits_for_a_log_that_is_not_there_yet(tmp_path: Path, clock: VirtualClock) -> None:
    watcher = Watcher(tmp_path / "logs", EVERY, clock, print)
    watcher.open()
    assert not watcher.step()
    scene = Scene(tmp_path / "logs", clock)
    scene.write(2)
    scene.read(watcher)
    scene.all_once()


def test_half_a_line_is_left_until_it_is_whole(scene: Scene) -> None:
    scene.write(2)
    whole = scene.path.read_bytes()
    scene.path.write_bytes(whole[:-30])
    watcher = scene.watcher()
    scene.read(watcher)
    assert scene.seqs() == [1]
    with scene.path.open("ab") as file:
        file.write(whole[-30:])
    scene.read(watcher)
    scene.all_once()


def test_stopped_and_started_it_goes_on_where_it_was(scene: Scene) -> None:
    for _ in range(5):
        scene.write(4)
        scene.read()
    scene.all_once()


@pytest.mark.parametrize("at_once", [1, 3, 30])
def test_a_rotated_file_is_read_to_its_end_before_the_next(rotating: Scene, at_once: int) -> None:
    watcher = rotating.watcher()
    for _ in range(60 // at_once):
        rotating.write(at_once)
        watcher.step()
    rotating.read(watcher)
    assert len(chain_files(rotating.path)) > 4
    rotating.all_once()


def test_what_is_written_between_its_look_and_a_rotation_is_not_lost(
    rotating: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = rotating.watcher()
    rotating.write(3)
    rotating.read(watcher)
    look, written = os.pread, rotating.written

    def pread(fd: int, size: int, offset: int) -> bytes:
        text = look(fd, size, offset)
        if size == watching.CHUNK_BYTES and rotating.written == written:
            rotating.write(20)
        return text

    monkeypatch.setattr(os, "pread", pread)
    rotating.read(watcher)
    rotating.read(watcher)
    assert len(chain_files(rotating.path)) > 1
    rotating.all_once()


def test_rotations_while_it_is_away_are_made_up_for(rotating: Scene) -> None:
    rotating.write(5)
    rotating.read()
    rotating.write(60)
    rotating.read()
    rotating.all_once()


def test_a_file_that_was_moved_by_others_is_read_to_its_end_too(scene: Scene) -> None:
    scene.write(3)
    scene.read()
    scene.write(2)
    scene.path.rename(scene.path.with_name("hub_security_audit.jsonl.1"))
    scene.read()
    assert scene.log.check() is None
    scene.write(2)
    scene.read()
    scene.all_once()


def test_a_log_that_is_emptied_loses_only_what_was_not_read(scene: Scene) -> None:
    scene.write(5)
    watcher = scene.watcher()
    scene.read(watcher)
    os.truncate(scene.path, 0)
    scene.read(watcher)
    scene.write(20)
    scene.read(watcher)
    scene.all_once()


def test_a_log_that_is_emptied_and_longer_than_before_when_it_looks_again_is_read_from_its_start(scene: Scene) -> None:
    scene.write(5)
    scene.read()
    os.truncate(scene.path, 0)
    scene.write(5)
    scene.write(2)
    scene.read()
    scene.all_once()


def test_a_log_that_is_cut_in_the_middle_makes_no_alert_twice(scene: Scene) -> None:
    scene.write(9)
    scene.read()
    os.truncate(scene.path, scene.path.stat().st_size // 2)
    scene.read()
    scene.write(2)
    scene.read()
    scene.all_once()


def test_a_new_file_on_the_old_ones_inode_is_not_taken_for_it(scene: Scene) -> None:
    scene.write(5)
    scene.read()
    state = json.loads((scene.folder / "watcher_state.json").read_bytes())
    scene.path.rename(scene.path.with_name("gone"))
    scene.write(30)
    state["inode"] = scene.path.stat().st_ino
    (scene.folder / "watcher_state.json").write_text(json.dumps(state))
    scene.read()
    scene.all_once()


@pytest.mark.parametrize("steps", range(0, 12))
def test_killed_at_any_step_it_raises_no_alert_twice_and_misses_none(
    rotating: Scene, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(watching, "CHUNK_BYTES", 1500)
    monkeypatch.setattr(watching, "SAVE_MS", 10**9)  # so that much is done that is not saved
    rotating.write(7)
    rotating.read()
    rotating.write(30)
    watcher = rotating.watcher()
    monkeypatch.setattr(watcher, "save", lambda: None)
    for _ in range(steps):
        watcher.step()
    killed(watcher)
    rotating.write(3)
    rotating.read()
    rotating.all_once()


@pytest.mark.parametrize("steps", range(0, 12))
def test_killed_once_more_while_it_reads_again_it_still_knows_what_it_has_raised(
    rotating: Scene, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(watching, "CHUNK_BYTES", 1500)
    rotating.write(7)
    rotating.read()
    rotating.write(30)
    watcher = rotating.watcher()
    monkeypatch.setattr(watcher, "save", lambda: None)
    rotating.read(watcher)
    killed(watcher)
    again = rotating.watcher()
    again.save()
    for _ in range(steps):
        again.step()
        again.save()
    killed(again)
    rotating.write(3)
    rotating.read()
    rotating.all_once()


def test_an_alert_that_a_kill_has_cut_is_raised_whole(scene: Scene) -> None:
    scene.write(3)
    scene.read()
    state = (scene.folder / "watcher_state.json").read_bytes()
    scene.write(3)
    scene.read()
    (scene.folder / "watcher_state.json").write_bytes(state)
    alerts = scene.folder / "alerts.jsonl"
    alerts.write_bytes(alerts.read_bytes()[:-20])
    scene.read()
    scene.all_once()


def test_a_cool_down_survives_a_restart(scene: Scene) -> None:
    settings = AlertSettings(**QUIET, rules=(AlertRule("NODE_DEAD", name="dead", cooldown_seconds=1),))
    for _ in range(25):
        scene.write(10)
        scene.read(watcher := scene.watcher(settings))
        watcher.close()
    assert scene.seqs() == [1, 101, 201]


@pytest.mark.parametrize("harm", ["gone", "torn"])
def test_without_its_state_it_knows_its_alerts(scene: Scene, harm: str) -> None:
    scene.write(5)
    scene.read()
    state = scene.folder / "watcher_state.json"
    if harm == "gone":
        state.unlink()
    else:
        state.write_bytes(state.read_bytes()[:-9])
    scene.write(5)
    scene.read()
    scene.all_once()


def test_at_the_very_first_start_old_lines_are_passed_over(scene: Scene) -> None:
    scene.write(3)
    scene.clock._now += 3_600_000
    scene.write(2)
    scene.read()
    assert scene.seqs() == [4, 5]


def test_the_very_first_start_begins_with_rotated_files_that_are_young_enough(rotating: Scene) -> None:
    rotating.write(40)
    rotating.clock._now += 3_600_000
    rotating.write(40)
    rotating.read()
    assert rotating.seqs() == list(range(41, 81))


def test_only_one_watches_at_a_time(scene: Scene) -> None:
    first = scene.watcher()
    with pytest.raises(BlockingIOError):
        scene.watcher()
    first.close()
    scene.watcher().close()


def test_alerts_that_were_moved_away_go_on_in_a_new_file(scene: Scene) -> None:
    watcher = scene.watcher()
    scene.write(2)
    scene.read(watcher)
    (scene.folder / "alerts.jsonl").rename(scene.folder / "alerts.old")
    scene.write(1)
    scene.read(watcher)
    assert scene.seqs() == [3]


def test_an_alert_that_finds_no_room_is_written_once_there_is_some(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = scene.watcher()
    scene.write(2)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
    with pytest.raises(OSError, match="no room"):
        watcher.step()
    monkeypatch.undo()
    scene.read(watcher)
    scene.all_once()


def test_the_hub_never_notices(scene: Scene) -> None:
    scene.write(20)
    before = scene.path.read_bytes(), scene.path.stat().st_ctime_ns
    scene.read()
    assert (scene.path.read_bytes(), scene.path.stat().st_ctime_ns) == before
    scene.log.look()
    assert scene.log.foreign == 0


# A log that does not hang together


def test_a_line_that_was_changed_is_an_alert_of_its_own(scene: Scene) -> None:
    scene.write(5)
    scene.path.write_bytes(scene.path.read_bytes().replace(b'"node_id":"n3"', b'"node_id":"n8"'))
    scene.read()
    (alert,) = [alert for alert in scene.alerts() if alert["rule"] == "audit_chain"]
    assert (alert["to_seq"], "line 3 was changed" in alert["text"]) == (3, True)


def test_lines_that_are_missing_are_an_alert_of_their_own(scene: Scene) -> None:
    scene.write(3)
    scene.read()
    scene.write(5)
    lines = scene.path.read_bytes().splitlines(keepends=True)
    scene.path.write_bytes(b"".join(lines[:3] + lines[6:]))
    scene.read()
    (alert,) = [alert for alert in scene.alerts() if alert["rule"] == "audit_chain"]
    assert alert["text"] == "lines 4 to 6 are missing"


def test_a_log_that_begins_anew_is_an_alert_and_its_lines_count(scene: Scene) -> None:
    scene.write(5)
    scene.read()
    scene.log.close()
    shutil.rmtree(scene.folder, ignore_errors=True)
    raise_again = scene.folder
    raise_again.mkdir()
    scene.log = AuditFile(scene.path)
    scene.write(2)
    scene.read()
    assert scene.seqs() == [1, 2], "with its state and alerts gone it is a new one"


def test_a_log_that_is_wiped_under_it_is_an_alert(scene: Scene) -> None:
    watcher = scene.watcher()
    scene.write(5)
    scene.read(watcher)
    scene.log.close()
    scene.path.unlink()
    scene.log = AuditFile(scene.path)
    scene.write(2)
    scene.read(watcher)
    (alert,) = [alert for alert in scene.alerts() if alert["rule"] == "audit_chain"]
    assert alert["text"] == "the log begins anew; it had come to line 5"
    assert scene.seqs() == [1, 2, 3, 4, 5, 1, 2]


def test_what_a_crash_has_cut_is_no_alert(scene: Scene) -> None:
    scene.write(3)
    scene.log.close()
    scene.path.write_bytes(scene.path.read_bytes()[:-30])
    scene.log = AuditFile(scene.path)
    scene.write(2)
    scene.read()
    assert scene.seqs("audit_chain") == []
    assert scene.seqs() == [1, 2, 3, 4]


BOUNDED = AlertSettings(**QUIET, rules=EVERY.rules, max_bytes=2000, keep_files=2)


def ids(*files: Path) -> list[str]:
    return [json.loads(line)["node_id"] for file in files for line in file.read_text().splitlines()]


def test_alerts_that_have_no_room_begin_a_new_file_and_the_oldest_go(tmp_path: Path, clock: VirtualClock) -> None:
    scene = Scene(tmp_path, clock)
    scene.write(40)
    scene.read(scene.watcher(BOUNDED))
    files = [tmp_path / f"alerts.jsonl{ending}" for ending in (".2", ".1", "")]
    assert {path.name for path in tmp_path.glob("alerts*")} == {file.name for file in files}
    for file in files:
        assert 0 < file.stat().st_size <= 2000
        assert file.stat().st_mode & 0o077 == 0
    kept = ids(*files)
    assert kept == [f"n{number}" for number in range(41 - len(kept), 41)]


def test_a_watcher_that_is_killed_right_after_a_new_file_was_begun_raises_nothing_twice(
    tmp_path: Path, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, clock)
    scene.write(3)
    first = scene.watcher(msgspec.structs.replace(BOUNDED, max_bytes=760))
    scene.read(first)
    first.close()
    second = scene.watcher(msgspec.structs.replace(BOUNDED, max_bytes=760))
    monkeypatch.setattr(second, "save", lambda: None)  # it is killed before that
    scene.write(3)
    scene.read(second)
    killed(second)
    assert (tmp_path / "alerts.jsonl.1").exists()
    scene.read(scene.watcher(BOUNDED))
    assert ids(tmp_path / "alerts.jsonl.1", tmp_path / "alerts.jsonl") == [f"n{number}" for number in range(1, 7)]


def test_another_watcher_is_kept_away_from_the_new_file_too(tmp_path: Path, clock: VirtualClock) -> None:
    scene = Scene(tmp_path, clock)
    scene.write(20)
    one = scene.watcher(BOUNDED)
    while one.step():
        pass
    assert (tmp_path / "alerts.jsonl.1").exists()
    with pytest.raises(BlockingIOError):
        scene.watcher(BOUNDED)
    one.close()


def test_other_settings_keep_what_was_counted(tmp_path: Path, clock: VirtualClock) -> None:
    scene = Scene(tmp_path, clock)
    rule = AlertRule("NODE_DEAD", name="dead", more_than=3)
    one = scene.watcher(AlertSettings(**QUIET, rules=(rule,)))
    scene.write(3)
    one.step()
    one.adopt(AlertSettings(**QUIET, rules=(rule, AlertRule("NODE_STALE", name="stale"))), posting=False)
    scene.write()
    scene.write(event="NODE_STALE")
    one.step()
    one.close()
    assert [line.split()[2] for line in scene.said] == ["dead:", "stale:"]
