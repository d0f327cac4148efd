"""Canonical JSON and what a result's proof is checked against."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheratan_hub.canonical import canonical, payload_sha256, result_sha256, result_sig
from sheratan_hub.rules.command import Refused
from sheratan_hub.rules.integrity import Demand, Proof, check_result

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(values, st.booleans(), st.booleans())
def test_the_canonical_form_is_what_pythons_json_writes(value: Any, ascii: bool, spaced: bool) -> None:
    sent = json.dumps(value, ensure_ascii=ascii, indent=1 if spaced else None).encode()
    expected = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert canonical(sent) == expected


BORDERS = [10.0**exponent for exponent in range(-7, 23)] + [0.0, 2.0**53, 2.0**63, 2.0**64, 5e-324, 1e300]


@pytest.mark.parametrize("near", BORDERS)
def test_floats_where_one_notation_ends_and_the_next_begins_are_written_as_python_does(near: float) -> None:
    for number in (near, math.nextafter(near, math.inf), math.nextafter(near, 0), 1.2345 * near, 9.87654321 * near):
        for value in (number, -number, [number, int(near)], {"n": number, "text": "3e7 0.00001 -0"}):
            sent = json.dumps(value).encode()
            assert canonical(sent) == json.dumps(value, separators=(",", ":")).encode()


@pytest.mark.parametrize("leaf", [b"1.5", b"7"])
def test_what_is_nested_deep_has_a_canonical_form_too(leaf: bytes) -> None:
    deep = b"[" * 450 + leaf + b"]" * 450
    assert canonical(deep.replace(b"[", b"[ ")) == deep


@given(values)
def test_what_is_canonical_says_the_same_and_is_its_own_canonical_form(value: Any) -> None:
    text = canonical(json.dumps(value).encode())
    assert repr(json.loads(text)) == repr(json.loads(json.dumps(value, sort_keys=True)))
    assert canonical(text) == text
    assert canonical(json.dumps(json.loads(text), indent=3).encode()) == text


def test_the_integrity_text_has_exactly_four_keys() -> None:
    text = '{"error":null,"job_id":"j","ok":true,"result":{"a":1.0,"z":-0.0}}'
    assert result_sha256("j", True, b'{"z": -0.0, "a": 1.0}', b"null") == hashlib.sha256(text.encode()).hexdigest()


def test_formatting_does_not_change_the_payload_hash() -> None:
    assert payload_sha256("k", b'{"b": 1, "a": [1, 2]}') == payload_sha256("k", b'{"a":[1,2],"b":1}')
    assert payload_sha256("k", b"1") != payload_sha256("k", b"1.0")


def check(proof: Proof | None, demand: Demand) -> str:
    try:
        return str(check_result("j", True, b"1", b"null", proof, demand))
    except Refused as no:
        return no.reason


SHA = result_sha256("j", True, b"1", b"null")
SIG = result_sig("key", "j", True, b"1", b"null")


@pytest.mark.parametrize(
    ("proof", "demand", "outcome"),
    [
        (None, Demand(), "False"),
        (None, Demand(required=True), "missing_integrity"),
        (Proof("none"), Demand("none"), "False"),
        (Proof("none"), Demand("sha256"), "mode_downgrade"),
        (Proof("sha256", SHA), Demand(), "True"),
        (Proof("sha256", SHA.upper()), Demand(), "True"),
        (Proof("sha256", "0" * 64), Demand(), "sha_mismatch"),
        (Proof("sha256"), Demand(), "missing_integrity"),
        (Proof("sha256", "0" * 64), Demand("none"), "sha_mismatch"),
        (Proof("sha256", SHA), Demand("hmac", key="key"), "mode_downgrade"),
        (Proof("hmac", SHA, SIG), Demand("hmac", key="key"), "True"),
        (Proof("hmac", SHA, "00"), Demand("hmac", key="key"), "sig_mismatch"),
        (Proof("hmac", SHA), Demand("hmac", key="key"), "sig_mismatch"),
        (Proof("hmac", SHA, SIG), Demand("hmac", key="other"), "sig_mismatch"),
        # stronger than configured: checked as far as the hub can
        (Proof("hmac", SHA, SIG), Demand("sha256", key="key"), "True"),
        (Proof("hmac", SHA, "00"), Demand("sha256", key="key"), "sig_mismatch"),
        (Proof("hmac", SHA, SIG), Demand("sha256"), "True"),
        (Proof("hmac", "0" * 64, SIG), Demand("sha256"), "sha_mismatch"),
        (Proof("hmac", None, SIG), Demand("sha256"), "False"),
        (Proof("hmac", None, SIG), Demand("none"), "False"),
        (Proof("hmac", None, SIG), Demand("sha256", required=True), "missing_integrity"),
        (Proof("hmac"), Demand("sha256"), "missing_integrity"),
        # a proof that is empty or no hex at all
        (Proof("sha256", ""), Demand(), "sha_mismatch"),
        (Proof("sha256", "é" * 64), Demand(), "sha_mismatch"),
        (Proof("hmac", SHA, "é"), Demand("hmac", key="key"), "sig_mismatch"),
    ],
)
def test_the_hub_decides_which_proof_is_enough(proof: Proof | None, demand: Demand, outcome: str) -> None:
    assert check(proof, demand) == outcome
