"""The gates that a request passes before its handler: parser, Host, leak guard, path, method, token."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from yarl import URL

from sheratan_hub.clock import settle
from sheratan_hub.config import AuthSettings, ControlSettings, DataSettings, LimitSettings, MetricsSettings
from sheratan_hub.rules.access import TOKEN_RIGHTS
from sheratan_hub.rules.command import Code
from sheratan_hub.storage import StoreDown
from sheratan_hub.web.auth import is_loopback
from sheratan_hub.web.errors import STATUS
from sheratan_hub.web.plane import Route
from sheratan_hub.web.routes import ROUTES
from tests.conftest import TOKEN, MakeSite, Site

PLANES = ("control", "data")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
AT = {"source": "s", "id": "x1", "node_id": "x1", "version": "1"}
SERVED = [(plane, route) for route in ROUTES for plane in PLANES if route.plane in (plane, "both")]
"""Every route with each plane that serves it."""


@pytest.fixture
async def anonymous() -> AsyncIterator[aiohttp.ClientSession]:
    """A client without any token."""
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def heard() -> Iterator[list[logging.LogRecord]]:
    """What is logged from INFO up by the hub, aiohttp and asyncio, however another test has set up logging."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = records.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("sheratan", "aiohttp", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
    yield records
    for logger in loggers:
        logger.removeHandler(handler)


def other(plane: str) -> str:
    return "data" if plane == "control" else "control"


def path_of(route: Route) -> str:
    return route.path.format(**AT)


def check_problem(answer: tuple[int, Any, dict[str, str]], status: int, code: str) -> Any:
    got, body, headers = answer
    assert (got, body["code"]) == (status, code), body
    assert headers["Content-Type"] == "application/problem+json"
    assert (body["status"], body["ok"]) == (status, False)
    assert all(isinstance(body[name], str) and body[name] for name in ("type", "title", "detail"))
    if status in (429, 503):
        assert int(headers["Retry-After"]) >= 1
    return body


def as_anonymous(site: Site, session: aiohttp.ClientSession) -> Site:
    return Site(site.app, session)


def audited(site: Site, event: str) -> list[dict[str, Any]]:
    return [line for line in site.audit() if line["event"] == event]


# errors


def test_every_code_has_a_status_and_nothing_else_has_one() -> None:
    assert set(STATUS) == set(Code)
    assert {status for code, status in STATUS.items() if code is not Code.INTERNAL} <= set(range(400, 500)) | {503}


async def test_a_bug_is_500_without_a_word_of_it(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, heard: list[logging.LogRecord]
) -> None:
    site = await make_site()

    async def broken(*_: object) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(site.app.hub, "page", broken)
    body = check_problem(await site.ask("data", "GET", "/api/jobs"), 500, "internal")
    assert "secret detail" not in json.dumps(body)
    [record] = [record for record in heard if record.exc_info]
    assert body["request_id"] in record.getMessage()


