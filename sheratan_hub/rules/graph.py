"""Several jobs submitted at once that may depend on each other: their plan, and the command that makes them (rule 7).

Members name each other by `ref`, in any order. A job that exists cannot depend on one that is yet to be made, so a
cycle can only lie inside one batch, and the plan finds it before anything is decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from typing import Any

import msgspec

from sheratan_hub.rules.command import Code, Decision, Need, Refused, Scene, joined
from sheratan_hub.rules.edges import AT_ONCE
from sheratan_hub.rules.submit import Submit, Submitted
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Wants, merge

EDGES_MAX = 20_000
"""How many dependencies the jobs of one batch may have in all."""

EDGES_AT_ONCE = 2000
"""How many of them are linked in the transaction that makes the jobs; the others follow piece by piece."""


class Member(msgspec.Struct, frozen=True, gc=False):
    """An entry of a batch: its `ref`, and its submit, whose `depends_on` holds refs and job ids; or why it is none."""

    ref: str | None
    submit: Submit | Refused


class Graph(msgspec.Struct, frozen=True, gc=False):
    """Make the members parents first: each alone, or (`atomic`) all or none. Made by `plan`.

    `parents` are by member: the place of another, or the id of a job that was there before.
    """

    members: tuple[Submit | Refused, ...]
    parents: tuple[tuple[int | str, ...], ...]
    order: tuple[int, ...]
    atomic: bool = True

    def __len__(self) -> int:
        """How many rows it makes, about: what it counts for in a batch of the committer."""
        return len(self.members) + sum(map(len, self.parents))

    def wants(self, scene: Scene) -> Wants:
        """All that the members want."""
        return merge(one.wants(scene) for one in self.members if isinstance(one, Submit))

    def decide(self, view: View) -> Decision:
        """The answer is a tuple of `Submitted` or `Refused`, one a member. Refused, if atomic, as the first is."""
        made = Made(self, view.trial())
        for place in self.order:
            made.try_one(place)
        if made.needs:
            raise Need(merge(made.needs))
        outcomes = tuple(made.outcomes[place] for place in range(len(self.members)))
        if self.atomic:
            for place, outcome in enumerate(outcomes):
                if isinstance(outcome, Refused):
                    raise in_entry(outcome, place, "of the atomic batch")
        done = joined(made.decisions)
        return msgspec.structs.replace(done, answer=outcomes)


class Made:
    """What has become of a graph's members so far, on a trial view."""

    def __init__(self, graph: Graph, trial: View) -> None:
        self._graph, self._trial = graph, trial
        self.outcomes: dict[int, Any] = {}
        self.needs: list[Wants] = []
        self.decisions: list[Decision] = []

    def try_one(self, place: int) -> None:
        """Decide one member, unless a parent of it was refused, or is not decided yet for want of rows."""
        member = self._graph.members[place]
        if isinstance(member, Refused):
            self.outcomes[place] = member
            return
        parents = self._graph.parents[place]
        known = [self.outcomes.get(one) if isinstance(one, int) else one for one in parents]
        refused = next((one for one, is_ in zip(parents, known, strict=True) if isinstance(is_, Refused)), None)
        if refused is not None and isinstance(refused, int):
            self.outcomes[place] = in_entry(self.outcomes[refused], refused, "that it depends on")
            return
        ids = [one.job.id if isinstance(one, Submitted) else one for one in known if one is not None]
        try:
            submit = msgspec.structs.replace(member, depends_on=tuple(dict.fromkeys(ids)))
            decision = submit.decide(self._trial)
        except Need as need:
            self.needs.append(need.wants)
            return
        except Refused as no:
            if not self.needs:  # else it may have been refused for what is not loaded yet
                self.outcomes[place] = no
            return
        if len(ids) == len(parents):
            self._trial.apply(decision)
            self.outcomes[place] = decision.answer
            self.decisions.append(decision)


