"""The handlers of tokens: how the shared one stands, its rotation, scoped ones. A value is shown once, an id always."""

from __future__ import annotations

from typing import Any

from sheratan_hub.clock import rfc3339
from sheratan_hub.keyring import Holder
from sheratan_hub.rules.access import Access, Admit, Revoke, access_of
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.rules.tokens import Abandon, Ring, Rotate, Slot, token_id
from sheratan_hub.token_uses import LastUse, last_uses, users_of
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.plane import Call
from sheratan_hub.web.query import cursor, page_limit
from sheratan_hub.web.render import listed, reply

RETIRED_SHOWN = 20
NO_STORE = {"Cache-Control": "no-store"}


async def status(call: Call) -> Answer:
    """GET /api/tokens: which token is active or next, until when, and which node last used which."""
    keyring = call.services.tokens.keyring
    ring = _ring(call)
    uses = await last_uses(call.hub, keyring)
    retired = [
        {"id": token_id(one.digest), "retired_at": rfc3339(one.at), "successor": one.successor}
        for one in keyring.retired[:RETIRED_SHOWN]
    ]
    return reply(
        {
            "ok": True,
            **_shown(ring),
            "retired": retired,
            "nodes": {node_id: _use(use) for node_id, use in uses.items()},
            "locked_out": users_of(ring.active.id, uses) if ring.next else [],
        }
    )


def _use(use: LastUse) -> dict[str, Any]:
    return {"token_id": use.token_id, "at": rfc3339(use.at), "status": use.state}


async def rotate(call: Call) -> Answer:
    """POST /api/tokens/rotation: begin a rotation. A token that the hub makes is in this answer and never again."""
    form, keyring = call.form, call.services.tokens.keyring
    until, in_ms = form.deadline_ms()
    value = form.token or _new_value(call, "shn")
    holder = keyring.find(value)
    if holder is not None and holder.slot == "access":
        raise Refused(Code.INVALID_FIELD, "this token is a scoped one - at `$.token`")
    ring, again = await call.hub.execute(Rotate(keyring.digest(value).hex(), until, in_ms), call.origin)
    shown = {} if form.token else {"token": value}
    answer = reply({"ok": True, **_shown(ring), **shown}, 200 if again else 201)
    answer.more.update(NO_STORE)
    return answer


async def abandon(call: Call) -> Answer:
    """DELETE /api/tokens/rotation: abandon the rotation; `locked_out` are the nodes that used it."""
    uses = await last_uses(call.hub, call.services.tokens.keyring)
    before = _ring(call)
    ring: Ring = await call.hub.execute(Abandon(), call.origin)
    dropped = before.next.id if before.next else None
    late = sorted(node_id for node_id, use in uses.items() if dropped and use.token_id == dropped)
    return reply({"ok": True, **_shown(ring), "locked_out": late})


async def listing(call: Call) -> Answer:
    """GET /api/access: the scoped tokens by cursor, never their values."""
    page = await call.hub.page("access", (), cursor(call.request), page_limit(call.request))
    return listed("access", (_access(call, access_of(row)) for row in page.rows), page.next)


async def create(call: Call) -> Answer:
    """POST /api/access: make a scoped token. Its value is in the answer, and nowhere else ever again."""
    form = call.form
    value = _new_value(call, f"shn_{form.role}")
    made: Access = await call.hub.execute(
        Admit(
            f"a-{call.services.clock.job_id()}",
            call.services.tokens.keyring.digest(value).hex(),
            form.role,
            round((form.expires_in_seconds or 0) * 1000),
            form.node_id,
            form.name,
        ),
        call.origin,
    )
    answer = reply({"ok": True, **_access(call, made), "token": value}, 201)
    answer.more.update(NO_STORE)
    return answer


async def revoke(call: Call) -> Answer:
    """DELETE /api/access/{id}: revoke a scoped token; it is refused from now on."""
    gone: Access = await call.hub.execute(Revoke(call.params["id"]), call.origin)
    return reply({"ok": True, "access_id": gone.id})


def retiring(holder: Holder) -> dict[str, Any]:
    """What a heartbeat is told about the token that it came with."""
    old = holder.slot == "old"
    return {"retiring": old, "until": rfc3339(holder.until) if old and holder.until else None}


def _new_value(call: Call, prefix: str) -> str:
    """256 random bits behind a prefix that scanners of leaked secrets can look for."""
    return f"{prefix}_{call.services.clock.secret()}{call.services.clock.secret()}"


def _ring(call: Call) -> Ring:
    ring = call.services.tokens.keyring.ring
    if ring is None:
        raise Refused(Code.UNAVAILABLE, "the tokens are not loaded yet", retry_after_ms=2000)
    return ring


def _shown(ring: Ring) -> dict[str, Any]:
    return {
        "active": _slot(ring.active),
        "next": _slot(ring.next),
        "until": rfc3339(ring.until) if ring.next and ring.until else None,
    }


def _slot(slot: Slot | None) -> dict[str, Any] | None:
    return None if slot is None else {"id": slot.id, "since": rfc3339(slot.since)}


def _access(call: Call, access: Access) -> dict[str, Any]:
    expires_at = access.expires_at
    return {
        "access_id": access.id,
        "role": access.role,
        "node_id": access.node_id,
        "name": access.name,
        "created_at": rfc3339(access.created_at),
        "expires_at": rfc3339(expires_at) if expires_at else None,
        "expired": 0 < expires_at <= call.services.clock.now(),
    }
