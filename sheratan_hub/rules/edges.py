"""Edges from a job to those that depend on it, and what news of a parent make of a dependent (design rule 7).

An edge is a row `parent/child` on an agenda of its parent: `edge:PARENT` while the child waits for it, `failed:PARENT`
once the parent has failed or was cancelled; it goes when the parent completes. A child keeps counts of its edges, never
ids, and changes only when one of them does: edges can be brought in line with their parent in pieces, in any order, and
again after a crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from sheratan_hub.rules.command import Code, Event, Need, Refused
from sheratan_hub.rules.jobs import Job, job_event, job_key, job_of
from sheratan_hub.rules.retry import end
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Due, Key, Row, Wants

PARENTS_MAX = 10_000
"""How many jobs one may depend on."""

AT_ONCE = 100
"""A job with more parents than this is stored first, and linked to them piece by piece."""

PIECE = 200
"""How many parents a transaction links, or how many edges of one parent it looks at."""

ALWAYS = 253_370_764_800_000
"""The year 9999: what is on an agenda without a time of its own is found by looking before this."""


class Parents(NamedTuple):
    """What became of some of a job's parents: how many completed (or failed, and may), how many failed, why."""

    done: int = 0
    failed: int = 0
    root_cause: str = ""


class Linked(NamedTuple):
    """The rows that tie a child to some of its parents, and what is known of these."""

    parents: Parents
    new: tuple[Row, ...] = ()
    put: tuple[Row, ...] = ()


def edge(parent_id: str, child_id: str, *, failed: bool) -> Row:
    """The edge from one job to another, in one of its two states. Its last label is the child."""
    name = failed_of(parent_id) if failed else waiting_of(parent_id)
    return Row("edge", f"{parent_id}/{child_id}", b"", (None, None, None, None, child_id), agenda=name, due_at=ALWAYS)


def waiting_of(parent_id: str) -> str:
    """The agenda of edges whose child waits for this job."""
    return f"edge:{parent_id}"


def failed_of(parent_id: str) -> str:
    """The agenda of edges whose child knows that this job has failed."""
    return f"failed:{parent_id}"


def edges_of(*agendas: str) -> Wants:
    """The wants of a look at some edges of each agenda: `PIECE` at most."""
    return Wants(due={Due(name, ALWAYS): PIECE for name in agendas})


def child_of(row: Row, parent_id: str) -> str:
    """The dependent's id."""
    return row.id[len(parent_id) + 1 :]


def root_of(parent: Job) -> str:
    """The job whose failure it all began with."""
    return parent.root_cause or parent.id


def counts_as_done(parent: Job | None, child: Job) -> bool:
    """Whether this parent (None: pruned, who knows how it ended) does not stand in the way any more."""
    if parent is not None and not parent.finished:
        return False
    return child.on_dependency_failure == "run" or (parent is not None and parent.status == "completed")


def link(view: View, child: Job, parent_ids: Sequence[str], *, known: bool = False) -> Linked:
    """Tie a child to these jobs. Refused with `unknown_dependency`; `known`: what is gone was there, and has failed."""
    missing = {key for key in map(job_key, parent_ids) if not view.has(*key, locked=True)}
    if missing:
        raise Need(Wants(keys=missing))
    done = failed = 0
    root, new, put = "", [], []
    for id in parent_ids:
        row = view.row("job", id)
        if row is None and not known:
            raise unknown(id)
        parent = job_of(row) if row is not None else None
        if counts_as_done(parent, child):
            done += 1
            continue
        if parent is None or parent.finished:
            failed += 1
            root = root or (root_of(parent) if parent is not None else id)
        if parent is not None:
            new.append(edge(id, child.id, failed=parent.finished))
            if not (parent.dependents and view.changed("job", id)):
                put.append(parent.with_(dependents=True).row)  # also as it was: this batch must see it as changed
    return Linked(Parents(done, failed, root), tuple(new), tuple(put))


def unknown(job_id: str) -> Refused:
    """The refusal of a dependency that does not exist."""
    return Refused(Code.UNKNOWN_DEPENDENCY, f"there is no job {job_id[:200]} to depend on")