@pytest.mark.parametrize("broken", ["full", "closing", "store"])
async def test_what_cannot_be_written_now_is_503_with_a_time_to_wait(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    site = await make_site()
    if broken == "full":
        monkeypatch.setattr(site.app.hub.committer, "_max_waiting", 0)
    elif broken == "closing":
        site.app.hub.committer.close()
    else:
        monkeypatch.setattr(site.app.store, "begin", out_of_order)
    code = {"full": "busy", "closing": "draining", "store": "unavailable"}[broken]
    for plane, path, body in (
        ("data", "/api/jobs", {"kind": "x"}),
        ("data", "/api/jobs/pull", {"node_id": "n1"}),
        ("control", "/api/hosts/heartbeat", {"node_id": "n1"}),
    ):
        answer = await site.ask(plane, "POST", path, json=body)
        if broken == "store" and plane == "control":
            assert answer[0] == 200, "it is heard, and written down when there is room"
        else:
            check_problem(answer, 503, code)
    monkeypatch.undo()
    assert await site.stored() == ({}, 0)
    if broken != "closing":
        assert (await site.data("POST", "/api/jobs", {"kind": "x"}))[0] == 201


def out_of_order(*_: object, **__: object) -> Any:
    raise StoreDown("the disk is on fire")


# leak guard, path, method


@pytest.mark.parametrize("plane", PLANES)
async def test_every_path_of_the_other_plane_is_gone_whatever_the_method_and_names_the_port(
    make_site: MakeSite, anonymous: aiohttp.ClientSession, plane: str
) -> None:
    site = await make_site()
    stranger = as_anonymous(site, anonymous)
    theirs = [path_of(route) for route in ROUTES if route.plane == other(plane)]
    assert len(theirs) >= 5
    for path in theirs:
        for method in METHODS:
            answer = await stranger.ask(plane, method, path)
            assert answer[0] == 410, (method, path, answer)
            if method != "HEAD":
                body = check_problem(answer, 410, "port_mismatch")
                assert f"port {site.app.ports[other(plane)]}" in body["detail"]
                assert path in body["detail"]
    lines = audited(site, "PORT_MISMATCH")
    assert {line["path"] for line in lines} == set(theirs)
    assert {(line["plane"], line["reason"]) for line in lines} == {(plane, f"{other(plane)}_path_on_{plane}_port")}
    assert all(line["remote_addr"] == "127.0.0.1" for line in lines)
    assert audited(site, "AUTH_FAILURE") == []


@pytest.mark.parametrize("plane", PLANES)
async def test_the_leak_guard_does_not_look_at_token_or_body(make_site: MakeSite, plane: str) -> None:
    site = await make_site()
    path = "/api/hosts/heartbeat" if plane == "data" else "/api/jobs"
    for options in ({"data": b"not JSON"}, {"headers": {"Authorization": "Bearer wrong"}}, {"json": {"kind": "x"}}):
        check_problem(await site.ask(plane, "POST", path + "?a=b", **options), 410, "port_mismatch")
    assert await site.stored() == ({}, 0)


UNKNOWN = [
    "/",
    "/api",
    "/api/job",
    "/api/jobs/",
    "/api/jobs/x/",
    "/api/jobs//result",
    "/api/jobs/x/result/y",
    "/API/JOBS",
]


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("path", [*UNKNOWN, "/mesh", "/favicon.ico", "/livez/", "//livez", "/api/hosts/x/", "/%00"])
async def test_an_unknown_path_is_404_for_any_method(
    make_site: MakeSite, anonymous: aiohttp.ClientSession, plane: str, path: str
) -> None:
    site = as_anonymous(await make_site(), anonymous)
    for method in ("GET", "POST", "DELETE", "OPTIONS"):
        check_problem(await site.ask(plane, method, path), 404, "unknown_path")


async def test_a_known_path_with_another_method_is_405_and_says_which(make_site: MakeSite) -> None:
    site = await make_site()
    tried = 0
    for plane, path in {(plane, route.path) for plane, route in SERVED}:
        known = {route.method for served, route in SERVED if (served, route.path) == (plane, path)}
        for method in set(METHODS) - known - ({"HEAD"} if "GET" in known else set()):
            answer = await site.ask(plane, method, path.format(**AT))
            assert answer[0] == 405, (plane, method, path)
            assert set(answer[2]["Allow"].split(", ")) >= known
            if method != "HEAD":
                check_problem(answer, 405, "method_not_allowed")
            tried += 1
    assert tried > 100
    assert await site.stored() == ({}, 0)


async def test_an_escaped_path_is_the_same_path(make_site: MakeSite) -> None:
    site = await make_site()
    job_id = await site.submit()
    reader, writer = await asyncio.open_connection("127.0.0.1", site.app.ports["data"])
    target = f"/%61pi/jobs/{job_id[:-1]}%{ord(job_id[-1]):02x}"
    writer.write(request(f"GET {target} HTTP/1.1", "Connection: close", f"X-Sheratan-Token: {TOKEN}"))
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200")
    assert job_id.encode() in answer


@pytest.mark.parametrize("name", ["*", "%2A", "{id}", "%7Bid%7D", "None", "..", "%2e%2e", "a%2Fb", "%00", "%FF", ";x"])
async def test_any_name_may_stand_in_a_path(site: Site, anonymous: aiohttp.ClientSession, name: str) -> None:
    paths = [("control", f"/api/hosts/{name}"), ("data", f"/api/jobs/{name}"), ("data", f"/api/jobs/{name}/explain")]
    for who, status in ((site, 404), (Site(site.app, anonymous), 403)):
        for plane, path in paths:
            url = URL(f"http://127.0.0.1:{site.app.ports[plane]}{path}", encoded=True)
            async with who.session.get(url) as answer:
                assert answer.status == status, path


async def test_head_is_get_without_the_body(site: Site) -> None:
    job_id = await site.submit()
    await site.submit(mission_id=job_id)
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1"})
    await site.data("PUT", "/admin/rate-limits/s", {})
    version = (await site.control("POST", "/api/policies", {"policy": {}}))[1]["version"]
    gets = [(plane, route) for plane, route in SERVED if route.method == "GET" and "pull" not in route.path]
    assert len(gets) >= 12
    for plane, route in gets:
        path = route.path.format(id="n1" if plane == "control" else job_id, source="s", version=version)
        async with site.session.head(site.url(plane, path)) as answer:
            assert answer.status == 200, path
            assert await answer.read() == b""
            assert int(answer.headers["Content-Length"]) > 0


@pytest.mark.parametrize("path", ["/mesh/pull_requests/n1", "/mesh/pull_requests?node_id=n1"])
async def test_head_leases_nothing(site: Site, path: str) -> None:
    await site.submit()
    before = await site.stored()
    await site.ask("data", "HEAD", path)
    assert await site.stored() == before


# tokens

TOKEN_ROUTES = [(plane, route) for plane, route in SERVED if route.right in TOKEN_RIGHTS]
NO_TOKEN: dict[str, dict[str, str]] = {
    "none": {},
    "empty": {"X-Sheratan-Token": ""},
    "bearer without a token": {"Authorization": "Bearer "},
    "another scheme": {"Authorization": f"Basic {TOKEN}"},
    "in no scheme": {"Authorization": TOKEN},
    "in a cookie": {"Cookie": f"token={TOKEN}"},
}
WRONG_TOKEN: dict[str, dict[str, str]] = {
    "wrong": {"Authorization": "Bearer wrong"},
    "wrong in the other header": {"X-Sheratan-Token": "wrong"},
    "longer": {"Authorization": f"Bearer {TOKEN}x"},
    "shorter": {"X-Sheratan-Token": TOKEN[:-1]},
    "upper case": {"X-Sheratan-Token": TOKEN.upper()},
    "not ASCII": {"X-Sheratan-Token": "tökén€"},
    "scheme in the other header": {"X-Sheratan-Token": f"Bearer {TOKEN}"},
    "wrong bearer with a right second": {"Authorization": "Bearer wrong", "X-Sheratan-Token": TOKEN},
}
RIGHT_TOKEN: dict[str, dict[str, str]] = {
    "bearer": {"Authorization": f"Bearer {TOKEN}"},
    "bearer in lower case": {"Authorization": f"bearer  {TOKEN} "},
    "the fleet's header": {"X-Sheratan-Token": TOKEN},
    "the fleet's header beside another scheme": {"Authorization": "Basic abc", "X-Sheratan-Token": TOKEN},
}


def test_all_but_the_operators_routes_need_a_token() -> None:
    assert {route.path for route in ROUTES if route.right not in TOKEN_RIGHTS} == {
        "/health",
        "/livez",
        "/readyz",
        "/metrics",
        "/openapi.json",
        "/docs",
    }


@pytest.mark.parametrize(
    ("headers", "code"),
    [pytest.param(headers, "missing_token", id=name) for name, headers in NO_TOKEN.items()]
    + [pytest.param(headers, "invalid_token", id=name) for name, headers in WRONG_TOKEN.items()],
)
async def test_without_the_token_every_route_that_needs_one_is_403(
    make_site: MakeSite, anonymous: aiohttp.ClientSession, headers: dict[str, str], code: str
) -> None:
    site = await make_site()
    stranger = as_anonymous(site, anonymous)
    for plane, route in TOKEN_ROUTES:
        options = {"data": b"not JSON"} if route.form else {}
        answer = await stranger.ask(plane, route.method, path_of(route), headers=headers, **options)
        assert answer[0] == 403, (route.path, answer)
        check_problem(answer, 403, code)
        assert "WWW-Authenticate" not in answer[2]
    lines = audited(site, "AUTH_FAILURE")
    assert {(line["plane"], line["path"]) for line in lines} == {
        (plane, path_of(route)) for plane, route in TOKEN_ROUTES
    }
    assert {(line["reason"], line["remote_addr"]) for line in lines} == {(code, "127.0.0.1")}
    assert await site.stored() == ({}, 0)


@pytest.mark.parametrize("headers", RIGHT_TOKEN.values(), ids=RIGHT_TOKEN)
async def test_with_the_token_in_either_header_no_route_is_403(
    make_site: MakeSite, anonymous: aiohttp.ClientSession, headers: dict[str, str]
) -> None:
    site = await make_site()
    for plane, route in TOKEN_ROUTES:
        answer = await as_anonymous(site, anonymous).ask(plane, route.method, path_of(route), headers=headers)
        assert answer[0] in (200, 400, 404, 409, 422, 428), (route.path, answer)
    assert audited(site, "AUTH_FAILURE") == []


async def test_a_token_that_is_not_utf8_is_wrong_and_no_error(
    make_site: MakeSite, heard: list[logging.LogRecord]
) -> None:
    site = await make_site()
    answer, closed = await spoken(
        site, "data", request("GET /api/jobs HTTP/1.1", "Connection: close", "X-Sheratan-Token: \udcff\udcfe")
    )
    assert closed
    check_problem(answer, 403, "invalid_token")
    assert [record for record in heard if record.exc_info] == []


async def test_where_no_token_is_required_everybody_may(make_site: MakeSite, anonymous: aiohttp.ClientSession) -> None:
    site = await make_site(auth=AuthSettings(token_required=False))
    stranger = as_anonymous(site, anonymous)
    for headers in ({}, {"X-Sheratan-Token": "wrong"}):
        status, _, _ = await stranger.ask("data", "POST", "/api/jobs", json={"kind": "x"}, headers=headers)
        assert status == 201
        status, _, _ = await stranger.ask("control", "GET", "/api/hosts", headers=headers)
        assert status == 200
    assert audited(site, "AUTH_FAILURE") == []


# Host

FINE = ["localhost", "localhost:8788", "LOCALHOST", "127.0.0.1", "127.0.0.1:1", "127.0.0.2", "[::1]", "[::1]:8788"]
FOREIGN = [
    *(
        "evil.example",
        "evil.example:8787",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "localhost@evil.example",
    ),
    *("0.0.0.0", "10.0.0.1", "[::2]", "[fe80::1]:80", "", "hub", "xn--localhost"),
]


@pytest.mark.parametrize("host", FOREIGN)
async def test_a_foreign_host_header_is_403_on_every_route(make_site: MakeSite, host: str) -> None:
    site = await make_site()
    for plane, route in SERVED:
        answer = await site.ask(plane, route.method, path_of(route), headers={"Host": host})
        assert answer[0] == 403, (host, route.path)
        check_problem(answer, 403, "foreign_host")
    for plane in PLANES:
        path = "/api/jobs" if plane == "control" else "/api/registry"
        for lost in (path, "/nowhere"):
            check_problem(await site.ask(plane, "GET", lost, headers={"Host": host}), 403, "foreign_host")
    assert await site.stored() == ({}, 0)


async def test_a_loopback_host_header_is_fine(make_site: MakeSite) -> None:
    site = await make_site()
    for host in FINE:
        for plane in PLANES:
            assert (await site.ask(plane, "GET", "/livez", headers={"Host": host}))[0] == 200, host


async def test_each_plane_may_list_more_hosts(make_site: MakeSite) -> None:
    site = await make_site(
        control=ControlSettings(port=0, hosts=("nodes.example",)), data=DataSettings(port=0, hosts=("Work.example",))
    )
    for plane, host, status in (
        ("control", "nodes.example", 200),
        ("control", "NODES.example:8787", 200),
        ("control", "work.example", 403),
        ("data", "work.example:8788", 200),
        ("data", "nodes.example", 403),
        ("data", "localhost", 200),
    ):
        assert (await site.ask(plane, "GET", "/livez", headers={"Host": host}))[0] == status, (plane, host)


async def test_off_loopback_any_host_will_do_unless_some_are_listed(make_site: MakeSite) -> None:
    site = await make_site(
        control=ControlSettings(host="0.0.0.0", port=0),
        data=DataSettings(host="0.0.0.0", port=0, hosts=("hub.example",)),
    )
    for plane, host, status in (
        ("control", "whatever.example", 200),
        ("data", "hub.example", 200),
        ("data", "whatever.example", 403),
        ("data", "localhost", 403),
    ):
        assert (await site.ask(plane, "GET", "/livez", headers={"Host": host}))[0] == status, (plane, host)


# health, readiness, metrics: who may


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz", "/readyz?verbose"])
async def test_health_needs_no_token(
    make_site: MakeSite, anonymous: aiohttp.ClientSession, plane: str, path: str
) -> None:
    status, body, _ = await as_anonymous(await make_site(), anonymous).ask(plane, "GET", path)
    assert (status, body["ok"], body["plane"]) == (200, True, plane)
    assert ("checks" in body) == (path in ("/health", "/readyz?verbose"))


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz"])
async def test_health_of_the_data_plane_is_for_loopback_only(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    site = await make_site()
    asked: list[str | None] = []

    def far(address: str | None) -> bool:
        asked.append(address)
        return False

    monkeypatch.setattr("sheratan_hub.web.plane.is_loopback", far)
    check_problem(await site.ask("data", "GET", path), 403, "loopback_only")
    assert asked == ["127.0.0.1"], "it is the peer's address that counts"
    assert (await site.ask("control", "GET", path))[0] == 200
    assert (await site.ask("data", "GET", "/metrics"))[0] == 200
    assert (await site.ask("data", "GET", "/api/jobs"))[0] == 200


@pytest.mark.parametrize(
    ("address", "fine"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost.", True)]
    + [
        (address, False) for address in ("10.0.0.1", "0.0.0.0", "::", "fe80::1", "", "hub.example", "127.0.0.1.x", None)
    ],
)
def test_loopback_is_this_machine_only(address: str | None, fine: bool) -> None:
    assert is_loopback(address) is fine


@pytest.mark.parametrize("plane", PLANES)
async def test_a_hub_whose_store_fails_is_alive_but_not_ready(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, plane: str
) -> None:
    site = await make_site()
    for name in ("counts", "fetch", "page", "begin", "heads", "events", "now"):
        monkeypatch.setattr(site.app.store, name, out_of_order)
    answer = await site.ask(plane, "GET", "/readyz?verbose")
    body = check_problem(answer, 503, "unavailable")
    assert body["checks"] == {"started": True, "not_draining": True, "store": False}
    status, told, _ = await site.ask(plane, "GET", "/health")
    assert (status, told["status"], told["checks"]["store"]) == (200, "degraded", False)
    assert (await site.ask(plane, "GET", "/livez"))[0] == 200
    monkeypatch.undo()
    await site.submit()
    assert (await site.ask(plane, "GET", "/readyz"))[0] == 200
    assert (await site.ask(plane, "GET", "/health"))[1]["status"] == "ok"


@pytest.mark.parametrize("plane", PLANES)
async def test_a_hub_whose_store_cannot_write_is_not_ready(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, plane: str
) -> None:
    site = await make_site()
    monkeypatch.setattr(site.app.store, "begin", out_of_order)
    assert (await site.data("POST", "/api/jobs", {"kind": "x"}))[0] == 503
    check_problem(await site.ask(plane, "GET", "/readyz"), 503, "unavailable")
    monkeypatch.undo()
    await site.submit()
    assert (await site.ask(plane, "GET", "/readyz"))[0] == 200


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("moment", ["starting", "draining"])
async def test_a_hub_that_starts_or_drains_is_alive_but_not_ready(make_site: MakeSite, plane: str, moment: str) -> None:
    site = await make_site()
    if moment == "draining":
        site.app.hub.stop()
    else:
        site.app.hub.ready = False
    body = check_problem(await site.ask(plane, "GET", "/readyz?verbose"), 503, "unavailable")
    wrong = [name for name, fine in body["checks"].items() if not fine]
    assert wrong == ["started" if moment == "starting" else "not_draining"]
    assert (await site.ask(plane, "GET", "/livez"))[0] == 200


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("required", [False, True])
async def test_metrics_need_the_token_only_if_so_configured(
    make_site: MakeSite, anonymous: aiohttp.ClientSession, plane: str, required: bool
) -> None:
    site = await make_site(metrics=MetricsSettings(require_token=required))
    stranger = as_anonymous(site, anonymous)
    for path in ("/metrics", "/metrics?format=json"):
        answer = await stranger.ask(plane, "GET", path)
        if required:
            check_problem(answer, 403, "missing_token")
        else:
            assert answer[0] == 200
        assert (await site.ask(plane, "GET", path))[0] == 200
    assert len(audited(site, "AUTH_FAILURE")) == required


# what is not HTTP


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    text = "\r\n".join([line, "Host: 127.0.0.1", *headers])
    return text.encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body


async def spoken(site: Site, plane: str, text: bytes) -> tuple[tuple[int, Any, dict[str, str]], bool]:
    """Write bytes, read one answer: ((status, JSON body, headers), whether the hub then closed the connection)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", site.app.ports[plane])
    try:
        async with asyncio.timeout(5):
            writer.write(text)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:])
            body = await reader.readexactly(int(headers["Content-Length"]))
            writer.write(request("GET /livez HTTP/1.1"))
            try:
                closed = await reader.read(1) == b""
            except ConnectionError:
                closed = True
    finally:
        writer.close()
    return (int(lines[0].split()[1]), json.loads(body), headers), closed


SECRET = f"X-Sheratan-Token: {TOKEN}"
GARBAGE = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "words": b"hello\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "unknown method": request("FETCH /livez HTTP/1.1", SECRET),
    "unknown version": request("GET /livez HTTP/9.9", SECRET),
    "no slash": request("GET livez HTTP/1.1", SECRET),
    "bytes in the path": request("GET /\udcff HTTP/1.1", SECRET),
    "bytes in the query": request("GET /api/jobs?kind=\udcff HTTP/1.1", SECRET),
    "space in the path": request("GET /a b HTTP/1.1", SECRET),
    "long path": request(f"GET /{'a' * 9000} HTTP/1.1", SECRET),
    "long header": request("GET /livez HTTP/1.1", SECRET, f"X-Long: {'a' * 9000}"),
    "bad header name": request("GET /livez HTTP/1.1", SECRET, "Bad Header: 1"),
    "header without colon": request("GET /livez HTTP/1.1", SECRET, "nonsense"),
    "NUL in a header": request("GET /livez HTTP/1.1", SECRET, "X-Nul: a\0b"),
    "two hosts": request("GET /livez HTTP/1.1", SECRET, "Host: evil.example"),
    "negative length": request("POST /api/jobs HTTP/1.1", SECRET, "Content-Length: -1"),
    "length that is no number": request("POST /api/jobs HTTP/1.1", SECRET, "Content-Length: many"),
    "two lengths": request("POST /api/jobs HTTP/1.1", SECRET, "Content-Length: 5", "Content-Length: 6"),
    "length and chunks": request("POST /api/jobs HTTP/1.1", SECRET, "Content-Length: 5", "Transfer-Encoding: chunked"),
    "chunks that are none": request(
        "POST /api/jobs HTTP/1.1", SECRET, "Transfer-Encoding: chunked", body=b"zz\r\n\r\n"
    ),
}


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("name", GARBAGE)
async def test_what_the_parser_refuses_is_400_one_log_line_and_a_closed_connection(
    make_site: MakeSite, heard: list[logging.LogRecord], plane: str, name: str
) -> None:
    site = await make_site()
    heard.clear()
    answer, closed = await spoken(site, plane, GARBAGE[name])
    check_problem(answer, 400, "bad_request")
    assert closed
    [record] = heard
    assert record.name.startswith(f"sheratan.{plane}")
    assert not record.exc_info
    assert "\n" not in record.getMessage()
    assert TOKEN not in record.getMessage()
    assert answer[2]["X-Request-ID"]
    assert await site.stored() == ({}, 0)
    assert (await site.ask(plane, "GET", "/livez"))[0] == 200


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(
    "line",
    [
        "GET http://127.0.0.1/livez HTTP/1.1",
        "GET http://evil.example/livez HTTP/1.1",
        "OPTIONS * HTTP/1.1",
        "CONNECT 127.0.0.1:80 HTTP/1.1",
    ],
)
async def test_a_target_that_is_no_path_is_400_without_a_traceback(
    make_site: MakeSite, heard: list[logging.LogRecord], plane: str, line: str
) -> None:
    site = await make_site()
    answer, closed = await spoken(site, plane, request(line, SECRET, "Connection: close"))
    check_problem(answer, 400, "bad_request")
    assert closed
    assert [record for record in heard if record.exc_info] == []


async def test_a_body_that_breaks_off_into_nonsense_is_400_and_the_connection_is_closed(make_site: MakeSite) -> None:
    site = await make_site()
    reader, writer = await asyncio.open_connection("127.0.0.1", site.app.ports["data"])
    try:
        async with asyncio.timeout(3):
            head = request("POST /api/jobs HTTP/1.1", SECRET, "Transfer-Encoding: chunked")
            writer.write(head + b'8\r\n{"kind":\r\n')
            await writer.drain()
            await settle(200)
            writer.write(b"zz\r\n")
            answer = await reader.read()
    finally:
        writer.close()
    assert answer.split()[1] == b"400"
    assert await site.stored() == ({}, 0)


@pytest.mark.parametrize("headers", [["Content-Length: 50"], ["Transfer-Encoding: chunked"]])
async def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing_behind(
    make_site: MakeSite, heard: list[logging.LogRecord], headers: list[str]
) -> None:
    site = await make_site()
    heard.clear()
    _, writer = await asyncio.open_connection("127.0.0.1", site.app.ports["data"])
    writer.write(request("POST /api/jobs HTTP/1.1", SECRET, *headers, body=b'8\r\n{"kind":\r\n'))
    await writer.drain()
    await settle(200)
    writer.transport.abort()
    await settle(200)
    assert await site.stored() == ({}, 0)
    assert heard == []


async def test_expect_100_continue_is_honoured(make_site: MakeSite) -> None:
    site = await make_site()
    reader, writer = await asyncio.open_connection("127.0.0.1", site.app.ports["data"])
    try:
        async with asyncio.timeout(5):
            length = ("Content-Length: 12", "Expect: 100-continue", "Connection: close")
            writer.write(request("POST /api/jobs HTTP/1.1", SECRET, *length))
            assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == b"100"
            writer.write(b'{"kind":"x"}')
            assert (await reader.read()).split()[1] == b"201"
    finally:
        writer.close()


async def test_a_body_that_never_comes_is_given_up(make_site: MakeSite) -> None:
    site = await make_site(limits=LimitSettings(body_seconds=1))
    reader, writer = await asyncio.open_connection("127.0.0.1", site.app.ports["data"])
    writer.write(request("POST /api/jobs HTTP/1.1", SECRET, "Content-Length: 20", body=b"{"))
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    assert answer.split()[1] == b"400"
    assert b"did not arrive" in answer
    assert await site.stored() == ({}, 0)
