"""The OpenAPI document and the page: whole, true to the route table and to docs/protocol.md, and safe to look at."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import hdrs
from openapi_spec_validator import OpenAPIV31SpecValidator

from sheratan_hub.config import AuthSettings, LimitSettings, MetricsSettings, QueueSettings, Settings
from sheratan_hub.rules.access import TOKEN_RIGHTS
from sheratan_hub.rules.command import Code
from sheratan_hub.web import examples, openapi, page
from sheratan_hub.web.body import decode
from sheratan_hub.web.codes import MEANINGS
from sheratan_hub.web.errors import STATUS
from sheratan_hub.web.manual import GUARDS
from sheratan_hub.web.plane import Route
from sheratan_hub.web.routes import ROUTES
from sheratan_hub.web.schemas import shapes, types
from tests.conftest import TOKEN, MakeSite, Site
from tests.web.test_docs import PLANE_HEADINGS, table

PLANES = ("control", "data")
SERVED = [(plane, route) for route in ROUTES for plane in PLANES if route.plane in (plane, "both")]


def documented(plane: str, **settings: Any) -> dict[str, Any]:
    return json.loads(json.dumps(openapi.openapi(plane, ROUTES, Settings(**settings))))


DOCUMENTS = {plane: documented(plane) for plane in PLANES}


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        yield from ((method.upper(), path, told) for method, told in item.items())


def operation(plane: str, route: Route) -> dict[str, Any]:
    found: dict[str, Any] = DOCUMENTS[plane]["paths"][route.path][route.method.lower()]
    return found


def codes(document: dict[str, Any], told: dict[str, Any]) -> dict[str, int]:
    """Every code of an operation with its status."""
    found = {}
    for status, answer in told["responses"].items():
        if "$ref" in answer:
            problem = document["components"]["responses"][answer["$ref"].rpartition("/")[2]]
            schema = problem["content"]["application/problem+json"]["schema"]
            found |= dict.fromkeys(schema["properties"]["code"]["enum"], int(status))
    return found


# The document


@pytest.mark.parametrize("plane", PLANES)
def test_it_is_openapi_3_1(plane: str) -> None:
    assert not list(OpenAPIV31SpecValidator(DOCUMENTS[plane]).iter_errors())


@pytest.mark.parametrize("plane", PLANES)
def test_it_has_every_route_of_its_plane_and_no_other(plane: str) -> None:
    told = [(method, path) for method, path, _ in operations(DOCUMENTS[plane])]
    assert told == sorted(told, key=lambda one: list(dict.fromkeys(path for _, path in told)).index(one[1]))
    assert sorted(told) == sorted((route.method, route.path) for where, route in SERVED if where == plane)


def test_it_has_every_route_of_the_reference_and_no_other() -> None:
    planes = {"Control plane": "control", "Data plane": "data", "Both planes": "both"}
    listed = {
        (planes[heading], row[0].strip("`"), row[1].strip("`")) for heading in PLANE_HEADINGS for row in table(heading)
    }
    for plane in PLANES:
        told = {(f"{method} {path}", one["x-right"]) for method, path, one in operations(DOCUMENTS[plane])}
        assert told == {(name, right) for where, name, right in listed if where in (plane, "both")}


def test_it_has_every_code_of_the_reference_with_its_status_and_meaning() -> None:
    everywhere = {"port_mismatch"}  # answers of paths that are not in a document
    found: dict[str, int] = {}
    for plane in PLANES:
        for _, _, told in operations(DOCUMENTS[plane]):
            found |= codes(DOCUMENTS[plane], told)
    listed = {row[0].strip("`"): row for row in table("Codes")}
    assert found.keys() | everywhere == listed.keys()
    assert all(int(listed[code][1]) == status for code, status in found.items())
    for code, meaning in MEANINGS.items():
        said = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", listed[code][2])
        assert not said or said == meaning or said.startswith(f"{meaning}; see "), code


def test_every_code_has_a_meaning() -> None:
    assert set(MEANINGS) == set(Code) == set(STATUS)


@pytest.mark.parametrize(
    ("plane", "route"), SERVED, ids=lambda one: one if isinstance(one, str) else f"{one.method} {one.path}"
)
def test_a_route_is_told_whole(plane: str, route: Route) -> None:
    told = operation(plane, route)
    assert len(told["summary"]) > 10
    assert told["summary"][0].isupper() or told["summary"][0] == "`"
    assert told["description"]
    assert ("requestBody" in told) == (route.form is not None)
    assert (
        {status for status in told["responses"] if status[0] == "2"}
        == {status for status, shape in (("200", route.answers), ("201", route.made)) if shape is not None}
        != set()
    )
    assert [one["name"] for one in told["parameters"] if one["in"] == "path"] == re.findall(r"{(\w+)}", route.path)
    if route.query is not None:
        names = [field.encode_name for field in msgspec.structs.fields(route.query)]
        assert [one["name"] for one in told["parameters"] if one["in"] == "query"] == names
    assert set(route.codes) <= codes(DOCUMENTS[plane], told).keys()
    assert (told["security"] == []) == (route.right in ("public", "local"))
    assert ([route.right] in [next(iter(one.values())) for one in told["security"] if one]) == (
        route.right in TOKEN_RIGHTS
    )


def test_the_names_of_operations_are_each_used_once() -> None:
    for plane in PLANES:
        names = [told["operationId"] for _, _, told in operations(DOCUMENTS[plane])]
        assert len(names) == len(set(names))


def test_the_routes_of_the_fleet_are_marked() -> None:
    fleet = {
        f"{method} {path}" for plane in PLANES for method, path, told in operations(DOCUMENTS[plane]) if told["x-fleet"]
    }
    assert fleet == {
        f"{route.method} {route.path}"
        for route in ROUTES
        if route.path.startswith(("/mesh/", "/registry")) or route.path in ("/api/hosts/heartbeat", "/api/registry")
    }


def test_links_lead_to_routes_of_what_was_made() -> None:
    told = operation("data", next(route for route in ROUTES if (route.method, route.path) == ("POST", "/api/jobs")))
    links = told["responses"]["201"]["links"]
    assert links["get_api_jobs_id"] == {
        "operationId": "get_api_jobs_id",
        "parameters": {"id": "$response.body#/job_id"},
    }
    names = {told["operationId"] for _, _, told in operations(DOCUMENTS["data"])}
    assert {link["operationId"] for link in links.values()} <= names


def test_settings_that_change_what_is_answered_change_the_document() -> None:
    full = operation("data", next(route for route in ROUTES if route.path == "/mesh/submit_request"))
    assert codes(DOCUMENTS["data"], full)["queue_full"] == 429
    other = documented("data", queue=QueueSettings(backpressure_mode=503), limits=LimitSettings(batch_jobs=7))
    assert codes(other, other["paths"]["/mesh/submit_request"]["post"])["queue_full"] == 503
    assert other["components"]["schemas"]["BatchForm"]["properties"]["jobs"]["maxItems"] == 7
    asked = documented("control", metrics=MetricsSettings(require_token=True))["paths"]["/metrics"]["get"]
    assert {} in DOCUMENTS["control"]["paths"]["/metrics"]["get"]["security"]
    assert {} not in asked["security"]
    free = documented("data", auth=AuthSettings(token_required=False))
    assert all({} in told["security"] or not told["security"] for _, _, told in operations(free))


# Examples


@pytest.mark.parametrize("form", examples.BODIES, ids=lambda form: form.__name__)
def test_the_example_of_a_body_is_one(form: type[msgspec.Struct]) -> None:
    decode(json.dumps(examples.BODIES[form]).encode(), form)


def test_every_form_has_an_example() -> None:
    assert set(examples.BODIES) == {kind for route in ROUTES for kind in types(route.form)}


@pytest.mark.parametrize("plane", PLANES)
def test_examples_fit_their_schema(plane: str) -> None:
    import jsonschema_rs

    document = DOCUMENTS[plane]
    shown = 0
    for _, _, told in operations(document):
        contents = [answer["content"] for answer in told["responses"].values() if "content" in answer]
        contents += [told["requestBody"]["content"]] if "requestBody" in told else []
        for content in (one for several in contents for one in several.values() if one):
            schema = {**content["schema"], "components": document["components"]}
            values = [content["example"]] if "example" in content else []
            values += [one["value"] for one in content.get("examples", {}).values()]
            shown += len(values)
            for value in values:
                assert jsonschema_rs.is_valid(schema, value), (told["operationId"], value)
    assert shown > 40


# Served


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("path", ["/openapi.json", "/docs"])
async def test_it_is_served_on_both_planes_and_asked_for_by_its_tag(make_site: MakeSite, plane: str, path: str) -> None:
    site = await make_site()
    status, body, headers = await site.ask(plane, "GET", path)
    assert status == 200
    assert headers["Content-Type"] == ("application/json" if path == "/openapi.json" else "text/html; charset=utf-8")
    assert headers["Cache-Control"] == "private, no-cache"
    if path == "/openapi.json":
        assert body == json.loads(json.dumps(openapi.openapi(plane, ROUTES, site.app.settings)))
    head = await site.ask(plane, "HEAD", path)
    assert (head[0], head[1]) in ((200, ""), (200, None))
    same = (hdrs.ETAG, "Content-Length", "Content-Type")
    assert [head[2][name] for name in same] == [headers[name] for name in same]
    mine = headers[hdrs.ETAG]
    for tag in (mine, f'"x", W/{mine}', "*"):
        status, body, again = await site.ask(plane, "GET", path, headers={"If-None-Match": tag})
        assert (status, body or "", again[hdrs.ETAG]) == (304, "", mine)
    assert (await site.ask(plane, "GET", path, headers={"If-None-Match": '"x"'}))[0] == 200


async def test_the_bytes_are_made_once(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await make_site()
    first = await site.ask("data", "GET", "/openapi.json")
    page_first = await site.ask("data", "GET", "/docs")
    monkeypatch.setattr("sheratan_hub.web.manual.openapi", None)
    monkeypatch.setattr("sheratan_hub.web.manual.html", None)
    assert (await site.ask("data", "GET", "/openapi.json"))[1] == first[1]
    assert (await site.ask("data", "GET", "/docs"))[1] == page_first[1]


@pytest.mark.parametrize("plane", PLANES)
async def test_strangers_need_a_token_for_it_and_this_machine_does_not(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, plane: str
) -> None:
    site = await make_site()
    _, made = await site.control("POST", "/api/access", {"role": "producer"})
    async with aiohttp.ClientSession() as nobody:
        here = Site(site.app, nobody)
        for path in ("/openapi.json", "/docs"):
            assert (await here.ask(plane, "GET", path))[0] == 200
            assert (await here.ask(plane, "GET", path, headers={"X-Sheratan-Token": "wrong"}))[0] == 200
        monkeypatch.setattr("sheratan_hub.web.plane.is_loopback", lambda _: False)
        for path in ("/openapi.json", "/docs"):
            for headers, code in (({}, "missing_token"), ({"X-Sheratan-Token": "wrong"}, "invalid_token")):
                status, body, _ = await here.ask(plane, "GET", path, headers=headers)
                assert (status, body["code"]) == (403, code)
            for token in (TOKEN, made["token"]):
                assert (await here.ask(plane, "GET", path, headers={"X-Sheratan-Token": token}))[0] == 200


# The page


class Reader(HTMLParser):
    """Everything that a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.inside: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, name: str, given: list[tuple[str, str | None]]) -> None:
        self.attributes += ((name, key, value or "") for key, value in given)
        if name not in ("meta", "input"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, text: str) -> None:
        if self.open:
            self.inside.setdefault(self.open[-1], []).append(text)