def plan(members: Sequence[Member], *, atomic: bool) -> Graph:
    """The graph of a batch. Refused as a whole: a `ref` given twice, a cycle, or too many dependencies."""
    places = _places(members)
    parents = tuple(_parents(member, places) for member in members)
    if sum(map(len, parents)) > EDGES_MAX:
        raise Refused(Code.INVALID_FIELD, f"the jobs of a batch may have {EDGES_MAX} dependencies in all")
    order = _order(parents)
    named = {one for some in parents for one in some if isinstance(one, int)}
    room = EDGES_AT_ONCE
    submits: list[Submit | Refused] = []
    for place, member in enumerate(members):
        submit = member.submit
        if isinstance(submit, Submit):
            n = len(parents[place])
            later = n > min(AT_ONCE, room)
            room -= 0 if later else n
            submit = msgspec.structs.replace(submit, depends_on=(), later=later, dependents=place in named)
        submits.append(submit)
    return Graph(tuple(submits), parents, order, atomic)


def alone(submit: Submit) -> Submit:
    """The submit of one job, which is linked later if it has many parents."""
    if not submit.depends_on:
        return submit
    ids = tuple(dict.fromkeys(submit.depends_on))
    return msgspec.structs.replace(submit, depends_on=ids, later=len(ids) > AT_ONCE)


def outside(submits: Iterable[Submit | Refused], parents: Iterable[tuple[int | str, ...]]) -> list[str]:
    """The job ids, each once, that members which are linked later depend on: they are to be looked for before."""
    late = (some for one, some in zip(submits, parents, strict=True) if isinstance(one, Submit) and one.later)
    return list(dict.fromkeys(id for some in late for id in some if isinstance(id, str)))


def lacking(graph: Graph, found: set[str]) -> Graph:
    """The graph, knowing which of the jobs that `outside` names exist."""
    members = list(graph.members)
    for place, member in enumerate(members):
        if isinstance(member, Submit) and member.later:
            unknown = next((id for id in graph.parents[place] if isinstance(id, str) and id not in found), None)
            members[place] = msgspec.structs.replace(member, unknown=unknown)
    return msgspec.structs.replace(graph, members=tuple(members))


def refuse_repeated(members: Sequence[Member]) -> None:
    """Refused with `invalid_field` when two members have one `ref`."""
    _places(members)


def in_entry(no: Refused, place: int, which: str) -> Refused:
    """A member's refusal, telling its place in the batch."""
    text = f"entry {place} {which}: {no.text}"
    return Refused(no.code, text, reason=no.reason, retry_after_ms=no.retry_after_ms, detail=no.detail, quota=no.quota)


def _places(members: Sequence[Member]) -> dict[str, int]:
    places: dict[str, int] = {}
    for place, member in enumerate(members):
        if member.ref is not None and places.setdefault(member.ref, place) != place:
            raise Refused(Code.INVALID_FIELD, f"two jobs of the batch have the ref {member.ref}")
    return places


def _parents(member: Member, places: dict[str, int]) -> tuple[int | str, ...]:
    """A name is a member's `ref` if there is one, else a job id."""
    if isinstance(member.submit, Refused):
        return ()
    return tuple(dict.fromkeys(places.get(name, name) for name in member.submit.depends_on))


def _order(parents: tuple[tuple[int | str, ...], ...]) -> tuple[int, ...]:
    """The places, parents first, else as given. Refused with `dependency_cycle`."""
    children: dict[int, list[int]] = {}
    left = [0] * len(parents)
    for place, some in enumerate(parents):
        for one in some:
            if isinstance(one, int):
                children.setdefault(one, []).append(place)
                left[place] += 1
    ready = [place for place, n in enumerate(left) if not n]  # a heap: it is sorted
    order = []
    while ready:
        place = heappop(ready)
        order.append(place)
        for child in children.get(place, ()):
            left[child] -= 1
            if not left[child]:
                heappush(ready, child)
    if len(order) < len(parents):
        stuck = next(place for place, n in enumerate(left) if n)
        raise Refused(Code.DEPENDENCY_CYCLE, f"entry {stuck} is in a cycle of dependencies, or waits for one")
    return tuple(order)
