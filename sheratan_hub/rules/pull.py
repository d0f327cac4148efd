"""Pulling: which jobs go to a node under which leases, and the same again for the same `pull_id` (rules 3, 6, 9)."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from sheratan_hub.rules.command import Decision, Event, Need, Scene
from sheratan_hub.rules.jobs import Job, job_event, job_of
from sheratan_hub.rules.lanes import Offer
from sheratan_hub.rules.nodes import Node, node_of, state_of
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Ready, Row, Wants

REMEMBERED = 8
"""How many pull_ids are remembered for each node."""

REASONS = ("no_job", "inflight_limit", "node_stale", "node_dead", "node_draining", "pull_spent", "draining")
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
    """The jobs leased, or why there are none. `params` holds, by job id, those kept in rows of their own."""

    jobs: tuple[Job, ...] = ()
    params: tuple[tuple[str, bytes], ...] = ()
    reason: str | None = None


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
        """The node, its remembered pulls, how many leases live, and the lane that is probably next."""
        wants = Wants(look={Key("node", self.node_id)}, counts={"job:running"})
        if self.pull_id is not None:
            wants.keys.add(Key("puller", self.node_id))
        if self.capabilities is not None:
            for lane in scene.lanes.choose(Offer(self.capabilities, self.kinds), 1):
                wants.ready[Ready(lane)] = min(self.limit, scene.limits.max_inflight)
        return wants

    def decide(self, view: View) -> Decision:
        """Leases, the same leases again, or none with a reason. Never refused."""
        pulls = self._pulls(view)
        again = self._again(view, pulls)
        if again is not None:
            return again
        row = view.look("node", self.node_id)
        node = node_of(row) if row else None
        state = state_of(node, view.now, view.scene.limits, view.scene.started_at) if node else "ONLINE"
        if state != "ONLINE":
            return Decision(Pulled(reason=f"node_{state.lower()}"))
        if node is not None and node.draining:
            return Decision(Pulled(reason="node_draining"))
        free = view.scene.limits.max_inflight - view.count("job:running")
        if free <= 0:
            note = Event(view.now, "pull.saturated", self.node_id)
            return Decision(Pulled(reason="inflight_limit"), notes=(note,))
        jobs = [job_of(row) for row in self._choose(view, self._offer(node), min(self.limit, free))]
        if not jobs:
            return Decision(Pulled(reason="no_job"))
        return self._lease(view, jobs, pulls, node)

    def _offer(self, node: Node | None) -> Offer:
        given = self.capabilities
        return Offer(frozenset(node.capabilities if node else ()) if given is None else given, self.kinds)

    def _choose(self, view: View, offer: Offer, limit: int) -> list[Row]:
        """The first `limit` waiting rows over the lanes in their order; asks for more lanes as they run out."""
        taken: list[Row] = []
        used_up = set(view.used_up)
        rounds = 0
        while len(taken) < limit:
            lanes = view.scene.lanes.choose(offer, max(1, rounds), used_up)
            if not lanes:
                break
            missing = [lane for lane in lanes if not view.loaded(lane)]
            if missing:
                raise Need(Wants(ready={Ready(lane): limit - len(taken) for lane in missing}))
            for lane in lanes:
                if len(taken) < limit:
                    rows = view.ready(lane, limit - len(taken))
                    taken += rows
                    if not rows:
                        view.used_up.add(lane)
            used_up.update(lanes)
            rounds += len(lanes)
        return taken

    def _lease(self, view: View, jobs: list[Job], pulls: Pulls | None, node: Node | None) -> Decision:
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
        return Decision(Pulled(leased, apart), new=new, put=tuple(put), events=events)

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


def _params(view: View, jobs: list[Job]) -> Iterator[tuple[str, bytes]]:
    """The params that have rows of their own, all asked for at once."""
    apart = [job.id for job in jobs if job.params_apart]
    missing = {Key("params", id) for id in apart if not view.has("params", id)}
    if missing:
        raise Need(Wants(look=missing))
    return ((id, row.doc) for id in apart if (row := view.look("params", id)) is not None)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Pulls).decode
