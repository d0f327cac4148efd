"""Which lanes a pull looks into."""

from __future__ import annotations

import random

from sheratan_hub.rules.lanes import Lanes, Offer, lane_name, read_lane, suits
from tests.rules.stage import Stage

ANY = Offer(frozenset(), frozenset())


def offer(*capabilities: str, kinds: tuple[str, ...] = ()) -> Offer:
    return Offer(frozenset(capabilities), frozenset(kinds))


def test_a_lane_says_what_it_is_called() -> None:
    name = lane_name(1, 'a"b', "ü", ("gpu", "x"))
    assert read_lane(name) == (1, 'a"b', "ü", ("gpu", "x"))


def test_capability_comes_first_then_level_then_the_oldest_head() -> None:
    lanes = Lanes()
    needing = lane_name(0, "k", "", ("gpu",))
    low, old, young = lane_name(3, "k", "", ()), lane_name(2, "k", "a", ()), lane_name(2, "k", "b", ())
    for name, head in ((needing, 1), (low, 0), (young, 9), (old, 5)):
        lanes.set(name, head)
    assert lanes.choose(ANY, 9) == [old, young, low]
    assert lanes.choose(offer("gpu"), 9) == [needing, old, young, low]
    assert lanes.choose(offer("gpu"), 2, {needing}) == [old, young]


def test_a_pull_may_name_its_kinds() -> None:
    lanes = Lanes({lane_name(2, kind, "", ()): 1 for kind in "abc"})
    assert [read_lane(name).kind for name in lanes.choose(offer(kinds=("a", "c")), 9)] == ["a", "c"]


def test_the_directory_agrees_with_a_plain_sort_under_random_changes() -> None:
    rng = random.Random(7)
    lanes, model = Lanes(), {}
    names = [
        lane_name(level, kind, s, needs) for level in range(4) for kind in "ab" for s in "xy" for needs in ((), ("g",))
    ]
    for _ in range(2000):
        name, head = rng.choice(names), rng.randrange(100)
        if rng.random() < 0.3:
            lanes.set(name, None)
            model.pop(name, None)
        elif rng.random() < 0.5:
            lanes.set(name, head)
            model[name] = head
        else:
            lanes.joined_by(name, head)
            model[name] = min(head, model.get(name, head))
        mine = offer("g") if rng.random() < 0.5 else ANY
        fitting = [n for n in model if suits(read_lane(n).kind, read_lane(n).needs, mine)]
        assert lanes.choose(mine, 99) == sorted(fitting, key=lambda n: (read_lane(n).level, model[n], n))
        assert len(lanes) == len(model)


def test_a_node_is_never_starved_by_jobs_that_it_cannot_run() -> None:
    stage = Stage(max_depth=10_000)
    for n in range(300):
        stage.submit(needs=("gpu",), source=f"s{n % 7}", priority=0)
    mine = stage.submit(priority=3)
    assert [job.id for job in stage.pull(limit=5)] == [mine]


def test_one_pull_takes_from_many_lanes_in_priority_order() -> None:
    stage = Stage(max_depth=10_000)
    for n in range(60):
        stage.submit(source=f"s{n}", priority=n % 4)
        stage.now += 1
    jobs = stage.pull(limit=60)
    assert [job.priority for job in jobs] == sorted(n % 4 for n in range(60))
    assert len({job.id for job in jobs}) == 60
    for level in range(4):
        ids = [job.id for job in jobs if job.priority == level]
        assert ids == sorted(ids)
