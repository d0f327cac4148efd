"""Pauses: what is not leased for a while, and how that ends."""

from __future__ import annotations

from sheratan_hub.rules.pauses import PAUSES, PauseKind, ResumeKind, SweepPauses, pauses_of
from tests.rules.stage import Stage


def test_a_paused_kind_is_not_leased_and_others_are() -> None:
    stage = Stage()
    stage.do(PauseKind("k"))
    waiting, other = stage.submit("k"), stage.submit("l")
    assert stage.lease().id == other
    assert stage.reason() == "paused"
    stage.do(ResumeKind("k"))
    assert stage.lease().id == waiting


def test_a_pause_of_all_is_told_even_if_nothing_waits() -> None:
    stage = Stage()
    assert stage.reason() == "no_job"
    stage.do(PauseKind(None))
    assert stage.reason() == "paused"


def test_the_reason_is_paused_only_if_the_pull_could_take_what_is() -> None:
    stage = Stage()
    stage.do(PauseKind("k"))
    stage.submit("k", needs=("gpu",))
    assert stage.reason() == "no_job"
    assert stage.reason(capabilities=frozenset({"gpu"})) == "paused"
    assert stage.reason(kinds=frozenset({"l"})) == "no_job"
    assert stage.reason(kinds=frozenset({"k"})) == "paused"


def test_a_pause_ends_by_itself_and_is_forgotten_then() -> None:
    stage = Stage()
    stage.do(PauseKind("k", for_ms=1000))
    stage.do(PauseKind("l"))
    waiting = stage.submit("k")
    stage.now += 999
    assert stage.reason() == "paused"
    stage.now += 1
    assert stage.lease().id == waiting
    stage.do(SweepPauses())
    assert [pause.kind for pause in pauses_of(stage.rows[PAUSES]).pauses] == ["l"]
    assert stage.rows[PAUSES].agenda is None


def test_a_new_pause_of_a_kind_takes_the_place_of_the_old_one() -> None:
    stage = Stage()
    stage.do(PauseKind("k", for_ms=1000))
    (pause,) = stage.do(PauseKind("k", until=stage.now + 5000, reason="longer")).pauses
    assert (pause.until, pause.reason) == (stage.now + 5000, "longer")


def test_resuming_all_ends_every_pause_and_resuming_a_kind_only_its_own() -> None:
    stage = Stage()
    for kind in (None, "k", "l"):
        stage.do(PauseKind(kind))
    assert [pause.kind for pause in stage.do(ResumeKind("k")).pauses] == [None, "l"]
    assert stage.do(ResumeKind(None)).pauses == ()
    assert stage.do(ResumeKind("k")).pauses == ()
