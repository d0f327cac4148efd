"""The OpenAPI 3.1 document of one plane, made of the route table: its forms, answers, refusals and docstrings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from inspect import cleandoc
from typing import TYPE_CHECKING, Any

import msgspec

from sheratan_hub import __version__
from sheratan_hub.config import Settings
from sheratan_hub.rules.access import TOKEN_RIGHTS, Right
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.web import examples
from sheratan_hub.web.answer import JSON, PROBLEM
from sheratan_hub.web.codes import MEANINGS, codes_of
from sheratan_hub.web.errors import problem_body, status_of
from sheratan_hub.web.schemas import REF, Doc, is_struct, ref, schemas_of, types

if TYPE_CHECKING:
    from sheratan_hub.web.plane import Route

TAKEN: list[dict[str, list[str]]] = [{"bearer": []}, {"token": []}]
"""Either header will do."""

RIGHTS: dict[Right, str] = {
    "public": "Anybody may ask.",
    "local": "No token is needed; on the data plane this machine only.",
    "metrics": "No token is needed, unless `[metrics] require_token` says so.",
    "docs": "On this machine no token is needed; from elsewhere any token that is in force.",
    "token": "Needs the shared token, or one of the role admin.",
    "admin": "Needs the shared token, or one of the role admin, on this machine unless the active policy says more.",
    "work": "Needs a token whose role may do what nodes do.",
    "submit": "Needs a token whose role may hand jobs in.",
    "jobs": "Needs a token whose role may look at jobs.",
    "read": "Needs a token whose role may look at the rest.",
}

ABOUT = """\
Nodes check in on the control plane; work is handed in, handed out and taken back on the data plane. This is the {plane}
plane; a path of the other one is answered 410 `port_mismatch`, which names the right port.

Where GET is listed, HEAD works too, unless the GET leases. A successful answer carries `"ok": true`, any other is a
problem (RFC 9457): rely on its `code`. Answers may get further fields at any time. No Content-Type is needed."""

HEADERS: dict[str, Doc] = {
    "Idempotency-Key": {
        "description": "The same as `idempotency_key`, with which it must agree; not for a batch.",
        "schema": {"type": "string"},
    },
    "traceparent": {
        "description": "W3C Trace Context, kept with the job and given to its worker; another text is ignored.",
        "schema": {"type": "string"},
    },
    "If-Match": {
        "description": "The version that is active now, as an entity tag, or `*`.",
        "required": True,
        "schema": {"type": "string", "pattern": '^(\\*|"[0-9]{1,9}")$'},
        "example": '"3"',
    },
}
"""What a route may read from the headers."""

PLACES: dict[str, Doc] = {
    "id": {"type": "string", "minLength": 1},
    "node_id": {"type": "string", "minLength": 1, "maxLength": 200},
    "source": {"type": "string", "minLength": 1, "maxLength": 200},
    "version": {"type": "string", "pattern": "^[0-9]{1,9}$"},
}
"""What may stand in a path."""


def openapi(plane: str, routes: Iterable[Route], settings: Settings) -> Doc:
    """The document of the routes that this plane serves."""
    mine = [route for route in routes if route.plane in (plane, "both")]
    schemas = schemas_of(mine, settings)
    refusals = _Refusals(settings.queue.backpressure_mode)
    paths: dict[str, Doc] = {}
    for route in mine:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(
            route, plane, mine, refusals, settings, schemas
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"Sheratan Hub, {plane} plane",
            "version": __version__,
            "description": ABOUT.format(plane=plane),
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in dict.fromkeys(_tag(route) for route in mine)],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": refusals.told,
            "examples": refusals.examples,
            "headers": {
                "X-Request-ID": {"description": "The request's own id.", "schema": {"type": "string"}},
                "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}},
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "token": {"type": "apiKey", "in": "header", "name": "X-Sheratan-Token"},
            },
        },
    }


def _operation(
    route: Route, plane: str, mine: list[Route], refusals: _Refusals, settings: Settings, schemas: Mapping[str, Doc]
) -> Doc:
    summary, more = _docstring(route)
    told: Doc = {
        "operationId": operation_id(route.method, route.path),
        "summary": summary,
        "description": "\n\n".join(text for text in (more, RIGHTS[route.right]) if text),
        "tags": [_tag(route)],
        "parameters": list(_parameters(route)),
        "responses": {},
        "security": _security(route.right, settings),
        "x-right": route.right,
        "x-fleet": route.fleet,
    }
    if route.form is not None:
        told["requestBody"] = _body(route)
    for status, shape in ((200, route.answers), (201, route.made)):
        if shape is not None:
            told["responses"][str(status)] = _success(route, shape, status, mine, schemas)
    if route.right == "docs":
        told["responses"]["304"] = {"description": "`If-None-Match` names what it is still."}
    codes = codes_of(route, plane, shadowed=_shadowed(route, mine))
    told["responses"] |= refusals.of(codes)
    return told


def operation_id(method: str, path: str) -> str:
    """The name of a route in programs that are made of the document."""
    return "_".join([method.lower(), *re.findall(r"\w+", path)])


def _docstring(route: Route) -> tuple[str, str]:
    """(summary, the rest) of the handler's docstring, which begins with its route."""
    first, _, rest = cleandoc(route.handler.__doc__ or "").partition("\n")
    told = re.sub(r"^([A-Z]+ )?/\S+?(:|, |\.$)\s*", "", first)
    return told[:1].upper() + told[1:].rstrip("."), rest.strip()


