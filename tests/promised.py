"""Holds the answers that tests get to the OpenAPI document: its status, media type, code and fields, and no others.

So a handler that answers what its route does not say fails every test that asks it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import jsonschema_rs

from sheratan_hub.config import Settings
from sheratan_hub.web.openapi import openapi
from sheratan_hub.web.plane import Table
from sheratan_hub.web.routes import ROUTES

EITHER = {429: 503, 503: 429}
"""`queue_full` may be configured to be the other one."""


def check(plane: str, method: str, path: str, status: int, headers: Mapping[str, str], body: Any) -> None:
    """Raises AssertionError when a route of this plane answers what the document does not say."""
    methods, _ = _table(plane).find(path.partition("?")[0])
    route = methods.get("GET" if method == "HEAD" else method)
    if route is None or (route.acts and method == "HEAD"):
        return
    told = _document(plane)["paths"][route.path][route.method.lower()]["responses"]
    where = f"{method} {route.path} on the {plane} plane"
    kind = headers.get("Content-Type", "").partition(";")[0]
    if method != "HEAD" and status != 304 and kind.endswith("json"):
        found = [one for one in (status, EITHER.get(status)) if str(one) in told]
        assert found, f"{where} answers {status}, which it does not say: {body}"
        errors = [_said(plane, route.path, route.method.lower(), str(one), kind, body) for one in found]
        assert None in errors, f"{where} answers {status} otherwise than it says: {errors}: {str(body)[:500]}"
    else:
        assert str(status) in told, f"{where} answers {status}, which it does not say"


def _said(plane: str, path: str, method: str, status: str, kind: str, body: Any) -> str | None:
    """What is wrong with the body, None if nothing."""
    validator = _validator(plane, path, method, status, kind)
    if validator is None:
        return f"it does not say {kind}"
    error = next(validator.iter_errors(body), None)
    return None if error is None else f"{list(error.instance_path)}: {error.message[:300]}"


@cache
def _table(plane: str) -> Table:
    return Table(route for route in ROUTES if route.plane in (plane, "both"))


@cache
def _document(plane: str) -> dict[str, Any]:
    """The document, whose answers have no other fields than it names."""
    document: dict[str, Any] = json.loads(json.dumps(openapi(plane, ROUTES, Settings())))
    for schema in document["components"]["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return document


@cache
def _validator(plane: str, path: str, method: str, status: str, kind: str) -> Any:
    document = _document(plane)
    answer = document["paths"][path][method]["responses"][status]
    if "$ref" in answer:
        answer = document["components"]["responses"][answer["$ref"].rpartition("/")[2]]
    if kind not in answer.get("content", {}):
        return None
    schema = copy.deepcopy(answer["content"][kind]["schema"])
    return jsonschema_rs.validator_for({**schema, "components": document["components"]})
