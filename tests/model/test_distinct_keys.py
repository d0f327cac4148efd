"""Very many submits, a third of them repeated, at once and after a hub that lost its answers: one job for each key."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.hub import Hub
from sheratan_hub.rules.command import Limits
from sheratan_hub.rules.submit import Submit
from sheratan_hub.storage import open_store
from tests.model.test_machine import TIMES

KEYS = int(os.environ.get("MODEL_KEYS", "0")) or (20_000 if TIMES == 1 else 100_000)
WAVES = 5
"""A hub each; every second one is killed with answers under way."""


class Producer:
    """Submits by key until each is answered, and remembers which job it was told."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.ids = count(1)
        self.told: dict[int, str] = {}
        self.repeats = self.lost = 0

    def requests(self, new: range) -> list[list[int]]:
        """Requests of 1 to 40 submits each: the new keys, repeats of a third of them, and some from before."""
        keys = [key for key in new for _ in range(1 if key % 3 else 1 + self.random.randint(1, 5))]
        keys += [key for key in range(0, new.start, 3) if self.random.random() < 0.2]
        self.repeats += len(keys) - len(new)
        self.random.shuffle(keys)
        keys += [key for key in new if key % 97 == 0]  # once more at the very end, when it may all be over
        return list(cut(iter(keys), iter(lambda: self.random.randint(1, 40), 0)))

    def commands(self, keys: Sequence[int]) -> list[Submit]:
        return [Submit(f"job-{next(self.ids):09}", "k", b"1", f"key-{key}", "same") for key in keys]

    async def send(self, hub: Hub, keys: Sequence[int]) -> None:
        """One request. What is not answered is sent again by the next wave."""
        for key, outcome in zip(keys, await hub.execute_many(self.commands(keys)), strict=True):
            first = self.told.setdefault(key, outcome.job.id)
            assert outcome.job.id == first, f"key {key} has two jobs"


def cut(keys: Iterator[int], lengths: Iterator[int]) -> Iterator[list[int]]:
    while part := [key for _, key in zip(range(next(lengths)), keys, strict=False)]:
        yield part


@pytest.mark.parametrize("scheme", ["sqlite", "file"])
async def test_there_is_one_job_for_each_key_however_often_it_is_submitted(scheme: str, tmp_path: Path) -> None:
    producer, clock, unanswered = Producer(1), VirtualClock(), list[int]()
    for wave in range(WAVES):
        store: Any = open_store(f"{scheme}://{tmp_path}/hub", clock)
        await store.open()
        hub = Hub(store, clock, Limits(max_depth=10**9), max_waiting=10**9)
        await hub.start()
        committing = asyncio.create_task(hub.committer.run())
        new = range(KEYS * wave // WAVES, KEYS * (wave + 1) // WAVES)
        requests = [*cut(iter(unanswered), iter(lambda: 40, 0)), *producer.requests(new)]
        sent = [asyncio.create_task(producer.send(hub, keys)) for keys in requests]
        if wave % 2:
            await killed(sent, committing)
        else:
            await asyncio.gather(*sent)
            hub.committer.close()
            await committing
        unanswered = [key for keys in requests for key in keys if key not in producer.told]
        producer.lost += len(unanswered)
        await store.close()
    await check(producer, f"{scheme}://{tmp_path}/hub", clock)


async def killed(sent: list[asyncio.Task[None]], committing: asyncio.Task[None]) -> None:
    """The hub dies once half of the requests are answered."""
    while sum(task.done() for task in sent) < len(sent) // 2:
        await settle(5)
    for task in (committing, *sent):
        task.cancel()
    with suppress(asyncio.CancelledError):
        await committing
    for task in sent:
        with suppress(asyncio.CancelledError):
            await task


async def check(producer: Producer, url: str, clock: VirtualClock) -> None:
    """jobs = distinct keys; nothing else was ever submitted."""
    store: Any = open_store(url, clock)
    await store.open()
    counted = await store.counts()
    submitted, after = 0, 0
    while lines := await store.events(after, 10_000):
        submitted += sum(b'"job.submitted"' in line.line for line in lines)
        after = lines[-1].seq
    await store.close()
    assert (counted, submitted) == ({"job:pending": KEYS, "claimable:2": KEYS, "key": KEYS}, KEYS)
    assert (len(producer.told), len(set(producer.told.values()))) == (KEYS, KEYS)
    assert producer.repeats > KEYS
    assert producer.lost > 0, "no answer was lost, so nothing was learned"