def _tag(route: Route) -> str:
    """The noun of its path; `fleet` for the older routes, `hub` for what both planes have."""
    if route.plane == "both":
        return "hub"
    first, *others = route.path.strip("/").split("/")
    return others[0] if first == "api" else "fleet" if first in ("mesh", "registry") else first


def _security(right: Right, settings: Settings) -> list[Doc]:
    if right not in TOKEN_RIGHTS and right not in ("metrics", "docs"):
        return []
    optional = right == "docs" or (right == "metrics" and not settings.metrics.require_token)
    needed = [{name: [] if optional else [right] for name in one} for one in TAKEN]
    return [{}, *needed] if optional or not settings.auth.token_required else needed


def _parameters(route: Route) -> Iterator[Doc]:
    for noun, name in re.findall(r"([\w-]+)/{(\w+)}", route.path):
        told = {"schema": PLACES[name], "example": examples.PLACES[noun]}
        yield {"name": name, "in": "path", "required": True, **told}
    if route.query is not None:
        schema = msgspec.json.schema_components([route.query])[1][route.query.__name__]
        for name, told in schema["properties"].items():
            yield {"name": name, "in": "query", **_described(told)}
    for name in route.headers:
        yield {"name": name, "in": "header", **HEADERS[name]}
    if route.right == "docs":
        yield {"name": "If-None-Match", "in": "header", "schema": {"type": "string"}}


def _described(schema: Doc) -> Doc:
    """A parameter's schema, with its description beside it and without null, which no query can say."""
    told = {name: value for name, value in schema.items() if name not in ("description", "default", "anyOf")}
    several = [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]
    told |= several[0] if several else {}
    if schema.get("default") not in (None, ""):
        told["default"] = schema["default"]
    said = told.pop("description", None) or schema.get("description")
    more = {"description": said} if said else {}
    if "examples" in told:
        more["example"] = told.pop("examples")[0]
    return {**more, "schema": told}


def _body(route: Route) -> Doc:
    kinds = types(route.form)
    refs = [ref(kind) for kind in kinds]
    shown = {kind.__name__: {"value": examples.BODIES[kind]} for kind in kinds}
    content = {"schema": refs[0] if len(refs) == 1 else {"anyOf": refs}, "examples": shown}
    return {"required": not route.body_optional, "content": {JSON: content}}


