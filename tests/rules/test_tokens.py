"""The shared token's rules: what settings and store make of each other at a start, rotations, what is retired."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheratan_hub.rules.access import KEPT_MS, Access, Admit, ForgetAccess, Revoke
from sheratan_hub.rules.command import Code, Command, Refused
from sheratan_hub.rules.tokens import (
    RING,
    Abandon,
    MakeSalt,
    Ring,
    Rotate,
    Said,
    Settle,
    Settled,
    Turn,
    ring_of,
    token_id,
)
from sheratan_hub.storage import Key
from tests.rules.stage import Stage

A, B, C, D = (letter * 64 for letter in "abcd")


def start(stage: Stage, active: str, next: str | None = None, until: int = 0) -> Settled:
    settled: Settled = stage.do(Settle(Said(active, next, until)))
    return settled


def ring(stage: Stage) -> Ring:
    return ring_of(stage.rows[RING])


def holds(stage: Stage) -> tuple[str, str | None]:
    found = ring(stage)
    return found.active.digest[0], found.next.digest[0] if found.next else None


def retired(stage: Stage) -> set[str]:
    return {key.id[0] for key in stage.rows if key.kind == "retired"}


def told(stage: Stage) -> list[str]:
    return [event.event.removeprefix("token.rotation_") for event in stage.events]


def refused(stage: Stage, command: Command) -> Code:
    before = dict(stage.rows)
    with pytest.raises(Refused) as no:
        stage.do(command)
    assert stage.rows == before
    return no.value.code


@pytest.fixture
def stage() -> Stage:
    return Stage()


def after_rotation(stage: Stage) -> Stage:
    """a was replaced by b at its deadline."""
    start(stage, A, B, stage.now + 100)
    stage.now += 100
    stage.do(Turn())
    stage.events.clear()
    return stage


def test_the_salt_is_made_once(stage: Stage) -> None:
    assert [stage.do(MakeSalt("first")), stage.do(MakeSalt("second"))] == ["first", "first"]


def test_the_first_start_takes_what_the_settings_say(stage: Stage) -> None:
    start(stage, A)
    assert (holds(stage), told(stage)) == (("a", None), [])


def test_a_next_token_opens_a_window(stage: Stage) -> None:
    start(stage, A, B, stage.now + 100)
    assert (holds(stage), told(stage)) == (("a", "b"), ["started"])
    assert (stage.rows[RING].agenda, stage.rows[RING].due_at) == ("rotate", stage.now + 100)


def test_a_window_without_an_end_stays_open(stage: Stage) -> None:
    start(stage, A, B)
    stage.now += 10**12
    assert stage.do(Turn()) is False
    assert (holds(stage), stage.rows[RING].agenda) == (("a", "b"), None)


def test_a_deadline_in_the_past_is_carried_out_at_the_start(stage: Stage) -> None:
    start(stage, A, B, stage.now - 1)
    assert (holds(stage), retired(stage), told(stage)) == (("b", None), {"a"}, ["finalized"])


def test_the_deadline_itself_is_past(stage: Stage) -> None:
    start(stage, A, B, stage.now)
    assert (holds(stage), retired(stage)) == (("b", None), {"a"})


def test_the_clock_turns_at_the_deadline_not_before_and_once(stage: Stage) -> None:
    start(stage, A, B, stage.now + 100)
    stage.now += 99
    assert stage.do(Turn()) is False
    stage.now += 1
    assert [stage.do(Turn()), stage.do(Turn())] == [True, False]
    assert (holds(stage), retired(stage), told(stage)) == (("b", None), {"a"}, ["started", "finalized"])


def test_a_start_with_the_same_settings_changes_nothing(stage: Stage) -> None:
    after_rotation(stage)
    until = ring(stage).said.until
    settled = start(stage, A, B, until)
    assert (holds(stage), told(stage)) == (("b", None), [])
    assert [token_id(A) in warning and token_id(B) in warning for warning in settled.warnings] == [True]


def test_a_rotation_that_ended_while_no_hub_ran_ends_at_the_start(stage: Stage) -> None:
    start(stage, A, B, stage.now + 100)
    stage.now += 1000
    start(stage, A, B, stage.now - 900)
    assert (holds(stage), retired(stage), told(stage)) == (("b", None), {"a"}, ["started", "finalized"])


@pytest.mark.parametrize(
    ("said", "holding", "gone", "events"),
    [
        ((B,), ("b", None), "a", []),
        ((B, A), ("b", None), "a", []),
        ((A, B, 77), ("b", None), "a", []),
        ((A, C, 2_000_000), ("b", "c"), "a", ["started"]),
        ((A, C, 77), ("c", None), "ab", ["finalized"]),
        ((B, C, 2_000_000), ("b", "c"), "a", ["started"]),
        ((B, B, 2_000_000), ("b", None), "a", []),
        ((C,), ("c", None), "a", []),
        ((C, A, 2_000_000), ("c", None), "a", []),
        ((C, B, 2_000_000), ("c", "b"), "a", ["started"]),
    ],
)
def test_settings_after_a_rotation(
    stage: Stage, said: tuple[Any, ...], holding: tuple[str, str | None], gone: str, events: list[str]
) -> None:
    start(after_rotation(stage), *said)
    assert (holds(stage), retired(stage), told(stage)) == (holding, set(gone), events)


@pytest.mark.parametrize("said", [(A,), (A, A, 77)])
def test_settings_that_newly_name_only_a_retired_token_stop_the_start(stage: Stage, said: tuple[Any, ...]) -> None:
    after_rotation(stage)
    before = dict(stage.rows)
    with pytest.raises(Refused, match=token_id(B)) as no:
        start(stage, *said)
    assert no.value.code is Code.OLD_TOKEN
    assert stage.rows == before


@pytest.mark.parametrize(
    ("said", "holding", "gone", "events"),
    [
        ((A, B, 1_000_500), ("a", "b"), "", []),
        ((A, B, 1_000_900), ("a", "b"), "", []),
        ((A, B), ("a", "b"), "", []),
        ((A,), ("a", None), "", []),
        ((A, C, 1_000_900), ("a", "c"), "", ["started"]),
        ((B,), ("b", None), "a", ["finalized"]),
        ((B, A, 1_000_900), ("b", "a"), "", ["started"]),
        ((B, C, 1_000_900), ("b", "c"), "a", ["finalized", "started"]),
        ((B, C, 77), ("c", None), "ab", ["finalized", "finalized"]),
        ((C,), ("c", None), "", []),
        ((C, B, 1_000_900), ("c", "b"), "", []),
    ],
)
def test_settings_while_a_rotation_of_theirs_is_under_way(
    stage: Stage, said: tuple[Any, ...], holding: tuple[str, str | None], gone: str, events: list[str]
) -> None:
    start(stage, A, B, 1_000_500)
    stage.events.clear()
    start(stage, *said)
    assert (holds(stage), retired(stage), told(stage)) == (holding, set(gone), events)
    assert ring(stage).until == (said[2] if len(said) == 3 and holding[1] else 0)


@pytest.mark.parametrize(
    ("said", "holding", "gone"),
    [((A,), ("a", "b"), ""), ((C,), ("c", "b"), ""), ((B,), ("b", None), "a"), ((A, C), ("a", "c"), "")],
)
def test_settings_while_a_rotation_of_the_api_is_under_way(
    stage: Stage, said: tuple[Any, ...], holding: tuple[str, str | None], gone: str
) -> None:
    start(stage, A)
    stage.do(Rotate(B, in_ms=500))
    start(stage, *said)
    assert (holds(stage), retired(stage)) == (holding, set(gone))
    assert ring(stage).until == (1_000_500 if holding[1] == "b" else 0)


def test_a_rotation_over_the_api_outlives_restarts_with_the_old_settings(stage: Stage) -> None:
    start(stage, A)
    stage.do(Rotate(B, in_ms=100))
    start(stage, A)
    stage.now += 100
    settled = start(stage, A)
    assert (holds(stage), retired(stage), told(stage)) == (("b", None), {"a"}, ["started", "finalized"])
    assert settled.warnings == ()
    assert start(stage, A).warnings != ()


def test_a_second_rotation_is_refused_and_a_repeat_is_not(stage: Stage) -> None:
    start(stage, A)
    first, again = stage.do(Rotate(B, in_ms=100)), stage.do(Rotate(B, in_ms=900))
    assert (first[1], again[1], first[0].until == again[0].until) == (False, True, True)
    assert refused(stage, Rotate(C, in_ms=100)) == Code.ROTATION_UNDER_WAY


@pytest.mark.parametrize("digest", [A, B])
def test_no_rotation_leads_to_a_token_that_is_active_or_retired(stage: Stage, digest: str) -> None:
    assert refused(after_rotation(stage), Rotate(digest, in_ms=100)) == Code.INVALID_FIELD


def test_a_rotation_does_not_end_in_the_past(stage: Stage) -> None:
    start(stage, A)
    assert refused(stage, Rotate(B, until=stage.now)) == Code.INVALID_FIELD


def test_an_abandoned_rotation_leaves_the_active_token_and_retires_none(stage: Stage) -> None:
    start(stage, A)
    stage.do(Rotate(B, in_ms=100))
    stage.do(Abandon())
    stage.now += 1000
    assert (stage.do(Turn()), holds(stage), retired(stage)) == (False, ("a", None), set())
    assert told(stage) == ["started", "abandoned"]
    assert refused(stage, Abandon()) == Code.NO_ROTATION


def test_a_rotation_past_its_deadline_cannot_be_abandoned(stage: Stage) -> None:
    start(stage, A)
    stage.do(Rotate(B, in_ms=100))
    stage.now += 100
    assert refused(stage, Abandon()) == Code.NO_ROTATION


TOKENS = st.sampled_from([A, B, C, D])
STEPS = st.one_of(
    st.tuples(st.just("start"), TOKENS, st.none() | TOKENS, st.integers(-200, 400)),
    st.tuples(st.just("rotate"), TOKENS, st.integers(1, 300)),
    st.tuples(st.just("abandon")),
    st.tuples(st.just("wait"), st.integers(1, 300)),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_whatever_happens_a_retired_token_never_comes_back_and_each_end_is_told_once(steps: list[Any]) -> None:
    stage, ends = Stage(), itertools.count()
    gone: set[str] = set()
    for name, *given_ in steps:
        try:
            if name == "start":
                active, following, until = given_
                start(stage, active, following, stage.now + until if following else 0)
            elif name == "rotate":
                stage.do(Rotate(given_[0], in_ms=given_[1]))
            elif name == "abandon":
                stage.do(Abandon())
            else:
                stage.now += given_[0]
                stage.do(Turn())
        except Refused:
            pass
        assert gone <= retired(stage)
        gone = retired(stage)
        if RING in stage.rows:
            assert not gone & set(filter(None, holds(stage)))
            assert holds(stage)[0] != holds(stage)[1]
    assert told(stage).count("finalized") == len(gone), next(ends)


def test_a_scoped_token_is_made_and_taken_back(stage: Stage) -> None:
    made: Access = stage.do(Admit("a-1", A, "node", 1000, "n1", "the first"))
    assert (made.expires_at, made.node_id) == (stage.now + 1000, "n1")
    assert stage.do(Revoke("a-1")).id == "a-1"
    assert refused(stage, Revoke("a-1")) == Code.ACCESS_NOT_FOUND
    assert [event.event for event in stage.events] == ["access.created", "access.revoked"]


@pytest.mark.parametrize(("role", "node_id"), [("node", None), ("viewer", "n1"), ("admin", "n1")])
def test_only_a_token_of_the_role_node_has_a_node(stage: Stage, role: Any, node_id: str | None) -> None:
    assert refused(stage, Admit("a-1", A, role, node_id=node_id)) == Code.INVALID_FIELD


def test_an_expired_token_is_forgotten_after_a_while_and_one_without_an_end_never(stage: Stage) -> None:
    stage.do(Admit("a-1", A, "viewer", 1000))
    stage.do(Admit("a-2", B, "viewer"))
    stage.now += KEPT_MS
    assert stage.do(ForgetAccess()) == 0
    stage.now += 1000
    assert stage.do(ForgetAccess()) == 1
    assert [key for key in stage.rows if key.kind == "access"] == [Key("access", "a-2")]
