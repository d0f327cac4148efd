"""Hostile and merely wrong bodies: the documented 4xx, problem+json, nothing stored; and what must be accepted."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
import tracemalloc
import zlib
from io import BytesIO
from typing import Any, NamedTuple

import pytest

from sheratan_hub.rules.command import Refused
from sheratan_hub.web.body import check_json
from sheratan_hub.web.routes import ROUTES
from tests.conftest import TOKEN, MakeSite, Site

BODIES = [route for route in ROUTES if route.form is not None]
"""Every route that reads a body, of both planes."""

FLEET = ("/api/hosts/heartbeat", "/mesh/")
MIB = 1_048_576


class Bad(NamedTuple):
    """A body with its headers, and what it is answered with."""

    body: bytes
    status: int = 400
    code: str = "bad_json"
    headers: tuple[tuple[str, str], ...] = ()


def coded(encoding: str, body: bytes) -> Bad:
    return Bad(body, 415, "unsupported_media_type", (("Content-Encoding", encoding),))


def typed(kind: str, body: bytes = b'{"kind":"x"}') -> Bad:
    return Bad(body, 415, "unsupported_media_type", (("Content-Type", kind),))


def deep(opening: bytes, closing: bytes, levels: int = 100_000) -> Bad:
    return Bad(b'{"params":' + opening * levels + b"1" + closing * levels + b"}", 422, "too_deep")


CORPUS = {
    "empty": Bad(b""),
    "blank": Bad(b" \n"),
    "array": Bad(b"[]"),
    "array of objects": Bad(b'[{"kind":"x"}]'),
    "null": Bad(b"null"),
    "true": Bad(b"true"),
    "number": Bad(b"7"),
    "string": Bad(b'"kind"'),
    "not JSON": Bad(b"kind=x&node_id=n1"),
    "one byte": Bad(b"{"),
    "NUL bytes": Bad(b"\0" * 100),
    "single quotes": Bad(b"{'kind':'x'}"),
    "comment": Bad(b'{"kind":"x"/* no */}'),
    "trailing comma": Bad(b'{"kind":"x",}'),
    "truncated": Bad(b'{"kind":"x","params":{"a":'),
    "truncated string": Bad(b'{"kind":"x'),
    "truncated escape": Bad(b'{"kind":"\\u00'),
    "trailing garbage": Bad(b'{"kind":"x"} x'),
    "two objects": Bad(b'{"kind":"x"}{"kind":"y"}'),
    "newline in a string": Bad(b'{"kind":"a\nb"}'),
    "leading zero": Bad(b'{"params":01}'),
    "plus sign": Bad(b'{"params":+1}'),
    "bare fraction": Bad(b'{"params":.5}'),
    "hex": Bad(b'{"params":0x10}'),
    "NaN": Bad(b'{"priority":NaN}'),
    "NaN in params": Bad(b'{"kind":"x","params":{"a":[NaN]}}'),
    "Infinity": Bad(b'{"priority":Infinity}'),
    "Infinity in result": Bad(b'{"ok":true,"result":Infinity}'),
    "minus Infinity": Bad(b'{"params":-Infinity}'),
    "1e999": Bad(b'{"priority":1e999}'),
    "1e999 in params": Bad(b'{"kind":"x","params":[1e999]}'),
    "-1e999 in result": Bad(b'{"ok":true,"result":{"a":-1e999}}'),
    "repeated key": Bad(b'{"kind":"x","node_id":"n1","kind":"y","node_id":"n1"}'),
    "repeated key, escaped": Bad(b'{"kind":"x","\\u006bind":"x"}'),
    "params given twice": Bad(b'{"kind":"x","params":1,"params":1}'),
    "result given twice": Bad(b'{"ok":true,"result":1,"result":1}'),
    "repeated key in integrity": Bad(b'{"ok":true,"integrity":{"mode":"none","mode":"none"}}'),
    "repeated key in an entry": Bad(b'{"jobs":[{"kind":"x","kind":"x"}]}'),
    "lone surrogate": Bad(b'{"kind":"\\ud800","node_id":"\\ud800"}'),
    "lone low surrogate": Bad(b'{"kind":"a\\udc00b"}'),
    "lone surrogate in a key": Bad(b'{"\\udfff":1}'),
    "lone surrogate in params": Bad(b'{"kind":"x","params":["\\ud83d"]}'),
    "lone surrogate in result": Bad(b'{"ok":true,"result":"\\ud83d\\ud83d"}'),
    "bad UTF-8": Bad(b'{"kind":"\xff","node_id":"\xff"}'),
    "bad UTF-8 in params": Bad(b'{"kind":"x","params":"\xc3"}'),
    "overlong UTF-8": Bad(b'{"kind":"\xc0\xaf"}'),
    "surrogate as UTF-8": Bad(b'{"kind":"\xed\xa0\x80"}'),
    "UTF-16": Bad('{"kind":"x","node_id":"n1"}'.encode("utf-16")),
    "UTF-16 without BOM": Bad('{"kind":"x"}'.encode("utf-16-le")),
    "UTF-32": Bad('{"kind":"x"}'.encode("utf-32")),
    "byte order mark": Bad(b'\xef\xbb\xbf{"kind":"x","node_id":"n1"}'),
    "100 000 arrays": deep(b"[", b"]"),
    "100 000 arrays, never closed": deep(b"[", b""),
    "100 000 objects": deep(b'{"a":', b"}"),
    "65 levels": deep(b"[", b"]", 64),
    "5 000 digits": Bad(b'{"priority":' + b"9" * 5000 + b"}"),
    "5 000 digits in params": Bad(b'{"kind":"x","params":-' + b"9" * 5000 + b"}"),
    "65 bit": Bad(b'{"priority":18446744073709551616}'),
    "65 bit in params": Bad(b'{"kind":"x","params":{"a":18446744073709551616}}'),
    "minus 65 bit in result": Bad(b'{"ok":true,"result":-9223372036854775809}'),
    "gzip": coded("gzip", gzip.compress(b'{"kind":"x"}')),
    "gzip in name only": coded("GZIP", b'{"kind":"x"}'),
    "gzip bomb": coded("gzip", gzip.compress(b" " * 50_000_000)),
    "deflate": coded("deflate", zlib.compress(b'{"kind":"x"}')),
    "Latin-1": typed("application/json; charset=iso-8859-1"),
    "UTF-16 by its charset": typed("application/json; charset=utf-16", '{"kind":"x"}'.encode("utf-16")),
    "charset in quotes": typed('application/json; foo=bar; Charset="windows-1252"'),
}


async def arranged(site: Site) -> dict[str, str]:
    """A node with a job it holds, and a waiting job: what the `{}` of a path stand for."""
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1"})
    held = await site.submit()
    await site.lease("n1")
    await site.submit(priority="LOW")
    return {"id": held, "node_id": "n1", "source": "s"}


async def everything(site: Site) -> Any:
    """All that a request could have changed."""
    jobs, registry = await site.data("GET", "/api/jobs"), await site.control("GET", "/api/registry")
    return await site.stored(), jobs, registry


def check_problem(answer: tuple[int, Any, dict[str, str]], status: int, code: str) -> None:
    got, body, headers = answer
    assert (got, body["code"]) == (status, code), body
    assert headers["Content-Type"] == "application/problem+json"
    assert (body["status"], body["ok"]) == (status, False)
    assert all(isinstance(body[name], str) and body[name] for name in ("type", "title", "detail"))


@pytest.mark.parametrize("name", CORPUS)
async def test_a_hostile_body_is_refused_on_every_route_and_leaves_no_trace(site: Site, name: str) -> None:
    bad = CORPUS[name]
    places = await arranged(site)
    before = await everything(site)
    for route in BODIES:
        if not bad.body and route.body_optional:
            continue
        answer = await site.ask(
            route.plane, route.method, route.path.format(**places), data=bad.body, headers=dict(bad.headers)
        )
        assert answer[0] == bad.status, (route.path, answer)
        check_problem(answer, bad.status, bad.code)
    assert await everything(site) == before


def test_the_corpus_meets_routes_of_both_planes() -> None:
    assert {route.plane for route in BODIES} == {"control", "data"}
    assert len(BODIES) >= 13


async def spoken(site: Site, plane: str, request: bytes) -> tuple[int, Any, dict[str, str]]:
    """Write bytes, read one answer, hang up: (status, JSON body, headers)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", site.app.ports[plane])
    try:
        async with asyncio.timeout(10):
            writer.write(request)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:])
            body = await reader.readexactly(int(headers["Content-Length"]))
    finally:
        writer.close()
    return int(lines[0].split()[1]), json.loads(body), headers


