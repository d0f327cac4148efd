"""Calls that are made at the same time travel together: what a batch is, and the merger of single calls.

There is no timer. What is asked for while no request is out leaves at the event loop's next turn; what comes
later gathers until one of the requests that are out is answered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Generic, Literal, NamedTuple, TypeVar

import msgspec

from sheratan_hub.answers import Envelope, Refusal
from sheratan_hub.canonical import Raw
from sheratan_hub.transport import TRY_AGAIN, HubRefused, HubUnreachable, Request, Transport, TryAgain

Of = Literal["jobs", "results"]
T = TypeVar("T")
R = TypeVar("R", bound=Refusal)

BATCH_ENTRIES = 500
BATCH_BYTES = 16 * 1024 * 1024 - 128 * 1024
"""What a hub takes, less the room for a pull beside the entries."""
ENTRY_AT_FAULT = frozenset({400, 413, 422, 500})
"""Statuses by which a hub refuses a whole batch for what stands in one entry of it."""

NO_ROOM_MS = 1000
"""When an entry that the hub had no room for is offered again at the soonest; an entry names no time."""

IN_FLIGHT = 2
"""So many merged requests are out at once: the hub works on one while the other is written or read, and one answer that
is slow in coming does not hold up everybody."""


class Entry(NamedTuple):
    """One call: its body in a batch, the request that it is alone, and where its outcome goes."""

    body: bytes
    alone: Callable[[], Request]
    outcome: asyncio.Future[object]


class Merger(Generic[T]):
    """Sends single calls of one verb, merged when they come together; each has its own outcome, `T` or an error.

    A call that is cancelled before it was sent is not sent. `close` before the transport.
    """

    def __init__(self, hub: Transport, of: Of, answer: type[T]) -> None:
        self._hub, self._of, self._answer = hub, of, answer
        self._waiting: deque[Entry] = deque()
        self._out: set[asyncio.Task[None]] = set()

    async def send(self, body: bytes, alone: Callable[[], Request]) -> T:
        """The hub's answer to this one. Raises what a request of its own would, and is as patient."""
        return await self._hub.patiently(partial(self._join, body, alone))

    async def _join(self, body: bytes, alone: Callable[[], Request]) -> T:
        entry = Entry(body, alone, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self._start()
        outcome = await entry.outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome  # type: ignore[return-value]

    async def close(self) -> None:
        """Whoever still waits for an outcome is told HubUnreachable."""
        waiting, self._waiting = self._waiting, deque()
        _tell(waiting, HubUnreachable(CLOSED))
        out = [*self._out]
        for task in out:
            task.cancel()
        if out:
            await asyncio.wait(out)

    def _start(self) -> None:
        """Have what waits sent at the loop's next turn, with what comes until then, unless enough requests are out."""
        if self._waiting and len(self._out) < IN_FLIGHT:
            batch: list[Entry] = []
            task = asyncio.create_task(self._leave(batch))
            self._out.add(task)
            task.add_done_callback(partial(self._ended, batch))

    async def _leave(self, batch: list[Entry]) -> None:
        batch += self._take()
        if batch:
            await self._deliver(batch)

    def _take(self) -> list[Entry]:
        """As many as fit one request, without those whose callers have left."""
        batch: list[Entry] = []
        size = 0
        while self._waiting and not is_full(len(batch), size, self._waiting[0].body):
            entry = self._waiting.popleft()
            if not entry.outcome.done():
                batch.append(entry)
                size += len(entry.body) + 1
        return batch

    def _ended(self, batch: list[Entry], task: asyncio.Task[None]) -> None:
        """Nobody is left without an outcome, whatever went wrong."""
        self._out.discard(task)
        _tell(batch, HubUnreachable(CLOSED) if task.cancelled() else task.exception())
        self._start()

    async def _deliver(self, batch: Sequence[Entry]) -> None:
        """One request, one try. If it is refused for what stands in one entry, it is halved until that is alone."""
        try:
            outcomes = await self._ask(batch)
        except HubRefused as no:
            if len(batch) > 1 and no.status in ENTRY_AT_FAULT:
                half = len(batch) // 2
                await self._deliver(batch[:half])
                await self._deliver(batch[half:])
            else:
                _tell(batch, no)
        except HubUnreachable as error:
            _tell(batch, TryAgain(error))
        except TryAgain as error:
            _tell(batch, error)
        else:
            for entry, outcome in zip(batch, outcomes, strict=True):
                _tell([entry], _raised(outcome) if isinstance(outcome, Refusal) else outcome)

    async def _ask(self, batch: Sequence[Entry]) -> Sequence[T | Refusal]:
        if len(batch) == 1:
            return [await self._hub.once(batch[0].alone(), self._answer)]
        bodies = [entry.body for entry in batch]
        envelope = await self._hub.once(request_of(self._of, bodies), Envelope)
        return outcomes_of(envelope, self._of, len(batch), self._answer)


CLOSED = "the client was closed before the hub's answer came"


def _tell(entries: Sequence[Entry] | deque[Entry], outcome: object) -> None:
    """An error is told to each in a copy of its own, as each will raise it."""
    for entry in entries:
        if not entry.outcome.done():
            own = outcome.again() if isinstance(outcome, HubRefused | HubUnreachable | TryAgain) else outcome
            entry.outcome.set_result(own)


def _raised(no: Refusal) -> HubRefused | TryAgain:
    refused = HubRefused(no.status, no.code, no.detail, {"ok": False, **msgspec.structs.asdict(no)})
    return TryAgain(refused, NO_ROOM_MS) if no.status in TRY_AGAIN else refused


# batches


def request_of(of: Of, bodies: Sequence[bytes], also: bytes = b"") -> Request:
    """The request that carries these entries, and further members of its body."""
    return Request("data", "POST", f"/api/{of}", b'{"%b":[%b]%b}' % (of.encode(), b",".join(bodies), also))


def outcomes_of(envelope: Envelope, of: Of, entries: int, answer: type[T]) -> list[T | Refusal]:
    """One outcome each, in order. Raises HubUnreachable for an answer that no hub gives."""
    raws = envelope.jobs if of == "jobs" else envelope.results
    if len(raws) != entries:
        raise HubUnreachable(f"the hub answered {len(raws)} outcomes to {entries} entries")
    return [outcome_of(raw, answer, Refusal) for raw in raws]


def outcome_of(raw: Raw, answer: type[T], refusal: type[R]) -> T | R:
    """The outcome of one entry. Raises HubUnreachable for one that no hub gives."""
    try:
        if msgspec.json.decode(raw, type=_Verdict).ok:
            return msgspec.json.decode(raw, type=answer)
        return msgspec.json.decode(raw, type=refusal)
    except msgspec.DecodeError as error:
        raise HubUnreachable(f"the hub answered an entry as no hub does: {error}") from None


class _Verdict(msgspec.Struct):
    ok: bool


def chunks(indexes: Sequence[int], bodies: Sequence[bytes]) -> Iterator[list[int]]:
    """`indexes` in runs that fit one request."""
    for packed in packs([[i] for i in indexes], bodies):
        yield [i for group in packed for i in group]


def packs(groups: Sequence[list[int]], bodies: Sequence[bytes]) -> Iterator[list[list[int]]]:
    """`groups` in runs that fit one request. A group stays whole; one that is larger than that travels alone."""
    pack: list[list[int]] = []
    entries = size = 0
    for group in groups:
        more = sum(len(bodies[i]) + 1 for i in group)
        if pack and (entries + len(group) > BATCH_ENTRIES or size + more > BATCH_BYTES):
            yield pack
            pack, entries, size = [], 0, 0
        pack.append(group)
        entries, size = entries + len(group), size + more
    if pack:
        yield pack


def groups_of(jobs: Sequence[Mapping[str, object]]) -> list[list[int]]:
    """The places of jobs, those together that must travel together as they name each other by `ref`."""
    refs = {ref for job in jobs if isinstance(ref := job.get("ref"), str)}
    if not refs:
        return [[place] for place in range(len(jobs))]
    leader = list(range(len(jobs)))

    def lead(place: int) -> int:
        while leader[place] != place:
            leader[place] = place = leader[leader[place]]
        return place

    first: dict[str, int] = {}
    for place, job in enumerate(jobs):
        for name in refs & _names(job):
            leader[lead(place)] = lead(first.setdefault(name, place))
    groups: dict[int, list[int]] = {}
    for place in range(len(jobs)):
        groups.setdefault(lead(place), []).append(place)
    return list(groups.values())


def _names(job: Mapping[str, object]) -> set[str]:
    """What a job is called by others of its batch, and what it calls them; ids of other jobs are among them."""
    depends_on = job.get("depends_on")
    names = [job.get("ref"), *(depends_on if isinstance(depends_on, (list, tuple)) else ())]
    return {name for name in names if isinstance(name, str)}


def is_full(entries: int, size: int, body: bytes) -> bool:
    """Whether a request of so many entries and bytes has no room for one more; the first always fits."""
    return entries == BATCH_ENTRIES or (entries > 0 and size + len(body) + 1 > BATCH_BYTES)
