"""Pulling: which jobs a node gets under which leases, and the same again for the same `pull_id` (rules 3, 6, 9, 10)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import msgspec

from sheratan_hub.rules.command import Decision, Event, Need, Refused, Scene, Served
from sheratan_hub.rules.eligible import hub_room, kind_stop, node_room, node_stop, policy_stop
from sheratan_hub.rules.hand import Hand
from sheratan_hub.rules.jobs import Job, job_event, job_of
from sheratan_hub.rules.lanes import Offer, read_lane
from sheratan_hub.rules.limits import RATES
from sheratan_hub.rules.nodes import Node, node_of
from sheratan_hub.rules.pauses import PAUSES, Pauses, pauses_of
from sheratan_hub.rules.policies import denied, node_ask
from sheratan_hub.rules.policy import Judge
from sheratan_hub.rules.view import View, leases_on
from sheratan_hub.storage import Key, Ready, Row, Wants

REMEMBERED = 8
"""How many pull_ids are remembered for each node."""

REASONS = (
    "no_job",
    "inflight_limit",
    "node_stale",
    "node_dead",
    "node_draining",
    "node_busy",
    "node_full",
    "paused",
    "throttled",
    "pull_spent",
    "draining",
    "policy_denied",
)
"""Why a pull was answered without jobs: every `reason` of a pull's answer."""


class Pulls(msgspec.Struct, frozen=True, array_like=True):
    """A node's last pulls that got jobs: (pull_id, ((job_id, lease_id), ...)), oldest first."""

    pulls: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()

    def leases(self, pull_id: str) -> tuple[tuple[str, str], ...]:
        """What this pull got, empty if it is not remembered."""
        return next((leases for known, leases in self.pulls if known == pull_id), ())

    def with_pull(self, pull_id: str, leases: tuple[tuple[str, str], ...]) -> Pulls:
        """With one more pull; the oldest beyond `REMEMBERED` is forgotten."""
        others = [pull for pull in self.pulls if pull[0] != pull_id]
        return Pulls((*others, (pull_id, leases))[-REMEMBERED:])


class Pulled(msgspec.Struct, frozen=True, gc=False):
    """The jobs leased, or why there are none. `params` holds, by job id, those kept in rows of their own.

    `free` is what a pull without jobs bids if it waits: the leases that its node has room for; of a node that names
    no limit, what it asks for less what it holds.
    """

    jobs: tuple[Job, ...] = ()
    params: tuple[tuple[str, bytes], ...] = ()
    reason: str | None = None
    free: int = 0
    denied: Refused | None = None
    """The policy's refusal, with `policy_denied`."""


