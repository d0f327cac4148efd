"""Takes secrets out of what leaves the machine: known values in any form they may have taken, and what looks like one.

Three nets behind each other: names (a header, a field, a variable that tells of a secret), known values in every
encoding, and long texts that are no words. What it keeps is for people who look for a fault, so it takes too much
rather than too little.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

GONE = "***"

VALUE_CHARS = 6
"""A shorter value is not looked for: it would be found everywhere."""

FORM_CHARS = 8
"""Nor is a shorter encoding of one."""

TEXT_CHARS, NAME_CHARS = 4000, 200
LIST_MAX = 100
DEPTH_MAX = 8

SECRET_NAME = re.compile(
    r"token(?!_id)|secret|passw|passphrase|passwd|\bpwd\b|credential|private|api[_-]?key|hmac|authoriz|cookie|idempotency"
    r"|^key$|lease_id|signature|^sig$|^auth$|params|payload|^body$|^result$|^error$|^headers$|labels|artifact|webhook",
    re.IGNORECASE,
)
"""The names of fields whose texts are not told."""

_TO_THE_END = re.compile(
    r"(?im)\b(authorization|proxy-authorization|x-sheratan-token|set-cookie|cookie|idempotency-key|x-api-key|bearer"
    r"|[\w-]*(?:token|secret|passw(?:or)?d|passphrase|pwd|credentials?|api[_-]?key|hmac[_-]?key|private[_-]?key"
    r"|idempotency[_-]?key|params|payload|headers))"
    r"(?:\\?[\"'])?\s*(?:[:=]|(?<=bearer)\s)\s*\S.*"
)
_USERINFO = re.compile(r"(://)\S*@")
_WEB_PATH = re.compile(r"(?i)\b(https?://[^\s/?#\"'\\]+)[/?#][^\s\"']*")
_WORD = re.compile(r"[A-Za-z0-9+=%]{20,}")
_BYTES = re.compile(r"\bb(['\"]).*?(?<!\\)\1")
_PEM = re.compile(r"-----BEGIN [A-Z ]+-----.*?(?:-----END [A-Z ]+-----|\Z)", re.DOTALL)


class Redactor:
    """Knows the values that must not be told."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._forms = sorted({form for secret in secrets for form in forms_of(secret)}, key=len, reverse=True)

    def known(self, text: str) -> str:
        """The text without known values, in whatever form."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, GONE)
        return text

    def name(self, text: str) -> str:
        """A name that people or machines have given: shown but for known values and the password of a URL."""
        return _USERINFO.sub(rf"\1{GONE}@", self.known(text))[:NAME_CHARS]

    def names(self, value: Any) -> Any:
        """A JSON value of numbers and of names that people or machines have given."""
        if isinstance(value, str):
            return self.name(value)
        if isinstance(value, Mapping):
            return {self.name(str(name)): self.names(one) for name, one in list(value.items())[:LIST_MAX]}
        return [self.names(one) for one in value[:LIST_MAX]] if isinstance(value, (list, tuple)) else value

    def text(self, text: str) -> str:
        """The text without what is, or looks like, a secret."""
        text = self.known(text)
        text = _PEM.sub(GONE, text)
        text = _TO_THE_END.sub(rf"\1: {GONE}", text)
        text = _USERINFO.sub(rf"\1{GONE}@", text)
        text = _WEB_PATH.sub(rf"\1/{GONE}", text)
        text = _BYTES.sub(GONE, text)
        text = _WORD.sub(_opaque, text)
        return text if len(text) <= TEXT_CHARS else f"{text[:TEXT_CHARS]} ... {len(text) - TEXT_CHARS} more"

    def value(self, value: Any, depth: int = DEPTH_MAX) -> Any:
        """The JSON value without them; of what has a secret's name numbers and booleans only."""
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, str):
            return self.text(value)
        if not depth:
            return GONE
        if isinstance(value, Mapping):
            members = list(value.items())[:LIST_MAX]
            return {self.text(str(name)): self._member(str(name), one, depth) for name, one in members}
        if isinstance(value, (list, tuple)):
            return [self.value(one, depth - 1) for one in value[:LIST_MAX]]
        return self.text(str(value))

    def _member(self, name: str, value: Any, depth: int) -> Any:
        told = isinstance(value, (bool, int, float)) or value is None
        return GONE if SECRET_NAME.search(name) and not told else self.value(value, depth - 1)

    def last_look(self, data: bytes) -> bytes:
        """What is about to leave, without any known value that has slipped through."""
        return self.known(data.decode("utf-8", "replace")).encode() if self._forms else data


def _opaque(found: re.Match[str]) -> str:
    """A long word is kept if it may be one of a language: letters only, and not in changing case."""
    word = found[0]
    plain = word.isalpha() and (word.islower() or word.isupper() or word[1:].islower())
    return word if plain else GONE


def forms_of(secret: str) -> Iterator[str]:
    """Every text that a value may have become on its way into a file: plain, escaped, quoted, encoded, turned round."""
    for value in {secret, secret.strip()}:
        if len(value) < VALUE_CHARS:
            continue
        yield from (value, value[::-1])
        escaped = json.dumps(value)[1:-1]
        texts = {escaped, json.dumps(escaped)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]}
        texts |= {quote(value, safe=safe) for safe in ("", "/", '/"+\\', "/:@")} | {quote_plus(value)}
        texts |= {re.sub("%..", lambda found: found[0].lower(), text) for text in texts}
        raw = value.encode("utf-8", "surrogateescape")
        for data in (raw, raw[::-1], *(_deflated(raw, level) for level in (1, 6, 9))):
            texts |= {data.hex(), data.hex().upper(), *_base64(data)}
        yield from (text for text in texts if len(text) >= FORM_CHARS)


def _deflated(raw: bytes, level: int) -> bytes:
    """What gzip and zlib make of it, without what stands around that."""
    made = zlib.compressobj(level, zlib.DEFLATED, -15)
    return made.compress(raw) + made.flush()


def _base64(raw: bytes) -> Iterator[str]:
    """Its base64 at each of three places in a longer text, without the characters that neighbours have a part in."""
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for shift in range(3):
            text = encode(b"\0" * shift + raw)
            yield text[4 if shift else 0 : (shift + len(raw)) // 3 * 4].decode()