def head_of(path: str, *headers: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"X-Sheratan-Token: {TOKEN}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@pytest.mark.parametrize("extra", [1, 10**12])
async def test_a_body_announced_as_too_large_is_refused_before_it_is_sent(make_site: MakeSite, extra: int) -> None:
    site = await make_site()
    places = await arranged(site)
    before = await everything(site)
    for route in BODIES:
        limit = 16 * MIB if route.batch else MIB
        request = head_of(route.path.format(**places), f"Content-Length: {limit + extra}", method=route.method)
        answer = await spoken(site, route.plane, request)
        check_problem(answer, 413, "body_too_large")
        assert answer[2]["Connection"] == "close"
    assert await everything(site) == before


async def test_a_chunked_body_is_cut_off_at_the_limit(make_site: MakeSite) -> None:
    site = await make_site()
    places = await arranged(site)
    before = await everything(site)
    for route in BODIES:
        limit = 16 * MIB if route.batch else MIB
        chunk = b"%x\r\n%b\r\n" % (limit + 1, b" " * (limit + 1))
        request = head_of(route.path.format(**places), "Transfer-Encoding: chunked", method=route.method) + chunk
        answer = await spoken(site, route.plane, request)
        check_problem(answer, 413, "body_too_large")
        assert answer[2]["Connection"] == "close"
    assert await everything(site) == before


def padded(size: int, **fields: Any) -> bytes:
    """A job as a JSON text of exactly so many bytes."""
    text = json.dumps({"kind": "x", **fields, "params": ""}, separators=(",", ":")).encode()
    return text[:-2] + b"a" * (size - len(text)) + text[-2:]


@pytest.mark.parametrize("path", ["/api/jobs", "/mesh/submit_request"])
async def test_one_job_may_have_one_mebibyte_and_not_a_byte_more(site: Site, path: str) -> None:
    status, body, _ = await site.ask("data", "POST", path, data=BytesIO(padded(MIB)))
    assert status in (200, 201), body
    before = await site.stored()
    check_problem(await site.ask("data", "POST", path, data=BytesIO(padded(MIB + 1))), 413, "body_too_large")
    assert await site.stored() == before


async def test_a_large_batch_is_taken_but_for_its_entry_over_one_mebibyte(make_site: MakeSite) -> None:
    site = await make_site()
    batch = b'{"jobs":[%b,%b]}' % (padded(MIB), padded(MIB + 1))
    status, body, _ = await site.ask("data", "POST", "/api/jobs", data=BytesIO(batch))
    assert (status, body["jobs"][0]["status"]) == (200, "accepted")
    assert {name: body["jobs"][1][name] for name in ("ok", "code", "status")} == {
        "ok": False,
        "code": "body_too_large",
        "status": 413,
    }
    assert (await site.stored())[0]["job:pending"] == 1


QUOTES = b"[" * 65 + b'"' + b'\\"' * 20_000


def test_a_string_that_never_ends_cannot_hold_the_hub_up() -> None:
    began = time.perf_counter()
    with pytest.raises(Refused):
        check_json(QUOTES, 64)
    assert time.perf_counter() - began < 0.5, "40 kB took longer than a mebibyte may"


def test_a_long_string_in_a_batch_does_not_cost_a_multiple_of_its_memory() -> None:
    text = b'{"jobs":[' + b"{}," * 70 + b'"' + b"a" * 2_000_000 + b'"]}'
    tracemalloc.start()
    try:
        check_json(text, 64)
        assert tracemalloc.get_traced_memory()[1] < 40 * len(text)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("key", [b"\xff\xfe", b"a\x80b"])
async def test_a_key_header_that_is_not_utf8_is_refused(site: Site, key: bytes) -> None:
    before = await site.stored()
    request = head_of("/api/jobs", "Connection: close", "Content-Length: 12")
    request = request.replace(b"\r\n\r\n", b"\r\nIdempotency-Key: " + key + b"\r\n\r\n") + b'{"kind":"x"}'
    status, body, _ = await spoken(site, "data", request)
    assert status in (400, 422), body
    assert await site.stored() == before


QUERIES = [
    ("data", "/api/jobs?limit=nan"),
    ("data", "/api/jobs?limit=0"),
    ("data", "/api/jobs?limit=1001"),
    ("data", "/api/jobs?limit=ten"),
    ("data", "/api/jobs?limit=inf"),
    ("data", "/api/jobs?limit=1e999"),
    ("data", "/api/jobs?status=asleep"),
    ("data", "/api/jobs/{id}?wait_seconds=-1"),
    ("data", "/api/jobs/{id}?wait_seconds=31"),
    ("data", "/api/jobs/{id}?wait_seconds=nan"),
    ("data", "/mesh/pull_requests"),
    ("data", "/mesh/pull_requests?node_id="),
    ("data", "/mesh/pull_requests/n1?max=0"),
    ("data", "/mesh/pull_requests/n1?max=101"),
    ("data", "/mesh/pull_requests/n1?max=many"),
    ("data", "/mesh/pull_requests/" + "n" * 201),
    ("control", "/api/hosts?limit=0"),
    ("control", "/api/hosts?limit=x"),
]


async def test_a_wrong_query_is_refused_and_leases_nothing(site: Site) -> None:
    places = await arranged(site)
    before = await everything(site)
    for plane, path in QUERIES:
        check_problem(await site.ask(plane, "GET", path.format(**places)), 422, "invalid_field")
    assert await everything(site) == before


@pytest.mark.parametrize("text", ["%ff", "%00", "%ed%a0%80", "%F0%9F%98%80", "%27%3B--", "%25", "%", "+"])
async def test_a_strange_query_is_no_error_of_the_hub(site: Site, text: str) -> None:
    for name in ("cursor", "kind", "source", "mission_id", "node_id"):
        reader, writer = await asyncio.open_connection("127.0.0.1", site.app.ports["data"])
        target = f"GET /api/jobs?{name}={text} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        writer.write(f"{target}X-Sheratan-Token: {TOKEN}\r\n\r\n".encode())
        status = int((await asyncio.wait_for(reader.read(), 10)).split()[1])
        writer.close()
        assert status in (200, 400, 422), (name, status)


LONG, HUGE = "x" * 201, 10**18
JOB: dict[str, list[Any]] = {
    "kind": ["", 5, None, LONG, [], {}],
    "idempotency_key": ["", 5, "k" * 513],
    "source": [5, LONG],
    "mission_id": ["", 5, LONG],
    "task_id": ["", 5, LONG],
    "priority": [-1, 4, HUGE, "URGENT", "normal", 1.5, True, None, []],
    "timeout_seconds": [0, -1, "5", 1e12, HUGE, None],
    "max_retries": [-1, 1.5, "3", HUGE],
    "retry_backoff": ["none", 1, None],
    "required_capabilities": ["gpu", [1], [""], ["a"] * 101, {}],
    "not_before": ["yesterday", "2030-02-30T00:00:00Z", "2030-01-01T00:00:00", 5],
    "delay_seconds": [-1, "1", 1e12, HUGE],
    "expires_in_seconds": [0, -1, "1", 1e12],
    "delivery": ["twice", 1, None],
    "depends_on": ["x", [1], [""], [LONG], {}, [None], ["x"] * 10_001],
    "on_dependency_failure": ["explode", 1, None, "CANCEL"],
    "ref": ["", 5, LONG],
}
MISSION: dict[str, list[Any]] = {
    "title": ["", 5, None, [], "x" * 501],
    "jobs": [5, "x", {}, None, [5], [{}], [None], [{"kind": ""}], [{"kind": "x", "mission_id": "m"}]],
    "metadata": [5, "x", []],
    "idempotency_key": ["", 5, "k" * 513],
}
PULL: dict[str, list[Any]] = {
    "node_id": [5, None, LONG],
    "max": [0, 101, -1, HUGE, "1", 1.5, None],
    "wait_seconds": [-1, 31, "1", HUGE],
    "pull_id": ["", 5, LONG],
    "capabilities": ["gpu", [1], [""], ["a"] * 101],
    "kinds": ["x", [1], [""]],
}
RESULT: dict[str, list[Any]] = {
    "ok": [None, "yes", 1],
    "lease_id": ["", 5, LONG],
    "node_id": ["", 5, LONG],
    "retry": ["no", 0, None],
    "retry_after_seconds": [-1, "1", 1e12],
    "integrity": [5, "sha256", [], {"mode": "md5"}, {"mode": None}, {"sha256": 5}, {"sig": []}],
}
BEAT: dict[str, list[Any]] = {
    "node_id": [5, LONG, []],
    "host_id": [5],
    "health": ["PURPLE", "green", 5, None],
    "status": ["offline", 1],
    "zone": [5, LONG],
    "capabilities": ["gpu", [1], [""]],
    "current_jobs": [-1, 1.5, "1", HUGE],
    "max_concurrent": [-1, HUGE],
    "boot_id": [5],
    "endpoint": [5, "x" * 501],
    "attestation": [5, "x", [], {"build_id": 5}, {"capability_hash": {}}],
}
MANY: dict[str, list[Any]] = {"limit": [0, -1, "5", HUGE], "cursor": ["", 5, LONG]}
AGES: list[Any] = [{"older_than_seconds": age} for age in (-1, "5", HUGE)]
WRONG: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "/api/hosts/heartbeat": ({"node_id": "n2"}, BEAT),
    "/mesh/heartbeat": ({"node_id": "n2"}, BEAT),
    "/api/tokens/rotation": (
        {"seconds": 60},
        {
            "until": ["tomorrow", "2030-01-01T00:00:00", "2030-01-01T00:00:00Z", 5],
            "seconds": [0, -1, "5", HUGE],
            "token": ["tooshort", "a token with spaces", "\u00e4" * 20, "x" * 513, 5],
        },
    ),
    "/api/access": (
        {"role": "viewer"},
        {
            "role": ["root", "VIEWER", "node", 5, None],
            "node_id": ["", 5, LONG, "n1"],
            "expires_in_seconds": [0, -1, "5", HUGE],
            "name": [5, LONG],
        },
    ),
    "/api/jobs": ({"kind": "x"}, JOB),
    "/mesh/submit_request": ({"kind": "x"}, JOB),
    "/api/jobs/pull": ({"node_id": "n1"}, {**PULL, "node_id": ["", *PULL["node_id"]]}),
    "/mesh/pull_requests": ({"node_id": "n1"}, {**PULL, "node_id": ["", *PULL["node_id"]]}),
    "/mesh/pull_requests/{node_id}": ({}, PULL),
    "/mesh/submit_result": ({"job_id": "{id}", "ok": True}, {**RESULT, "job_id": ["", 5, None]}),
    "/api/results": ({"results": []}, {"results": [5, "x", None, {}]}),
    "/api/jobs/{id}/result": ({"lease_id": "{lease}", "ok": True}, {**RESULT, "lease_id": ["", 5, None, LONG]}),
    "/api/jobs/{id}/extend": (
        {"lease_id": "{lease}"},
        {"lease_id": ["", 5, None], "seconds": [0, -1, "5", 86_401, HUGE], "node_id": [5]},
    ),
    "/api/jobs/{id}/release": ({"lease_id": "{lease}"}, {"lease_id": ["", 5, None, LONG], "node_id": [5]}),
    "/api/jobs/{id}/cancel": ({}, {}),
    "/api/jobs/{id}/redrive": ({}, {"dependents": ["yes", 1, None]}),
    "/admin/dlq/redrive": (
        {"filter": {}},
        {**MANY, "filter": [5, [], {"status": "failed"}, {"kind": ""}, {"reason": 5}], "rate_per_second": [0, -1, "5"]},
    ),
    "/admin/purge": (
        {"filter": {}},
        {**MANY, "filter": [None, 5, {"status": "failed"}, {"node_id": "n1"}, *AGES], "dry_run": ["no", 1, None]},
    ),
    "/admin/cancel": (
        {"filter": {}},
        {**MANY, "filter": [5, {"status": "failed"}, *AGES], "job_ids": [5, [5], ["x"] * 1001], "dry_run": [1]},
    ),
    "/api/missions": ({"title": "t"}, MISSION),
    "/api/missions/{id}/cancel": ({}, {}),
    "/api/missions/{id}/redrive": ({}, {}),
    "/admin/pause": (
        {},
        {
            **{"kind": ["", 5, LONG], "seconds": [0, -1, "5", HUGE], "reason": [5, LONG]},
            "until": [5, "soon", "2001-01-01T00:00:00Z", "2999-01-01T00:00:00", "9999-12-31T00:00:00Z"],
        },
    ),
    "/admin/resume": ({}, {"kind": ["", 5, LONG]}),
    "/admin/rate-limits/{source}": ({}, {"per_minute": [-1, "5", None, HUGE], "concurrent": [-1, "5", None, HUGE]}),
    "/api/hosts/{id}/drain": ({}, {"seconds": [-1, "5", HUGE, []], "until": [5, "", "soon", "2026-01-01T00:00:00"]}),
    "/api/hosts/{id}/resume": ({}, {}),
    "/api/hosts/{id}/attest": ({}, {}),
    "/api/fleet/reap": ({}, {}),
    "/api/policies": ({"policy": {}}, {"policy": [5, None, {"rules": 5}, {"surprise": 1}]}),
    "/api/policies/plan": ({"version": 0}, {"version": [-1, "1", HUGE], "policy": [5, {"rules": [{}]}]}),
}
"""For every route with a body: one that is fine, and by field the values that are not."""


