"""Probe: a command that sees nothing and changes nothing; that it is answered at all is what it tells."""

from __future__ import annotations

import msgspec

from sheratan_hub.rules.command import Decision, Scene
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Wants


class Probe(msgspec.Struct, frozen=True, gc=False):
    """Goes the way of every command, through a batch and a transaction."""

    def wants(self, scene: Scene) -> Wants:
        """Nothing."""
        return Wants()

    def decide(self, view: View) -> Decision:
        """Nothing to refuse."""
        return Decision(None)
