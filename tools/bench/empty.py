"""The empty handler that everything is measured against: aiohttp reads a body, parses it, answers JSON, nothing else.

A `web.Application` with one route, without an access log, on uvloop's event loop if there is one, as a hub is.
Prints its port.
"""

from __future__ import annotations

import asyncio
import sys

import orjson
from aiohttp import web

ANSWER = {
    "ok": True,
    "request_id": "01890a5d-ac96-774b-bcce-b302099a8057",
    "job_id": "01890a5d-ac96-774b-bcce-b302099a8057",
    "dedup": False,
    "status": "accepted",
}
"""As long as a hub's answer to a submit."""


async def answer(request: web.Request) -> web.Response:
    orjson.loads(await request.read())
    return web.Response(body=orjson.dumps(ANSWER), content_type="application/json")


async def serve() -> None:
    app = web.Application()
    app.router.add_post("/api/jobs", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"data plane     http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def main() -> int:
    factory = None
    try:
        import uvloop

        factory = uvloop.new_event_loop
    except ImportError:
        pass
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