def test_the_wrong_values_cover_every_route_with_a_body() -> None:
    assert set(WRONG) >= {route.path for route in BODIES}


def filled(value: Any, places: dict[str, str]) -> Any:
    if isinstance(value, str):
        return value.format(**places) if value in ("{id}", "{lease}") else value
    return {name: filled(one, places) for name, one in value.items()} if isinstance(value, dict) else value


async def with_lease(site: Site) -> dict[str, str]:
    places = await arranged(site)
    return {**places, "lease": (await site.lease("n1"))["lease_id"]}


@pytest.mark.parametrize("path", WRONG)
async def test_a_wrong_value_is_refused_and_not_stored(site: Site, path: str) -> None:
    route = next(route for route in BODIES if route.path == path)
    places = await with_lease(site)
    fine, wrong = WRONG[path]
    fine = filled(fine, places)
    before = await everything(site)
    bodies = [{**fine, name: value} for name, values in wrong.items() for value in values]
    bodies += [{other: value for other, value in fine.items() if other != name} for name in fine]
    for body in bodies:
        answer = await site.ask(route.plane, route.method, path.format(**places), json=body)
        assert answer[0] == 422, (body, answer)
        check_problem(answer, 422, "invalid_field")
    assert await everything(site) == before


async def test_a_refusal_names_the_field(site: Site) -> None:
    _, body = await site.data("POST", "/api/jobs", {"kind": "x", "max_retries": -1})
    assert "max_retries" in body["detail"]


