"""A process for tests to kill: `child.py MODE URL` opens the store of that URL and says "open" when it has.

A path stands for the SQLite store there.
"""

from __future__ import annotations

import asyncio
import os
import sys

from sheratan_hub.clock import SystemClock
from sheratan_hub.storage import Changes, Key, Row, Store, StoreDown, Wants, open_store


def say(text: object) -> None:
    print(text, flush=True)


async def hold() -> None:
    """Holds the store until it is killed."""
    sys.stdin.readline()


async def fork() -> None:
    """Holds the store and leaves a child behind, which lives until stdin ends."""
    if os.fork() == 0:
        say(os.getpid())  # by the child itself: it has let go of the lock before it runs this
        sys.stdin.readline()
        os._exit(0)
    sys.stdin.readline()


async def commit(store: Store) -> None:
    """Saves three rows, a counter and three lines at a time, and says the last seq of each save that returned."""
    for n in range(1_000_000):
        rows = [Row("job", f"{n:07}-{i}", b"x" * 300, lane="l", order=n) for i in range(3)]
        try:
            async with store.begin() as tx:
                await tx.load(Wants(keys={Key("job", "none")}))
                seq = await tx.save(Changes(new=rows, counts={"rows": 3}, ledger=[b"line"] * 3))
        except StoreDown as error:
            say(f"{type(error).__name__} {error}")
            if n % 2:
                return
        else:
            say(seq + 2)


async def main(mode: str, url: str) -> None:
    store = open_store(url if "://" in url else f"sqlite://{url}", SystemClock())
    await store.open()
    say("open")
    await (commit(store) if mode == "commit" else {"hold": hold, "fork": fork}[mode]())
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
