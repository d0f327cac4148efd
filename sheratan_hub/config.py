"""Settings: hub.toml, then the environment, then flags; a later one wins. Nothing else reads the environment.

Longer than 300 lines because every setting, its range and its variable stand in this one place.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta

from sheratan_hub.audit_lines import EVENTS


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table of hub.toml. Field names end in their unit; defaults are what an absent key means."""


class ControlSettings(Section, frozen=True):
    """Where nodes check in."""

    host: str = "127.0.0.1"
    port: int = 8787
    hosts: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()


class DataSettings(Section, frozen=True):
    """Where work is handed out and taken back."""

    host: str = "127.0.0.1"
    port: int = 8788
    hosts: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()


class HubSettings(Section, frozen=True):
    """The process itself."""

    data_dir: str = "var"
    restart_grace_seconds: int = 15
    max_waiting_commands: int = 20_000
    max_batch_commands: int = 512
    max_long_polls: int = 10_000


class StoreSettings(Section, frozen=True):
    """Where everything is kept; empty means `sqlite://<data_dir>/hub.db`."""

    url: str = ""

    def __repr__(self) -> str:
        return f"StoreSettings(url={hide_password(self.url)!r})"


class AuthSettings(Section, frozen=True):
    """The shared token, and the one that is to follow it. Values come from variables or from files, never from here."""

    token_file: str = ""
    token_required: bool = True
    token_next_file: str = ""
    rotation_until: str = ""
    refusals_free: int = 20
    refusal_delay_ms: int = 1000


class NodeSettings(Section, frozen=True):
    """When a silent node counts as STALE and as DEAD, and how often nodes are asked to come."""

    ttl_seconds: int = 120
    dead_seconds: int = 600
    max_heartbeats_per_second: int = 1000


class AttestationSettings(Section, frozen=True):
    """When changes of what a node attests are suspect."""

    flip_window_seconds: int = 120
    spoof_threshold: int = 3


class QueueSettings(Section, frozen=True):
    """Limits of the queue, and how long a lease lasts."""

    max_depth: int = 1000
    max_inflight: int = 100
    backpressure_mode: Literal[429, 503] = 429
    lease_seconds: int = 300
    item_ttl_seconds: int = 0
    max_losses: int = 3
    loss_delay_ms: int = 1000
    cancel_grace_seconds: int = 30
    max_deliveries: int = 50
    age_seconds: int = 60
    max_leases_per_node: int = 0


class RetrySettings(Section, frozen=True):
    """What happens after a failure, unless the job says otherwise."""

    max_attempts: int = 4
    backoff_base_ms: int = 1000
    backoff_cap_ms: int = 60_000


class RetentionSettings(Section, frozen=True):
    """How long what is over is kept, from its end on."""

    completed_seconds: int = 86_400
    cancelled_seconds: int = 86_400
    failed_seconds: int = 604_800
    mission_seconds: int = 604_800
    ledger_days: int = 30


class DlqSettings(Section, frozen=True):
    """The dead-letter list: the failed jobs."""

    enabled: bool = True
    max_items: int = 10_000


class LedgerSettings(Section, frozen=True):
    """The ledger's file."""

    file: bool = True
    max_bytes: int = 104_857_600
    max_hours: int = 0
    keep_files: int = 0


class IdempotencySettings(Section, frozen=True):
    """How long a key is remembered after its job has ended, and how much of its result is given again."""

    ttl_seconds: int = 86_400
    max_cached_bytes: int = 16_384


class IntegritySettings(Section, frozen=True):
    """How results are checked. The key comes from SHERATAN_RESULT_HMAC_KEY or from `hmac_key_file`."""

    mode: Literal["none", "sha256", "hmac"] = "sha256"
    required: bool = False
    hmac_key_file: str = ""


