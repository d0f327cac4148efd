"""Reads the settings again while the hub runs, on SIGHUP: all that may change changes at once, or nothing does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from sheratan_hub.app import App
from sheratan_hub.config import FIELDS, RATE_LIMITS, BadConfig, Secrets, Settings, TlsSettings, problems, until_ms
from sheratan_hub.items import HUB
from sheratan_hub.log import Logs
from sheratan_hub.policy_files import new_policies
from sheratan_hub.rules.command import Event, Refused
from sheratan_hub.rules.integrity import Demand
from sheratan_hub.rules.policies import CreatePolicy
from sheratan_hub.storage import StoreRefused

log = logging.getLogger("sheratan.reload")

Load = Callable[[], tuple[Settings, Secrets]]
"""Reads file, environment and flags as at the start. Raises `BadConfig`."""

Adopt = Callable[[], None]
"""Puts into force what was prepared. Cannot fail."""

WHOLE = (
    "nodes",
    "attestation",
    "retry",
    "retention",
    "dlq",
    "idempotency",
    "integrity",
    "limits",
    "tls",
    "log",
    "audit",
)
"""The tables of which every setting is taken over."""

SINGLE = (
    "control.hosts",
    "control.trusted_proxies",
    "data.hosts",
    "data.trusted_proxies",
    "auth.token_file",
    "auth.token_next_file",
    "auth.rotation_until",
    "auth.refusals_free",
    "auth.refusal_delay_ms",
    "policies.dir",
    "metrics.require_token",
)
WAITING = ("queue.age_seconds", "alerts.in_process", "alerts.look_back_seconds")
"""What a running hub has built on; of their tables the rest is taken over."""


def is_reloaded(key: str) -> bool:
    """Whether a running hub takes this setting over (a dotted key, or `rate_limits`); else it waits for the next start.

    What a setting stands for that is not named here waits.
    """
    if key in WAITING:
        return False
    return key in SINGLE or key.partition(".")[0] in (*WHOLE, "queue", "alerts", RATE_LIMITS)


class Outcome(msgspec.Struct, frozen=True):
    """What a reload did: what changed (with what it was and is), what waits for a restart; or why nothing was done."""

    changed: dict[str, str] = {}
    waiting: tuple[str, ...] = ()
    refused: str = ""

    @property
    def text(self) -> str:
        """One sentence for the log and the service manager."""
        if self.refused:
            return f"the settings were not taken over, the old ones stay: {self.refused}"
        text = f"settings reloaded: {', '.join(self.changed) or 'nothing changed'}"
        return text + (f"; only a restart changes {', '.join(self.waiting)}" if self.waiting else "")


class Reload:
    """Reloads the settings of `app`. `with_logs`: the logs are this process's, and opened anew."""

    def __init__(self, app: App, load: Load, *, with_logs: bool = False) -> None:
        self._app, self._load, self._with_logs = app, load, with_logs

    async def run(self) -> Outcome:
        """Take over what may change. What cannot be used is said, in the log and the audit log, and changes nothing."""
        try:
            outcome = await self._take_over()
        except (BadConfig, StoreRefused, OSError) as no:
            outcome = Outcome(refused=str(no))
        except Refused as no:
            outcome = Outcome(refused=no.text)
        level = logging.WARNING if outcome.refused or outcome.waiting else logging.INFO
        log.log(level, "%s", outcome.text, extra={"data": _told(outcome)})
        self._app.hub.report(Event(self._app.clock.now(), "hub.reload", "operator", meta=_meta(outcome)), HUB)
        return outcome

    async def _take_over(self) -> Outcome:
        app = self._app
        found, secrets = self._load()
        differing = differences(app.settings, found)
        waiting = [key for key in differing if not is_reloaded(key) or _switches_tls(key, app.settings.tls, found.tls)]
        settings = with_keys(app.settings, found, [key for key in differing if key not in waiting])
        if wrong := list(problems(settings, secrets)):
            raise BadConfig(" ".join(wrong))
        changed = {key: _shown(app.settings, settings, key) for key in differing if key not in waiting}
        adopt, files = self._prepare(settings, secrets)
        policies = await new_policies(app.hub, settings.policies.dir)
        logs = Logs(settings, settings.hub.data_dir) if self._with_logs else None
        try:
            changed |= files | await self._keep(policies) | await self._hear(settings, secrets)
        except BaseException:
            if logs is not None:
                logs.close()
            raise
        for one in adopt:
            one()
        if logs is not None:
            logs.install()
        return Outcome(changed, tuple(waiting))

    def _prepare(self, settings: Settings, secrets: Secrets) -> tuple[list[Adopt], dict[str, str]]:
        """(what puts the settings into force, which files changed although their names did not). Raises `BadConfig`."""
        app = self._app
        demand = Demand(settings.integrity.mode, settings.integrity.required, secrets.hmac_key)
        renewed, show = app.certificates.prepare(settings.tls)
        files = {"the certificate": "read again"} if renewed else {}
        if demand.key != app.services.demand.key:
            files["the hmac key"] = "another one"
        adopt = [show, lambda: app.adopt(settings, demand)]
        if app.watch is not None:
            adopt.append(app.watch.prepare(settings.alerts))
        return adopt, files

    async def _keep(self, policies: list[CreatePolicy]) -> dict[str, str]:
        """Keep the policies that are new; they are not active."""
        made = [await self._app.hub.execute(command) for command in policies]
        return {f"policy version {one.version}": f"loaded from {one.file}" for one in made}

    async def _hear(self, settings: Settings, secrets: Secrets) -> dict[str, str]:
        """Let settings and store agree on the tokens, as at a start."""
        app = self._app
        before = app.keyring.ring
        until = until_ms(settings.auth.rotation_until)
        await app.keyring.hear(app.hub, secrets.token, secrets.token_next, until)
        after = app.keyring.ring
        if before is None or after is None or (before.active, before.next) == (after.active, after.next):
            return {}
        return {"the token": f"{after.active.id}{f', then {after.next.id}' if after.next else ''}"}