def shown(plane: str) -> str:
    return page.html(DOCUMENTS[plane], "http://127.0.0.1:1")


@pytest.mark.parametrize("plane", PLANES)
def test_the_page_has_nothing_from_elsewhere_and_fits_its_policy(plane: str) -> None:
    found = Reader(shown(plane))
    assert not found.open
    keys = {(name, key) for name, key, _ in found.attributes}
    assert not [key for _, key in keys if key.startswith("on") or key in ("style", "src", "action", "srcset")]
    assert {value for _, key, value in found.attributes if key == "href"} == {"/openapi.json"}
    allowed = dict(part.split(" ", 1) for part in GUARDS["Content-Security-Policy"].split("; "))
    assert allowed["default-src"] == "'none'"
    for name in ("style", "script"):
        (text,) = found.inside[name]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert allowed[f"{name}-src"] == f"'sha256-{digest}'"
        assert not re.search(r"https?:|url\(|@import|innerHTML|eval", text)
    assert "prefers-color-scheme: dark" in page.STYLE


@pytest.mark.parametrize("plane", PLANES)
def test_the_page_lists_every_route_with_what_goes_in_and_comes_out(plane: str) -> None:
    text = shown(plane)
    ids = re.findall(r'<details id="(\w+)"', text)
    assert ids == [
        told["operationId"]
        for one in DOCUMENTS[plane]["tags"]
        for _, _, told in operations(DOCUMENTS[plane])
        if told["tags"] == [one["name"]]
    ]
    pieces = dict(zip(ids, text.split("<details id=")[1:], strict=True))
    for where, route in SERVED:
        if where != plane:
            continue
        piece = pieces[openapi.operation_id(route.method, route.path)]
        assert ("Goes in" in piece) == (route.form is not None)
        assert "Comes out" in piece
        structs = [
            kind
            for kind in (*types(route.form), *shapes(route.answers), *shapes(route.made))
            if hasattr(kind, "__struct_fields__")
        ]
        for kind in structs:
            assert all(f"<code>{name}</code>" in piece for name in kind.__struct_fields__), (route.path, kind)


