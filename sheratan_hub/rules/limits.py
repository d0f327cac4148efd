"""Rate limits of sources (design rule 10): submits a minute at the door, jobs running at once when leased.

A limit is configured, or stored at run time; the stored one wins. All stored ones stand in one row, which submits
and pulls look at. Submits are counted in a row of each limited source, running jobs by their live leases.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import msgspec

from sheratan_hub.rules.command import Code, Decision, Event, Limits, Quota, Rate, Refused, Scene
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Row, Wants

RATES = Key("standing", "rates")
"""The row that holds the limits set at run time."""

MINUTE_US = 60_000_000

Rates = dict[str, Rate]


def rates_of(row: Row | None) -> Mapping[str, Rate]:
    """The limits kept in the row, by source."""
    return _read(row.doc) if row is not None else {}


def rate_of(source: str, stored: Mapping[str, Rate], limits: Limits) -> Rate | None:
    """The limit in force for this source."""
    return (stored.get(source) or limits.rates.get(source)) if source else None


class Taken(msgspec.Struct, frozen=True, array_like=True):
    """A limited source's submits: when all that it has used will be given back (microseconds since 1970)."""

    full_at_us: int


def pay(taken: Taken, rate: Rate, now: int) -> tuple[Taken | None, Quota]:
    """One more submit at this time (ms): what is taken then, None if it has to wait; and what is left.

    A bucket of `per_minute` that fills evenly (GCRA, the leaky bucket as a meter).
    """
    each, now_us = MINUTE_US // rate.per_minute, now * 1000
    full_at = min(max(taken.full_at_us, now_us), now_us + MINUTE_US) + each  # no further off, whatever the clock did
    over = full_at - now_us - each * rate.per_minute
    if over > 0:
        return None, Quota(rate.per_minute, 0, -(-over // 1000))
    left = -over // each
    return Taken(full_at), Quota(rate.per_minute, left, 0 if left else -(-(over + each) // 1000))


def admit(view: View, source: str) -> tuple[Row, bool, Quota] | None:
    """The row that says that this source has submitted one more, whether it is new, and what is left; None: no limit.

    Refused: `rate_limited`.
    """
    rate = rate_of(source, rates_of(view.look(*RATES)), view.scene.limits)
    if rate is None or not rate.per_minute:
        return None
    row = view.row("submits", source)
    taken, quota = pay(_taken(row.doc) if row is not None else Taken(0), rate, view.now)
    if taken is None:
        raise Refused(
            Code.RATE_LIMITED,
            f"source {source} may submit {rate.per_minute} jobs a minute; try again later",
            reason="submits_per_minute",
            retry_after_ms=quota.next_in_ms,
            detail={"source": source},
            quota=quota,
        )
    return Row("submits", source, _encode(taken)), row is None, quota


class Limited(msgspec.Struct, frozen=True, gc=False):
    """A source's limit in force, None if there is none, and whether it was set at run time."""

    source: str
    rate: Rate | None
    stored: bool


class SetRate(msgspec.Struct, frozen=True, gc=False):
    """Set a source's limit, in the place of a configured one."""

    source: str
    rate: Rate

    def wants(self, scene: Scene) -> Wants:
        """The limits set so far."""
        return Wants(keys={RATES})

    def decide(self, view: View) -> Decision:
        """The answer is `Limited`."""
        rates = {**rates_of(view.row(*RATES)), self.source: self.rate}
        return _written(view, rates, Limited(self.source, self.rate, True), "rate_limit.set")


class DropRate(msgspec.Struct, frozen=True, gc=False):
    """Forget a source's limit that was set at run time; the configured one counts again."""

    source: str

    def wants(self, scene: Scene) -> Wants:
        """The limits set so far."""
        return Wants(keys={RATES})

    def decide(self, view: View) -> Decision:
        """The answer is `Limited`. Refused: `rate_limit_not_found`."""
        rates = dict(rates_of(view.row(*RATES)))
        if rates.pop(self.source, None) is None:
            raise Refused(Code.RATE_LIMIT_NOT_FOUND, f"no limit of source {self.source} was set at run time")
        left = Limited(self.source, rate_of(self.source, {}, view.scene.limits), False)
        return _written(view, rates, left, "rate_limit.dropped")


def _written(view: View, rates: Rates, answer: Limited, event: str) -> Decision:
    row, there = Row(RATES.kind, RATES.id, _encode(rates)), view.row(*RATES) is not None
    note = Event(view.now, event, "admin", meta={"source": answer.source})
    return Decision(answer, new=() if there else (row,), put=(row,) if there else (), notes=(note,))


_encode = msgspec.json.Encoder().encode
_taken = msgspec.json.Decoder(Taken).decode
_read = lru_cache(16)(msgspec.json.Decoder(Rates).decode)
