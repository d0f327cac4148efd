"""What the committer knows of pauses and limits without asking: whose lanes are left out, and who may look again.

Rules decide on the rows; this keeps the directory of lanes in step with them, so that nobody chooses in vain.
"""

from __future__ import annotations

from collections.abc import Mapping

from sheratan_hub.rules.command import Limits, Rate
from sheratan_hub.rules.eligible import source_room
from sheratan_hub.rules.lanes import Lanes, read_lane
from sheratan_hub.rules.limits import RATES, rates_of
from sheratan_hub.rules.pauses import NONE, PAUSES, Pauses, pauses_of
from sheratan_hub.rules.view import View, running_of
from sheratan_hub.storage import Changes, Store

RUNNING = running_of("")


class Standing:
    """Pauses, limits and the live leases of each source, as of the last commit."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.pauses: Pauses = NONE
        self.rates: Mapping[str, Rate] = {}
        self._running: dict[str, int] = {}
        self._freed: list[tuple[str, int]] = []
        self._resumed = False

    async def prepare(self, store: Store, lanes: Lanes) -> None:
        """Read what was kept. Call once, after the store is open."""
        rows = {row.key: row for row in await store.fetch([PAUSES, RATES])}
        self.pauses, self.rates = pauses_of(rows.get(PAUSES)), rates_of(rows.get(RATES))
        counts = await store.counts(RUNNING)
        self._running = {facet.removeprefix(RUNNING): n for facet, n in counts.items()}
        for source in self._running:
            self._settle(source, lanes)

    def adopt(self, limits: Limits, lanes: Lanes) -> None:
        """Other limits are configured: leave out and take in the sources anew."""
        self._limits = limits
        for source in {*self._running, *lanes.benched}:
            self._settle(source, lanes)

    def running(self, source: str) -> int:
        """How many jobs of this source run."""
        return self._running.get(source, 0)

    def closed(self, lane: str, now: int) -> bool:
        """Whether a lane is known not to be leased from now: its kind is paused, or its source left out."""
        return bool(self.pauses.pauses) and self.pauses.of(read_lane(lane).kind, now) is not None

    def learn(self, view: View, changes: Changes, lanes: Lanes) -> None:
        """A batch is committed: leave out whose concurrency is used up, take in again who is free."""
        taken_in = lanes.taken_in()
        sources = set(taken_in)
        for facet, n in changes.counts.items():
            if facet.startswith(RUNNING):
                sources.add(source := facet.removeprefix(RUNNING))
                self._running[source] = self._running.get(source, 0) + n
                if not self._running[source]:
                    del self._running[source]
        if (row := view.written(PAUSES)) is not None:
            self.pauses, self._resumed = pauses_of(row), True
        if (row := view.written(RATES)) is not None:
            self.rates = rates_of(row)
            sources.update(self._running, lanes.benched)
        for source in sources:
            room = self._settle(source, lanes)
            if room > 0 and (source in taken_in or source in lanes.taken_in()):
                self._freed += [(name, room) for name in lanes.of_source(source)]

    def _settle(self, source: str, lanes: Lanes) -> int:
        """Leave the source's lanes out, or take them in; how many more of its jobs may run, at most a pull's."""
        room = source_room(source, self.running(source), self.rates, self._limits)
        if room is not None and room <= 0:
            lanes.bench(source)
            return 0
        lanes.unbench(source)
        return MOST if room is None else room

    def freed(self) -> list[tuple[str, int]]:
        """Lanes whose source was throttled and is free since the last call, each with how many of its jobs may run."""
        freed, self._freed = self._freed, []
        return freed

    def resumed(self) -> bool:
        """Whether pauses have changed since the last call."""
        resumed, self._resumed = self._resumed, False
        return resumed


MOST = 100
"""Nobody is woken for more jobs of one lane at once."""