def test_whatever_stands_in_a_document_is_text_on_the_page() -> None:
    evil = "<img src=x onerror=alert(1)>\"'&</script>"
    document = json.loads(json.dumps(DOCUMENTS["data"]))
    spoil(document, evil)
    found = Reader(page.html(document, evil))
    assert not [one for one in found.attributes if one[0] == "img" or one[1].startswith("on")]
    assert len(found.inside["script"]) == 1


def spoil(node: Any, evil: str) -> None:
    """Put it behind every text that people read."""
    if isinstance(node, dict):
        for key, value in node.items():
            if isinstance(value, str) and key in ("summary", "description", "title", "version", "x-right", "example"):
                node[key] = f"{value} {evil} `{evil}`"
            else:
                spoil(value, evil)
    elif isinstance(node, list):
        for one in node:
            spoil(one, evil)


@pytest.mark.parametrize("plane", PLANES)
async def test_the_curl_lines_of_the_page_are_requests_that_the_hub_understands(
    make_site: MakeSite, plane: str
) -> None:
    site = await make_site()
    text = (await site.ask(plane, "GET", "/docs"))[1]
    lines = [
        re.sub(r"<[^>]+>", "", one) for one in re.findall(r'<div class="ask"><pre><code>(.*?)</code>', text, re.DOTALL)
    ]
    assert len(lines) == sum(where == plane for where, _ in SERVED)
    async with aiohttp.ClientSession() as plain:
        for line in lines:
            words = [one.replace("$SHERATAN_HUB_TOKEN", TOKEN) for one in shlex.split(html_text(line))]
            assert words.pop(0) == "curl"
            method, headers, body, url = "", {}, None, ""
            while words:
                word = words.pop(0)
                if word == "-X":
                    method = words.pop(0)
                elif word == "-H":
                    name, _, value = words.pop(0).partition(": ")
                    headers[name] = value
                elif word == "-d":
                    body = words.pop(0)
                else:
                    url = word
            assert url.startswith(site.url(plane, "/"))
            method = method or ("GET" if body is None else "POST")
            async with plain.request(
                method, url.replace("wait_seconds", "_"), data=quick(body), headers=headers
            ) as answer:
                told = await answer.text(errors="replace")
            fine = answer.status in (200, 201, 404, 409) or "policy" in url
            assert fine, (line, told)
            assert answer.status != 404 or json.loads(told)["code"] != "unknown_path", line


def quick(body: str | None) -> str | None:
    return body and body.replace('"wait_seconds": 20', '"wait_seconds": 0')


def html_text(text: str) -> str:
    import html

    return html.unescape(text)
