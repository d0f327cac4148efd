"""Which node a request speaks for; and that a node's own token speaks for that node only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from sheratan_hub.keyring import Holder
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.rules.jobs import job_key, job_of
from sheratan_hub.web.forms import BeatForm

if TYPE_CHECKING:
    from sheratan_hub.web.plane import Call


class _Entry(msgspec.Struct):
    """What tells whose result an entry of a batch is."""

    job_id: str = ""
    lease_id: str | None = None
    node_id: str | None = None


def speaks_for(call: Call) -> str | None:
    """The node that a request of a node names first, None if it names none."""
    return next(_named(call), None)


def _named(call: Call) -> Iterator[str]:
    """Every node that the request names: in its path, its query, its body, a pull inside it, entries of a batch."""
    form = call.form
    if isinstance(form, tuple):
        form = form[0]
    if isinstance(form, BeatForm):
        name = form.node_id or form.host_id or form.host or form.name
        if name:
            yield name
        return
    query = call.request.query if call.request.query_string else {}
    pull = getattr(form, "pull", None)
    names = [
        call.params.get("node_id"),
        getattr(form, "node_id", None),
        query.get("node_id"),
        query.get("host_id"),
        getattr(pull, "node_id", None),
        *(entry.node_id for entry in _entries(form)),
    ]
    yield from (name for name in names if isinstance(name, str) and name)


def _entries(form: Any) -> list[_Entry]:
    found = []
    for raw in getattr(form, "results", ()):
        try:
            found.append(msgspec.json.decode(raw, type=_Entry))
        except msgspec.DecodeError:
            continue  # its own refusal stands in its place in the answer
    return found


async def bind(call: Call, holder: Holder) -> None:
    """Refused with `forbidden_node` when the request names, or touches a lease of, another node than the token's.

    A body that may name its node and does not is taken to name the token's, so that the rules hold it to that.
    """
    for name in _named(call):
        if name != holder.node_id:
            raise _forbidden(holder, f"this token is for the node {holder.node_id} only, not for {name[:200]}")
    if not getattr(call.form, "node_id", holder.node_id):
        call.form = msgspec.structs.replace(call.form, node_id=holder.node_id)
    leases = _leases(call)
    if not leases:
        return
    keys = list({job_key(job_id) for job_id, _ in leases})
    jobs = {row.id: job_of(row) for row in await call.hub.fetch(keys)}
    for job_id, lease_id in leases:
        job = jobs.get(job_id)
        current = job is not None and (lease_id is None or job.lease_id == lease_id)
        if job is not None and current and job.node_id not in (None, holder.node_id):
            raise _forbidden(holder, f"job {job_id} is not held by the node {holder.node_id}, for which this token is")


def _leases(call: Call) -> list[tuple[str, str | None]]:
    """The leases that the request is about, each with its job."""
    form = call.form
    if "id" in call.params:
        return [(call.params["id"], getattr(form, "lease_id", None))]
    if hasattr(form, "job_id"):
        return [(form.job_id, getattr(form, "lease_id", None))]
    return [(entry.job_id, entry.lease_id) for entry in _entries(form) if entry.job_id]


def _forbidden(holder: Holder, text: str) -> Refused:
    detail = {"access_id": holder.id, "for_node": holder.node_id or ""}
    return Refused(Code.FORBIDDEN_NODE, text, reason="invalid_token", detail=detail)