class LimitSettings(Section, frozen=True):
    """How much one request may ask."""

    body_bytes: int = 1_048_576
    batch_bytes: int = 16_777_216
    batch_jobs: int = 1000
    json_depth: int = 64
    header_seconds: int = 10
    body_seconds: int = 10
    send_seconds: int = 10
    idle_seconds: int = 75
    connections: int = 20_000
    connections_per_address: int = 1000


class TlsSettings(Section, frozen=True):
    """Certificates, as PEM files. Without `cert` both planes speak plain HTTP."""

    cert: str = ""
    key: str = ""
    client_ca: str = ""


class PolicySettings(Section, frozen=True):
    """Policies that lie in files: each `*.json` in `dir` is loaded as a version when the hub starts."""

    dir: str = ""


class MetricsSettings(Section, frozen=True):
    """Who may read /metrics, and how many series there may be."""

    require_token: bool = False
    max_kinds: int = 20
    max_node_series: int = 0


class LogSettings(Section, frozen=True):
    """What is written to the logs, and how large they grow."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    max_bytes: int = 104_857_600
    keep_files: int = 5


class AuditSettings(Section, frozen=True):
    """The security audit log."""

    required: bool = True
    max_bytes: int = 104_857_600
    keep_files: int = 0


class AlertRule(Section, frozen=True):
    """More than so many lines of one event in the audit log within a window of seconds make an alert.

    `per`: counted for each address, each node, each origin (node, else address), or `all` together. Then the rule is
    silent for its cool-down, for that address or node. `reason` empty is any; `on` false switches the rule off.
    """

    event: str
    more_than: Annotated[int, Meta(ge=0, le=10_000)] = 0
    window_seconds: Annotated[int, Meta(ge=1, le=86_400)] = 60
    per: Literal["all", "address", "node", "origin"] = "all"
    reason: str = ""
    ignore_loopback: bool = False
    cooldown_seconds: Annotated[int, Meta(ge=0, le=1_000_000)] = 300
    on: bool = True
    name: str = ""


class AlertSettings(Section, frozen=True):
    """What the watcher makes of the audit log. Each rule that ships is a setting; `rules` are one's own."""

    in_process: bool = False
    look_back_seconds: int = 3600
    webhook_file: str = ""
    webhook_hosts: tuple[str, ...] = ()
    webhook_timeout_seconds: int = 5
    webhook_tries: int = 5
    max_bytes: int = 10_485_760
    keep_files: int = 5
    auth_failure: AlertRule = AlertRule("AUTH_FAILURE", more_than=20)
    port_mismatch: AlertRule = AlertRule("PORT_MISMATCH", more_than=20)
    result_integrity_fail: AlertRule = AlertRule("RESULT_INTEGRITY_FAIL", per="origin")
    attestation_spoof: AlertRule = AlertRule("ATTESTATION_SPOOF_SUSPECT", per="node")
    poison: AlertRule = AlertRule("DLQ_ENQUEUE", reason="POISON")
    fleet_silent: AlertRule = AlertRule("FLEET_SILENT")
    rules: tuple[AlertRule, ...] = ()

    def in_force(self) -> dict[str, AlertRule]:
        """The rules that are on, by name; one's own without a name are called rule_1, rule_2 ..."""
        shipped = {name: rule for name in self.__struct_fields__ if isinstance(rule := getattr(self, name), AlertRule)}
        own = {rule.name or f"rule_{number}": rule for number, rule in enumerate(self.rules, 1)}
        return {name: rule for name, rule in (shipped | own).items() if rule.on}


class RateLimitSettings(Section, frozen=True):
    """What one source may do: submits a minute, jobs running at once; 0 is without that limit."""

    per_minute: int = 10
    concurrent: int = 5


class Secrets(msgspec.Struct, frozen=True):
    """Values that never stand in hub.toml. Their repr hides them."""

    token: str = "shared-secret"
    hmac_key: str = ""
    token_next: str = ""

    def __repr__(self) -> str:
        return "Secrets(***)"


