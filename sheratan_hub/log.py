"""Logs: one JSON object a line, one file a plane; warnings also to stderr. Never a secret, never a payload.

Loggers: `sheratan.control` and `sheratan.data` with everything below them write to their plane's file; the engine
(`sheratan`), aiohttp and asyncio write to both.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from io import TextIOWrapper
from pathlib import Path

from sheratan_hub.clock import rfc3339
from sheratan_hub.config import BadConfig, Settings

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request being served; every line written meanwhile carries it."""

PLANES = ("control", "data")
ROOTS = ("sheratan", "aiohttp", "asyncio", "opentelemetry")


def setup(settings: Settings, data_dir: str | Path) -> Callable[[], None]:
    """Write logs to `data_dir`/logs from now on, in the place of an earlier call's; returns what ends it.

    Directories are made 0700 and files 0600. Raises `BadConfig` when they cannot be written.
    """
    Logs(settings, data_dir).install()
    return _remove_handlers


class Logs:
    """The logs as these settings want them, opened: either `install` or `close` them.

    Raises `BadConfig` when they cannot be written; what was written until now goes on.
    """

    def __init__(self, settings: Settings, data_dir: str | Path) -> None:
        self._level: int = getattr(logging, settings.log.level.upper())
        files = _plane_files(Path(data_dir), settings.log.max_bytes, settings.log.keep_files)
        self._handlers = [*files, _stderr()]

    def install(self) -> None:
        """Write to them from now on, and to no others."""
        _remove_handlers()
        for name in ROOTS:
            logger = logging.getLogger(name)
            logger.propagate = False
            logger.setLevel(self._level if name == "sheratan" else max(self._level, logging.WARNING))
            for handler in self._handlers:
                logger.addHandler(handler)

    def close(self) -> None:
        """They are not wanted after all."""
        for handler in self._handlers:
            handler.close()


class JsonFormatter(logging.Formatter):
    """A record as one line: `ts`, `level`, `logger`, `event`, then the fields of `extra={"data": {...}}`.

    Fields cannot replace these four. Whatever is not printable ASCII is escaped, so a line stays a line.
    """

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        line = {
            "ts": rfc3339(int(record.created * 1000)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        if current := request_id.get():
            line["request_id"] = current
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        data = getattr(record, "data", {})
        try:
            text = json.dumps({**line, **data, **line}, default=str, allow_nan=False)
        except (TypeError, ValueError):  # keys that are no texts, NaN, a circle
            text = json.dumps({**line, "data": repr(data)})
        return text.replace("\x7f", "\\u007f")


class TextFormatter(logging.Formatter):
    """A record for people: level, logger, message, and an exception's last line."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        text = f"{record.levelname} {record.name}: {record.getMessage()}"
        if record.exc_info and (error := record.exc_info[1]):
            text += f" ({type(error).__name__}: {error})"
        return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


class PlaneFilter(logging.Filter):
    """Lets through all but the other plane's records."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self._other = logging.Filter(f"sheratan.{other}")

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record belongs into this plane's file."""
        return not self._other.filter(record)


class PlaneFile(logging.handlers.WatchedFileHandler):
    """A log file readable by its owner only, opened again when it was moved away or removed.

    Once it has `max_bytes` (0: never) the next line begins a new one: the old one gets the ending `.1`, the one
    before it `.2`, up to `keep_files`.
    """

    def __init__(self, path: Path, max_bytes: int = 0, keep_files: int = 1) -> None:
        self._max_bytes, self._keep_files = max_bytes, keep_files
        self._fixed = False
        super().__init__(path)

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.fchmod(descriptor, 0o600)
        return os.fdopen(descriptor, "a", encoding="ascii", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record; a file that cannot be opened again is reported, not raised to the one who logs."""
        try:
            self.reopenIfNeeded()
            if self._max_bytes and not self._fixed:
                self._make_room()
            logging.FileHandler.emit(self, record)
        except OSError:
            self.handleError(record)

    def _make_room(self) -> None:
        """Begin a new file if this one is full. If that cannot be done it grows on."""
        if self.stream is None or os.fstat(self.stream.fileno()).st_size < self._max_bytes:
            return
        try:
            shift(Path(self.baseFilename), self._keep_files)
        except OSError as error:
            self._fixed = True
            sys.stderr.write(f"ERROR cannot rotate {self.baseFilename}, which grows on: {error}\n")
            return
        self.reopenIfNeeded()

    def close(self) -> None:
        """Let go of the file; that lines could not be written was said when they were."""
        with suppress(OSError):
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        """Say in one line on stderr that a record was lost."""
        sys.stderr.write(f"ERROR cannot write {self.baseFilename}: {sys.exc_info()[1]}\n")


def shift(path: Path, keep_files: int) -> None:
    """Move a full file out of the way: it becomes `.1`, that one `.2` and so on; the last one is gone. `OSError`s."""
    names = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, keep_files + 1))]
    for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
        with suppress(FileNotFoundError):
            newer.replace(older)


def _plane_files(data_dir: Path, max_bytes: int, keep_files: int) -> list[logging.Handler]:
    """The handlers of both planes' files."""
    directory = data_dir / "logs"
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        directory.chmod(0o700)
        bounds = max_bytes, keep_files
        return [_plane_file(directory, plane, other, *bounds) for plane, other in (PLANES, PLANES[::-1])]
    except OSError as error:
        raise BadConfig(f"hub.data_dir: logs cannot be written to {directory}: {error.strerror}.") from error


def _plane_file(directory: Path, plane: str, other: str, max_bytes: int, keep_files: int) -> logging.Handler:
    handler = PlaneFile(directory / f"hub_{plane}.jsonl", max_bytes, keep_files)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(PlaneFilter(other))
    return handler


def _stderr() -> logging.Handler:
    handler = StderrHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(TextFormatter())
    return handler


class StderrHandler(logging.Handler):
    """Short lines on stderr, for whoever started the process."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record; a closed stderr is nobody's concern."""
        with suppress(OSError, ValueError):
            sys.stderr.write(self.format(record) + "\n")


def _remove_handlers() -> None:
    """Take away and close what an earlier `setup` added."""
    for name in ROOTS:
        logger = logging.getLogger(name)
        for handler in [handler for handler in logger.handlers if isinstance(handler, PlaneFile | StderrHandler)]:
            logger.removeHandler(handler)
            handler.close()
