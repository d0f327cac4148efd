"""What is kept of a worker's error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheratan_hub.canonical import Raw
from sheratan_hub.rules.errors import ERROR_BYTES, LINE_CHARS, kept_error, without_trace

LINES = [f"line {n}" for n in range(80)]


def kept(error: Any) -> Any:
    return json.loads(bytes(kept_error(json.dumps(error).encode())))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ({"type": "T" * 101}, {"type": "T" * 100, "truncated": True}),
        ({"message": "m" * 1001, "n": 7}, {"message": "m" * 1000, "n": 7, "truncated": True}),
        ({"trace": "\n".join(LINES)}, {"trace": "\n".join(LINES[-50:]), "truncated": True}),
        ({"traceback": LINES}, {"traceback": LINES[-50:], "truncated": True}),
        ({"trace": "x" * 500}, {"trace": "x" * LINE_CHARS, "truncated": True}),
        ("t" * 1001, {"message": "t" * 1000, "truncated": True}),
    ],
)
def test_what_is_too_long_is_cut_and_says_so(error: Any, expected: Any) -> None:
    assert kept(error) == expected


@pytest.mark.parametrize(
    "error",
    [
        None,
        "t" * 1000,
        ["x" * 2000],
        17,
        {"type": "T" * 100, "message": "é" * 1000, "trace": "\n".join(LINES[:50]) + "\n"},
        {"type": 5, "message": ["m" * 2000], "trace": {"a": 1}, "code": "x" * 3000},
    ],
)
def test_what_is_not_too_long_is_kept_to_the_byte(error: Any) -> None:
    text = json.dumps(error, indent=1).encode()
    assert bytes(kept_error(text)) == text


@pytest.mark.parametrize(
    "error",
    [["x" * ERROR_BYTES], {"type": "T", "message": "m", "more": "x" * ERROR_BYTES}, {"type": ["x" * ERROR_BYTES]}],
)
def test_an_error_of_any_shape_is_bounded(error: Any) -> None:
    told = kept(error)
    assert told["truncated"] is True
    assert len(json.dumps(told)) < 2000
    assert told.get("type", "T") == "T"


def test_a_trace_in_wide_letters_loses_more_lines_rather_than_all() -> None:
    told = kept({"type": "T", "trace": "\n".join(["😀" * 400] * 50)})
    assert told["trace"].count("\n") == 9


def test_a_record_can_do_without_the_trace() -> None:
    assert json.loads(bytes(without_trace(Raw(b'{"type":"T","trace":"a"}')))) == {"type": "T", "truncated": True}
    for untouched in (b'{"type":"T"}', b'"trace"', b"null"):
        assert bytes(without_trace(Raw(untouched))) == untouched


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["type", "message", "trace", "x"]), inner),
)


@given(values)
def test_no_error_breaks_it_and_what_is_kept_is_json(error: Any) -> None:
    text = json.dumps(error).encode()
    told = bytes(kept_error(text))
    assert told == text or json.loads(told)["truncated"] is True
