"""Handlers: how they are registered and loaded, and what becomes of what they return and raise."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from sheratan_hub import handlers
from sheratan_hub.handlers import Attempt, Handler, failed, handler, load, run, run_async
from sheratan_hub.worker import Fail


@pytest.fixture(autouse=True)
def register(monkeypatch: pytest.MonkeyPatch) -> dict[str, Handler]:
    """An empty register for each test."""
    found: dict[str, Handler] = {}
    monkeypatch.setattr(handlers, "_registered", found)
    return found


MODULE = """
from sheratan_hub.worker import handler

@handler("add")
def add(params):
    return params["a"] + params["b"]

@handler("tell")
async def tell(params, job):
    return job.attempt
"""


def test_a_file_is_loaded_and_its_handlers_are_known_for_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "handlers_of_a_test.py").write_text(MODULE)
    found = load(str(tmp_path / "handlers_of_a_test.py"))
    assert {kind: (one.is_async, one.wants_job) for kind, one in found.items()} == {
        "add": (False, False),
        "tell": (True, True),
    }
    assert bytes(run("add", b'{"a": 1, "b": 2}', Attempt(job_id="j", kind="add")).result) == b"3"


def test_a_module_without_handlers_and_a_file_that_is_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty_module_of_a_test.py").write_text("")
    with pytest.raises(ValueError, match="registers no handler"):
        load(str(tmp_path / "empty_module_of_a_test.py"))
    with pytest.raises(ImportError, match=r"nowhere\.py"):
        load(str(tmp_path / "nowhere.py"))
    with pytest.raises(ImportError, match="no_such_module_anywhere"):
        load("no_such_module_anywhere")


def test_a_kind_has_one_handler() -> None:
    @handler("k")
    def one(params: object) -> None: ...

    assert handler("k")(one) is one
    with pytest.raises(ValueError, match="'k' has two handlers"):

        @handler("k")
        def other(params: object) -> None: ...


def test_a_handler_gets_its_attempt_when_it_has_a_second_parameter() -> None:
    @handler("k")
    def attempt_of(params: object, job: Attempt) -> list[object]:
        return [params, job.attempt]

    assert bytes(run("k", b'"p"', Attempt(job_id="j", kind="k", attempt=4)).result) == b'["p",4]'


def even(n: int) -> None:
    if n:
        odd(n - 1)
    raise type("E" * 200, (Exception,), {})("\ud800" + "x" * 2000)


def odd(n: int) -> None:
    even(n - 1)


async def test_an_error_is_cut_to_its_limits() -> None:
    async def breaks(params: object) -> None:
        even(200)

    outcome = await run_async(Handler("k", breaks, True, False), b"{}", Attempt(job_id="j", kind="k"))
    error = orjson.loads(bytes(outcome.error))
    assert (outcome.ok, outcome.retry) == (False, None)
    assert error["type"] == "E" * 100
    assert len(error["message"]) == 1000
    assert error["message"].startswith("\\ud800x")
    assert len(error["trace"].splitlines()) == 50
    assert all(len(line) <= 400 for line in error["trace"].splitlines())


async def test_a_trace_begins_at_the_handler() -> None:
    async def breaks(params: object) -> None:
        raise KeyError("x")

    outcome = await run_async(Handler("k", breaks, True, False), b"{}", Attempt(job_id="j", kind="k"))
    head, first, *_, last = orjson.loads(bytes(outcome.error))["trace"].splitlines()
    assert head == "Traceback (most recent call last):"
    assert first.endswith("in breaks")
    assert last == "KeyError: 'x'"


async def test_a_result_that_json_cannot_hold_is_a_failure_without_retry() -> None:
    async def answers(params: object) -> object:
        return {"rate": float("nan")}

    outcome = await run_async(Handler("k", answers, True, False), b"{}", Attempt(job_id="j", kind="k"))
    assert (outcome.ok, outcome.retry, orjson.loads(bytes(outcome.error))["type"]) == (False, False, "NotJson")


def test_a_failure_may_ask_for_a_later_retry() -> None:
    outcome = failed(Fail("rate limited", retry_after_seconds=90))
    assert (outcome.retry, outcome.retry_after_seconds) == (None, 90)
