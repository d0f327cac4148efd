"""The part of a diagnosis that needs no hub: logs, audit log, settings, names of variables, disks, versions."""

from __future__ import annotations

import os
import platform
import re
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from sheratan_hub import __version__, tails
from sheratan_hub.audit_lines import ALERTS_NAME, FILE_NAME, chain_files, first_seq, parsed
from sheratan_hub.audit_verify import Chain, last_head
from sheratan_hub.config import DEFAULT_TOKEN, ENVIRONMENT, SECRETS, Settings, store_url
from sheratan_hub.redact import GONE, Redactor
from sheratan_hub.rules.signs import DiskSign, Told
from sheratan_hub.tails import Tail, tail

CHAIN_BYTES = 32 << 20
"""So much of the audit log's end is proved; `audit verify` proves all of it."""

TOLD_LINES = 2000
"""So many of the audit log's last lines are looked at for signs."""

FULL_BYTES = 1 << 20
LOW_BYTES, LOW_SHARE = 100 << 20, 0.02

NAMES_MAX = 2000
PACKAGES = ("aiohttp", "aiosqlite", "click", "msgspec", "orjson", "prometheus-client", "sortedcontainers", "uvloop")

SECRET_VARIABLE = re.compile(
    r"token|secret|passw|pwd|credential|key|auth|cookie|dsn|webhook|salt|bearer", re.IGNORECASE
)
_PASSWORD = re.compile(r"://([^\s/]*)@")


def secrets_of(settings: Settings, environ: Mapping[str, str], more: tuple[str, ...] = ()) -> Redactor:
    """A redactor that knows every secret value that this process can find out: what must not be told."""
    found = {*more, *_of_environment(environ), *_of_files(settings), *_of_url(settings.store.url)}
    return Redactor(value for value in found if value not in (DEFAULT_TOKEN, "") and not value.isdigit())


def _of_environment(environ: Mapping[str, str]) -> Iterator[str]:
    own = {name for source in SECRETS.values() for name in source.variables}
    for name, value in environ.items():
        if name in own or (SECRET_VARIABLE.search(name) and name not in ENVIRONMENT and not value.startswith("/")):
            yield value
        yield from _of_url(value)


def _of_url(url: str) -> Iterator[str]:
    """What stands before the `@` of a URL, and the values of its query."""
    for found in _PASSWORD.finditer(url):
        yield from (found[1], *found[1].split(":", 1)[1:])
    if "://" in url and "?" in url:
        yield from (pair.partition("=")[2] for pair in url.partition("?")[2].split("&"))


def _of_files(settings: Settings) -> Iterator[str]:
    names = (
        settings.auth.token_file,
        settings.auth.token_next_file,
        settings.integrity.hmac_key_file,
        settings.alerts.webhook_file,
        settings.tls.key,
    )
    for name in filter(None, names):
        try:
            text = Path(name).read_text("utf-8", "replace")[:65_536].strip()
        except OSError:
            continue
        yield text
        yield from (line for line in text.splitlines() if len(line) > 20)
        yield text.partition("://")[2].partition("/")[2]


# Settings, variables, versions


def config(settings: Settings, redactor: Redactor, where: Mapping[str, str]) -> dict[str, Any]:
    """Every setting in force; `where` tells where those that were given come from."""
    tables = msgspec.to_builtins(settings)
    tables["store"]["url"] = shown_url(store_url(settings))
    rates = tables.pop("rate_limits")
    plain = {
        f"{table}.{name}": _named(one, redactor) for table, fields in tables.items() for name, one in fields.items()
    }
    limits = {redactor.name(source): rate for source, rate in rates.items()}
    secrets = {name: {"from": redactor.name(where.get(name, "unknown")), "value": GONE} for name in SECRETS}
    origins = {name: redactor.name(origin) for name, origin in where.items() if name not in SECRETS}
    return {"settings": plain, "rate_limits": limits, "secrets": secrets, "from": origins}


def _named(value: Any, redactor: Redactor) -> Any:
    if isinstance(value, str):
        return redactor.name(value)
    if isinstance(value, list):
        return [_named(one, redactor) for one in value]
    return {name: _named(one, redactor) for name, one in value.items()} if isinstance(value, dict) else value


def shown_url(url: str) -> str:
    """A store's URL without user, password and query."""
    scheme, mark, rest = url.partition("://")
    rest = rest.rpartition("@")[2] if "@" in rest else rest
    return f"{scheme}{mark}{rest.partition('?')[0]}"


def environment(environ: Mapping[str, str], redactor: Redactor, whose: str) -> dict[str, Any]:
    """The names of the variables, never a value."""
    names = sorted(redactor.name(name) for name in environ)
    return {"process": whose, "names": names[:NAMES_MAX], "cut": len(names) > NAMES_MAX}


