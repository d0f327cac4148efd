"""The suite that every store must pass: longer than 300 lines, so that a third party subclasses one class.

    class TestMyStore(StoreConformance):
        async def make(self, clock): return MyStore("mine://somewhere-empty", clock)

Needs pytest and pytest-asyncio with `asyncio_mode = "auto"`. `stores/STORES.md` says what each part is about.
"""

# ruff: noqa: S101, D102, PT012  (tests assert, a test's name is its sentence, a transaction is two statements)

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from msgspec.structs import replace

from sheratan_hub.clock import Clock, VirtualClock, settle
from sheratan_hub.storage import Changes, Conflict, Due, Key, Ready, Row, Store, Wants
from sheratan_stores.story import listed, same_story, story

__all__ = ["StoreConformance", "same_story", "story"]

HIGHEST, LOWEST = 2**63 - 1, -(2**63)
TEXTS = ["", " ", "A", "Z", "a", "a b", "aa", "z", "é", "中", "\uffee", "🜁", "🜁x"]
"""Texts in the order ids have: by code point, whatever the language of the machine."""


def job(id: str, *, doc: bytes = b"{}", **fields: Any) -> Row:
    """A row of kind `job`."""
    return Row("job", id, doc, **fields)


def labelled(**slots: str) -> Any:
    """Labels by the hub's names of their slots."""
    return tuple(slots.get(name) for name in ("status", "kind", "source", "mission", "node"))


async def save(store: Store, *new: Row, load: Iterable[Key] = (), **changes: Any) -> int:
    """One transaction: the rows are new; `put` rows are loaded first, as are the keys in `load`."""
    put = changes.get("put", [])
    async with store.begin() as tx:
        await tx.load(Wants(keys={row.key for row in put} | set(load)))
        return await tx.save(Changes(new=list(new), **changes))


async def load(store: Store, **wants: Any) -> Any:
    """What one transaction sees that changes nothing."""
    async with store.begin() as tx:
        return await tx.load(Wants(**wants))


async def ready_ids(store: Store, lane: str, limit: int = 1000) -> list[str]:
    """The ids that a lane gives, in order."""
    seen = await load(store, ready={Ready(lane): limit})
    return [row.id for row in seen.ready[Ready(lane)]]


async def due_ids(store: Store, agenda: str, before: int, limit: int = 1000) -> list[str]:
    """The ids that an agenda gives, in order."""
    seen = await load(store, due={Due(agenda, before): limit})
    return [row.id for row in seen.due[Due(agenda, before)]]


async def ids(store: Store, *labels: str | None, **options: Any) -> list[str]:
    """The ids of a list of jobs, followed to its end."""
    return [row.id for row in await listed(store, "job", labels, **options)]


async def picture(store: Store) -> Any:
    """All that can be seen of jobs, counters, lanes and ledger."""
    return await listed(store, "job"), await store.counts(), await store.heads(), await store.events()


async def wait_for(task: asyncio.Task[Any]) -> Any:
    """A task's result; no test waits for ever."""
    return await asyncio.wait_for(task, 30)


class Broken(Exception):
    """What a test raises inside a transaction."""


