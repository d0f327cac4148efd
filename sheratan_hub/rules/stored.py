"""What each kind of row holds: how it is read, and which of the store's fields it must have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from sheratan_hub.rules.access import Access
from sheratan_hub.rules.attempts import Tried
from sheratan_hub.rules.edges import ALWAYS, failed_of, waiting_of
from sheratan_hub.rules.evidence import Evidence
from sheratan_hub.rules.jobs import PRUNE, Job
from sheratan_hub.rules.limits import RATES, Rates, Taken
from sheratan_hub.rules.missions import Mission, MissionKey
from sheratan_hub.rules.nodes import Node
from sheratan_hub.rules.pauses import PAUSES, Pauses
from sheratan_hub.rules.policies import Pointer, Snapshot, version_id
from sheratan_hub.rules.pull import Pulls
from sheratan_hub.rules.silence import Fleet
from sheratan_hub.rules.submit import KeyDoc
from sheratan_hub.rules.tokens import SALT, Retired, Ring
from sheratan_hub.storage import Key, Row

Read = Callable[[bytes], Any]


def _text(doc: bytes) -> str:
    return doc.decode()


READERS: dict[str, Read] = {
    "job": msgspec.json.Decoder(Job).decode,
    "params": msgspec.json.Decoder(msgspec.Raw).decode,
    "attempts": msgspec.json.Decoder(tuple[Tried, ...]).decode,
    "late": msgspec.json.Decoder(Evidence).decode,
    "read": _text,
    "key": msgspec.json.Decoder(KeyDoc).decode,
    "edge": _text,
    "link": msgspec.json.Decoder(list[str]).decode,
    "resume": _text,
    "mission": msgspec.json.Decoder(Mission).decode,
    "mission_key": msgspec.json.Decoder(MissionKey).decode,
    "node": msgspec.json.Decoder(Node).decode,
    "puller": msgspec.json.Decoder(Pulls).decode,
    "submits": msgspec.json.Decoder(Taken).decode,
    "fleet": msgspec.json.Decoder(Fleet).decode,
    "policy": msgspec.json.Decoder(Snapshot).decode,
    "policy-active": msgspec.json.Decoder(Pointer).decode,
    "retired": msgspec.json.Decoder(Retired).decode,
    "access": msgspec.json.Decoder(Access).decode,
}
"""How the document of a kind is read; `token` and `standing` have several forms, see `read`."""

SINGLE: dict[Key, Read] = {
    PAUSES: msgspec.json.Decoder(Pauses).decode,
    RATES: msgspec.json.Decoder(Rates).decode,
    SALT: _text,
}
"""Rows of which there is one, where its kind has others of another form."""

_ring = msgspec.json.Decoder(Ring).decode


def is_known(kind: str) -> bool:
    """Whether this version has rows of this kind."""
    return kind in READERS or kind in ("token", "standing")


def read(row: Row) -> Any:
    """The document in a row. Raises ValueError (`msgspec.DecodeError`, `UnicodeDecodeError`) if it is none."""
    if row.kind in READERS:
        return READERS[row.kind](row.doc)
    if row.kind == "token" and row.key != SALT:
        return _ring(row.doc)
    return SINGLE.get(row.key, _text)(row.doc)


def name_in(row: Row, doc: Any) -> str:
    """The id that the document itself says."""
    if isinstance(doc, Job | Node | Mission | Access):
        return doc.id
    if isinstance(doc, Snapshot):
        return version_id(doc.version)
    return doc.digest if isinstance(doc, Retired) else row.id


def as_it_should(row: Row, doc: Any) -> Row:
    """The row with the fields that its document asks for: labels, lane and order, agenda and time."""
    if isinstance(doc, Job):
        right = doc.row
        if right.agenda is not None and right.agenda == row.agenda and right.agenda in PRUNE.values():
            right = _with(right, due_at=row.due_at)  # it may have been put off, as something needed it
        return _with(right, doc=row.doc)
    if isinstance(doc, Mission):
        return _with(doc.row, doc=row.doc, due_at=max(row.due_at, doc.row.due_at))  # put off for its key, perhaps
    if isinstance(doc, Node):
        return _with(doc.row(row.due_at if row.agenda is not None else None), doc=row.doc)
    if isinstance(doc, Access | Ring | Retired):
        return _with(doc.row, doc=row.doc)
    if row.kind == "edge":
        parent, child = ends_of(row)
        agenda = failed_of(parent) if row.agenda == failed_of(parent) else waiting_of(parent)
        return Row("edge", row.id, row.doc, (None, None, None, None, child), agenda=agenda, due_at=ALWAYS)
    if row.kind in ("link", "resume"):
        return Row(row.kind, row.id, row.doc, agenda=row.kind, due_at=row.due_at)
    if row.key == PAUSES:
        return Row(*row.key, row.doc, agenda=row.agenda, due_at=row.due_at)
    return Row(row.kind, row.id, row.doc)


def ends_of(edge: Row) -> tuple[str, str]:
    """The ids of an edge's parent and child."""
    parent, _, child = edge.id.rpartition("/")
    return parent, child


def child_of_link(link: Row) -> str:
    """The id of the job that is yet to be linked to more parents."""
    return link.id.rpartition("/")[0]


def _with(row: Row, **changes: Any) -> Row:
    return msgspec.structs.replace(row, **changes)
