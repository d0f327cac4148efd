"""Which lanes a pull looks into."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheratan_hub.rules import lanes as lanes_module
from sheratan_hub.rules.command import Command, Need, Scene
from sheratan_hub.rules.finish import Release
from sheratan_hub.rules.lanes import PLACES, Lanes, Offer, lane_name, level_at, read_lane, suits
from sheratan_hub.rules.limits import Rate
from sheratan_hub.rules.pauses import PauseKind
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Wants
from tests.rules.stage import Stage

ANY = Offer(frozenset(), frozenset())


def offer(*capabilities: str, kinds: tuple[str, ...] = ()) -> Offer:
    return Offer(frozenset(capabilities), frozenset(kinds))


def test_a_lane_says_what_it_is_called() -> None:
    name = lane_name(1, 'a"b', "ü", ("gpu", "x"))
    assert read_lane(name) == (1, 'a"b', "ü", ("gpu", "x"))


def test_capability_comes_first_then_level_then_among_equals_the_oldest_head() -> None:
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


NEEDS = ((), ("g",), ("h",), ("g", "h"))
NAMES = [
    lane_name(level, kind, source, needs) for level in (1, 3) for kind in "abc" for source in "xy" for needs in NEEDS
]


@pytest.mark.parametrize("kept", [0, 64])
def test_whatever_is_asked_for_and_closed_the_order_is_that_of_a_plain_sort(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "GROUPS_KEPT", kept)
    rng = random.Random(kept)
    directory, model, now = Lanes(age_ms=1000), {}, 0
    for _ in range(4000):
        now += rng.randrange(200)
        name = rng.choice(NAMES)
        if rng.random() < 0.55:
            directory.set(name, None)
            model.pop(name, None)
        else:
            model[name] = max(0, now - rng.randrange(3000)) * PLACES
            directory.set(name, model[name])
        mine = Offer(frozenset(rng.sample("gh", rng.randrange(3))), frozenset(rng.sample("abcd", rng.randrange(4))))
        closed = rng.choice((None, None, frozenset("a").__contains__, frozenset("bc").__contains__))
        used_up = set(rng.sample(NAMES, rng.randrange(3)))
        fitting = [
            (level_at(lane.level, model[one] // PLACES, now, 1000), model[one], one)
            for one in model
            if suits((lane := read_lane(one)).kind, lane.needs, mine) and not (closed and closed(lane.kind))
        ]
        expected = [one for _, _, one in sorted(fitting) if one not in used_up]
        assert directory.choose(mine, 99, used_up, now, closed) == expected
        assert directory.choose(mine, 2, used_up, now, closed) == expected[:2]
        assert directory.turn(mine, 1, used_up, now, closed) == expected[:1]


def test_a_turn_looks_at_as_many_queues_with_a_thousand_kinds_as_with_one() -> None:
    directory = Lanes()
    for n in range(1000):
        directory.set(lane_name(2, f"kind-{n}", f"s{n % 7}", ()), n)
        directory.set(lane_name(2, f"kind-{n}", "", ("gpu", f"x{n}")), n)
    for asked, queues in ((ANY, 1), (offer("gpu"), 1), (offer(kinds=("kind-5", "kind-6", "other")), 2)):
        assert len(list(directory._queues_for(asked, None))) == queues


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


# Ageing


def test_a_waiting_job_rises_a_level_a_minute_but_never_into_critical() -> None:
    levels = [[level_at(level, 0, minutes * 60_000, 60_000) for minutes in range(4)] for level in range(4)]
    assert levels == [[0, 0, 0, 0], [1, 1, 1, 1], [2, 1, 1, 1], [3, 2, 1, 1]]


def test_a_low_job_that_has_waited_two_minutes_goes_before_new_high_ones_but_after_critical_ones() -> None:
    stage = Stage()
    low = stage.submit(priority=3)
    stage.now += 119_999
    high = [stage.submit(priority=1) for _ in range(2)]
    assert stage.lease().id == high[0]
    stage.now += 1
    critical = stage.submit(priority=0)
    assert [stage.lease().id for _ in range(3)] == [critical, low, high[1]]


def test_ageing_may_be_switched_off() -> None:
    stage = Stage(age_ms=0)
    stage.submit(priority=3)
    stage.now += 10_000_000
    normal = stage.submit(priority=2)
    assert stage.lease().id == normal


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 300), st.sampled_from("ab")), max_size=30),
    st.lists(st.integers(0, 90), max_size=8),
)
def test_however_time_goes_on_lanes_stand_where_a_plain_sort_by_their_age_puts_them(
    jobs: list[tuple[int, int, str]], steps: list[int]
) -> None:
    lanes, now = Lanes(age_ms=60_000), 300_000
    heads = {lane_name(level, kind, f"s{n}", ()): second for n, (level, second, kind) in enumerate(jobs)}
    for name, second in heads.items():
        lanes.set(name, second * 1_000 * PLACES)
    for seconds in steps:
        now += seconds * 1000
        wanted = sorted(
            heads,
            key=lambda name: (level_at(read_lane(name).level, heads[name] * 1000, now, 60_000), heads[name], name),
        )
        assert lanes.choose(ANY, 99, now=now) == wanted


def test_how_late_the_oldest_are_is_told_by_level_without_a_look_at_the_others() -> None:
    lanes = Lanes({lane_name(level, "k", str(n), ()): n * 1000 * PLACES for level in (1, 2) for n in range(10)})
    assert (lanes.oldest(1), lanes.oldest(0), lanes.late(1, 5000), lanes.late(2, 0)) == (0, None, 5, 0)


# Turns


def test_a_single_job_waits_for_one_job_of_a_source_with_thousands() -> None:
    stage = Stage(max_depth=100_000, max_inflight=100_000)
    for _ in range(1000):
        stage.submit(source="big")
    stage.pull(limit=7)
    mine = stage.submit(source="small", kind="other")
    waited = [stage.lease().id for _ in range(3)].index(mine)
    assert waited <= 1


def test_sources_take_turns_also_within_one_pull_and_each_in_its_own_order() -> None:
    stage = Stage(max_inflight=100)
    ids = {source: [stage.submit(kind, source=source) for kind in "klkl"] for source in "abc"}
    pulled = stage.pull(limit=9)
    assert [job.source for job in pulled] == list("abc" * 3)
    assert all([job.id for job in pulled if job.source == source] == ids[source][:3] for source in "abc")


def test_who_comes_back_after_a_while_has_no_credit() -> None:
    stage = Stage(max_inflight=1000)
    stage.submit(source="idle")
    stage.lease()
    for _ in range(50):
        stage.submit(source="busy")
    for _ in range(20):
        stage.lease()
    for _ in range(5):
        stage.submit(source="idle")
    served = [stage.lease().source for _ in range(8)]
    assert max(served[:n].count("idle") - served[:n].count("busy") for n in range(9)) <= 1


def test_new_sources_that_keep_coming_do_not_starve_one_that_waits() -> None:
    stage = Stage(max_inflight=1000)
    old = [stage.submit(source="old") for _ in range(3)]
    served = []
    for n in range(8):
        stage.submit(source=f"new{n}")
        stage.submit(source=f"newer{n}")
        served += [job.id for job in stage.pull(limit=2)]
    assert set(old) <= set(served)


def test_a_turn_in_one_pool_costs_nothing_in_another() -> None:
    stage = Stage(max_inflight=1000)
    for _ in range(20):
        stage.submit("gpu", source="a")
    for source in "ba":
        for _ in range(5):
            stage.submit("cpu", source=source)
    for _ in range(10):
        stage.lease(kinds=frozenset({"gpu"}))
    assert sorted(stage.lease(kinds=frozenset({"cpu"})).source for _ in range(2)) == ["a", "b"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("kl"), st.integers(1, 3)), max_size=25), st.data())
@settings(max_examples=60)
def test_a_sources_jobs_are_leased_in_their_order_whatever_is_pulled(
    jobs: list[tuple[str, str, int]], data: st.DataObject
) -> None:
    stage = Stage(max_inflight=1000, age_ms=0)
    leased: list[tuple[str, int, str]] = []
    for source, kind, level in jobs:
        stage.submit(kind, source=source, priority=level)
        stage.now += 1
        if data.draw(st.booleans()):
            leased += [(job.source, job.priority, job.id) for job in stage.pull(limit=data.draw(st.integers(1, 4)))]
    leased += [(job.source, job.priority, job.id) for job in stage.pull(limit=100)]
    assert len(leased) == len(jobs)
    for source in "abc":
        for level in (1, 2, 3):
            own = [id for whose, at, id in leased if (whose, at) == (source, level)]
            assert own == sorted(own)


def test_a_source_gives_its_oldest_job_also_after_a_pull_that_could_take_only_one_kind() -> None:
    lanes = Lanes()
    a, b, other = lane_name(2, "a", "s", ()), lane_name(2, "b", "s", ()), lane_name(2, "a", "t", ())
    for name, head in ((a, 5), (b, 9), (other, 20)):
        lanes.set(name, head)
    lanes.serve(offer(kinds=("a",)), [a])
    assert (lanes.turn(ANY, 1), lanes.turn(ANY, 3)) == ([a], [a, b, other])


def test_one_pull_takes_all_of_a_sources_short_lanes_in_their_order() -> None:
    stage = Stage(max_inflight=100)
    ids = [stage.submit(kind, source="s") for kind in "abababaa"]
    other = stage.submit("a", source="t")
    pulled = [job.id for job in stage.pull(limit=9)]
    assert [id for id in pulled if id != other] == ids


def test_sources_that_are_left_out_are_not_looked_at_and_come_back() -> None:
    lanes = Lanes({lane_name(2, "k", source, ()): 1 for source in "ab"})
    lanes.bench("a")
    lanes.set(lane_name(2, "l", "a", ()), 0)
    assert [read_lane(name).source for name in lanes.choose(ANY, 9)] == ["b"]
    assert lanes.has_benched(offer(kinds=("l",)))
    lanes.unbench("a")
    assert [read_lane(name).source for name in lanes.choose(ANY, 9)] == ["a", "a", "b"]
    assert not lanes.has_benched(ANY)


@given(
    st.lists(st.tuples(st.sampled_from(["set", "empty", "bench", "unbench", "serve"]), st.integers(0, 11)), max_size=60)
)
def test_whatever_happens_the_directory_names_every_lane_once_but_those_left_out(steps: list[tuple[str, int]]) -> None:
    names = [lane_name(1 + n % 3, "kl"[n % 2], "abcd"[n % 4], ()) for n in range(12)]
    lanes, there, out = Lanes(), set[str](), set[str]()
    for at, (what, n) in enumerate(steps):
        name, source = names[n], read_lane(names[n]).source
        if what == "set":
            lanes.set(name, at)
            there.add(name)
        elif what == "empty":
            lanes.set(name, None)
            there.discard(name)
        elif what == "serve":
            lanes.serve(ANY, [name])
        else:
            (lanes.bench if what == "bench" else lanes.unbench)(source)
            (out.add if what == "bench" else out.discard)(source)
        chosen = lanes.choose(ANY, 99, now=at * 1000)
        assert sorted(chosen) == sorted(one for one in there if read_lane(one).source not in out)
        assert lanes.has_benched(ANY) == any(read_lane(one).source in out for one in there)


def test_pulls_of_one_batch_that_find_many_short_lanes_do_not_ask_for_one_after_the_other() -> None:
    stage = Stage(max_depth=10_000, max_inflight=10_000)
    for n in range(300):
        stage.submit(source=f"s{n}")
    asked = stage.together([Pull("n", f"x{n}-", capabilities=frozenset()) for n in range(300)])
    assert asked <= 4
    assert len({job.lease_id for job in map(stage.job, stage.ids()) if job.status == "running"}) == 300


@pytest.mark.parametrize("others", [1, 2])
def test_a_pull_that_has_room_for_one_more_still_takes_the_oldest_of_a_sources_lanes(others: int) -> None:
    stage = Stage(age_ms=0, rates={"other": Rate(0, 1)})
    own = [stage.submit(kind) for kind in ("a", "b", "b", "a")]
    other = [stage.submit("c", source="other") for _ in range(others)]
    leased = [job.id for job in stage.pull(limit=4)]
    assert sorted(leased) == [*own[:3], other[0]], "of the other source one may run at once"


@pytest.mark.parametrize(("sources", "limit"), [(2, 1), (20, 1), (20, 7), (20, 30), (100, 1), (100, 7)])
def test_pulls_of_one_batch_whose_sources_take_turns_ask_once(sources: int, limit: int) -> None:
    stage = Stage(max_depth=10_000, max_inflight=10_000)
    for n in range(64 * limit + sources):
        stage.submit(source=f"source-{n % sources:02}")
    pulls: list[Command] = [Pull(f"n{n}", f"s{n}-", limit, capabilities=frozenset()) for n in range(64)]
    assert stage.together(pulls) <= (limit > 1), "what pulls of one job need is foreseen"
    leased = Counter(job.source for job in map(stage.job, stage.ids()) if job.status == "running")
    assert leased.total() == 64 * limit
    assert max(leased.values()) - min(leased.values()) <= 1, "each source had its turns"


@pytest.mark.parametrize(
    ("pulls", "limit", "sources", "kinds", "each"),
    [
        (8, 10, 20, 16, 3),
        (16, 50, 50, 8, 3),
        (8, 100, 100, 6, 2),
        (5, 100, 400, 1, 1),
        (300, 1, 250, 1, 1),
        (64, 1, 300, 2, 1),
    ],
)
def test_however_short_the_lanes_are_pulls_find_them_soon(
    pulls: int, limit: int, sources: int, kinds: int, each: int
) -> None:
    stage = Stage(max_depth=10_000, max_inflight=10_000, age_ms=0)
    for n in range(sources * kinds * each):
        stage.submit(f"kind-{n // sources % kinds}", source=f"source-{n % sources:03}")
    commands: list[Command] = [Pull(f"n{n}", f"s{n}-", limit, capabilities=frozenset()) for n in range(pulls)]
    assert stage.together(commands) <= 24
    running = [job for job in map(stage.job, stage.ids()) if job.status == "running"]
    assert len(running) == len({job.lease_id for job in running}) == min(pulls * limit, sources * kinds * each)


def test_a_batch_that_has_loaded_very_often_asks_for_no_more_lanes_than_there_can_be() -> None:
    stage = Stage()
    for n in range(3):
        stage.submit(source=f"source-{n}")
    stage.lanes = Lanes({row.lane: row.order for row in stage.rows.values() if row.lane is not None})
    scene = Scene(stage.now, stage.limits, stage.lanes, known={Key("node", "n"): None})
    view = View(scene)
    pull = Pull("n", "s-")
    view.add(*stage._load(Wants(look=pull.wants(scene).look, counts=pull.wants(scene).counts)))
    view.loads = 250
    with pytest.raises(Need) as asked:
        pull.decide(view)
    assert len(asked.value.wants.ready) == 3


def test_sources_that_are_paused_keep_no_pull_from_what_others_have() -> None:
    stage = Stage(max_depth=10_000, max_inflight=10_000, age_ms=0)
    for n in range(50):
        stage.submit("paused", source=f"paused-{n:02}")
    for n in range(250):
        stage.submit(source=f"live-{n % 50:02}")
    stage.do(PauseKind("paused"))
    assert stage.together([Pull("n", "s-", 100, capabilities=frozenset())]) <= 2
    assert sum(job.status == "running" for job in map(stage.job, stage.ids())) == 100


def test_sources_that_run_out_while_a_batch_takes_turns_are_made_up_for_by_others() -> None:
    stage = Stage()
    for n in range(20):
        stage.submit(source=f"short-{n:02}")
    for n in range(100):
        stage.submit(source=f"long-{n % 2}")
    pulls: list[Command] = [Pull(f"n{n}", f"s{n}-", capabilities=frozenset()) for n in range(64)]
    assert stage.together(pulls) <= 4
    assert Counter(job.source.partition("-")[0] for job in map(stage.job, stage.ids()) if job.status == "running") == {
        "short": 20,
        "long": 44,
    }


def test_a_released_job_keeps_its_place_before_those_that_came_later() -> None:
    stage = Stage()
    first = stage.submit()
    stage.now += 10
    stage.submit()
    lease = stage.lease()
    assert lease.id == first
    stage.now += 10
    stage.do(Release(first, lease.lease_id or ""))
    assert stage.lease().id == first