class StoreConformance:
    """Subclass it, say how to make your store, and run pytest."""

    keeps = True
    """Whether what was saved is there after `close` and `open`."""

    async def make(self, clock: Clock) -> Store:
        """A store over nothing that was there before, not opened."""
        raise NotImplementedError

    async def reopen(self, store: Store) -> None:
        """Close and open it; a store that wants a new object for that overrides this and `store`."""
        await store.close()
        await store.open()

    @pytest.fixture
    def clock(self) -> VirtualClock:
        """The clock the store is made with."""
        return VirtualClock()

    @pytest.fixture
    async def store(self, clock: VirtualClock) -> AsyncIterator[Store]:
        """The store, open."""
        store = await self.make(clock)
        await store.open()
        yield store
        await store.close()

    # Rows and keys

    async def test_saved_comes_back_equal(self, store: Store) -> None:
        rows = [
            job("plain"),
            job("full", doc=b'{"a":1}', labels=("a", "b", "c", "d", "e"), lane="l", order=7, agenda="g", due_at=9),
            job("bytes", doc=bytes(range(256)) + b"\0\n\xff\xfe"),
            job("empty", doc=b"", labels=("", None, None, None, ""), lane="", agenda=""),
            job("highest", lane="l", order=HIGHEST, agenda="g", due_at=HIGHEST),
            job("lowest", lane="l", order=LOWEST, agenda="g", due_at=LOWEST),
            job("unclaimable", order=5, due_at=6),
            Row("node", "plain", b"[]", labels=(None, None, None, None, "n")),
            *(job(f"ü {text}", labels=(text, *[None] * 4), lane=text, agenda=text) for text in TEXTS),
        ]
        await save(store, *rows)
        keys = {row.key for row in rows}
        assert (await load(store, keys=keys)).rows == {row.key: row for row in rows}
        assert (await load(store, look=keys)).rows == {row.key: row for row in rows}
        assert sorted(await store.fetch(sorted(keys)), key=lambda row: row.key) == sorted(rows, key=lambda row: row.key)

    async def test_a_big_doc_comes_back_equal(self, store: Store) -> None:
        big = job("big", doc=bytes(range(256)) * 4096, lane="l", agenda="g")
        await save(store, big)
        seen = await load(store, keys={big.key}, ready={Ready("l"): 1}, due={Due("g", 0): 1})
        assert seen.rows == {big.key: big}
        assert seen.ready[Ready("l")] == seen.due[Due("g", 0)] == [big]

    async def test_load_returns_only_what_exists(self, store: Store) -> None:
        await save(store, job("a"))
        wants = Wants(
            keys={Key("job", "a"), Key("job", "b"), Key("node", "a")},
            look={Key("job", "c")},
            ready={Ready("none"): 3},
            due={Due("none", HIGHEST): 3},
            counts={"none"},
        )
        async with store.begin() as tx:
            seen = await tx.load(wants)
        assert seen.rows == {Key("job", "a"): job("a")}
        assert seen.ready == {Ready("none"): []}
        assert seen.due == {Due("none", HIGHEST): []}
        assert seen.counts == {"none": 0}
        assert await store.fetch([Key("job", "b"), Key("node", "a")]) == []

    async def test_many_keys_are_loaded_at_once(self, store: Store) -> None:
        rows = [Row(kind, f"{n}'\"\\", b"") for n in range(300) for kind in ("job", "node")]
        await save(store, *rows)
        seen = await load(store, keys={row.key for row in rows[:400]}, look={row.key for row in rows[400:]})
        assert seen.rows == {row.key: row for row in rows}

    async def test_several_loads_see_one_transaction(self, store: Store) -> None:
        await save(store, *(job(f"{n}", lane="l", order=n) for n in range(5)), counts={"c": 3})
        async with store.begin() as tx:
            first = await tx.load(Wants(ready={Ready("l"): 2}))
            deeper = await tx.load(Wants(ready={Ready("l"): 4}, keys={Key("job", "0")}, counts={"c"}))
            put = [replace(row, lane=None) for row in first.ready[Ready("l")] + deeper.ready[Ready("l")][2:]]
            await tx.save(Changes(put=put))
        assert [row.id for row in deeper.ready[Ready("l")]] == ["0", "1", "2", "3"]
        assert deeper.counts == {"c": 3}
        assert await ready_ids(store, "l") == ["4"]

    # Selections

    async def test_ready_rows_come_by_order_then_id(self, store: Store) -> None:
        rows = [job(f"{text}{order}", lane="l", order=order) for text in reversed(TEXTS) for order in (3, LOWEST, 2)]
        await save(store, *rows, job("other", lane="l2"), job("unclaimable"))
        expected = [row.id for row in sorted(rows, key=lambda row: (row.order, row.id))]
        assert await ready_ids(store, "l") == expected
        assert await ready_ids(store, "l", 5) == expected[:5]
        assert await ready_ids(store, "l", 1) == expected[:1]

    async def test_due_rows_come_by_time_then_id(self, store: Store) -> None:
        rows = [job(f"{text}{at}", agenda="g", due_at=at) for text in reversed(TEXTS) for at in (30, LOWEST, 20, 21)]
        await save(store, *rows, job("other", agenda="h"), job("never"))
        expected = [row.id for row in sorted(rows, key=lambda row: (row.due_at, row.id)) if row.due_at <= 20]
        assert await due_ids(store, "g", 20) == expected
        assert await due_ids(store, "g", 20, 3) == expected[:3]
        assert await due_ids(store, "g", 19) == [id for id in expected if id.endswith(str(LOWEST))]

    async def test_put_moves_a_row_in_every_index(self, store: Store) -> None:
        old = job("a", labels=("s", "k", "q", "m", "n"), lane="l", order=1, agenda="g", due_at=1)
        new = job("a", doc=b"2", labels=("S", "K", "Q", "M", "N"), lane="L", order=2, agenda="G", due_at=2)
        await save(store, old, job("b", lane="l", order=1))
        for before, now in ((old, new), (new, job("a")), (job("a"), old), (old, replace(old, order=9, due_at=9))):
            await save(store, put=[now])
            assert await store.fetch([now.key]) == [now]
            for slot, label in enumerate(before.labels):
                assert await ids(store, *[None] * slot, label) == (
                    ["a", "b"] if label is None else ["a"] * (before.labels == now.labels)
                )
        assert await ready_ids(store, "l") == ["b", "a"]
        assert await ready_ids(store, "L") == []
        assert await due_ids(store, "g", 8) == []
        assert await due_ids(store, "g", 9) == ["a"]

    async def test_each_part_of_a_row_can_change_alone(self, store: Store) -> None:
        row = job("a", labels=("s", "k", "q", "m", "n"), lane="l", order=1, agenda="g", due_at=1)
        await save(store, row)
        parts: dict[str, Any] = {"doc": b"2", "lane": "L", "order": 2, "agenda": "G", "due_at": 2}
        labels = [(*row.labels[:slot], "x", *row.labels[slot + 1 :]) for slot in range(5)]
        for part in [{name: value} for name, value in parts.items()] + [{"labels": each} for each in labels] + [{}]:
            row = replace(row, **part)
            await save(store, put=[row])
            assert await store.fetch([row.key]) == [row]
            assert (await load(store, ready={Ready(row.lane or ""): 1})).ready == {Ready(row.lane or ""): [row]}

    async def test_gone_leaves_every_index(self, store: Store) -> None:
        row = job("a", labels=("s", "k", "q", "m", "n"), lane="l", agenda="g")
        await save(store, row, counts={"c": 1})
        await save(store, load=[row.key], gone=[row.key])
        assert await picture(store) == ([], {"c": 1}, {}, [])
        assert await ready_ids(store, "l") == await due_ids(store, "g", HIGHEST) == await ids(store, "s") == []
        await save(store, row)
        assert await ready_ids(store, "l") == ["a"]

    # All or nothing

    async def test_new_with_a_key_that_exists_leaves_nothing(self, store: Store) -> None:
        await save(store, job("a", lane="l", order=5), job("z"), counts={"c": 1}, ledger=[b"first"])
        before = await picture(store)
        for clash in (job("a", doc=b"other"), job("z")):
            with pytest.raises(Conflict):
                await save(
                    store,
                    job("b", lane="l"),
                    clash,
                    job("c"),
                    put=[job("z", lane="m")] if clash.id == "a" else [],
                    gone=[Key("job", "z")] if clash.id == "a" else [],
                    counts={"c": 5, "d": 1},
                    ledger=[b"never"],
                )
            assert await picture(store) == before
        assert await save(store, job("b"), ledger=[b"second"]) == 2

    async def test_a_key_is_new_once_in_a_batch(self, store: Store) -> None:
        with pytest.raises(Conflict):
            await save(store, job("a"), job("a", doc=b"2"))
        assert await listed(store, "job") == []

    async def test_the_same_id_of_another_kind_is_another_row(self, store: Store) -> None:
        node = Row("node", "a", b"n", labels=labelled(status="s"))
        await save(store, job("a", labels=labelled(status="s")), node)
        assert await listed(store, "node", ("s",), limit=1) == await listed(store, "node", limit=1) == [node]
        assert await ids(store, "s", limit=1) == ["a"]

    async def test_an_exception_leaves_no_trace(self, store: Store) -> None:
        await save(store, job("a", lane="l"), counts={"c": 1}, ledger=[b"1"])
        before = await picture(store)
        with pytest.raises(Broken):
            async with store.begin() as tx:
                await tx.load(Wants(ready={Ready("l"): 1}, keys={Key("job", "a")}, counts={"c"}))
                raise Broken
        assert await picture(store) == before
        assert await save(store, job("b"), ledger=[b"2"]) == 2

    async def test_leaving_without_save_leaves_no_trace(self, store: Store) -> None:
        await save(store, job("a", lane="l"))
        before = await picture(store)
        async with store.begin() as tx:
            await tx.load(Wants(ready={Ready("l"): 1}))
        async with store.begin():
            pass
        assert await picture(store) == before
        assert await save(store, put=[job("a")]) == 0

    async def test_a_row_that_was_not_loaded_cannot_be_put(self, store: Store) -> None:
        await save(store, job("a"))
        for wants in (Wants(), Wants(look={Key("job", "a")}), Wants(keys={Key("job", "b")})):
            with pytest.raises((ValueError, AssertionError)):
                async with store.begin() as tx:
                    await tx.load(wants)
                    await tx.save(Changes(put=[job("a", doc=b"2")], counts={"c": 1}))
        assert await picture(store) == ([job("a")], {}, {}, [])

    async def test_a_large_batch_is_one_transaction(self, store: Store) -> None:
        rows = [job(f"{n:04}", labels=labelled(status="s"), lane="l", order=-n, agenda="g") for n in range(2000)]
        assert await save(store, *rows, counts={"c": 2000}, ledger=[b"x"] * 2000) == 1
        assert await ready_ids(store, "l", 2000) == [row.id for row in reversed(rows)]
        assert await save(store, put=[replace(row, lane=None) for row in rows], ledger=[b"y"] * 2000) == 2001
        assert await store.heads() == {}
        await save(store, load=[row.key for row in rows], gone=[row.key for row in rows])
        assert await listed(store, "job", ("s",)) == []
        assert len(await store.events(0, 5000)) == 4000

    async def test_reads_go_on_beside_a_transaction(self, store: Store) -> None:
        await save(store, job("a", lane="l", order=3), counts={"c": 1}, ledger=[b"1"])
        before = await picture(store)
        async with store.begin() as tx:
            await tx.load(Wants(keys={Key("job", "a")}))
            assert await asyncio.wait_for(picture(store), 30) == before
            await tx.save(Changes(put=[job("a")], counts={"c": 1}, ledger=[b"2"]))
        assert (await picture(store))[:3] == ([job("a")], {"c": 2}, {})

    # Many at once

    async def test_no_row_is_claimed_twice(self, store: Store) -> None:
        await save(store, *(job(f"{n:03}", lane="l", order=n % 7) for n in range(150)), counts={"waiting": 150})
        claims: list[str] = []

        async def claim(size: int) -> None:
            found = True
            while found:
                try:
                    async with store.begin() as tx:
                        rows = (await tx.load(Wants(ready={Ready("l"): size}))).ready[Ready("l")]
                        found = bool(rows)
                        await tx.save(
                            Changes(put=[replace(row, lane=None) for row in rows], counts={"waiting": -len(rows)})
                        )
                    claims.extend(row.id for row in rows)
                except Conflict:
                    continue

        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            for worker in range(12):
                tasks.create_task(claim(1 + worker % 5))
        assert sorted(claims) == [f"{n:03}" for n in range(150)]
        assert await store.counts() == {}
        assert await store.heads() == {}

    async def test_no_update_is_lost(self, store: Store) -> None:
        await save(store, job("a", doc=b"0"))

        async def add_one() -> None:
            while True:
                try:
                    async with store.begin() as tx:
                        row = (await tx.load(Wants(keys={Key("job", "a")}))).rows[Key("job", "a")]
                        await settle(3)
                        await tx.save(Changes(put=[replace(row, doc=b"%d" % (int(row.doc) + 1))], counts={"c": 1}))
                    return
                except Conflict:
                    continue

        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            for _ in range(40):
                tasks.create_task(add_one())
        assert await store.fetch([Key("job", "a")]) == [job("a", doc=b"40")]
        assert await store.counts() == {"c": 40}

    async def test_of_many_with_one_new_key_one_wins(self, store: Store) -> None:
        async def create(n: int) -> bool:
            try:
                await save(store, job("same", doc=b"%d" % n), job(f"own-{n}"), counts={"c": 1}, ledger=[b"x"])
            except Conflict:
                return False
            return True

        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            racers = [tasks.create_task(create(n)) for n in range(20)]
        winner = [racer.result() for racer in racers].index(True)
        assert sum(racer.result() for racer in racers) == 1
        assert await ids(store) == [f"own-{winner}", "same"]
        assert await store.counts() == {"c": 1}
        assert len(await store.events()) == 1

    @pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 50])
    async def test_a_cancelled_transaction_is_whole_or_absent(self, store: Store, turns: int) -> None:
        await save(store, job("old", lane="l"))

        async def change() -> None:
            async with store.begin() as tx:
                await tx.load(Wants(keys={Key("job", "old")}, ready={Ready("l"): 1}))
                await tx.save(Changes(new=[job("new")], put=[job("old")], counts={"c": 1}, ledger=[b"1"]))

        task = asyncio.create_task(change())
        await settle(turns)
        task.cancel()
        await asyncio.wait({task}, timeout=30)
        rows, counts, heads, events = await picture(store)
        done = len(rows) == 2
        assert (counts, heads, len(events)) == (({"c": 1}, {}, 1) if done else ({}, {"l": 0}, 0))
        assert await save(store, job("after"), ledger=[b"2"]) == (2 if done else 1)

    # Counters

    async def test_counts_are_seen_in_the_next_transaction(self, store: Store) -> None:
        await save(store, counts={"a": 2, "b": -3, "c": 0, "é": 1})
        assert await store.counts() == {"a": 2, "b": -3, "é": 1}
        assert (await load(store, counts={"a", "b", "c", "é", "d"})).counts == {"a": 2, "b": -3, "c": 0, "é": 1, "d": 0}
        await save(store, counts={"a": -2, "b": 3, "é": HIGHEST - 1})
        assert await store.counts() == {"é": HIGHEST}

    async def test_counts_are_listed_by_prefix(self, store: Store) -> None:
        await save(store, counts=dict.fromkeys(["m", "m:", "m:1", "m:1:x", "m:\uffff", "m:🜁", "m;", "n", "M:1", ""], 1))
        assert set(await store.counts("m:")) == {"m:", "m:1", "m:1:x", "m:\uffff", "m:🜁"}
        assert set(await store.counts("m:1:")) == {"m:1:x"}
        assert await store.counts("x") == {}
        assert len(await store.counts()) == 10

    async def test_wildcards_in_a_prefix_mean_themselves(self, store: Store) -> None:
        await save(
            store, job("a", lane="a_b"), job("b", lane="axb"), job("c", lane="a%"), counts={"a_b": 1, "axb": 1, "a%": 1}
        )
        assert await store.counts("a_") == {"a_b": 1}
        assert await store.heads("a%") == {"a%": 0}

    async def test_counts_kept_by_delta_equal_a_recount(self, store: Store) -> None:
        await story(store, 101)
        rows = [row for kind in ("job", "node") for row in await listed(store, kind)]
        assert len(rows) > 20
        assert await store.counts() == Counter(row.labels[0] or "bare" for row in rows)

    # Lanes

    async def test_heads_follow_the_rows(self, store: Store) -> None:
        await save(store, job("a", lane="l", order=5), job("b", lane="l", order=7), job("c", lane="m", order=LOWEST))
        assert await store.heads() == {"l": 5, "m": LOWEST}
        await save(store, job("d", lane="l", order=2), put=[job("c", lane="k", order=1)])
        assert await store.heads() == {"k": 1, "l": 2}
        await save(store, put=[job("d", order=2)], gone=[Key("job", "a")])
        assert await store.heads() == {"k": 1, "l": 7}
        await save(store, put=[job("b")], gone=[Key("job", "c")])
        assert await store.heads() == {}

    async def test_heads_are_listed_by_prefix(self, store: Store) -> None:
        await save(
            store, *(job(f"{n}", lane=lane, order=n) for n, lane in enumerate(["[1", "[1,2]", "[2", "1", "[1é"]))
        )
        assert await store.heads("[1") == {"[1": 0, "[1,2]": 1, "[1é": 4}
        assert await store.heads("[3") == {}
        assert len(await store.heads()) == 5

    # Ledger

    async def test_ledger_numbers_have_no_gaps(self, store: Store) -> None:
        lines = [[b"a", b"b"], [], [bytes(set(range(256)) - {10})], [b"", b"", b"c"]]
        assert [await save(store, ledger=batch) for batch in lines] == [1, 0, 3, 4]
        assert await store.events() == [
            (n + 1, line) for n, line in enumerate(line for batch in lines for line in batch)
        ]

    async def test_events_are_read_across_batches(self, store: Store) -> None:
        for size in (1, 4, 2, 3, 10):
            await save(store, ledger=[b"%d" % size] * size)
        everything = await store.events()
        assert [line.seq for line in everything] == list(range(1, 21))
        for after in range(22):
            for limit in (1, 3, 100):
                assert await store.events(after, limit) == everything[after : after + limit]

    async def test_numbers_go_on_after_everything_was_pruned(self, store: Store, clock: VirtualClock) -> None:
        await save(store, ledger=[b"1", b"2"])
        assert await store.prune_events(await store.now() + 1000) == 2
        assert await store.events() == []
        if self.keeps:
            await self.reopen(store)
        assert await save(store, ledger=[b"3"]) == 3
        assert await store.events() == await store.events(2) == [(3, b"3")]

    async def test_prune_takes_whole_batches_that_are_old(self, store: Store, clock: VirtualClock) -> None:
        if store.shared:
            pytest.skip("the time of a shared store is its own")
        for _ in range(4):
            await save(store, ledger=[b"x", b"y"])
            await clock.advance(1000)
        assert await store.prune_events(await store.now() - 4000) == 0
        assert await store.prune_events(await store.now() - 2000) == 4
        assert [line.seq for line in await store.events()] == [5, 6, 7, 8]
        assert [line.seq for line in await store.events(2, 3)] == [5, 6, 7]
        assert await store.prune_events(await store.now() - 2000) == 0

    async def test_the_ledger_follows_the_order_of_commits(self, store: Store) -> None:
        async def append(n: int) -> tuple[int, int]:
            return await save(store, ledger=[b"%d" % n] * 3), n

        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            appended = [tasks.create_task(append(n)) for n in range(20)]
        expected = [b"%d" % n for _, n in sorted(task.result() for task in appended) for _ in range(3)]
        assert [line.line for line in await store.events()] == expected

    # Lists

    async def test_a_list_by_each_label(self, store: Store) -> None:
        rows = [
            job(f"{text}{slot}", labels=(*[None] * slot, "x", *[None] * (4 - slot)))
            for slot in range(5)
            for text in TEXTS
        ]
        await save(store, *rows, Row("node", "n", b"", labels=("x",) * 5))
        for slot in range(5):
            expected = [f"{text}{slot}" for text in TEXTS]
            assert await ids(store, *[None] * slot, "x", limit=4) == sorted(expected)
            assert await ids(store, *[None] * slot, "x", limit=4, newest=True) == sorted(expected, reverse=True)
        assert await ids(store, limit=7) == sorted(row.id for row in rows)
        assert await ids(store, "y") == []
        assert await listed(store, "none") == []

    async def test_a_list_by_several_labels(self, store: Store) -> None:
        values = [(a, b, c, d, None) for a in "pr" for b in "xy" for c in ("s", None) for d in "mno"]
        rows = [job(f"{n:02}", labels=labels) for n, labels in enumerate(values * 2)]
        await save(store, *rows)
        for asked in [*values, (None, "x", None, "m"), ("p", "y"), (None, None, "s"), ("p", None, None, "m", "no")]:
            expected = [row.id for row in rows if all(a in (None, b) for a, b in zip(asked, row.labels, strict=False))]
            assert await ids(store, *asked, limit=3, examine=5) == expected
            assert await ids(store, *asked, limit=3, examine=5, newest=True) == expected[::-1]

    async def test_a_page_says_where_to_go_on(self, store: Store) -> None:
        await save(store, *(job(f"{n}") for n in range(6)))
        page = await store.page("job", limit=2)
        assert ([row.id for row in page.rows], page.next) == (["0", "1"], "1")
        page = await store.page("job", after="1", limit=3)
        assert ([row.id for row in page.rows], page.next) == (["2", "3", "4"], "4")
        page = await store.page("job", after="4", limit=3)
        assert ([row.id for row in page.rows], page.next) == (["5"], None)
        page = await store.page("job", after="3x", limit=2, newest=True)
        assert ([row.id for row in page.rows], page.next) == (["3", "2"], "2")
        page = await store.page("job", after="3", limit=2)
        assert ([row.id for row in page.rows], page.next) == (["4", "5"], None)
        page = await store.page("job", limit=9, examine=6)
        assert (len(page.rows), page.next) == (6, None)
        assert await store.page("job", after="5") == ([], None)
        assert await store.page("job", after="0", newest=True) == ([], None)

    async def test_a_page_examines_only_so_many(self, store: Store) -> None:
        rows = [job(f"{n:03}", labels=labelled(status="ab"[n % 2], node="cd"[n % 2])) for n in range(100)]
        await save(store, *rows)
        after, pages = None, 0
        while True:
            page = await store.page("job", ("a", None, None, None, "d"), after, limit=5, examine=10)
            pages += 1
            assert page.rows == []
            if page.next is None:
                break
            after = page.next
        assert pages <= 11, "a cursor must move on by what was examined"
        assert len((await store.page("job", ("a",), limit=20, examine=10)).rows) == 10

    async def test_paging_beside_changes_neither_repeats_nor_misses(self, store: Store) -> None:
        label = labelled(status="s")
        stay = [f"{n:03}" for n in range(0, 100, 2)]
        brief = [f"{n:03}" for n in range(1, 100, 2)]
        await save(store, *(job(id, labels=label) for id in stay + brief))
        seen: list[str] = []
        after = None
        for step in range(50):
            page = await store.page("job", ("s",), after, limit=3)
            seen += [row.id for row in page.rows]
            if page.next is None:
                break
            after = page.next
            gone = Key("job", brief[step * 7 % 50])
            changed = job(stay[step * 11 % 50], doc=b"2", labels=label, lane="l")
            new = job(f"{step * 13 % 100:03}-{step}", labels=label)
            await save(store, new, put=[changed], gone=[gone], load=[gone])
        else:
            raise AssertionError("the list did not end")
        assert len(seen) == len(set(seen))
        assert set(stay) <= set(seen)

    # Opening again, time, stories

    async def test_everything_is_there_after_opening_again(self, store: Store) -> None:
        if not self.keeps:
            pytest.skip("this store says that it forgets")
        await story(store, 7, steps=60)
        before = await picture(store), await listed(store, "node")
        await self.reopen(store)
        assert (await picture(store), await listed(store, "node")) == before
        numbers = [line.seq for line in before[0][3]]
        assert await save(store, ledger=[b"next"]) > max(numbers, default=0)

    async def test_close_is_safe_to_call_twice(self, store: Store) -> None:
        await save(store, job("a"))
        await store.close()
        await store.close()

    async def test_an_embedded_store_keeps_the_clock_of_the_hub(self, store: Store, clock: VirtualClock) -> None:
        first = await store.now()
        await clock.advance(1234)
        later = await store.now()
        assert later >= first
        assert store.shared or later - first == 1234

    async def test_a_hint_ends_with_its_time(self, store: Store, clock: VirtualClock) -> None:
        task = asyncio.create_task(store.hint(1000))
        await clock.advance(1000)
        await wait_for(task)

    async def test_a_story_told_twice_is_the_same(self, store: Store, clock: VirtualClock) -> None:
        """Guards the story itself; `same_story` compares two stores."""
        trace = await story(store, 3, steps=40)
        assert len(trace) == 41
        assert {name for name, _ in trace[:-1]} >= {"submit", "claim", "change"}