class Settings(Section, frozen=True):
    """All settings, by table."""

    control: ControlSettings = ControlSettings()
    data: DataSettings = DataSettings()
    hub: HubSettings = HubSettings()
    store: StoreSettings = StoreSettings()
    auth: AuthSettings = AuthSettings()
    nodes: NodeSettings = NodeSettings()
    attestation: AttestationSettings = AttestationSettings()
    queue: QueueSettings = QueueSettings()
    retry: RetrySettings = RetrySettings()
    retention: RetentionSettings = RetentionSettings()
    dlq: DlqSettings = DlqSettings()
    ledger: LedgerSettings = LedgerSettings()
    idempotency: IdempotencySettings = IdempotencySettings()
    integrity: IntegritySettings = IntegritySettings()
    limits: LimitSettings = LimitSettings()
    tls: TlsSettings = TlsSettings()
    policies: PolicySettings = PolicySettings()
    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()
    audit: AuditSettings = AuditSettings()
    alerts: AlertSettings = AlertSettings()
    rate_limits: dict[str, RateLimitSettings] = {}


class BadConfig(Exception):
    """The settings cannot be used. The text says which one, where it was given and what it may be; never a secret."""


DEFAULT_FILE = "hub.toml"
DEFAULT_TOKEN = Secrets().token

ENVIRONMENT = {
    "SHERATAN_CONTROL_HOST": "control.host",
    "SHERATAN_CONTROL_PORT": "control.port",
    "SHERATAN_DATA_HOST": "data.host",
    "SHERATAN_DATA_PORT": "data.port",
    "SHERATAN_DATA_DIR": "hub.data_dir",
    "SHERATAN_RESTART_GRACE_SEC": "hub.restart_grace_seconds",
    "SHERATAN_STORE_URL": "store.url",
    "SHERATAN_HUB_TOKEN_REQUIRED": "auth.token_required",
    "SHERATAN_HUB_TOKEN_ROTATION_UNTIL": "auth.rotation_until",
    "SHERATAN_NODE_TTL_SEC": "nodes.ttl_seconds",
    "SHERATAN_NODE_DEAD_SEC": "nodes.dead_seconds",
    "SHERATAN_ATTESTATION_FLIP_WINDOW_SEC": "attestation.flip_window_seconds",
    "SHERATAN_ATTESTATION_SPOOF_THRESHOLD": "attestation.spoof_threshold",
    "SHERATAN_MAX_QUEUE_DEPTH": "queue.max_depth",
    "SHERATAN_MAX_INFLIGHT": "queue.max_inflight",
    "SHERATAN_BACKPRESSURE_MODE": "queue.backpressure_mode",
    "SHERATAN_LEASE_TIMEOUT": "queue.lease_seconds",
    "SHERATAN_QUEUE_ITEM_TTL_SEC": "queue.item_ttl_seconds",
    "SHERATAN_MAX_LOSSES": "queue.max_losses",
    "SHERATAN_PRIORITY_AGE_SEC": "queue.age_seconds",
    "SHERATAN_MAX_LEASES_PER_NODE": "queue.max_leases_per_node",
    "SHERATAN_RETRY_MAX_ATTEMPTS": "retry.max_attempts",
    "SHERATAN_RETRY_BACKOFF_BASE_MS": "retry.backoff_base_ms",
    "SHERATAN_RETRY_BACKOFF_CAP_MS": "retry.backoff_cap_ms",
    "SHERATAN_DLQ_ENABLED": "dlq.enabled",
    "SHERATAN_DLQ_MAX_ITEMS": "dlq.max_items",
    "SHERATAN_IDEMPOTENCY_TTL_SEC": "idempotency.ttl_seconds",
    "SHERATAN_IDEMPOTENCY_MAX_CACHED_BYTES": "idempotency.max_cached_bytes",
    "SHERATAN_RESULT_INTEGRITY": "integrity.mode",
    "SHERATAN_RESULT_INTEGRITY_MODE": "integrity.mode",
    "SHERATAN_RESULT_INTEGRITY_REQUIRED": "integrity.required",
}


