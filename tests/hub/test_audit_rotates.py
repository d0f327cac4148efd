"""Whoever reads the audit log while it is rotated, at whichever moment, misses no line and sees no break."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sheratan_hub.audit_check import ChainCheck
from sheratan_hub.audit_lines import rotated_name
from sheratan_hub.audit_read import Filter, newest, page, search
from sheratan_hub.cli import main
from sheratan_hub.clock import VirtualClock
from tests.hub.test_watcher import Scene

BYTES = 4000
"""A file's; about a dozen lines."""


class Log(Scene):
    """A log that is written to, and rotated, just before the `at`th time that somebody asks for or opens a file."""

    def __init__(self, folder: Path, clock: VirtualClock, at: int, **options: Any) -> None:
        super().__init__(folder, clock, max_bytes=BYTES, **options)
        self.write(20)
        self.left, self.calm = at, False

    def counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.left -= not self.calm
            if self.left == 0 and not self.calm:
                self.write(14)
            return call(*arguments, **options)

        return counted


Logs = Callable[..., Iterator[Log]]


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: VirtualClock) -> Logs:
    """A log for each moment there is."""

    def made(**options: Any) -> Iterator[Log]:
        for at in count(1):
            log = Log(tmp_path / str(at), clock, at, **options)
            with monkeypatch.context() as patch:
                for owner, name in ((os, "stat"), (os, "open"), (Path, "open")):
                    patch.setattr(owner, name, log.counting(getattr(owner, name)))
                yield log
            log.log.close()
            if log.left > 0:
                assert at > 5
                return

    return made


def numbers(records: list[dict[str, Any]]) -> list[int]:
    return [one["seq"] for one in records]


@pytest.mark.parametrize("after", [0, 5, 19])
def test_a_page_misses_no_line(logs: Logs, after: int) -> None:
    for log in logs():
        found = numbers(page(log.path, after, 1000).records)
        assert found == list(range(after + 1, after + 1 + len(found)))
        assert len(found) >= 20 - after


def test_the_newest_lines_are_together(logs: Logs) -> None:
    for log in logs():
        found = numbers(newest(log.path, 15))
        assert found == list(range(found[0], found[0] + 15))
        assert found[-1] >= 20


def test_a_search_misses_no_line(logs: Logs) -> None:
    for log in logs():
        found = numbers(list(search(log.path, Filter())))
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= 20


def test_a_log_whose_oldest_file_goes_meanwhile_is_read_to_its_end(logs: Logs) -> None:
    for log in logs(keep_files=1):
        for found in (numbers(page(log.path, 0, 1000).records), numbers(newest(log.path, 1000))):
            assert found[-1] >= 20
            assert found[-10:] == list(range(found[-1] - 9, found[-1] + 1))


def test_the_hubs_own_proof_sees_no_break(logs: Logs) -> None:
    for log in logs():
        check = ChainCheck(log.path)
        for _ in range(3):
            assert check.advance(log.log.head, 0, 0).broken is None
        log.calm = True
        proof = check.advance(log.log.head, 0, 0)
        assert (proof.complete, proof.seq) == (True, log.written)


@pytest.mark.parametrize("keep_files", [0, 1])
def test_verifying_sees_no_break(logs: Logs, keep_files: int) -> None:
    for log in logs(keep_files=keep_files):
        done = CliRunner().invoke(main, ["audit", "verify", str(log.folder)])
        assert done.exit_code == 0, done.output


def test_a_search_reads_files_whatever_their_numbers_say(tmp_path: Path, clock: VirtualClock) -> None:
    old = Scene(tmp_path / "old", clock)
    old.write(10)
    log = Scene(tmp_path / "log", clock)
    log.write(3)
    old.path.rename(rotated_name(log.path, 1))
    assert numbers(list(search(log.path, Filter()))) == [*range(1, 11), 1, 2, 3]


def test_copies_are_proved_whatever_the_settings_are(
    tmp_path: Path, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scene(tmp_path / "log", clock).write(3)
    (tmp_path / "hub.toml").write_text("this is not TOML")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["audit", "verify", str(next((tmp_path / "log").glob("hub*.jsonl")))])
    assert (done.exit_code, done.output[:12]) == (0, "ok: 3 lines,")


def test_a_watcher_reads_every_line_once(logs: Logs) -> None:
    for log in logs():
        log.read()
        log.read()
        log.calm = True
        log.read()  # what was written behind its back
        log.all_once()