@pytest.mark.parametrize("path", WRONG)
async def test_an_unknown_field_is_ignored_on_fleet_routes_and_refused_on_the_others(site: Site, path: str) -> None:
    route = next(route for route in BODIES if route.path == path)
    held = await site.submit()
    places = {"id": held, "node_id": "n1", "source": "s", "lease": (await site.lease("n1"))["lease_id"]}
    body = {**filled(WRONG[path][0], places), "surprise": {"deep": [1]}}
    before = await everything(site)
    answer = await site.ask(route.plane, route.method, path.format(**places), json=body)
    if path.startswith(FLEET):
        assert (answer[0], answer[1]["ok"]) == (200, True), answer
    else:
        check_problem(answer, 422, "invalid_field")
        assert await everything(site) == before


@pytest.mark.parametrize(
    ("path", "name", "bad"),
    [
        ("/api/jobs", "jobs", [5, None, "x", [], {}, {"kind": ""}, {"kind": "x", "surprise": 1}, {"jobs": []}]),
        (
            "/api/results",
            "results",
            [5, None, {}, {"job_id": "j", "ok": True}, {"job_id": "j", "lease_id": "l", "ok": True, "surprise": 1}],
        ),
    ],
)
async def test_each_wrong_entry_of_a_batch_has_its_own_refusal(site: Site, path: str, name: str, bad: Any) -> None:
    before = await everything(site)
    status, body = await site.data("POST", path, {name: bad})
    assert status == 200
    assert [(one["ok"], one["code"], one["status"]) for one in body[name]] == [(False, "invalid_field", 422)] * len(bad)
    assert all(one["detail"] for one in body[name])
    assert await everything(site) == before