class SecretSource(NamedTuple):
    """Where a secret comes from: the first of `variables` that is set, else the file that the setting names."""

    variables: tuple[str, ...]
    file_key: str


SECRETS = {
    "token": SecretSource(("SHERATAN_HUB_TOKEN_ACTIVE", "SHERATAN_HUB_TOKEN"), "auth.token_file"),
    "token_next": SecretSource(("SHERATAN_HUB_TOKEN_NEXT",), "auth.token_next_file"),
    "hmac_key": SecretSource(("SHERATAN_RESULT_HMAC_KEY",), "integrity.hmac_key_file"),
}
YES_NO = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}

RATE_LIMITS = "rate_limits"
"""The one table whose keys are free: sources, each with a table of its own."""

FIELDS = {
    f"{table.name}.{field.name}": field
    for table in msgspec.structs.fields(Settings)
    if table.name != RATE_LIMITS
    for field in msgspec.structs.fields(table.type)
}
# Whole numbers go from 1 to a thousand million, but for these.
RANGES = {
    "control.port": (0, 65_535),
    "data.port": (0, 65_535),
    "limits.json_depth": (1, 500),
    "limits.connections": (0, 1_000_000_000),
    "limits.connections_per_address": (0, 1_000_000_000),
    "attestation.spoof_threshold": (1, 1000),
    "metrics.max_kinds": (0, 200),
    "metrics.max_node_series": (0, 1000),
    "auth.refusals_free": (0, 1_000_000_000),
    "auth.refusal_delay_ms": (0, 60_000),
    "hub.restart_grace_seconds": (0, 1_000_000_000),
    "queue.item_ttl_seconds": (0, 1_000_000_000),
    "queue.loss_delay_ms": (0, 1_000_000_000),
    "queue.cancel_grace_seconds": (0, 1_000_000_000),
    "queue.age_seconds": (0, 1_000_000_000),
    "queue.max_leases_per_node": (0, 1_000_000_000),
    "retry.backoff_base_ms": (0, 1_000_000_000),
    "retry.backoff_cap_ms": (0, 1_000_000_000),
    "idempotency.ttl_seconds": (0, 1_000_000_000),
    "idempotency.max_cached_bytes": (0, 1_000_000_000),
    "ledger.max_bytes": (0, 1_000_000_000_000),
    "ledger.max_hours": (0, 1_000_000),
    "ledger.keep_files": (0, 1_000_000_000),
    "audit.max_bytes": (0, 1_000_000_000_000),
    "audit.keep_files": (0, 1_000_000_000),
    "alerts.webhook_timeout_seconds": (1, 60),
    "alerts.webhook_tries": (1, 100),
    "alerts.max_bytes": (0, 1_000_000_000_000),
    "alerts.keep_files": (1, 1000),
    "log.max_bytes": (0, 1_000_000_000_000),
    "log.keep_files": (1, 1000),
}


class Given(NamedTuple):
    """A value and where it comes from."""

    value: object
    origin: str


Flags = Mapping[str, object]


def load(path: str | None, environ: Mapping[str, str], flags: Flags | None = None) -> tuple[Settings, Secrets]:
    """The settings in force and the secrets; raises `BadConfig`.

    `path` names the settings file; None is ./hub.toml, if there is one. `flags` maps dotted keys (`data.port`)
    to the command line's values, None for those not given.
    """
    given = _gather(path, environ, flags)
    tables: dict[str, dict[str, object]] = {}
    for key, (value, _) in given.items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = value
    settings = msgspec.convert(tables, Settings)
    secrets = Secrets(**{name: _secret(name, given, environ)[0] for name in SECRETS})
    if wrong := list(problems(settings, secrets)):
        raise BadConfig(" ".join(wrong))
    return settings, secrets


