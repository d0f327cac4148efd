"""What the oracle of crash runs asks of leases: who may hold a job when, and whose word counts."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from itertools import pairwise
from typing import Any

from tools.crash_case import Case, Delivery, Found, Violation, Word
from tools.crash_history import Exchange

REMEMBERED = 8
"""How many ended leases of a job the hub promises to remember."""


def deliveries(case: Case) -> Found:
    """No job is handed out again but after its lease was lost or ended, and each time as the next attempt."""
    nobody = sorted(exchange.sent for exchange in case.pulls if exchange.unknown)
    room = sum(int(exchange.pull["max"]) for exchange in case.pulls if exchange.unknown and exchange.pull)
    holders: dict[str, str] = {}
    untold = 0
    for job_id, found in case.deliveries.items():
        job = case.jobs.get(job_id)
        if job is None:
            yield Violation("lost job", "a worker was told of it, and it is not there", job_id)
            continue
        for one in found:
            if holders.setdefault(one.lease_id, job_id) != job_id:
                yield Violation("double delivery", f"its lease is also that of job {holders[one.lease_id]}", job_id)
            yield from _as_submitted(job, one)
        for before, after in pairwise(found):
            yield from _in_turn(case, before, after)
        for place, one in enumerate(found):
            if one.attempt - 1 - place > bisect_left(nobody, one.told_at):
                text = f"attempt {one.attempt} came after more attempts than pulls that got no answer"
                yield Violation("delivery to nobody", text, job_id)
        if found[-1].attempt > job["attempt"]:
            text = f"attempt {found[-1].attempt} was told, and the job counts {job['attempt']}"
            yield Violation("attempt did not grow", text, job_id)
    for job_id, job in case.jobs.items():
        missing = job["attempt"] - len(case.deliveries.get(job_id, ()))
        untold += max(0, missing)
        if missing > len(nobody):
            text = f"{missing} of {job['attempt']} attempts were told to nobody, and {len(nobody)} pulls got no answer"
            yield Violation("delivery to nobody", text, job_id)
    if untold > room:
        text = f"{untold} attempts were told to nobody; pulls without an answer had room for {room}"
        yield Violation("delivery to nobody", text)


def _as_submitted(job: dict[str, Any], delivery: Delivery) -> Found:
    for _, lease in delivery.tellings:
        if int(lease["attempt"]) != delivery.attempt:
            yield Violation("attempt did not grow", "one lease was told as two attempts", delivery.job_id)
        if any(lease[name] != job[name] for name in ("kind", "params")):
            yield Violation("changed payload", f"its worker got {lease['kind']} {lease['params']}", delivery.job_id)


def _in_turn(case: Case, before: Delivery, after: Delivery) -> Found:
    job_id = before.job_id
    if before.attempt == after.attempt:
        yield Violation("double delivery", f"two leases are attempt {after.attempt}", job_id)
    elif after.told_at < case.asked_at(before):
        text = f"attempt {before.attempt} was asked for after attempt {after.attempt} was told"
        yield Violation("attempt did not grow", text, job_id)
    elif not before.ended_by(after.told_at, "fail", "release"):
        early = case.live_until(before, after.told_at) - after.told_at
        if early > 0:
            text = f"attempt {after.attempt} was told {early:.3f} s before the lease of attempt {before.attempt} ended"
            yield Violation("double delivery", text, job_id)


def words(case: Case) -> Found:
    """A word about a live lease is taken, about a foreign or superseded one it is not, a repeat is answered alike."""
    for word in case.words:
        found = case.deliveries.get(word.job_id, [])
        own = next((one for one in found if one.lease_id == word.lease_id), None)
        if own is None:
            if word.acknowledged:
                yield Violation("foreign lease accepted", f"{word.what} with lease {word.lease_id}", word.job_id)
            continue
        others = [one for one in own.words if one.possible and one.what != "extend" and one is not word]
        earlier = [one for one in others if one.exchange.sent < word.exchange.sent]
        rivals = [one for one in others if one.exchange.sent < word.exchange.done]
        repeated = [one for one in earlier if one.text == word.text and word.what != "extend"]
        passed = [one for one in found if one.attempt > own.attempt and one.told_at < word.exchange.sent]
        if word.acknowledged:
            if passed and not repeated:
                text = f"{word.what} of attempt {own.attempt} was taken after attempt {passed[0].attempt} was told"
                yield Violation("superseded lease accepted", text, word.job_id)
        elif word.possible:
            continue
        elif not rivals and word.exchange.done < surely_lived(case, own, word):
            text = f"{word.what} of attempt {own.attempt} was refused: {word.exchange.answer}"
            yield Violation("live lease refused", text, word.job_id)
        elif found[-1].attempt <= REMEMBERED and any(one.acknowledged for one in repeated):
            text = f"{word.what} of attempt {own.attempt} was acknowledged before, and now refused"
            yield Violation("repeat refused", text, word.job_id)


def surely_lived(case: Case, delivery: Delivery, word: Word) -> float:
    """Until when the lease lived for sure as this was said of it."""
    return case.live_until(delivery, word.exchange.sent)


def repeats(case: Case) -> Found:
    """A pull that is repeated with its pull_id gets the leases that it got, those that live, and no others."""
    asked: dict[tuple[str, str], list[Exchange]] = defaultdict(list)
    for exchange in case.pulls:
        pull = exchange.pull or {}
        if exchange.acknowledged and pull.get("pull_id"):
            asked[pull["node_id"], pull["pull_id"]].append(exchange)
    by_lease = {one.lease_id: one for found in case.deliveries.values() for one in found}
    for (node_id, pull_id), exchanges in asked.items():
        first = next((one for one in exchanges if one.leases), None)
        for again in exchanges:
            if first is None or again.sent < first.done:
                continue
            had, has = ({lease["lease_id"] for lease in one.leases} for one in (first, again))
            for lease_id in sorted(has - had):
                text = f"pull {pull_id} of {node_id} got a lease more when it was repeated"
                yield Violation("leases of a pull changed", text, by_lease[lease_id].job_id)
            for one in (by_lease[lease_id] for lease_id in sorted(had - has)):
                ended = one.ended_by(again.done, "complete", "fail", "release")
                if not ended and again.done < case.live_until(one, again.sent):
                    text = f"pull {pull_id} of {node_id} lost a live lease when it was repeated"
                    yield Violation("leases of a pull changed", text, one.job_id)