@pytest.mark.parametrize("body", [{"jobs": 5}, {"jobs": None}, {"jobs": [], "atomic": 1}, {"jobs": [], "kind": "x"}])
async def test_a_wrong_envelope_is_refused(make_site: MakeSite, body: Any) -> None:
    site = await make_site()
    check_problem(await site.ask("data", "POST", "/api/jobs", json=body), 422, "invalid_field")
    assert await site.stored() == ({}, 0)


@pytest.mark.parametrize("text", ["9999-12-31T23:59:59-23:59", "9999-12-31T23:59:59.9999-00:01"])
async def test_a_time_past_the_year_9999_is_refused_or_can_be_shown(site: Site, text: str) -> None:
    await site.data("POST", "/api/jobs", {"kind": "x", "not_before": text})
    assert (await site.data("GET", "/api/jobs"))[0] == 200


EXACT = {
    "object": b'{"b":2,"a":1}',
    "repeated key, the last wins": b'{"a":1,"b":{"c":1,"c":2},"a":{"d":[{"e":1,"e":3}]}}',
    "minus zero": b"[-0.0,-0]",
    "unsigned 64 bit": b"[18446744073709551615,9007199254740993]",
    "signed 64 bit": b"-9223372036854775808",
    "floats": b"[5e-324,1.7976931348623157e308,0.1,1E5,1.0,100000000000000000000000.0]",
    "60 levels": b"[" * 30 + b'{"a":' * 30 + b"1" + b"}" * 30 + b"]" * 30,
    "brackets in strings": b'"' + b"[{" * 500 + b'\\"]"',
    "whitespace": b' {\r\n\t"a" : [ 1 ,\n2 ] } ',
    "escaped": b'"\\u00e9\\ud83d\\ude00\\u0000\\n\\/\\"\\\\"',
    "plain unicode": '"é😀\u2028\x7f"'.encode(),
    "empty names": b'{"":{"":[]}}',
    "names of the hub's own": b'{"params":{"a":1},"result":[{"kind":"y"}],"ok":false,"__proto__":1}',
    "text": b'"x"',
    "true": b"true",
    "null": b"null",
    "empty list": b"[]",
}


