"""What is sent: params of 200 bytes of JSON, results of 100, and the bytes of whole HTTP requests around them."""

from __future__ import annotations

from typing import Any

import orjson

PARAMS_BYTES, RESULT_BYTES = 200, 100
BULK_JOBS = 500
SOURCES, MISSIONS = 20, 20
KIND = "bench.work"


def sized(size: int, **fields: Any) -> dict[str, Any]:
    """The fields and a text that fills their JSON up to `size` bytes."""
    return {**fields, "text": "x" * (size - len(orjson.dumps({**fields, "text": ""})))}


PARAMS = sized(PARAMS_BYTES, path="/srv/data/reports/2026-11/part-000017.csv", page=17, scale=0.5, flags=["a", "b"])
RESULT = sized(RESULT_BYTES, lines=1042, words=7311, ratio=0.25)


class Wire:
    """Makes the bytes of HTTP requests for one server."""

    def __init__(self, port: int, token: str) -> None:
        self.head = f"Host: 127.0.0.1:{port}\r\nAuthorization: Bearer {token}\r\n".encode()

    def post(self, path: str, body: bytes, *, added: int = 0) -> bytes:
        """A POST; `added` is by how many bytes the sender will make the body longer."""
        length = b"Content-Length: %d\r\n\r\n" % (len(body) + added)
        return b"POST " + path.encode() + b" HTTP/1.1\r\n" + self.head + length + body

    def get(self, path: str) -> bytes:
        return b"GET " + path.encode() + b" HTTP/1.1\r\n" + self.head + b"\r\n"


def job(**fields: Any) -> dict[str, Any]:
    return {"kind": KIND, "params": PARAMS, "source": "bench", **fields}


def submit(wire: Wire) -> list[bytes]:
    return [wire.post("/api/jobs", orjson.dumps(job()))]


def mixed_job(n: int) -> dict[str, Any]:
    """The nth of the jobs that 20 sources submit in turn, for 20 missions."""
    return job(source=f"source-{n % SOURCES}", mission_id=f"mission-{n // SOURCES % MISSIONS}")


def mixed(wire: Wire) -> list[bytes]:
    """Every one of 20 sources with every one of 20 missions."""
    return [wire.post("/api/jobs", orjson.dumps(mixed_job(n))) for n in range(SOURCES * MISSIONS)]


KEY, KEY_DIGITS = "@KEY@", 16
"""Stands where wrk.lua puts a number of so many digits."""


def keyed(wire: Wire, window: str) -> list[bytes]:
    """One submit with an idempotency key that is new each time; `window` keeps those of one window apart."""
    body = orjson.dumps(job(idempotency_key=f"{window}-{KEY}"))
    return [wire.post("/api/jobs", body, added=KEY_DIGITS - len(KEY))]


def bulk(wire: Wire, jobs: int = BULK_JOBS) -> bytes:
    return wire.post("/api/jobs", orjson.dumps({"jobs": [job()] * jobs}))


def mixed_bulk(wire: Wire) -> bytes:
    """A bulk of the jobs of `mixed`."""
    return wire.post("/api/jobs", orjson.dumps({"jobs": [mixed_job(n) for n in range(BULK_JOBS)]}))
