"""Decides a batch's commands on what one transaction sees, and loads what they ask for until all are decided."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sheratan_hub.items import Item
from sheratan_hub.memo import Memo
from sheratan_hub.rules.command import Command, Decision, Need, Refused, Scene
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Tx, Wants, merge

log = logging.getLogger("sheratan.commit")

ROUNDS = 256
"""How often a command may ask for more before it counts as broken."""

Todo = tuple[Item, int, Command]


async def decide(items: Sequence[Item], tx: Tx, view: View, memo: Memo) -> bool:
    """Give every command of the items its outcome, the decisions to `view`; whether the changes must be synced.

    Raises what the store raises.
    """
    todo, wants = opened(items, view.scene)
    most = view.scene.limits.max_inflight
    await _load(tx, view, memo, merge(wants, most))
    durable = False
    for _ in range(ROUNDS):
        todo, wants, synced = _decide_each(view, todo)
        durable = durable or synced
        if not todo:
            return durable
        await _load(tx, view, memo, merge(wants, most))
    for item, place, command in todo:
        item.outcomes[place] = RuntimeError(f"{type(command).__name__} asks for more and more")
    return durable


async def _load(tx: Tx, view: View, memo: Memo, wants: Wants) -> None:
    """Ask the store for what is not known without it."""
    memo.tell(view, wants)
    lanes = view.scene.lanes
    wants.ready = {ready: limit for ready, limit in wants.ready.items() if not view.exhausted(ready.lane)}
    for ready in wants.ready:
        if lanes.has_others(ready.lane):
            wants.ready[ready] += 1  # and the first that is left: a source's oldest job is next (rule 6)
    if wants:
        view.add(wants, await tx.load(wants))


def opened(items: Sequence[Item], scene: Scene) -> tuple[list[Todo], list[Wants]]:
    """Every command, and what they want. One that cannot even say so has its outcome already."""
    todo: list[Todo] = []
    wants: list[Wants] = []
    for item in items:
        item.outcomes = [None] * len(item.commands)
        item.notes = []
        for place, command in enumerate(item.commands):
            try:
                wants.append(command.wants(scene))
            except Exception as bug:
                item.outcomes[place] = _as_outcome(bug, command)
            else:
                todo.append((item, place, command))
    return todo, wants


def _decide_each(view: View, todo: list[Todo]) -> tuple[list[Todo], list[Wants], bool]:
    """Decide each; those that need more are returned with their needs. The last value: must it be synced?"""
    again: list[Todo] = []
    needs: list[Wants] = []
    durable = False
    held: Item | None = None
    for item, place, command in todo:
        if item is held:
            again.append((item, place, command))
            needs += _foreseen(view, command)
            continue
        if item.order == "while_fine" and place and isinstance(item.outcomes[place - 1], Exception):
            item.outcomes[place] = item.outcomes[place - 1]
            continue
        try:
            decision: Decision = command.decide(view)
            view.apply(decision)
        except Need as need:
            again.append((item, place, command))
            needs.append(need.wants)
            held = item if item.order != "any" else None
            continue
        except Exception as no:
            item.outcomes[place] = _as_outcome(no, command)
            continue
        durable = durable or decision.durable
        item.outcomes[place] = decision.answer
        item.notes += (*decision.events, *decision.notes)
    return again, needs, durable


def _foreseen(view: View, command: Command) -> list[Wants]:
    """What a command that waits for its turn would ask for, so that all of an item's needs are loaded at once."""
    try:
        command.decide(view)
    except Need as need:
        return [need.wants]
    except Exception:
        return []  # its turn will tell
    return []


def _as_outcome(error: Exception, command: Command) -> Exception:
    """The error without the frames that it went through: one of them holds the item, which will hold it."""
    if not isinstance(error, Refused):
        log.error("%s failed", type(command).__name__, exc_info=error)
    return error.with_traceback(None)
