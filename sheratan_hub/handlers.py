"""What runs a job's work: the `@handler` register, loading a module of them, and turning what happens into an outcome.

Imported by the worker and by each process of its pool, so it needs nothing of the network.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import msgspec
import orjson

from sheratan_hub.answers import json_text
from sheratan_hub.canonical import NULL, Raw

TYPE_CHARS = 100
MESSAGE_CHARS = 1000
TRACE_LINES = 50
TRACE_LINE_CHARS = 400

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """What a handler may ask about the work it is given. `attempt` counts deliveries and starts at 1."""

    job_id: str
    kind: str
    attempt: int = 1
    failures: int = 0
    losses: int = 0
    timeout_seconds: float | None = None
    priority: int = 2
    mission_id: str | None = None
    task_id: str | None = None
    traceparent: str | None = None


class Fail(Exception):
    """Raised by a handler to say how its failure is to be treated.

    `retry=False`: the job is not tried again. `retry_after_seconds`: it is, but not before that.
    """

    def __init__(self, message: str, *, retry: bool = True, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry = retry
        self.retry_after_seconds = retry_after_seconds


class Handler(NamedTuple):
    """One registered function: whether it is `async`, and whether it wants the `Attempt` as a second argument."""

    kind: str
    function: Function
    is_async: bool
    wants_job: bool

    def arguments(self, params: object, job: Attempt) -> tuple[object, ...]:
        """The positional arguments of a call."""
        return (params, job) if self.wants_job else (params,)


class Outcome(msgspec.Struct, frozen=True):
    """How a job ended: `result` and `error` are JSON texts (absent is `null`), `retry` None leaves it to the job."""

    ok: bool
    result: Raw = NULL
    error: Raw = NULL
    retry: bool | None = None
    retry_after_seconds: float | None = None


_registered: dict[str, Handler] = {}


def handler(kind: str) -> Callable[[F], F]:
    """Register the decorated function for jobs of `kind`.

    It takes the job's `params` and, when it has a second parameter, the `Attempt`; it returns anything JSON can
    hold. `async def` runs in the worker's event loop, `def` in a process of its pool. An exception is a failure
    of the job, which is tried again; `Fail` says more. Raises ValueError for a kind that is taken.
    """

    def register(function: F) -> F:
        if kind in _registered and not _same(_registered[kind].function, function):
            raise ValueError(f"kind {kind!r} has two handlers")
        _registered[kind] = Handler(
            kind, function, inspect.iscoroutinefunction(function), len(_positional(function)) > 1
        )
        return function

    return register


def load(module: str) -> dict[str, Handler]:
    """Import `module`, a dotted name or the path of a `.py` file, and give its handlers by kind.

    Raises ImportError when there is no such module, ValueError when it registers no handler, and whatever the
    module itself raises while it is imported.
    """
    if module.endswith(".py"):
        _import_file(Path(module))
    else:
        _first_on_path(Path.cwd())
        importlib.import_module(module)
    if not _registered:
        raise ValueError(f'{module} registers no handler; put @handler("kind") above a function')
    return dict(_registered)


def prepare(module: str) -> None:
    """What a process of the pool does first: the same import as the worker's, and a watch on that worker's life."""
    threading.Thread(target=_end_with_worker, daemon=True).start()
    load(module)


def _end_with_worker() -> None:
    """End this process when the worker has died, even by SIGKILL: what it is doing will be given to another node."""
    worker = multiprocessing.parent_process()
    if worker is not None:
        worker.join()
        os._exit(1)


def run(kind: str, params: bytes, job: Attempt) -> Outcome:
    """Call the sync handler of `kind`; never raises. Runs in a process of the pool."""
    found = _registered[kind]
    try:
        return succeeded(found.function(*found.arguments(orjson.loads(params), job)))
    except (Exception, SystemExit) as error:
        return failed(error)


async def run_async(found: Handler, params: bytes, job: Attempt) -> Outcome:
    """Await the async handler; raises only CancelledError."""
    try:
        return succeeded(await found.function(*found.arguments(orjson.loads(params), job)))
    except (Exception, SystemExit) as error:
        return failed(error)


def succeeded(value: object) -> Outcome:
    """The outcome of a handler that returned `value`; a value JSON can't hold is a failure without retry."""
    try:
        return Outcome(ok=True, result=Raw(json_text(value)))
    except (TypeError, ValueError, RecursionError) as error:
        return failure("NotJson", f"the handler returned what JSON cannot hold: {error}", retry=False)


def failed(error: BaseException) -> Outcome:
    """The outcome of a handler that raised `error`. The trace begins at the handler's own frame."""
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    trace = "".join(traceback.format_exception(type(error), error, frames))
    name, text = type(error).__name__, _text_of(error)
    if not isinstance(error, Fail):
        return failure(name, text, trace=trace)
    retry = None if error.retry else False
    return failure(name, text, trace=trace, retry=retry, retry_after_seconds=error.retry_after_seconds)


def failure(
    type_name: str,
    message: str,
    *,
    trace: str | None = None,
    retry: bool | None = None,
    retry_after_seconds: float | None = None,
) -> Outcome:
    """A failure with its error `{"type", "message", "trace"}`, cut to 100 and 1000 characters and 50 lines."""
    error = {"type": _clean(type_name)[:TYPE_CHARS], "message": _clean(message)[:MESSAGE_CHARS]}
    if trace is not None:
        error["trace"] = _cut_trace(trace)
    return Outcome(ok=False, error=Raw(orjson.dumps(error)), retry=retry, retry_after_seconds=retry_after_seconds)


def _cut_trace(trace: str) -> str:
    lines = _clean(trace).splitlines()[-TRACE_LINES:]
    return "\n".join(line[:TRACE_LINE_CHARS] for line in lines)


def _clean(text: str) -> str:
    """Text without lone surrogates, which JSON in UTF-8 cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:
        return f"(its text raised {type(broken).__name__})"


def _positional(function: Function) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in inspect.signature(function).parameters.values() if p.kind in kinds]


def _same(one: Function, other: Function) -> bool:
    """Whether both are the same function of the same module, met twice (a module imported under two names)."""
    return one.__code__.co_filename == other.__code__.co_filename and one.__qualname__ == other.__qualname__


def _import_file(path: Path) -> ModuleType:
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"there is no file {path}")
    _first_on_path(path.resolve().parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _first_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