def explain(path: str | None, environ: Mapping[str, str], flags: Flags | None = None) -> list[tuple[str, object, str]]:
    """Every setting as (dotted key, value, where it comes from), then the secrets, their values hidden."""
    given = _gather(path, environ, flags)
    rows = [(key, *given.get(key, Given(field.default, "default"))) for key, field in FIELDS.items()]
    plain = [(key, msgspec.to_builtins(value), origin) for key, value, origin in rows]
    shown = [(key, hide_password(str(value)) if key == "store.url" else value, origin) for key, value, origin in plain]
    rates = [(key, *one) for key, one in given.items() if key.startswith(f"{RATE_LIMITS}.")]
    return shown + rates + [(name, "***", _secret(name, given, environ)[1]) for name in SECRETS]


def store_url(settings: Settings) -> str:
    """The URL of the store in force."""
    return settings.store.url or f"sqlite://{settings.hub.data_dir}/hub.db"


@lru_cache(1024)
def is_loopback(host: str) -> bool:
    """Whether a server bound to `host` can be reached from this machine only."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def hide_password(url: str) -> str:
    """`url` with `***` in the place of its password, and of any in its query."""
    hidden = re.sub(r"(://[^:/]*):.*@", r"\1:***@", url)
    return re.sub(r"([?&]\w*password=)[^&]*", r"\1***", hidden, flags=re.IGNORECASE)


def _gather(path: str | None, environ: Mapping[str, str], flags: Flags | None) -> dict[str, Given]:
    """What is given, by dotted key, each value checked by itself."""
    given = _from_file(path) | _from_environment(environ)
    for key, value in (flags or {}).items():
        if value is not None:
            given[key] = Given(_checked(key, value, f"{key} on the command line"), "command line")
    return given


def _from_file(path: str | None) -> dict[str, Given]:
    """The settings of hub.toml."""
    name = path or DEFAULT_FILE
    if path is None and not Path(name).exists():
        return {}
    return {key: Given(_checked(key, value, f"{key} in {name}"), name) for key, value in _entries(name)}


def _entries(name: str) -> Iterator[tuple[str, object]]:
    """The file's dotted keys, all of them known, and their values."""
    try:
        tables = tomllib.loads(Path(name).read_bytes().decode())
    except OSError as error:
        raise BadConfig(f"The settings file {name} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise BadConfig(f"{name} is not a TOML file in UTF-8: {error}.") from error
    for table, entries in tables.items():
        if table not in Settings.__struct_fields__:
            raise BadConfig(_unknown(table, name, [*Settings.__struct_fields__, *FIELDS]))
        if not isinstance(entries, dict):
            raise BadConfig(f"{table} in {name} must be a table: [{table}].")
        for entry, value in entries.items():
            if table == RATE_LIMITS:
                yield f"{table}.{entry}", value
                continue
            if f"{table}.{entry}" not in FIELDS:
                raise BadConfig(_unknown(f"{table}.{entry}", name, FIELDS))
            yield f"{table}.{entry}", value


def _from_environment(environ: Mapping[str, str]) -> dict[str, Given]:
    """The settings that variables set."""
    _refuse_typos(environ)
    given: dict[str, Given] = {}
    for name, key in ENVIRONMENT.items():
        if name in environ:
            value = _checked(key, _parsed(key, environ[name]), name)
            if key in given and given[key].value != value:
                raise BadConfig(f"{name} and {given[key].origin} mean the same and differ; set one of them.")
            given[key] = Given(value, name)
    return given


def _refuse_typos(environ: Mapping[str, str]) -> None:
    """Raise for a variable close to one of ours; others may begin with SHERATAN_ for other software."""
    prefix = "SHERATAN_"
    ours = {*ENVIRONMENT, *(name for source in SECRETS.values() for name in source.variables)}
    endings = [name.removeprefix(prefix) for name in ours]
    for name in sorted(environ.keys() - ours):
        near = difflib.get_close_matches(name.removeprefix(prefix), endings, n=1, cutoff=0.8)
        if name.startswith(prefix) and near:
            raise BadConfig(f"{name} is not a variable of the hub; did you mean {prefix}{near[0]}?")


def _parsed(key: str, text: str) -> object:
    """A variable's text in the setting's type, or as it is when it does not fit (`_checked` refuses it then)."""
    default = FIELDS[key].default
    if isinstance(default, bool):
        return YES_NO.get(text.strip().lower(), text)
    if isinstance(default, int) and re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", text):
        return int(text)
    return text


def _checked(key: str, value: object, what: str) -> object:
    """`value` if the setting may have it, else `BadConfig` about `what`."""
    if key.startswith(f"{RATE_LIMITS}."):
        return _checked_rate(value, what)
    try:
        checked: object = msgspec.convert(value, FIELDS[key].type)
    except msgspec.ValidationError as error:
        raise BadConfig(_misfit(key, what, str(error))) from error
    if FIELDS[key].type is int and not _range(key)[0] <= int(str(checked)) <= _range(key)[1]:
        raise BadConfig(f"{what} must be {_allowed(key)}.")
    if isinstance(checked, str) and "\0" in checked:  # no file has such a name
        raise BadConfig(f"{what} must be a text without NUL.")
    return checked


def _misfit(key: str, what: str, error: str) -> str:
    """What is wrong with a value; inside a table of its own with the full path of what it is about."""
    wrong, _, place = error.partition(" - at `$")
    place = place.rstrip("`")
    if unknown := re.fullmatch(r"Object contains unknown field `(\w+)`", wrong):
        place, wrong = f"{place}.{unknown[1]}", "there is no such field"
    if AlertRule in (FIELDS[key].type, *get_args(FIELDS[key].type)) and (place or "`" in wrong):
        return f"{what.replace(key, key + place, 1)} cannot be used: {wrong}."
    return f"{what} must be {_allowed(key)}."


def _checked_rate(value: object, what: str) -> object:
    """The limits of one source, by name; what is not given keeps its default."""
    numbers = "whole numbers from 0 to 1000000"
    try:
        rate = msgspec.convert(value, RateLimitSettings)
    except msgspec.ValidationError as error:
        raise BadConfig(f"{what} must be a table of per_minute and concurrent, {numbers}.") from error
    if not all(0 <= n <= 1_000_000 for n in (rate.per_minute, rate.concurrent)):
        raise BadConfig(f"{what} must be a table of per_minute and concurrent, {numbers}.")
    return msgspec.structs.asdict(rate)


def _range(key: str) -> tuple[int, int]:
    return RANGES.get(key, (1, 1_000_000_000))


def _allowed(key: str) -> str:
    """What a setting may be, in words."""
    kind = FIELDS[key].type
    if AlertRule in (kind, *get_args(kind)):
        return "an alert rule" if kind is AlertRule else "a list of alert rules"
    if choices := get_args(kind):
        return "a list of texts" if ... in choices else "one of " + ", ".join(str(choice) for choice in choices)
    low, high = _range(key)
    return {bool: "true or false", int: f"a whole number from {low} to {high}", str: "a text"}[kind]


def _unknown(key: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"{key} in {name} is not a setting" + (f"; did you mean {near[0]}?" if near else ".")


def _secret(name: str, given: Mapping[str, Given], environ: Mapping[str, str]) -> tuple[str, str]:
    """A secret's value and where it comes from: a variable, else its file, else the default."""
    source = SECRETS[name]
    for variable in source.variables:
        if variable in environ:
            return environ[variable], variable
    file = given.get(source.file_key, Given("", "")).value
    return (_from_secret_file(str(file), source.file_key), str(file)) if file else (getattr(Secrets(), name), "default")


def _from_secret_file(file: str, key: str) -> str:
    """The file's text without the space around it."""
    try:
        text = Path(file).read_text("utf-8").strip()
    except OSError as error:
        raise BadConfig(f"{key}: the file {file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise BadConfig(f"{key}: the file {file} is not a text in UTF-8.") from error
    if not text:
        raise BadConfig(f"{key}: the file {file} is empty.")
    return text


def problems(settings: Settings, secrets: Secrets) -> Iterator[str]:
    """What cannot be together, each as a sentence."""
    control, data, token = settings.control, settings.data, secrets.token
    if not control.host or not data.host:
        yield "control.host and data.host must not be empty; 0.0.0.0 means every address of this machine."
    if control.port == data.port != 0:
        yield f"control.port and data.port must differ; both are {data.port}."
    if not settings.hub.data_dir:
        yield "hub.data_dir must not be empty."
    if settings.store.url and "://" not in settings.store.url:
        yield "store.url must look like sqlite://FILE, file://DIR or memory://."
    if not token or not _header_fit(token):
        yield "The token must be printable ASCII without space around it, and not empty; set SHERATAN_HUB_TOKEN."
    if not _header_fit(secrets.token_next):
        yield "The next token must be printable ASCII without space around it; set SHERATAN_HUB_TOKEN_NEXT."
    yield from _auth_problems(settings)
    if not (is_loopback(control.host) and is_loopback(data.host)):
        if DEFAULT_TOKEN in (token, secrets.token_next):
            yield "The default token is for 127.0.0.1 only; set SHERATAN_HUB_TOKEN, or bind both planes to 127.0.0.1."
        if not settings.auth.token_required:
            yield "auth.token_required can be switched off only while both planes are bound to 127.0.0.1."
    if bool(settings.tls.cert) != bool(settings.tls.key):
        yield "tls.cert and tls.key belong together; set both or none."
    if settings.tls.client_ca and not settings.tls.cert:
        yield "tls.client_ca needs tls.cert and tls.key."
    if settings.nodes.dead_seconds < settings.nodes.ttl_seconds:
        yield "nodes.dead_seconds must not be less than nodes.ttl_seconds."
    if settings.retry.backoff_cap_ms < settings.retry.backoff_base_ms:
        yield "retry.backoff_cap_ms must not be less than retry.backoff_base_ms."
    if settings.limits.batch_bytes < settings.limits.body_bytes:
        yield "limits.batch_bytes must not be less than limits.body_bytes."
    for name, rule in settings.alerts.in_force().items():
        if rule.event not in EVENTS:
            near = difflib.get_close_matches(rule.event, EVENTS, n=1)
            yield f"alerts.{name}: {rule.event} is no audit event" + (f"; did you mean {near[0]}?" if near else ".")
    if settings.integrity.mode == "hmac" and not secrets.hmac_key:
        yield "integrity.mode hmac needs a key; set SHERATAN_RESULT_HMAC_KEY or integrity.hmac_key_file."


def _auth_problems(settings: Settings) -> Iterator[str]:
    try:
        until_ms(settings.auth.rotation_until)
    except ValueError:
        yield (
            "auth.rotation_until (SHERATAN_HUB_TOKEN_ROTATION_UNTIL) must be an RFC 3339 time with a zone, "
            "such as 2027-01-31T12:00:00Z, or whole seconds since 1970."
        )
    for name, proxies in (("control", settings.control.trusted_proxies), ("data", settings.data.trusted_proxies)):
        for proxy in proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError:
                yield f"{name}.trusted_proxies holds {proxy!r}, which is no address and no network such as 10.0.0.0/8."


def until_ms(text: str) -> int:
    """A deadline in ms since 1970: RFC 3339 with a zone, or whole seconds; 0 for an empty text. Raises ValueError."""
    text = text.strip()
    if not text:
        return 0
    if re.fullmatch(r"[0-9]{9,11}", text):
        return int(text) * 1000
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("it names no zone")
    return min(max(1, int(moment.timestamp() * 1000)), 253_370_764_800_000)


def _header_fit(token: str) -> bool:
    """Whether a header can carry it."""
    return token.isascii() and (token.isprintable() or not token) and token == token.strip()
