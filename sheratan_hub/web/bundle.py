"""The control plane's handler that makes a diagnosis bundle."""

from __future__ import annotations

import asyncio
import os

from sheratan_hub.bundle import stamp, zipped
from sheratan_hub.diagnosis_live import Running, of_hub
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.plane import Call

ZIP = "application/zip"


async def bundle(call: Call) -> Answer:
    """GET /api/bundle: the diagnosis bundle as a zip, to this machine only whatever the policy says; one at a time."""
    if not call.is_local:
        raise Refused(Code.LOOPBACK_ONLY, "a bundle is given to the hub's own machine only")
    services, inside = call.services, call.services.inside
    if inside.making:
        raise Refused(Code.BUSY, "a bundle is being made; wait until it is done", retry_after_ms=5000)
    keyring = services.tokens.keyring
    inside.making = True
    try:
        made = await of_hub(
            Running(call.hub, call.settings, os.environ, keyring, services.audit, services.telling, inside)
        )
        data = await asyncio.to_thread(zipped, made.members)
    finally:
        inside.making = False
    call.done = {"bytes": len(data), "findings": len(made.findings)}
    name = f"diag_bundle_{stamp(services.clock.now())}.zip"
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
    return Answer(200, data, ZIP, headers)