def system(settings: Settings) -> dict[str, Any]:
    """Versions and the machine; of its disks only what does not change from one moment to the next."""
    return {
        "sheratan_hub": __version__,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "sqlite": sqlite3.sqlite_version,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "bits": 64 if sys.maxsize > 2**32 else 32,
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "disks": [{"path": one.path, "state": one.state} for one in disks(settings)],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def disks(settings: Settings) -> list[DiskSign]:
    """The directories that the hub writes to, each once."""
    places = [Path(settings.hub.data_dir), Path(settings.hub.data_dir) / "logs"]
    scheme, _, rest = store_url(settings).partition("://")
    if scheme in ("sqlite", "file") and rest:
        places.append(Path(rest) if scheme == "file" else Path(rest).parent)
    return [DiskSign(str(place), disk_state(place)) for place in dict.fromkeys(places) if os.path.isdir(place)]


def disk_state(place: Path) -> Any:
    """Whether there is room, and may be written: see `DiskSign`."""
    disk = os.statvfs(place)
    free, size = (disk.f_bavail if os.geteuid() else disk.f_bfree) * disk.f_frsize, disk.f_blocks * disk.f_frsize
    if disk.f_flag & os.ST_RDONLY:
        return "read-only"
    if size and free < FULL_BYTES:
        return "full"
    if not os.access(place, os.W_OK):
        return "forbidden"
    return "low" if size and free < min(LOW_BYTES, LOW_SHARE * size) else "ok"


# Logs


def log_files(folder: Path, name: str) -> list[Path]:
    """The files of a log that was moved away when it was full, the oldest first."""
    return [path for path in (folder / f"{name}.1", folder / name) if path.is_file()]


LOGS = (
    ("hub_control.jsonl", tails.log_line),
    ("hub_data.jsonl", tails.log_line),
    (ALERTS_NAME, tails.alert_line),
    ("ledger.jsonl", tails.ledger_line),
)


def read_log(folder: Path, name: str) -> Tail:
    """The last lines of one log. Raises `OSError`."""
    return tail(log_files(folder, name))


def newest(found: Tail) -> int:
    """The latest time that lines carry, in ms; 0 if none does."""
    return max((moment_ms(str((parsed(line) or {}).get("ts"))) for line in found.lines), default=0)


def moment_ms(text: str) -> int:
    """A time of a log in ms, 0 if it is none."""
    try:
        return round(datetime.fromisoformat(text).timestamp() * 1000)
    except (ValueError, OverflowError):
        return 0


# The audit log


def audit_tail(folder: Path) -> Tail:
    """The last lines of the audit log, more of them than are shown. Raises `OSError`."""
    return tail(chain_files(folder / FILE_NAME), TOLD_LINES)


def told(line: bytes, redactor: Redactor) -> Told | None:
    """What a line of the audit log tells of, as a sign."""
    record = parsed(line)
    if record is None:
        return None
    who = str(record.get("node_id") or record.get("remote_addr") or "hub")
    count = record.get("count")
    n = count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else 1
    reason = redactor.text(str(record.get("reason") or ""))
    return Told(moment_ms(str(record.get("ts"))), str(record.get("event")), redactor.name(who), reason, n)


def chain(folder: Path) -> dict[str, Any]:
    """Whether the end of the audit log hangs together. Raises `OSError`."""
    files = chain_files(folder / FILE_NAME)
    if not files:
        return {"files": 0, "complete": True, "broken": None, "from_seq": None, "to_seq": None}
    proving, complete = Chain(), first_seq(files[0]) in (1, None)
    room, first = CHAIN_BYTES, len(files)
    while first and room > 0:
        first -= 1
        room -= files[first].stat().st_size
    for place, file in enumerate(files[first:]):
        _follow(proving, file, -room if place == 0 and room < 0 else 0, trusting=place == 0)
    broken = proving.broken  # an end that is cut short is no break: a hub that was killed has left it
    return {
        "files": len(files),
        "complete": complete and first == 0 and room >= 0,
        "from_seq": proving.began_at,
        "to_seq": proving.seq,
        "broken": None
        if broken is None
        else {"file": Path(broken.file).name, "line": broken.line or None, "text": broken.text},
    }


def _follow(proving: Chain, file: Path, skip: int, *, trusting: bool) -> None:
    """Take a file from its first whole line behind `skip` bytes on; `trusting`: what it says of the lines before."""
    number = 1
    with file.open("rb") as opened:
        if skip:
            opened.seek(skip)
            opened.readline()
            number = 0  # nobody has counted the lines before
        lines = opened.read(CHAIN_BYTES + 1).split(b"\n")
    rest = lines.pop()
    lines += [rest] if rest else []
    if trusting and lines and (skip or (first_seq(file) or 1) > 1):
        proving.begin_at(lines[0])
    proving.feed(lines, str(file), number)


def unwritable(folder: Path) -> str:
    """Why the audit log could not be written by who runs this; nothing if it could be, or if there is none yet."""
    path = folder / FILE_NAME
    if not path.exists():
        return "" if not folder.is_dir() or os.access(folder, os.W_OK) else f"{folder} may not be written"
    if not path.is_file():
        return f"{path} is no file"
    if (state := disk_state(folder)) in ("full", "read-only"):
        return f"its disk is {state}"
    return "" if os.access(path, os.W_OK) else f"{path} may not be written"


def ended(found: Tail, folder: Path) -> tuple[bool, bool]:
    """(whether a hub has ever run, whether the last one ended without a word)"""
    last = ""
    for line in found.lines:
        record = parsed(line) or {}
        if record.get("event") in ("HUB_START", "HUB_STOP"):
            last = record["event"]
    began = bool(found.lines) or any(last_head(file) for file in chain_files(folder / FILE_NAME))
    return began, last != "HUB_STOP"
