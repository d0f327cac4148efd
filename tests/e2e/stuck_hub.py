"""`sheratan-hub serve` whose memory store stands still for as long as the file `stuck` is in the working directory."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sheratan_hub.cli import main
from sheratan_stores.memory import MemoryStore

now = MemoryStore.now


async def stuck_now(store: MemoryStore) -> int:
    while Path("stuck").exists():
        await asyncio.sleep(0.01)
    return await now(store)


if __name__ == "__main__":
    MemoryStore.now = stuck_now  # type: ignore[method-assign]
    main(["serve"])
