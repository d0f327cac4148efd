"""Job ids: UUIDs of version 7, each above the one before, whatever the clock does."""

import random
from uuid import RFC_4122, UUID

from hypothesis import given
from hypothesis import strategies as st

from sheratan_hub.clock import Ids, SystemClock

MOST_NOISE = (1 << 80) - 1
MOMENTS = st.lists(st.integers(0, (1 << 48) - 2), min_size=1, max_size=30)


@given(MOMENTS, st.lists(st.integers(0, MOST_NOISE), min_size=30, max_size=30))
def test_every_id_is_a_uuid_of_version_7_and_above_the_one_before(moments, noises):
    ids = Ids()
    made = [ids.next(now, noise) for now, noise in zip(moments, noises, strict=False)]
    assert made == sorted(set(made))
    for text in made:
        uuid = UUID(text)
        assert (str(uuid), uuid.version, uuid.variant) == (text, 7, RFC_4122)


def test_an_id_tells_the_millisecond_that_it_was_made_in():
    assert UUID(Ids().next(1_700_000_000_123, 0)).int >> 80 == 1_700_000_000_123


def test_ids_go_on_while_the_clock_stands_still_or_goes_back():
    ids = Ids()
    made = [ids.next(now, MOST_NOISE) for now in (5, 5, 4, 5)]
    assert made == sorted(set(made))
    assert [UUID(text).int >> 80 for text in made] == [5, 5, 5, 5]


def test_a_count_that_runs_over_moves_on_to_the_next_millisecond():
    ids = Ids()
    made = [ids.next(7, MOST_NOISE) for _ in range(40_000)]
    assert made == sorted(set(made))
    assert UUID(made[-1]).int >> 80 == 8


def test_two_processes_of_one_millisecond_do_not_meet():
    made = {Ids().next(9, random.Random(seed).getrandbits(80)) for seed in range(10_000)}
    assert len(made) == 10_000


def test_the_systems_clock_makes_them_in_order():
    clock = SystemClock()
    made = [clock.job_id() for _ in range(10_000)]
    assert made == sorted(set(made))