def after_parents(child: Job, parents: Parents, now: int) -> tuple[Job, str | None]:
    """The child after news of its parents, and what happened to it, if anything (design rule 7)."""
    child = child.with_(
        parents_left=child.parents_left - parents.done, parents_failed=child.parents_failed + parents.failed
    )
    if child.finished:
        return child, None
    if parents.failed > 0 and child.on_dependency_failure == "cancel":
        return end(child, "cancelled", now, "DEPENDENCY_FAILED", root_cause=parents.root_cause), "cancelled"
    if parents.failed > 0 and child.status == "pending":
        return child.after("held", reason="DEPENDENCY_FAILED", root_cause=parents.root_cause), "held"
    if child.status == "quarantined" and not child.parents_failed:
        return child.after("resumed", reason=None, root_cause=None), "resumed"
    if child.status == "pending" and not child.parents_left:
        return unblocked(child, now), "unblocked"
    return child, None


def unblocked(child: Job, now: int) -> Job:
    """The job once nothing stands before it: it keeps its place in line, and its time if that has not come."""
    waiting = child.not_before > now
    start = child.not_before if waiting else 0
    return child.after("unblocked", waiting=waiting, not_before=start, pending_since=start or now)


def told(child: Job, happened: str, now: int) -> Event:
    """The event of what news of a parent made of a job."""
    return job_event(child, happened, now, "hub", reason=child.reason, root_cause=child.root_cause)


def deferred(child: Job, parent_ids: Sequence[str], now: int) -> tuple[Row, ...]:
    """The rows from which a job's many parents are linked later, piece by piece."""
    pieces = [parent_ids[at : at + PIECE] for at in range(0, len(parent_ids), PIECE)]
    return tuple(
        Row("link", f"{child.id}/{n:04d}", _encode(piece), agenda="link", due_at=now) for n, piece in enumerate(pieces)
    )


def parents_in(row: Row) -> list[str]:
    """The parents that a row of `deferred` names."""
    return _decode(row.doc)


def resuming(view: View, job: Job, *, dependents: bool = False) -> tuple[Job, tuple[Row, ...], tuple[Row, ...]]:
    """A job just redriven, and the rows (new, put) by which those who depend on it are told.

    Those on hold wait for it again; with `dependents` those cancelled because of it are redriven, too.
    """
    job = job.with_(root_cause=None)
    if not job.dependents:
        return job, (), ()
    held = view.row("resume", job.id) if job.resuming else None
    revive = dependents or (held is not None and held.doc == b"1")
    row = Row("resume", job.id, b"1" if revive else b"0", agenda="resume", due_at=view.now)
    job = job.with_(resuming=True, cascade=False)
    return (job, (), (row,)) if held is not None else (job, (row,), ())


class Loose(NamedTuple):
    """Whether a finished job may be pruned as far as its dependents go, and the edges that go first."""

    prunable: bool
    gone: tuple[Key, ...] = ()


def loosen(view: View, job: Job) -> Loose:
    """What pruning asks of a finished job with `dependents`: never while one that is unfinished needs it (rule 15).

    At most `PIECE` edges go at a time; `prunable` is true once none is left.
    """
    if not job.dependents:
        return Loose(True)
    if job.cascade or job.resuming:
        return Loose(False)
    rows = view.all_due(failed_of(job.id))
    if rows is None:
        raise Need(edges_of(failed_of(job.id)))
    children = {row.key: job_key(child_of(row, job.id)) for row in rows}
    missing = {key for key in children.values() if not view.has(*key)}
    if missing:
        raise Need(Wants(look=missing))
    found = [view.look(*key) for key in children.values()]
    if any(row is not None for row in found):  # one that has ended may be redriven, and then waits for this one
        return Loose(False)
    return Loose(len(rows) < PIECE, tuple(key for key in children if not view.changed(*key)))


def ask_for_edges(view: View, jobs: Sequence[Job]) -> None:
    """Raises `Need` for all that `loosen` asks of these jobs, at once."""
    parents = [job for job in jobs if job.dependents and not (job.cascade or job.resuming)]
    missing = [name for job in parents if view.all_due(name := failed_of(job.id)) is None]
    if missing:
        raise Need(edges_of(*missing))
    children = {job_key(child_of(row, job.id)) for job in parents for row in view.all_due(failed_of(job.id)) or ()}
    if look := {key for key in children if not view.has(*key)}:
        raise Need(Wants(look=look))


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[str]).decode