def _success(route: Route, shape: Any, status: int, mine: list[Route], schemas: Mapping[str, Doc]) -> Doc:
    shapes = shape if isinstance(shape, Mapping) else {JSON: shape}
    told: Doc = {
        "description": "Made." if status == 201 else "Done.",
        "headers": {"X-Request-ID": {"$ref": "#/components/headers/X-Request-ID"}},
        "content": {kind: _content(one, schemas) for kind, one in shapes.items()},
    }
    links = dict(_links(route, mine))
    return {**told, "links": links} if links else told


def _content(shape: Any, schemas: Mapping[str, Doc]) -> Doc:
    if shape in (str, bytes):
        return {"schema": {"type": "string"}} if shape is str else {}
    kinds = types(shape)
    if not all(is_struct(kind) for kind in kinds):
        return {"schema": {"type": "object"}}
    refs = [ref(kind) for kind in kinds]
    told: Doc = {"schema": refs[0] if len(refs) == 1 else {"anyOf": refs}}
    if len(refs) == 1:
        return {**told, "example": examples.example(refs[0], schemas)}
    return {**told, "examples": {kind.__name__: {"value": examples.example(ref(kind), schemas)} for kind in kinds}}


def _links(route: Route, mine: list[Route]) -> Iterator[tuple[str, Doc]]:
    """Where the id of what was made leads to: every route of that thing."""
    found = re.fullmatch(r"(.*/){(.+)}", route.follow)
    if found is None:
        return
    prefix, pointer = found.groups()
    for other in mine:
        rest = other.path.removeprefix(prefix)
        name = re.match(r"{(\w+)}", rest)
        if rest != other.path and name is not None:
            target = operation_id(other.method, other.path)
            yield target, {"operationId": target, "parameters": {name[1]: f"$response.body#/{pointer}"}}


def _shadowed(route: Route, mine: list[Route]) -> bool:
    """Whether a literal path, which does not take this method, is also one of this route's."""
    pattern = re.compile(re.sub(r"{\w+}", "[^/]+", route.path))
    taken = {other.path for other in mine if other.method == route.method}
    return any("{" not in one.path and pattern.fullmatch(one.path) and one.path not in taken for one in mine)


class _Refusals:
    """The problems of all routes: one response for each set of codes with the same status."""

    def __init__(self, backpressure: int) -> None:
        self._backpressure = backpressure
        self.told: Doc = {}
        self._names: dict[tuple[Code, ...], str] = {}
        self.examples: Doc = {}

    def of(self, codes: Iterable[Code]) -> Doc:
        """The responses by status."""
        by_status: dict[int, list[Code]] = {}
        for code in codes:
            by_status.setdefault(status_of(code, self._backpressure), []).append(code)
        return {
            str(status): {"$ref": f"#/components/responses/{self._named(status, tuple(by_status[status]))}"}
            for status in sorted(by_status)
        }

    def _named(self, status: int, codes: tuple[Code, ...]) -> str:
        if codes not in self._names:
            count = sum(name.startswith(f"refused_{status}") for name in self.told)
            self._names[codes] = name = f"refused_{status}_{count + 1}"
            self.told[name] = self._response(status, codes)
        return self._names[codes]

    def _response(self, status: int, codes: tuple[Code, ...]) -> Doc:
        names = [code.value for code in codes]
        for code in codes:
            self.examples[code.value] = {"summary": MEANINGS[code], "value": self._example(code)}
        told: Doc = {
            "description": "\n".join(f"- `{code}`: {MEANINGS[code]}" for code in codes),
            "headers": {"X-Request-ID": {"$ref": "#/components/headers/X-Request-ID"}},
            "content": {
                PROBLEM: {
                    "schema": {"$ref": REF.format(name="Problem"), "properties": {"code": {"enum": names}}},
                    "examples": {name: {"$ref": f"#/components/examples/{name}"} for name in names},
                }
            },
        }
        if status in (429, 503):
            told["headers"]["Retry-After"] = {"$ref": "#/components/headers/Retry-After"}
        return told

    def _example(self, code: Code) -> Any:
        more = {"request_id": "6f1c0a9b2d3e-1a"} if code is Code.INTERNAL else {}
        return problem_body(Refused(code, MEANINGS[code]), self._backpressure, **more)
