"""A crash run by job: what was asked of each, what was told of each, and until when a lease surely lived."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import inf
from typing import Any

from tools.crash_history import RESULTS, SUBMIT, Exchange, History, Life


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that was asked for, alone or in a batch. `outcome` is what was answered to it alone."""

    exchange: Exchange
    body: dict[str, Any]
    outcome: dict[str, Any] | None

    @property
    def acknowledged(self) -> bool:
        """The hub has said that it is done."""
        return self.exchange.acknowledged and self.outcome is not None and self.outcome.get("ok") is True

    @property
    def unknown(self) -> bool:
        """It may or may not have happened."""
        if self.exchange.acknowledged:
            return self.outcome is None or (not self.acknowledged and int(self.outcome.get("status", 500)) >= 500)
        return self.exchange.unknown

    @property
    def possible(self) -> bool:
        """It happened, or may have."""
        return self.acknowledged or self.unknown

    @property
    def told(self) -> dict[str, Any]:
        """The outcome, empty if there is none."""
        return self.outcome or {}


@dataclass(frozen=True, slots=True)
class Submit(Part):
    """A job handed in. Every job of a run has a `tag` of its own in its params; a repeat has the same."""

    @property
    def tag(self) -> str:
        """What makes it this job and no other."""
        return str(self.body["params"]["tag"])

    @property
    def key(self) -> str | None:
        """Its idempotency key."""
        return self.body.get("idempotency_key")


@dataclass(frozen=True, slots=True)
class Word(Part):
    """What a worker said of a lease: `complete`, `fail`, `extend` or `release`."""

    job_id: str
    what: str

    @property
    def lease_id(self) -> str:
        """The lease it speaks of."""
        return str(self.body["lease_id"])

    @property
    def text(self) -> str:
        """What it says: two with the same text are repeats."""
        return json.dumps([self.what, self.body.get("result"), self.body.get("error")], sort_keys=True)


