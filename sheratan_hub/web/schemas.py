"""The types of the route table as JSON Schema: what goes in as it is validated, what comes out as it is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from sheratan_hub.canonical import Raw
from sheratan_hub.config import Settings
from sheratan_hub.web import forms
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


def schemas_of(routes: list[Route], settings: Settings) -> Doc:
    """The components: what goes in as it is validated, what comes out with all that is always there marked so."""
    going_in = [kind for route in routes for kind in types(route.form)]
    held = [entry for kind, (_, entry) in ENTRIES.items() if kind in going_in]
    told = [one for route in routes for shape in (route.answers, route.made) for one in shapes(shape)]
    coming_out = [kind for kind in dict.fromkeys([*told, *NAMED, Problem]) if is_struct(kind)]
    schemas = _components(coming_out)
    omitting = {kind.__name__ for kind in coming_out if kind.__struct_config__.omit_defaults}
    for name, schema in schemas.items():
        _as_answered(schema, name in omitting)
    schemas |= _components([*going_in, *held])
    for kind, (field, entry) in ENTRIES.items():
        if kind in going_in:
            entries = {"items": {"anyOf": [ref(entry), {}]}, "maxItems": settings.limits.batch_jobs}
            schemas[kind.__name__]["properties"][field] |= entries
    for schema in schemas.values():
        schema.pop("title", None)
    return dict(sorted(schemas.items()))


def _components(kinds: Iterable[Any]) -> Doc:
    return msgspec.json.schema_components(map(_without_raw, dict.fromkeys(kinds)), ref_template=REF)[1]


def _as_answered(schema: Doc, omits: bool) -> None:
    """Fields with a default are always told, unless those with their default are left out."""
    given = schema.get("properties", {})
    if not omits:
        schema["required"] = [name for name in given if name in schema["required"] or "default" in given[name]]
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