def same(one: Any, text: bytes) -> bool:
    """Equal as JSON, and -0.0 is not 0, 1.0 not 1."""
    return repr(one) == repr(json.loads(text))


@pytest.mark.parametrize("name", EXACT)
async def test_params_and_results_come_back_as_they_were_given(site: Site, name: str) -> None:
    text = EXACT[name]
    status, made, _ = await site.ask("data", "POST", "/api/jobs", data=b'{"kind":"x","params":%b}' % text)
    assert status == 201, made
    job = await site.job(made["job_id"])
    lease = await site.lease()
    _, listed = await site.data("GET", "/api/jobs")
    for found in (job, lease, listed["jobs"][0]):
        assert same(found["params"], text)
    path = f"/api/jobs/{lease['job_id']}/result"
    body = b'{"lease_id":"%b","ok":true,"result":%b}' % (lease["lease_id"].encode(), text)
    status, done, _ = await site.ask("data", "POST", path, data=body)
    assert (status, done.get("status")) == (200, "completed"), done
    assert same((await site.job(made["job_id"]))["result"], text)


async def test_an_absent_params_is_null(site: Site) -> None:
    await site.submit()
    assert (await site.lease())["params"] is None


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": ""},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json; charset=UTF-8"},
        {"Content-Type": 'application/json;charset="utf-8"; foo=bar'},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ],
)
async def test_no_content_type_is_needed(make_site: MakeSite, headers: dict[str, str]) -> None:
    site = await make_site()
    body = b'{\n  "kind" : "x"\n}\n'
    answer = await site.ask("data", "POST", "/api/jobs", data=body, headers=headers, skip_auto_headers=["Content-Type"])
    assert answer[0] == 201, answer


async def test_a_chunked_body_is_taken(make_site: MakeSite) -> None:
    site = await make_site()
    request = head_of("/api/jobs", "Transfer-Encoding: chunked", "Connection: close")
    status, body, _ = await spoken(site, "data", request + b'4\r\n{"ki\r\n8\r\nnd":"x"}\r\n0\r\n\r\n')
    assert (status, body["status"]) == (201, "accepted")


async def test_routes_with_an_optional_body_take_none(site: Site) -> None:
    held = await site.submit()
    await site.submit(mission_id=held)
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1", "attestation": {"build_id": "b"}})
    optional = [route for route in BODIES if route.body_optional]
    assert {route.path for route in optional} >= {"/mesh/pull_requests/{node_id}", "/api/jobs/{id}/cancel"}
    for route in optional:
        path = route.path.format(id=held if route.plane == "data" else "n1", node_id="n1")
        query = "" if "{" in route.path else "?node_id=n1"
        status, body = (await site.ask(route.plane, "POST", path + query))[:2]
        assert (status, body["ok"]) == (200, True), (route.path, body)