def differences(old: Settings, new: Settings) -> list[str]:
    """The dotted keys whose values differ; of the rate limits only that they do."""
    found = [key for key in FIELDS if _value(old, key) != _value(new, key)]
    return found + ([RATE_LIMITS] if old.rate_limits != new.rate_limits else [])


def with_keys(old: Settings, new: Settings, keys: list[str]) -> Settings:
    """`old` with the values of these keys from `new`."""
    tables: dict[str, dict[str, Any]] = {}
    for key in keys:
        if key != RATE_LIMITS:
            table, _, name = key.partition(".")
            tables.setdefault(table, {})[name] = _value(new, key)
    changed: dict[str, Any] = {
        table: msgspec.structs.replace(getattr(old, table), **values) for table, values in tables.items()
    }
    if RATE_LIMITS in keys:
        changed[RATE_LIMITS] = new.rate_limits
    return msgspec.structs.replace(old, **changed)


def _value(settings: Settings, key: str) -> Any:
    table, _, name = key.partition(".")
    return getattr(getattr(settings, table), name)


def _switches_tls(key: str, old: TlsSettings, new: TlsSettings) -> bool:
    """Whether it is of TLS or of clients' certificates, and one of them is switched on or off."""
    return key.startswith("tls.") and (bool(old.cert), bool(old.client_ca)) != (bool(new.cert), bool(new.client_ca))


def _shown(old: Settings, new: Settings, key: str) -> str:
    """What it was and is."""
    if key == RATE_LIMITS:
        names = {
            name
            for name in {*old.rate_limits, *new.rate_limits}
            if old.rate_limits.get(name) != new.rate_limits.get(name)
        }
        return ", ".join(sorted(names))
    was, now = (msgspec.to_builtins(_value(one, key)) for one in (old, new))
    return f"{was!r} -> {now!r}"


def _told(outcome: Outcome) -> Mapping[str, Any]:
    if outcome.refused:
        return {"refused": outcome.refused}
    return {"changed": outcome.changed, "waiting": list(outcome.waiting)}


def _meta(outcome: Outcome) -> dict[str, Any]:
    """For the audit log."""
    if outcome.refused:
        return {"route": "SIGHUP", "refused": outcome.refused}
    return {"route": "SIGHUP", "changed": list(outcome.changed), "waiting": list(outcome.waiting)}
