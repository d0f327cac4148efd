"""The page for people: an OpenAPI document as HTML, with its own style and small script and nothing from elsewhere.

Whatever stands in the document is text here: only `tag` writes markup, and it escapes all but other tags.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

Doc = Mapping[str, Any]


class Html(str):
    """Markup, as `tag` made it."""

    __slots__ = ()


def tag(name: str, *inside: str | None, **attributes: str) -> Html:
    """An element. What is not `Html` inside, and every attribute, is escaped; `class_` is `class`; None is left out."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    body = "".join(one if isinstance(one, Html) else escape(one, quote=False) for one in inside if one is not None)
    return Html(f"<{name}{given}>{body}</{name}>")


def html(document: Doc, origin: str) -> str:
    """The page; `origin` stands in the examples where no script runs, else the address that the page came from."""
    found = [(path, method, told) for path, item in document["paths"].items() for method, told in item.items()]
    groups = [
        tag(
            "section",
            tag("h2", one["name"]),
            *(_route(document, origin, *it) for it in found if it[2]["tags"] == [one["name"]]),
        )
        for one in document["tags"]
    ]
    head = tag(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        tag("title", document["info"]["title"]),
        tag("style", Html(STYLE)),
    )
    body = tag("body", _top(document), tag("main", *groups), tag("script", Html(SCRIPT)))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _top(document: Doc) -> Html:
    info = document["info"]
    themes = (
        tag("option", "as the system", value=""),
        tag("option", "light", value="light"),
        tag("option", "dark", value="dark"),
    )
    return tag(
        "header",
        tag("h1", info["title"], " ", tag("small", info["version"])),
        *(tag("p", *_marked(text)) for text in info["description"].split("\n\n")),
        tag("p", "For programs: ", tag("a", "/openapi.json", href="/openapi.json")),
        tag(
            "p",
            tag(
                "label",
                "Show ",
                Html('<input id="filter" type="search" placeholder="path or word" autocomplete="off">'),
            ),
            " ",
            tag("label", "Colours ", tag("select", *themes, id="theme")),
            class_="tools",
        ),
    )


def _route(document: Doc, origin: str, path: str, method: str, told: Doc) -> Html:
    badges = [tag("span", told["x-right"], class_="right", title="the right it needs")]
    if told["x-fleet"]:
        badges.append(tag("span", "fleet", class_="fleet", title="spoken by deployed fleets"))
    head = tag(
        "summary",
        tag("span", method.upper(), class_=f"method {method}"),
        " ",
        tag("code", path),
        " ",
        tag("span", *_marked(told["summary"]), class_="says"),
        " ",
        *badges,
    )
    return tag(
        "details",
        head,
        *(tag("p", *_marked(text)) for text in told["description"].split("\n\n")),
        _parameters(told),
        _goes_in(document, told),
        _comes_out(document, told),
        _refusals(document, told),
        tag("h3", "Ask"),
        _copyable(*_curl(origin, path, method, told)),
        id=told["operationId"],
    )


def _marked(text: str) -> Iterator[str]:
    """Text whose backticks are code."""
    for place, piece in enumerate(text.split("`")):
        yield tag("code", piece) if place % 2 else piece


def _table(*heads: str, rows: list[Html]) -> Html | None:
    if not rows:
        return None
    return tag("table", tag("thead", tag("tr", *(tag("th", head) for head in heads))), tag("tbody", *rows))


def _parameters(told: Doc) -> Html | None:
    rows = [
        tag(
            "tr",
            tag("td", tag("code", one["name"])),
            tag("td", one["in"]),
            tag("td", _kind(one["schema"]), "" if not one.get("required") else ", needed"),
            tag("td", *_marked(one.get("description", ""))),
        )
        for one in told["parameters"]
    ]
    return _table("parameter", "in", "what", "", rows=rows)


def _goes_in(document: Doc, told: Doc) -> Html | None:
    if "requestBody" not in told:
        return None
    content = told["requestBody"]["content"]["application/json"]
    needed = "" if told["requestBody"]["required"] else " (may be left out)"
    examples = (_pretty(one["value"]) for one in content["examples"].values())
    return tag("div", tag("h3", "Goes in", needed), *_fields(document, content["schema"], "needed"), *examples)


def _comes_out(document: Doc, told: Doc) -> Html:
    parts: list[Html] = []
    for status, answer in told["responses"].items():
        if "$ref" in answer:
            continue
        for kind, content in answer.get("content", {"": {}}).items():
            parts.append(tag("h3", f"Comes out: {status} {kind}".rstrip()))
            parts += _fields(document, content.get("schema", {}), "always")
            if "example" in content:
                parts.append(_pretty(content["example"]))
    return tag("div", *parts)


