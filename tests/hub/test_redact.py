"""What is taken out of what leaves the machine: known secrets in any form, what stands behind telling names, noise."""

from __future__ import annotations

import base64
import gzip
import json
import re
import urllib.parse
import zlib
from collections.abc import Callable

import pytest

from sheratan_hub.redact import GONE, Redactor

SECRET = 'canary/"known"+\\secret%0123456789'
KNOWN = Redactor([SECRET])

FORMS: dict[str, Callable[[str], str]] = {
    "plain": lambda text: text,
    "reversed": lambda text: text[::-1],
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 in the middle": lambda text: base64.b64encode(b"user:" + text.encode() + b"!").decode(),
    "base64url": lambda text: base64.urlsafe_b64encode(text.encode()).decode(),
    "hex": lambda text: text.encode().hex(),
    "HEX": lambda text: text.encode().hex().upper(),
    "url": urllib.parse.quote,
    "url, all of it": lambda text: urllib.parse.quote(text, safe=""),
    "url, small letters": lambda text: re.sub("%..", lambda found: found[0].lower(), urllib.parse.quote(text, safe="")),
    "form": urllib.parse.quote_plus,
    "json": lambda text: json.dumps(text)[1:-1],
    "json in json": lambda text: json.dumps(json.dumps(text))[1:-1],
    "repr": lambda text: repr(text)[1:-1],
    "zlib in base64": lambda text: base64.b64encode(zlib.compress(text.encode())).decode(),
    "gzip in base64": lambda text: base64.b64encode(gzip.compress(text.encode())).decode(),
    "gzip in hex": lambda text: gzip.compress(text.encode()).hex(),
    "reversed in base64": lambda text: base64.b64encode(text[::-1].encode()).decode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_known_secret_is_found_in_every_form(form: str) -> None:
    hidden = FORMS[form](SECRET)
    for clean in (KNOWN.text, KNOWN.name, lambda text: KNOWN.last_look(text.encode()).decode()):
        cleaned = clean(f"before {hidden} after")
        assert hidden not in cleaned
        assert cleaned.startswith("before ")
        assert cleaned.endswith(" after")


def test_short_values_are_not_looked_for_and_others_words_stay() -> None:
    redactor = Redactor(["abc", ""])
    assert redactor.text("abc is the alphabet's begin") == "abc is the alphabet's begin"
    assert Redactor().last_look(b"as it is \xff") == b"as it is \xff"


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer {0} and more",
        "'Authorization': 'Bearer {0}'",
        '{{"authorization": "Bearer {0}"}}',
        "bearer {0}",
        "X-Sheratan-Token: {0}",
        "Cookie: a=1; session={0}",
        "Idempotency-Key: {0}",
        "GET /x?token={0}",
        "password={0}",
        'api_key: "{0}"',
        "postgresql://hub:{0}@db/hub",
        "https://hooks.example.org/services/{0}",
        "params={0}",
        "bytes b'{0}' were sent",
        "-----BEGIN PRIVATE KEY-----\n{0}\n-----END PRIVATE KEY-----",
    ],
)
@pytest.mark.parametrize("secret", ["hunter2", 'with "quotes" and\\ more', "s3cr3t/with+signs=="])
def test_what_stands_behind_a_telling_name_is_taken_out(text: str, secret: str) -> None:
    if "://" in text and " " in secret:
        secret = secret.replace(" ", "")  # a URL ends at a blank
    cleaned = Redactor().text(text.format(secret))
    assert secret not in cleaned
    assert GONE in cleaned
    assert not any(word in cleaned for word in secret.split() if len(word) > 4)


@pytest.mark.parametrize(
    "noise", ["9f86d081884c7d659a2feaa0c55ad015", "c2VjcmV0IHNlY3JldCBzZWNyZXQ", "shn_node_0123456789abcdef0123456789"]
)
def test_long_texts_that_are_no_words_are_taken_out(noise: str) -> None:
    assert noise not in Redactor().text(f"seen {noise} somewhere")


@pytest.mark.parametrize(
    "text",
    [
        "the audit log /srv/sheratan_hub_with_a_long_name/logs/hub_security_audit.jsonl cannot be written: no room",
        "loop ledger failed",
        "job 019a1b2c-aaaa-7bbb-8ccc-0123456789ab is running",
        "2026-11-21T10:31:07.412Z",
        "tokens: the settings name the token ab12cd34, which is retired and stays so",
        "the hub has stood still for 5.1 s; leases and nodes get the grace of a restart",
        "http://127.0.0.1:8787",
    ],
)
def test_what_people_need_stays(text: str) -> None:
    assert Redactor().text(text) == text


def test_of_a_field_with_a_telling_name_only_numbers_stay() -> None:
    told = {
        "token": "abc",
        "token_id": "1a2b",
        "idempotency_key": "order-1",
        "key": "order-1",
        "params": {"a": 1},
        "headers": ["x"],
        "results": 3,
        "tokens": 4,
        "error": "why",
        "nested": {"password": "p", "kind": "render"},
    }
    assert Redactor().value(told) == {
        **told,
        **dict.fromkeys(("token", "idempotency_key", "key", "params", "headers", "error"), GONE),
        "nested": {"password": GONE, "kind": "render"},
    }


def test_what_is_deep_or_long_is_cut() -> None:
    deep: object = "x"
    for _ in range(50):
        deep = [deep]
    assert GONE in json.dumps(Redactor().value(deep))
    assert len(Redactor().value(["a"] * 500)) == 100
    assert len(Redactor().text("word " * 5000)) < 4100
