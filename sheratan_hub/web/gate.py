"""Lets a request pass or not, by its token: the route's right, and what a token is held to once the body is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sheratan_hub.rules.access import TOKEN_RIGHTS, Right
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.rules.policies import refuse_denied
from sheratan_hub.rules.policy import Ask
from sheratan_hub.web.binding import bind, speaks_for

if TYPE_CHECKING:
    from sheratan_hub.web.plane import Call

TOKEN_REFUSALS = frozenset({Code.MISSING_TOKEN, Code.INVALID_TOKEN, Code.OLD_TOKEN, Code.EXPIRED_TOKEN})
"""The refusals that are slowed down for an address that keeps earning them."""

SLOTS = {"active": "active", "old": "active", "next": "next", "access": "access", "anybody": "active"}
"""As which slot each kind of holder is counted; `retired` never gets that far."""


def authorize(call: Call, right: Right) -> None:
    """The right that the route asks for. A token comes before loopback, so that strangers learn nothing."""
    services = call.services
    if _asks_for_token(call, right):
        try:
            call.holder = holder = services.tokens.check(call.request.headers, right)
        except Refused as no:
            if no.code is Code.OLD_TOKEN:
                call.report("token.retired_used")
            raise
        services.metrics.accepted(SLOTS[holder.slot])
    if right == "admin":
        judge = call.hub.judge
        if judge.policy.gates.admin_from_loopback and not call.is_local:
            raise Refused(Code.LOOPBACK_ONLY, "this is answered to the hub's own machine only")
        refuse_denied(judge, Ask("admin"))
    if right == "local" and call.plane == "data" and not call.is_local:
        raise Refused(Code.LOOPBACK_ONLY, "on the data plane this is answered to this machine only")


def _asks_for_token(call: Call, right: Right) -> bool:
    if right == "metrics":
        return call.settings.metrics.require_token
    return right in TOKEN_RIGHTS or (right == "docs" and not call.is_local)


def patience_ms(call: Call, wait_ms: int) -> int:
    """How long a request may wait: no longer than its token lasts."""
    ends_at = call.holder.ends_at
    return min(wait_ms, max(0, ends_at - call.services.clock.now())) if ends_at else wait_ms


def holds_still(call: Call) -> bool:
    """Whether the request's token is still in force."""
    return call.services.tokens.good(call.request.headers)


def refuse_revoked(call: Call) -> None:
    """Refused when the token was taken back while the request waited. One whose time has run out was good till then."""
    try:
        call.services.tokens.check(call.request.headers, None)
    except Refused as no:
        if no.code is Code.INVALID_TOKEN:
            raise


async def hold(call: Call) -> None:
    """A node's token is held to its node; while a rotation is under way, who uses which token is noted."""
    holder = call.holder
    if holder.node_id is not None:
        await bind(call, holder)
    elif holder.slot in ("next", "old"):
        node_id = speaks_for(call)
        if node_id is not None:
            call.services.tokens.keyring.used(node_id, holder)
        call.report(f"token.accepted_{holder.slot}", node_id, token_id=holder.id)