class Pull(msgspec.Struct, frozen=True, gc=False):
    """Lease up to `limit` jobs to a node. `secret` is unguessable and makes the lease ids.

    `capabilities` None means: those of the node's last heartbeat. `kinds` empty means any.
    """

    node_id: str
    secret: str
    limit: int = 1
    pull_id: str | None = None
    capabilities: frozenset[str] | None = None
    kinds: frozenset[str] = frozenset()

    def wants(self, scene: Scene) -> Wants:
        """The node, its remembered pulls, pauses and limits, how many leases live, and the lane probably next."""
        look = {Key("node", self.node_id), PAUSES, RATES}
        wants = Wants(look=look, counts={"job:running", leases_on(self.node_id)})
        if self.pull_id is not None:
            wants.keys.add(Key("puller", self.node_id))
        wants.ready = self._foreseen(scene)
        return wants

    def _foreseen(self, scene: Scene) -> dict[Ready, int]:
        """The lane that it is probably served from, and how deep; none if nobody knows, or if it is for the decision
        to find that out: what is paused or denied, and what several sources give to one pull."""
        known, key = scene.known, Key("node", self.node_id)
        if self.capabilities is None and key not in known:
            return {}
        row, lanes = known.get(key), scene.lanes
        offer = self._offer(node_of(row) if row else None)
        if lanes.of_one_source:
            most = min(self.limit, scene.limits.max_inflight)
            return {Ready(lane): most for lane in lanes.turn(offer, 1, (), scene.now)}
        if self.limit > 1 or not scene.judge.trivial or pauses_of(known.get(PAUSES)).pauses:
            return {}
        if offer not in scene.turns:
            scene.turns[offer] = lanes.turns(offer, scene.now)
        lane = next(scene.turns[offer], None)
        return {} if lane is None else {Ready(lane): 1}

    def decide(self, view: View) -> Decision:
        """Leases, the same leases again, or none with a reason. Never refused."""
        pulls = self._pulls(view)
        again = self._again(view, pulls)
        if again is not None:
            return again
        row = view.look("node", self.node_id)
        node = node_of(row) if row else None
        leases, limits = view.count(leases_on(self.node_id)), view.scene.limits
        room = node_room(node, leases, limits)
        free = self.limit - leases if room is None else room
        stop = node_stop(node, leases, view.now, limits, view.scene.started_at)
        if stop is not None:
            return Decision(Pulled(reason=stop, free=free))
        barred = _barred(self.node_id, node, view.scene.judge)
        if barred is not None:
            return Decision(Pulled(reason="policy_denied", free=free, denied=barred))
        pauses = pauses_of(view.look(*PAUSES))
        if pauses.pauses and self._all_paused(pauses, view.now):
            return Decision(Pulled(reason="paused", free=free))
        left = hub_room(view.count("job:running"), limits)
        if left <= 0:
            note = Event(view.now, "pull.saturated", self.node_id)
            return Decision(Pulled(reason="inflight_limit", free=free), notes=(note,))
        offer = self._offer(node)
        hand = Hand(view, offer, pauses, bars_of(self.node_id, node, view.scene.judge))
        rows = hand.take(min(self.limit, left) if room is None else min(self.limit, left, room))
        if not rows:
            return Decision(Pulled(reason=hand.why_none(), free=free))
        return self._lease(view, [job_of(row) for row in rows], pulls, node, Served(offer, tuple(hand.lanes)))

    def _offer(self, node: Node | None) -> Offer:
        if self.capabilities is None:
            return _offer_of(node.capabilities if node else (), self.kinds)
        return Offer(self.capabilities, self.kinds)

    def _all_paused(self, pauses: Pauses, now: int) -> bool:
        if pauses.of_all(now) is not None:
            return True
        return bool(self.kinds) and all(kind_stop(kind, pauses, now) for kind in self.kinds)

    def _lease(self, view: View, jobs: list[Job], pulls: Pulls | None, node: Node | None, served: Served) -> Decision:
        apart = tuple(_params(view, jobs))
        zone = node.zone if node else None
        leased = tuple(self._leased(job, place, view, zone) for place, job in enumerate(jobs))
        put = [job.row for job in leased]
        new: tuple[Row, ...] = ()
        if self.pull_id is not None and pulls is not None:
            given = tuple((job.id, job.lease_id or "") for job in leased)
            row = Row("puller", self.node_id, _encode(pulls.with_pull(self.pull_id, given)))
            if view.row("puller", self.node_id) is None:
                new = (row,)
            else:
                put.append(row)
        events = tuple(job_event(job, "leased", view.now, self.node_id, attempt=job.attempt) for job in leased)
        return Decision(Pulled(leased, apart), new=new, put=tuple(put), events=events, served=served)

    def _leased(self, job: Job, place: int, view: View, zone: str | None) -> Job:
        lease_ms = view.scene.limits.lease_ms
        return job.after(
            "leased",
            attempt=job.attempt + 1,
            node_id=self.node_id,
            zone=zone,
            lease_id=f"{self.secret}{place:02x}",
            lease_ms=lease_ms,
            lease_until=view.now + lease_ms,
            started_at=view.now,
            sending=1,
            not_before=0,
            policy_version=view.scene.judge.version,
        )

    def _pulls(self, view: View) -> Pulls | None:
        if self.pull_id is None:
            return None
        row = view.row("puller", self.node_id)
        return _decode(row.doc) if row else Pulls()

    def _again(self, view: View, pulls: Pulls | None) -> Decision | None:
        """What is left of a repeated pull's leases, none with a reason; None if this pull is new."""
        known = pulls.leases(self.pull_id) if pulls and self.pull_id else ()
        if not known:
            return None
        missing = {Key("job", job_id) for job_id, _ in known if not view.has("job", job_id, locked=True)}
        if missing:
            raise Need(Wants(keys=missing))
        rows = ((view.row("job", job_id), lease_id) for job_id, lease_id in known)
        jobs = [(job_of(row), lease_id) for row, lease_id in rows if row is not None]
        live = [job for job, lease_id in jobs if job.status == "running" and job.lease_id == lease_id]
        if not live:
            return Decision(Pulled(reason="pull_spent"))
        sent = tuple(job.with_(sending=job.sending + 1) for job in live)
        note = Event(view.now, "pull.repeated", self.node_id)
        put = tuple(job.row for job in sent)
        return Decision(Pulled(sent, tuple(_params(view, live))), put=put, notes=(note,))


@lru_cache(1024)
def _offer_of(capabilities: tuple[str, ...], kinds: frozenset[str]) -> Offer:
    """What a node with these capabilities offers; a batch asks it of every pull, more than once."""
    return Offer(frozenset(capabilities), kinds)


def bars_of(node_id: str, node: Node | None, judge: Judge) -> Callable[[str], bool] | None:
    """Tells of a lane whether the policy keeps its jobs from this node; None: it keeps none."""
    if judge.trivial:
        return None

    def bars(name: str) -> bool:
        lane = read_lane(name)
        return policy_stop(judge, node_id, node, lane.kind, lane.source) is not None

    return bars


def _barred(node_id: str, node: Node | None, judge: Judge) -> Refused | None:
    """Why the policy lets the node have no job at all, None if it may have some."""
    if judge.trivial:
        return None
    ask = node_ask("pull", node_id, node)
    verdict = judge.pull(ask)
    return None if verdict.allowed else denied(judge, ask, verdict)


def _params(view: View, jobs: list[Job]) -> Iterator[tuple[str, bytes]]:
    """The params that have rows of their own, all asked for at once."""
    apart = [job.id for job in jobs if job.params_apart]
    missing = {Key("params", id) for id in apart if not view.has("params", id)}
    if missing:
        raise Need(Wants(look=missing))
    return ((id, row.doc) for id in apart if (row := view.look("params", id)) is not None)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Pulls).decode
