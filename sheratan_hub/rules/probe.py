"""Probe: a command that sees nothing and changes no row; that it is answered at all is what it tells."""

from __future__ import annotations

import msgspec

from sheratan_hub.rules.command import Decision, Event, Scene
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Wants


class Probe(msgspec.Struct, frozen=True, gc=False):
    """Goes the way of every command, through a batch and a transaction.

    `writes`: one that is answered has been written, to the ledger; while the store cannot, nothing is.
    """

    writes: bool = False

    def wants(self, scene: Scene) -> Wants:
        """Nothing."""
        return Wants()

    def decide(self, view: View) -> Decision:
        """Nothing to refuse."""
        return Decision(None, events=(Event(view.now, "store.recovered", "hub"),) if self.writes else ())