def _fields(document: Doc, schema: Doc, always: str) -> Iterator[Html]:
    """A table of the fields of each struct that the schema names."""
    for one in schema.get("anyOf", [schema]):
        if "$ref" not in one:
            continue
        struct = _found(document, one)
        rows = [
            tag(
                "tr",
                tag("td", tag("code", name)),
                tag("td", _kind(field)),
                tag("td", always if name in struct["required"] else _default(field)),
            )
            for name, field in struct["properties"].items()
        ]
        yield tag("p", *_marked(struct.get("description", "")))
        table = _table("field", "what", "", rows=rows)
        if table is not None:
            yield table


def _default(field: Doc) -> str:
    return f"default {json.dumps(field['default'])}" if "default" in field else "at times"


def _refusals(document: Doc, told: Doc) -> Html:
    rows = []
    for status, answer in told["responses"].items():
        if "$ref" not in answer:
            continue
        content = _found(document, answer)["content"]["application/problem+json"]
        for code in content["schema"]["properties"]["code"]["enum"]:
            meaning = document["components"]["examples"][code]["summary"]
            rows.append(tag("tr", tag("td", status), tag("td", tag("code", code)), tag("td", *_marked(meaning))))
    table = _table("status", "code", "", rows=rows)
    return tag("details", tag("summary", "Refusals"), table, class_="refusals")


def _found(document: Doc, ref: Doc) -> Doc:
    _, _, place, name = ref["$ref"].split("/")
    found: Doc = document["components"][place][name]
    return found


def _kind(schema: Doc) -> str:
    """A schema in a few words: `integer, 1 to 100`."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_kind, schema["anyOf"])))
    if "enum" in schema:
        return ", ".join(str(value) or "nothing" for value in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    kind = str(schema.get("type", "any JSON"))
    if kind == "array":
        return f"list{_range(schema, 'minItems', 'maxItems', ' of ')} [{_kind(schema.get('items', {}))}]"
    if kind == "string":
        form = (
            f" as {schema['format']}"
            if "format" in schema
            else f" like {schema['pattern']}"
            if "pattern" in schema
            else ""
        )
        return f"text{_range(schema, 'minLength', 'maxLength', ' of ')}{form}"
    above = f", above {schema['exclusiveMinimum']}" if "exclusiveMinimum" in schema else ""
    return f"{kind}{above}{_range(schema, 'minimum', 'maximum', ', ')}"


def _range(schema: Doc, least: str, most: str, before: str) -> str:
    """` of 1 to 200`, ` of up to 200`, ` of at least 1`, or nothing."""
    if most in schema:
        start = f"{schema[least]} to" if least in schema else "up to"
        return f"{before}{start} {schema[most]}"
    return f"{before}at least {schema[least]}" if least in schema else ""


def _pretty(value: Any) -> Html:
    return tag("pre", tag("code", json.dumps(value, indent=2, ensure_ascii=False)))


def _curl(origin: str, path: str, method: str, told: Doc) -> Iterator[str]:
    """The words of a curl command; the origin is one of its own, which the script puts right."""
    yield "curl"
    body = next(iter(_bodies(told)), None)
    if method not in ("get", "post") or (method == "post" and body is None):
        yield f" -X {method.upper()}"
    if told["security"] and {} not in told["security"]:
        yield ' -H "Authorization: Bearer $SHERATAN_HUB_TOKEN"'
    query = []
    for one in told["parameters"]:
        if "example" not in one:
            continue
        if one["in"] == "path":
            path = path.replace(f"{{{one['name']}}}", quote(one["example"]))
        elif one["in"] == "query":
            query.append(f"{one['name']}={quote(str(one['example']))}")
        else:
            yield " -H " + shlex.quote(f"{one['name']}: {one['example']}")
    if body is not None:
        yield f" -d {shlex.quote(json.dumps(body))}"
    target = "?".join([path, "&".join(query)]) if query else path
    yield " "
    yield tag("span", origin, class_="origin")
    yield target if re.fullmatch(r"[\w/.-]*", target) else shlex.quote(target)


def _bodies(told: Doc) -> Iterator[Any]:
    if "requestBody" in told:
        yield from (one["value"] for one in told["requestBody"]["content"]["application/json"]["examples"].values())


def _copyable(*words: str) -> Html:
    return tag("div", tag("pre", tag("code", *words)), tag("button", "copy", type="button", hidden=""), class_="ask")


STATIC = Path(__file__).with_name("static")
STYLE = (STATIC / "docs.css").read_text()

SCRIPT = (STATIC / "docs.js").read_text()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = "; ".join(
    (
        "default-src 'none'",
        f"style-src {_hash(STYLE)}",
        f"script-src {_hash(SCRIPT)}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""What the page is sent with as Content-Security-Policy: its own style and script by their hashes, nothing else."""
