"""What a hub that holds its store alone knows without asking it: counters, and the nodes that pulls look at.

Only the committer writes, so what it has read stays true until it writes something else. With a store that
several hubs share nothing is remembered.
"""

from __future__ import annotations

from sheratan_hub.rules.view import View
from sheratan_hub.storage import Changes, Key, Loaded, Row, Wants

KINDS = frozenset({"node", "standing"})
"""Rows that are remembered when they were only looked at: small, and asked for again and again."""

MOST = 100_000
"""So many are remembered; beyond, everything is forgotten and begins anew."""


class Memo:
    """Remembers counters and looked-at rows as they were last committed; None in `rows`: there is no such row."""

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared
        self._counts: dict[str, int] = {}
        self.rows: dict[Key, Row | None] = {}

    def tell(self, view: View, wants: Wants) -> None:
        """Give `view` what is known of `wants`, and take that out of them."""
        if not self._counts and not self.rows:
            return
        known = Wants(
            look={key for key in wants.look if key in self.rows},
            counts={facet for facet in wants.counts if facet in self._counts},
        )
        rows = {key: row for key in known.look if (row := self.rows[key]) is not None}
        view.add(known, Loaded(rows=rows, counts={facet: self._counts[facet] for facet in known.counts}))
        wants.look -= known.look
        wants.counts -= known.counts

    def learn(self, view: View, changes: Changes) -> None:
        """What this batch has read and written is committed."""
        if self._shared:
            return
        if len(self._counts) + len(self.rows) > MOST:
            self.forget()
        for facet, delta in changes.counts.items():
            if facet in self._counts:
                self._counts[facet] += delta
        self._counts.update((facet, view.count(facet)) for facet in view.counted())
        for row in (*changes.new, *changes.put):
            if row.kind in KINDS and row.key in self.rows:
                self.rows[row.key] = row
        for key in changes.gone:
            if key in self.rows:
                self.rows[key] = None
        self.rows.update((key, row) for key, row in view.looked() if key.kind in KINDS)

    def forget(self) -> None:
        """Nothing is known any more: a batch has failed, or there is too much."""
        self._counts.clear()
        self.rows.clear()
