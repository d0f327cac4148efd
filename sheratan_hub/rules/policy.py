"""Policies: who may do what, as immutable numbered snapshots. First matching rule wins, else the default.

A policy is made of rules and gates. Each rule names any of actions, zones, capabilities, kinds, sources, nodes and
attestation states; what it does not name it does not ask about. A rule that names something which a request does
not have (a submit has no node, say) does not match it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta

Action = Literal["heartbeat", "pull", "submit", "result", "admin"]
Effect = Literal["allow", "deny"]
Status = Literal["OK", "DRIFT", "SPOOF_SUSPECT", "MISSING"]
Pattern = Annotated[str, Meta(min_length=1, max_length=200)]
Patterns = Annotated[tuple[Pattern, ...], Meta(min_length=1, max_length=1000)]

ACTIONS: tuple[Action, ...] = get_args(Action)
RULES_MAX = 1000


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line of a policy. A list that is absent matches anything; in a text `*` stands for any characters.

    `capabilities`: the node has one of them (for a submit: the job asks for one of them).
    """

    effect: Effect
    actions: Annotated[tuple[Action, ...], Meta(min_length=1)] | None = None
    zones: Patterns | None = None
    capabilities: Patterns | None = None
    kinds: Patterns | None = None
    sources: Patterns | None = None
    nodes: Patterns | None = None
    attestation: Annotated[tuple[Status, ...], Meta(min_length=1)] | None = None
    comment: Annotated[str, Meta(max_length=500)] = ""

    @property
    def asks_about_jobs(self) -> bool:
        """Whether it depends on which job it is about."""
        return self.kinds is not None or self.sources is not None


class Gates(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Switches that come before all rules.

    `admin_from_loopback`: admin routes answer this machine only. `heartbeat_before_pull`: a node never heard of gets
    nothing. `block_spoof_suspect`: a node under that suspicion gets nothing and its results are not taken.
    """

    admin_from_loopback: bool = True
    heartbeat_before_pull: bool = False
    block_spoof_suspect: bool = False


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A policy as people write it."""

    default: Effect = "allow"
    rules: Annotated[tuple[Rule, ...], Meta(max_length=RULES_MAX)] = ()
    gates: Gates = Gates()
    title: Annotated[str, Meta(max_length=200)] = ""


class Ask(NamedTuple):
    """What somebody wants to do. None: there is no such thing, or it is not known.

    `attestation` is None for a node that was never heard of.
    """

    action: Action
    node_id: str | None = None
    zone: str | None = None
    capabilities: frozenset[str] = frozenset()
    attestation: Status | None = None
    kind: str | None = None
    source: str | None = None


class Verdict(NamedTuple):
    """Whether it may, and what decided: `rule N` (from 1), `default`, or a gate's name."""

    allowed: bool
    by: str


ALLOWED = Verdict(True, "default")


class Judge:
    """A policy made ready to decide by, with its number. Version 0, the one before all, allows all."""

    def __init__(self, policy: Policy | None = None, version: int = 0, sha256: str = "") -> None:
        self.policy = policy or Policy()
        self.version, self.sha256 = version, sha256
        gates = self.policy.gates
        gated = gates.block_spoof_suspect or gates.heartbeat_before_pull
        self.trivial = not self.policy.rules and self.policy.default == "allow" and not gated
        """Whether it allows everything, so that nobody needs to ask."""
        self._tests = [_Test(rule) for rule in self.policy.rules]
        self._known: dict[Ask, Verdict] = {}

    def decide(self, ask: Ask) -> Verdict:
        """The gates, then the first rule that matches, then the default. What was asked before is remembered."""
        known = self._known.get(ask)
        if known is None:
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            known = self._known[ask] = self._closed(ask) or self._first(ask)
        return known

    def pull(self, ask: Ask) -> Verdict:
        """Whether a node may pull (or bring results) at all: denied only if every job is. Which, `decide` says."""
        return self._closed(ask) or self._any_job(ask)

    def _first(self, ask: Ask) -> Verdict:
        for number, test in enumerate(self._tests, 1):
            if test.of_caller(ask) and test.of_job(ask):
                return Verdict(test.rule.effect == "allow", f"rule {number}")
        return self._default()

    def _any_job(self, ask: Ask) -> Verdict:
        for number, test in enumerate(self._tests, 1):
            if not test.of_caller(ask):
                continue
            if not test.rule.asks_about_jobs:
                return Verdict(test.rule.effect == "allow", f"rule {number}")
            if test.rule.effect == "allow":
                return Verdict(True, f"rule {number}")
        return self._default()

    def _default(self) -> Verdict:
        return Verdict(self.policy.default == "allow", "default")

    def _closed(self, ask: Ask) -> Verdict | None:
        gates = self.policy.gates
        if gates.block_spoof_suspect and ask.attestation == "SPOOF_SUSPECT" and ask.action in ("pull", "result"):
            return Verdict(False, "block_spoof_suspect")
        if gates.heartbeat_before_pull and ask.attestation is None and ask.action == "pull":
            return Verdict(False, "heartbeat_before_pull")
        return None


class _Test:
    """A rule, with its patterns made ready."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._nodes, self._zones, self._capabilities, self._kinds, self._sources = (
            None if patterns is None else re.compile("|".join(map(_pattern, patterns)), re.DOTALL).fullmatch
            for patterns in (rule.nodes, rule.zones, rule.capabilities, rule.kinds, rule.sources)
        )

    def of_caller(self, ask: Ask) -> bool:
        """Whether it is about such a request of such a node."""
        rule = self.rule
        return (
            (rule.actions is None or ask.action in rule.actions)
            and (rule.attestation is None or ask.attestation in rule.attestation)
            and (self._nodes is None or _any(self._nodes, (ask.node_id,)))
            and (self._zones is None or _any(self._zones, (ask.zone,)))
            and (self._capabilities is None or _any(self._capabilities, ask.capabilities))
        )

    def of_job(self, ask: Ask) -> bool:
        """Whether it is about such a job."""
        kinds, sources = self._kinds, self._sources
        return (kinds is None or _any(kinds, (ask.kind,))) and (sources is None or _any(sources, (ask.source,)))


def _any(matches: Callable[[str], object], texts: Iterable[str | None]) -> bool:
    return any(text is not None and matches(text) for text in texts)


def _pattern(text: str) -> str:
    """Each piece is looked for once, at its first place; a plain `.*` for each star would try all of them."""
    first, *middle = (re.escape(piece) for piece in text.split("*"))
    last = middle.pop() if middle else None
    return first + "".join(f"(?>.*?{piece})" for piece in middle if piece) + ("" if last is None else f".*{last}")


KNOWN_MAX = 65_536
"""So many answers are remembered."""
