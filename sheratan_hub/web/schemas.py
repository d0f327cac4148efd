"""The types of the route table as JSON Schema: what goes in as it is validated, what comes out as it is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args

import msgspec
from msgspec import UnsetType

from sheratan_hub.canonical import Raw
from sheratan_hub.config import Settings
from sheratan_hub.web import admin_forms, forms, nodes, standing_forms
from sheratan_hub.web.answers import NAMED, Problem

if TYPE_CHECKING:
    from sheratan_hub.web.plane import Route

Doc = dict[str, Any]

REF = "#/components/schemas/{name}"

ENTRIES: dict[type, tuple[str, type]] = {
    forms.BatchForm: ("jobs", forms.JobForm),
    forms.MissionForm: ("jobs", forms.JobForm),
    forms.ResultsForm: ("results", forms.NamedReportForm),
}
"""Lists whose entries are read one by one, so that a wrong one is refused in its place: field, and what it holds."""


def _given(*names: str) -> list[Doc]:
    return [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in names]


def _not_both(one: str, other: str) -> Doc:
    return {"not": {"allOf": _given(one, other)}}


TOGETHER: dict[type, Doc] = {
    forms.BeatForm: {
        "anyOf": [
            {"required": [name], "properties": {name: {"type": "string", "minLength": 1}}}
            for name in ("node_id", "host_id", "host", "name")
        ]
    },
    forms.RotationForm: {"oneOf": _given("until", "seconds")},
    forms.AccessForm: {
        "if": {"properties": {"role": {"const": "node"}}},
        "then": _given("node_id")[0],
        "else": {"properties": {"node_id": {"type": "null"}}},
    },
    forms.PlanForm: {"oneOf": _given("policy", "version")},
    forms.ResultForm: _given("lease_id")[0],
    forms.NamedReportForm: _given("lease_id")[0],
    nodes.DrainForm: _not_both("seconds", "until"),
    standing_forms.PauseForm: _not_both("seconds", "until"),
    admin_forms.RedriveManyForm: {"oneOf": _given("job_ids", "filter")},
    admin_forms.CancelManyForm: {"oneOf": _given("job_ids", "filter")},
}
"""What fields of a form ask of each other, which their types cannot say; else the handlers refuse: `invalid_field`."""


def schemas_of(routes: list[Route], settings: Settings) -> Doc:
    """The components: what goes in as it is validated, what comes out with all that is always there marked so."""
    going_in = [kind for route in routes for kind in types(route.form)]
    held = [entry for kind, (_, entry) in ENTRIES.items() if kind in going_in]
    told = [one for route in routes for shape in (route.answers, route.made) for one in shapes(shape)]
    coming_out = [kind for kind in dict.fromkeys([*told, *NAMED, Problem]) if is_struct(kind)]
    schemas = _components(coming_out)
    structs = {kind.__name__: kind for kind in coming_out}
    for name, schema in schemas.items():
        _as_answered(schema, structs.get(name))
    schemas |= _components([*going_in, *held])
    for kind, (field, entry) in ENTRIES.items():
        if kind in going_in:
            entries = {"items": {"anyOf": [ref(entry), {}]}, "maxItems": settings.limits.batch_jobs}
            schemas[kind.__name__]["properties"][field] |= entries
    for kind, together in TOGETHER.items():
        if kind.__name__ in schemas:
            schemas[kind.__name__]["allOf"] = [together]
    for schema in schemas.values():
        schema.pop("title", None)
    return dict(sorted(schemas.items()))


def _components(kinds: Iterable[Any]) -> Doc:
    return msgspec.json.schema_components(map(_without_raw, dict.fromkeys(kinds)), ref_template=REF)[1]


def _as_answered(schema: Doc, kind: Any) -> None:
    """All fields are always told, but those that may be unset, and in some structs those with their default."""
    given = schema.get("properties", {})
    if kind is None or not kind.__struct_config__.omit_defaults:
        schema["required"] = [name for name in given if name in schema["required"] or "default" in given[name]]
    if kind is not None:
        at_times = {one.encode_name for one in msgspec.structs.fields(kind) if UnsetType in get_args(one.type)}
        schema["required"] = [name for name in schema["required"] if name not in at_times]
    for one in given.values():
        one.pop("default", None)


def _without_raw(kind: Any) -> Any:
    """The struct with null in the place of a raw null as the default, which msgspec cannot show."""
    fields = msgspec.structs.fields(kind)
    if not any(isinstance(field.default, Raw) for field in fields):
        return kind
    return msgspec.defstruct(
        kind.__name__,
        [
            (field.encode_name, field.type)
            if field.required
            else (field.encode_name, field.type, None if isinstance(field.default, Raw) else field.default)
            for field in sorted(fields, key=lambda field: not field.required)
        ],
        namespace={"__doc__": kind.__doc__},
        forbid_unknown_fields=kind.__struct_config__.forbid_unknown_fields,
    )


def shapes(shape: Any) -> list[Any]:
    """The types of an answer, whatever its media type."""
    several = shape.values() if isinstance(shape, Mapping) else [shape]
    return [kind for one in several for kind in types(one)]


def types(shape: Any) -> list[Any]:
    """One type, or those of a union."""
    return [] if shape is None else list(get_args(shape)) if isinstance(shape, UnionType) else [shape]


def is_struct(kind: Any) -> bool:
    """Whether it has a schema of its own."""
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def ref(kind: type) -> Doc:
    """Where its schema stands."""
    return {"$ref": REF.format(name=kind.__name__)}
