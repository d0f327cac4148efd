"""What one pull takes: the lanes' first rows, source by source in turn, a source's own jobs in their order (rule 6)."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from sheratan_hub.rules.command import Need
from sheratan_hub.rules.eligible import kind_stop, source_room
from sheratan_hub.rules.lanes import Offer, read_lane, suits
from sheratan_hub.rules.limits import RATES, rates_of
from sheratan_hub.rules.pauses import Pauses
from sheratan_hub.rules.view import View, running_of
from sheratan_hub.storage import Ready, Row, Wants

AHEAD = 4
"""So many rows of a lane are asked for that may have to give one only."""

TWICE_MAX = 10
"""So often a batch's pulls ask for twice as many lanes as the time before."""


class Hand:
    """Takes rows for one pull. `lanes` are those they came from, in the order in which they were taken."""

    def __init__(self, view: View, offer: Offer, pauses: Pauses, bars: Callable[[str], bool] | None = None) -> None:
        """`bars` tells of a lane whether the policy keeps its jobs from this node."""
        self.lanes: list[str] = []
        self._view, self._offer, self._pauses = view, offer, pauses
        self._bars = bars
        self._closed = self._is_paused if pauses.pauses else None
        self._done = set(view.used_up) if view.used_up else set[str]()
        self._rows: list[Row] = []
        self._from: dict[str, int] = {}
        self._rooms: dict[str, int | None] = {}
        self._throttled = False

    def _is_paused(self, kind: str) -> bool:
        return kind_stop(kind, self._pauses, self._view.now) is not None

    def take(self, limit: int) -> list[Row]:
        """Up to `limit` waiting rows; fewer only if there are no more. Raises `Need` for what is not loaded."""
        while (left := limit - len(self._rows)) > 0:
            # With those of its source: once some are taken, the directory no longer knows which is the oldest.
            lanes = self._turn(max(left, 2) if self._rows else left)
            if not lanes:
                break
            if self._bars is not None:
                barred = [lane for lane in lanes if self._bars(lane)]
                self._done.update(barred)
                lanes = [lane for lane in lanes if lane not in self._done]
                if not lanes:
                    continue
            if len(lanes) == 1 and self._room(read_lane(lanes[0]).source) is None:
                self._load(lanes, left)
                rows = self._next(lanes[0], left)
                for row in rows:
                    self._keep(row, lanes[0])
                if len(rows) < left:
                    self._done.add(lanes[0])
                continue
            sources = self._by_source(lanes)
            if not sources:
                continue
            share = -(-left // len(sources))
            further = [lane for own in sources.values() for lane in own[1:]]
            self._load([own[0] for own in sources.values()], share, further)
            piles = [list(self._own(source, own, share)) for source, own in sources.items()]
            for place in range(share):
                for pile in piles:
                    if place < len(pile) and len(self._rows) < limit:
                        self._keep(*pile[place])
        return self._rows

    def _turn(self, left: int, besides: set[str] | None = None) -> list[str]:
        done = self._done if besides is None else self._done | besides
        return self._view.scene.lanes.turn(self._offer, left, done, self._view.now, self._closed)

    def _keep(self, row: Row, lane: str) -> None:
        self._rows.append(row)
        self.lanes.append(lane)
        self._from[lane] = self._from.get(lane, 0) + 1
        if self._rooms and (room := self._rooms.get(source := read_lane(lane).source)) is not None:
            self._rooms[source] = room - 1

    def _by_source(self, lanes: list[str]) -> dict[str, list[str]]:
        """The lanes of each source in their order, without those that are throttled (rule 10)."""
        out: dict[str, list[str]] = {}
        self._count({read_lane(lane).source for lane in lanes})
        for lane in lanes:
            source = read_lane(lane).source
            room = self._room(source)
            if room is not None and room <= 0:
                self._throttled = True
                self._done.add(lane)
            else:
                out.setdefault(source, []).append(lane)
        return out

    def _count(self, sources: set[str]) -> None:
        """Ask for the live leases of all these sources at once."""
        view = self._view
        stored, limits = rates_of(view.look(*RATES)), view.scene.limits
        new = (source for source in sources if source and source not in self._rooms)
        limited = (running_of(source) for source in new if source_room(source, 0, stored, limits) is not None)
        missing = {facet for facet in limited if facet not in view.counted()}
        if missing:
            raise Need(Wants(counts=missing))

    def _room(self, source: str) -> int | None:
        """How many more jobs of this source may run, once the pull has what it holds by now."""
        if not source:
            return None
        if source not in self._rooms:
            view = self._view
            stored = rates_of(view.look(*RATES))
            limited = source_room(source, 0, stored, view.scene.limits) is not None
            running = view.count(running_of(source)) if limited else 0
            self._rooms[source] = source_room(source, running, stored, view.scene.limits)
        return self._rooms[source]

    def _own(self, source: str, lanes: list[str], share: int) -> Iterator[tuple[Row, str]]:
        """Up to `share` rows of a source's lanes, oldest first, with their lane; a lane is read in its turn."""
        room, unread = self._room(source), lanes[::-1]
        heap: list[tuple[int, str, Row, str, Iterator[Row]]] = []
        most = share if room is None else min(share, room)
        given = 0
        while given < most:
            while unread and (not heap or self._view.scene.lanes.head(unread[-1]) <= heap[0][0]):
                lane = unread.pop()
                rows = self._lazily(lane, most)
                if (row := next(rows, None)) is not None:
                    heapq.heappush(heap, (row.order, row.id, row, lane, rows))
            if not heap:
                return
            _, _, row, lane, rows = heapq.heappop(heap)
            yield row, lane
            given += 1
            if (row := next(rows, None)) is not None:
                heapq.heappush(heap, (row.order, row.id, row, lane, rows))

    def _lazily(self, lane: str, most: int) -> Iterator[Row]:
        """The rows of `_next`, asked for a few at a time: of many lanes each may give one only."""
        got, piece = 0, AHEAD
        while got < most:
            asked = min(piece, most - got)
            rows = self._next(lane, asked, got)
            yield from rows
            if len(rows) < asked:
                return
            got, piece = got + asked, 2 * piece

    def _next(self, lane: str, most: int, got: int = 0) -> list[Row]:
        """Up to `most` rows of the lane that neither this pull nor another has; if there is none it is done with."""
        begun = self._from.get(lane, 0) + got
        rows = self._view.ready(lane, begun + most)[begun:]
        if not rows and not got:
            self._done.add(lane)
            if not begun:
                self._view.used_up.add(lane)
        return rows

    def _load(self, lanes: list[str], share: int, behind: Sequence[str] = ()) -> None:
        """Ask for what is not loaded of so many rows of each of the lanes, and of a few of those that stand behind.

        What the batch's other pulls have asked for goes to them, so this one asks for lanes whose turn comes later.
        Where there are none left the turns have come round: it asks for more of those that were asked longest ago. So
        the pulls of a batch do not all ask for the same few jobs. The oftener they had to ask, the more each asks for.
        """
        view, few = self._view, min(AHEAD, share)
        missing = [lane for lane in lanes if view.lacks(lane, self._from.get(lane, 0) + share)]
        also = [lane for lane in behind if view.lacks(lane, self._from.get(lane, 0) + few)]
        if not missing and not also:
            return
        found = [lane for lane in missing if lane not in view.asked]
        if missing:
            most = max(len(missing), 1 << min(view.loads, TWICE_MAX))
            found += self._others(lanes[0], most - len(found), {*view.asked, *found})
            found += islice(filter(self._suits, view.asked), max(0, len(missing) - len(found)))
        for lane in found:
            view.asked.pop(lane, None)
            view.asked[lane] = None
        deeper = {Ready(lane): view.deeper(lane, few) for lane in also}
        raise Need(Wants(ready=deeper | {Ready(lane): view.deeper(lane, share) for lane in found or missing}))

    def _others(self, first: str, most: int, besides: set[str]) -> list[str]:
        """Up to so many more lanes of the level of the first that have to be loaded, in turn."""
        if most <= 0:
            return []
        lanes, view = self._view.scene.lanes, self._view
        turn = (lane for lane in self._turn(most, besides) if lanes.level(lane) == lanes.level(first))
        lacking = (lane for lane in turn if view.lacks(lane, self._from.get(lane, 0) + 1))
        return [lane for lane in islice(lacking, most) if self._bars is None or not self._bars(lane)]

    def _suits(self, name: str) -> bool:
        lane = read_lane(name)
        return name not in self._done and suits(lane.kind, lane.needs, self._offer)

    def why_none(self) -> str:
        """The reason of a pull that finds nothing."""
        lanes = self._view.scene.lanes
        if self._throttled or lanes.has_benched(self._offer):
            return "throttled"
        if self._closed and lanes.choose(self._offer, 1, self._done, self._view.now):
            return "paused"
        return "no_job"
