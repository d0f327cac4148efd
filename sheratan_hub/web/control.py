"""The control plane's handlers: heartbeats, registry, nodes."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from sheratan_hub.config import Settings
from sheratan_hub.rules.attestation import Claim
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.rules.nodes import Beat, Beaten, Forget, node_of
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.body import decode
from sheratan_hub.web.forms import AttestationForm, BeatForm
from sheratan_hub.web.nodes import moment_ms, whole
from sheratan_hub.web.plane import Call
from sheratan_hub.web.query import cursor, page_limit
from sheratan_hub.web.render import listed, node_answer, reply
from sheratan_hub.web.tokens import retiring

LABELS_MAX = 50
_SECRET = re.compile("token|secret|passw|credential|private|api_?key", re.IGNORECASE)  # such a field is never kept


async def heartbeat(call: Call) -> Answer:
    """POST /api/hosts/heartbeat: record the node, tell it what to stop and when to come again."""
    form, labels = call.form
    node_id = form.node_id or form.host_id or form.host or form.name
    if not node_id:
        raise Refused(Code.INVALID_FIELD, "one of node_id, host_id, host or name must be given")
    done: Beaten = await call.hub.beats.take(_beat(call, node_id, form, labels), call.from_node(node_id))
    if done.denied is not None:
        raise done.denied
    return reply(
        {
            "ok": True,
            "node_id": node_id,
            "attestation_status": done.node.attested.status,
            "policy_version": call.hub.judge.version,
            "heartbeat_after_seconds": round(done.next_in_ms / 1000, 3),
            "cancel": done.cancel,
            "drain": done.node.draining,
            "token": retiring(call.holder),
        }
    )


def read_beat(
    body: bytes, doc: dict[str, Any], _settings: Settings
) -> tuple[BeatForm, dict[str, str | int | float | bool]]:
    """A heartbeat's form, and its other scalar fields as labels."""
    known = BeatForm.__struct_fields__
    others = {name: value for name, value in doc.items() if name not in known and not _SECRET.search(name)}
    scalars = {name[:100]: value for name, value in others.items() if isinstance(value, (str, int, float, bool))}
    labels = {name: value[:500] if isinstance(value, str) else value for name, value in scalars.items()}
    return decode(body, BeatForm), dict(list(labels.items())[:LABELS_MAX])


def _beat(call: Call, node_id: str, form: BeatForm, labels: dict[str, str | int | float | bool]) -> Beat:
    sent_at = form.ts_utc if form.ts_utc is not None else form.timestamp
    return Beat(
        node_id,
        form.health,
        form.status,
        form.zone,
        None if form.capabilities is None else tuple(sorted(set(form.capabilities))),
        form.current_jobs,
        form.max_concurrent,
        form.boot_id,
        form.endpoint,
        None if sent_at is None else str(sent_at)[:100],
        labels,
        None if form.attestation is None else _claim(form.attestation),
        None if sent_at is None else moment_ms(sent_at),
        call.services.clock.jitter(),
        call.holder.id or None,
    )


def _claim(form: AttestationForm) -> Claim | None:
    if form.build_id is None and form.capability_hash is None:
        return None
    runtime = (
        form.runtime if isinstance(form.runtime, str) or form.runtime is None else msgspec.json.encode(form.runtime)
    )
    text = runtime.decode() if isinstance(runtime, bytes) else runtime
    return Claim(form.build_id, form.capability_hash, None if text is None else text[:500])


async def registry(call: Call) -> Answer:
    """GET /api/registry: every node by id, and the active policy."""
    nodes: dict[str, Any] = {}
    after: str | None = None
    while True:
        page = await call.hub.page("node", (), after, 200)
        nodes |= {row.id: _node(call, row) for row in page.rows}
        if page.next is None:
            return reply({"ok": True, "nodes": nodes, "policy": pinned(call)})
        after = page.next
        await call.services.clock.sleep(0)


def pinned(call: Call) -> dict[str, Any]:
    """The active policy, as the registry shows it; version 0 is the one that allows all."""
    return {"version": call.hub.judge.version, "sha256": call.hub.judge.sha256 or None}


def _node(call: Call, row: Any) -> dict[str, Any]:
    node = node_of(row)
    return node_answer(node, call.hub.state_of(node))


async def hosts(call: Call) -> Answer:
    """GET /api/hosts: the nodes by cursor."""
    page = await call.hub.page("node", (), cursor(call.request), page_limit(call.request))
    return listed("nodes", (_node(call, row) for row in page.rows), page.next)


async def host(call: Call) -> Answer:
    """GET /api/hosts/{id}: one node, with its last attestations."""
    node = await call.hub.node(call.params["id"])
    if node is None:
        raise Refused(Code.NODE_NOT_FOUND, f"there is no node {call.params['id']}")
    return reply({"ok": True, **whole(call, node)})


async def forget(call: Call) -> Answer:
    """DELETE /api/hosts/{id}: forget a dead node."""
    await call.hub.execute(Forget(call.params["id"]), call.from_node(call.params["id"]))
    return reply({"ok": True, "node_id": call.params["id"]})