@dataclass(slots=True)
class Delivery:
    """A lease that was told to a worker, each time that it was told, and what was said of it."""

    job_id: str
    lease_id: str
    attempt: int
    tellings: list[tuple[Exchange, dict[str, Any]]] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)

    @property
    def told_at(self) -> float:
        """When the hub had surely handed it out."""
        return min(exchange.done for exchange, _ in self.tellings)

    def ended_by(self, before: float, *verbs: str) -> bool:
        """Whether its worker may have ended it by then with one of these."""
        return any(word.possible and word.what in verbs and word.exchange.sent < before for word in self.words)


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise: which, of what job (or, if the hub gave it no id, which tag), and how it shows."""

    what: str
    text: str
    job_id: str = ""
    tag: str = ""


Found = Iterator[Violation]


class Case:
    """A history by job. `jobs` are those of the last reading."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.submits: dict[str, list[Submit]] = defaultdict(list)
        self.batches: list[tuple[Exchange, list[Submit]]] = []
        self.words: list[Word] = []
        self.deliveries: dict[str, list[Delivery]] = {}
        self.pulls: list[Exchange] = []
        self.jobs = {str(job["job_id"]): job for job in history.readings[-1].jobs} if history.readings else {}
        for exchange in history.exchanges:
            if exchange.reached:
                self._read(exchange)
        by_lease = {(one.job_id, one.lease_id): one for found in self.deliveries.values() for one in found}
        for word in self.words:
            if (word.job_id, word.lease_id) in by_lease:
                by_lease[word.job_id, word.lease_id].words.append(word)
        for found in self.deliveries.values():
            found.sort(key=lambda one: one.attempt)

    def _read(self, exchange: Exchange) -> None:
        if exchange.path == SUBMIT and exchange.method == "POST":
            submits = [Submit(*part) for part in _parts(exchange, "jobs")]
            for submit in submits:
                self.submits[submit.tag].append(submit)
            if "jobs" in exchange.body:
                self.batches.append((exchange, submits))
        self.words += _words(exchange)
        if exchange.pull is not None:
            self.pulls.append(exchange)
        for lease in exchange.leases:
            self._deliver(exchange, lease)

    def _deliver(self, exchange: Exchange, lease: dict[str, Any]) -> None:
        known = self.deliveries.setdefault(str(lease["job_id"]), [])
        same = [one for one in known if one.lease_id == lease["lease_id"]]
        if not same:
            same = [Delivery(str(lease["job_id"]), str(lease["lease_id"]), int(lease["attempt"]))]
            known += same
        same[0].tellings.append((exchange, lease))

    @cached_property
    def first_pulls(self) -> dict[tuple[str, str], float]:
        """When each pull_id of a node was first sent."""
        first: dict[tuple[str, str], float] = {}
        for exchange in self.pulls:
            pull = exchange.pull or {}
            if pull.get("pull_id"):
                first.setdefault((pull["node_id"], pull["pull_id"]), exchange.sent)
        return first

    def asked_at(self, delivery: Delivery) -> float:
        """The earliest moment at which the hub can have handed it out."""
        moments = []
        for exchange, _ in delivery.tellings:
            pull = exchange.pull or {}
            moments.append(self.first_pulls.get((pull["node_id"], pull.get("pull_id") or ""), exchange.sent))
        return min(moments)

    def live_until(self, delivery: Delivery, before: float) -> float:
        """A moment until which the lease surely lived unless its worker ended it, by what had been asked `before`.

        A telling or an extension promises seconds, counted at the earliest from when it was asked for. Where the
        lease was alive as a hub was killed, the next hub leaves it the restart grace, or its own time if shorter.
        """
        moments: list[tuple[float, float | Word | Life, Life | None]] = [
            (exchange.sent, float(lease["lease_seconds"]), None) for exchange, lease in delivery.tellings
        ]
        moments += [(word.exchange.sent, word, None) for word in delivery.words if word.what == "extend"]
        lives = self.history.lives
        moments += [(life.began, life, past) for past, life in pairwise(lives)]
        until, shortest = 0.0, inf
        for at, what, past in sorted((one for one in moments if one[0] < before), key=lambda one: one[0]):
            if isinstance(what, float):
                until, shortest = max(until, at + what), min(shortest, what)
            elif isinstance(what, Word):
                seconds = float(what.body["seconds"])
                if what.acknowledged:
                    until = at + min(seconds, float(what.told["lease_seconds"]))
                elif what.unknown:
                    until = min(until, at + seconds)
                shortest = min(shortest, seconds)
            elif past is not None and until > past.dead:
                until = max(until, at + min(self.history.grace_seconds, shortest))
        return until - self.history.tolerance


def _parts(exchange: Exchange, name: str) -> Iterator[tuple[Exchange, dict[str, Any], dict[str, Any] | None]]:
    """Each entry of a batch with its outcome, or the whole of a request that is none."""
    if name not in exchange.body:
        yield exchange, exchange.body, exchange.answer if exchange.acknowledged else None
        return
    outcomes = exchange.answer.get(name, []) if exchange.acknowledged else []
    for place, body in enumerate(exchange.body[name]):
        yield exchange, body, outcomes[place] if place < len(outcomes) else None


def _words(exchange: Exchange) -> Iterable[Word]:
    if exchange.path == RESULTS:
        return [Word(*part, part[1]["job_id"], _verb(part[1])) for part in _parts(exchange, "results")]
    *_, job_id, verb = exchange.path.split("/")
    if exchange.method != "POST" or verb not in ("result", "extend", "release"):
        return []
    what = _verb(exchange.body) if verb == "result" else verb
    return [Word(exchange, exchange.body, exchange.answer if exchange.acknowledged else None, job_id, what)]


def _verb(body: dict[str, Any]) -> str:
    return "complete" if body["ok"] else "fail"
