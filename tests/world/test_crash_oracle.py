"""The oracle of crash runs: it sees each kind of broken promise, and nothing where all were kept.

Longer than 300 lines because every kind has a test, and all of them change one history that stands at the top.
"""

from __future__ import annotations

from typing import Any

import pytest

from tools.crash_history import PULL, RESULTS, SUBMIT, Exchange, History, Life, Reading
from tools.crash_oracle import judge

LEASE_SECONDS = 2.0


class Tale:
    """A history written by hand: every request takes 10 ms, and 100 ms later comes the next."""

    def __init__(self) -> None:
        self.history = History(lives=[Life(0.0, 0.5)])
        self.now = 1.0
        self.jobs: dict[str, dict[str, Any]] = {}
        self.keys: set[str] = set()

    def ask(self, path: str, body: Any, answer: Any = None, status: int = 200, method: str = "POST") -> Exchange:
        """A request; without an `answer` it got none."""
        exchange = Exchange("someone", method, path, body, self.now)
        if answer is not None:
            exchange.done, exchange.status, exchange.answer = self.now + 0.01, status, answer
        self.history.exchanges.append(exchange)
        self.now += 0.1
        return exchange

    def refuse(self, path: str, body: Any, code: str, status: int = 409) -> Exchange:
        return self.ask(path, body, {"ok": False, "code": code, "status": status}, status)

    def made(self, tag: str, job_id: str | None = None) -> None:
        """The hub has this job."""
        job = {
            "job_id": job_id or f"job-{tag}",
            "status": "pending",
            "kind": "k",
            "params": {"tag": tag},
            "reason": None,
        }
        job |= {"attempt": 0, "failures": 0, "losses": 0, "result": None, "error": None, "finished_at": None}
        self.jobs.setdefault(str(job["job_id"]), job)

    def body(self, tag: str, key: str | None = None) -> dict[str, Any]:
        return {"kind": "k", "params": {"tag": tag}, "max_retries": 9} | ({"idempotency_key": key} if key else {})

    def submit(self, tag: str, key: str | None = None, *, job_id: str | None = None) -> str:
        """An acknowledged submit; the job's id."""
        self.made(tag, job_id)
        self.keys |= {key} if key else set()
        told = {"ok": True, "job_id": job_id or f"job-{tag}", "dedup": False, "status": "accepted"}
        self.ask(SUBMIT, self.body(tag, key), told, 201)
        return str(told["job_id"])

    def lease(self, job_id: str, lease_id: str) -> dict[str, Any]:
        """The job's next lease, as a worker is told of it."""
        job = self.jobs[job_id]
        job.update(attempt=job["attempt"] + 1, status="running")
        told = {name: job[name] for name in ("job_id", "kind", "params", "attempt")}
        return {**told, "lease_id": lease_id, "lease_seconds": LEASE_SECONDS}

    def pull(self, *leases: dict[str, Any], pull_id: str | None = None, answered: bool = True) -> Exchange:
        body = {"node_id": "n", "max": 5, "pull_id": pull_id}
        return self.ask(PULL, body, {"ok": True, "jobs": list(leases)} if answered else None)

    def say(self, job_id: str, lease_id: str, verb: str, *, answered: bool = True, **body: Any) -> Exchange:
        """A word about a lease. What it does to the job has to be told by `set`."""
        told = {"ok": True, "job_id": job_id, "status": {"release": "pending"}.get(verb, "completed")}
        told |= {"lease_seconds": body.get("seconds")} if verb == "extend" else {}
        return self.ask(f"/api/jobs/{job_id}/{verb}", {"lease_id": lease_id, **body}, told if answered else None)

    def complete(self, job_id: str, lease_id: str, result: Any = "fine", *, answered: bool = True) -> Exchange:
        self.set(job_id, status="completed", result=result, finished_at="then")
        return self.say(job_id, lease_id, "result", ok=True, result=result, answered=answered)

    def fail(self, job_id: str, lease_id: str) -> Exchange:
        self.set(job_id, failures=self.jobs[job_id]["failures"] + 1, error="broken", status="pending")
        body = {"lease_id": lease_id, "ok": False, "error": "broken"}
        return self.ask(f"/api/jobs/{job_id}/result", body, {"ok": True, "job_id": job_id, "status": "pending"})

    def set(self, job_id: str, **fields: Any) -> None:
        self.jobs[job_id].update(fields)

    def restart(self) -> None:
        last = self.history.lives[-1]
        last.killed_at, last.dead = self.now, self.now + 0.01
        self.history.lives.append(Life(self.now + 0.02, self.now + 0.5))
        self.now += 0.6

    def read(self, **metrics: int) -> None:
        """Read all jobs, and metrics that fit but for those given."""
        jobs = [dict(job) for job in self.jobs.values()]
        count = {status: sum(job["status"] == status for job in jobs) for status in ("pending", "running", "failed")}
        fit = {"queue_depth": count["pending"], "inflight_jobs": count["running"], "dlq_size": count["failed"]}
        fit |= {"idempotency_store_size": len(self.keys), **metrics}
        self.history.readings.append(Reading(self.now, jobs, fit, drained=True))
        self.now += 0.1

    def verdict(self) -> set[str]:
        """What kinds of broken promises the oracle sees, after a last reading."""
        self.read()
        return {violation.what for violation in judge(self.history)}


@pytest.fixture
def tale() -> Tale:
    """A history in which everything that may happen has happened, and every promise was kept.

    Of the jobs, `job-held` is under the live lease `held-1`, which was handed out just now by the pull `last`.
    """
    tale = Tale()
    plain, keyed = tale.submit("plain"), tale.submit("keyed", "key")
    tale.ask(SUBMIT, {"jobs": [tale.body("none-1"), tale.body("none-2")], "atomic": True})
    tale.ask(SUBMIT, tale.body("unanswered"))
    tale.made("unanswered")
    tale.pull(tale.lease(plain, "plain-1"), tale.lease(keyed, "keyed-1"))
    tale.fail(plain, "plain-1")
    again = tale.lease(plain, "plain-2")
    tale.pull(again, pull_id="again")
    tale.restart()
    tale.pull({**again, "lease_seconds": 1.0}, pull_id="again")
    tale.say(plain, "plain-2", "extend", seconds=3.0)
    tale.say(plain, "plain-2", "release")
    tale.pull(tale.lease(plain, "plain-3"))
    entry = {"job_id": plain, "lease_id": "plain-3", "ok": True, "result": 7}
    tale.ask(RESULTS, {"results": [entry]}, {"ok": True, "results": [{"ok": True, "status": "completed"}]})
    tale.set(plain, status="completed", result=7, error=None, finished_at="then")
    tale.ask(f"/api/jobs/{plain}", None, {"ok": True, **tale.jobs[plain]}, method="GET")
    tale.pull(answered=False)
    tale.lease("job-unanswered", "never told")
    tale.now += LEASE_SECONDS
    tale.set(keyed, losses=1)
    tale.set("job-unanswered", losses=1)
    tale.pull(tale.lease(keyed, "keyed-2"), tale.lease("job-unanswered", "unanswered-2"))
    tale.refuse(f"/api/jobs/{keyed}/result", {"lease_id": "keyed-1", "ok": True, "result": 1}, "lease_superseded")
    tale.complete(keyed, "keyed-2", answered=False)
    tale.restart()
    tale.complete(keyed, "keyed-2")
    tale.submit("keyed", "key")
    tale.history.exchanges[-1].answer.update(dedup=True, status="completed", result="fine")
    tale.complete("job-unanswered", "unanswered-2")
    tale.read()
    tale.submit("held")
    tale.pull(tale.lease("job-held", "held-1"), pull_id="last")
    return tale


def finish(tale: Tale, lease_id: str = "held-1") -> None:
    tale.complete("job-held", lease_id)


def test_a_history_without_a_broken_promise_passes(tale: Tale) -> None:
    finish(tale)
    assert tale.verdict() == set()


def test_a_run_without_an_end_is_reported() -> None:
    assert [one.what for one in judge(Tale().history)] == ["no end"]


def test_a_job_that_never_ends_is_reported(tale: Tale) -> None:
    assert tale.verdict() == {"unfinished job"}


def test_a_lost_submit_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.submit("more")
    del tale.jobs["job-more"]
    assert tale.verdict() == {"lost submit", "lost job"}


def test_a_submit_that_was_not_answered_may_be_lost(tale: Tale) -> None:
    finish(tale)
    tale.ask(SUBMIT, tale.body("more", "another key"))
    assert tale.verdict() == set()


def test_a_job_that_a_worker_was_told_of_cannot_vanish(tale: Tale) -> None:
    tale.history.exchanges = [one for one in tale.history.exchanges if one.path != SUBMIT or one.status]
    tale.ask(SUBMIT, tale.body("more"))
    finish(tale)
    tale.made("more")
    tale.pull(tale.lease("job-more", "more-1"))
    del tale.jobs["job-more"]
    assert "lost job" in tale.verdict()


def test_a_job_that_nobody_asked_for_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.made("strange")
    assert "unexpected job" in tale.verdict()


def test_a_job_of_a_request_without_a_connection_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.ask(SUBMIT, tale.body("more")).reached = False
    tale.made("more")
    assert "unexpected job" in tale.verdict()


def test_two_jobs_of_one_submit_are_reported(tale: Tale) -> None:
    finish(tale)
    tale.made("plain", "job-twin")
    assert "unexpected job" in tale.verdict()


def test_two_jobs_for_one_key_are_reported(tale: Tale) -> None:
    finish(tale)
    tale.submit("keyed", "key", job_id="job-twin")
    assert "two jobs for one key" in tale.verdict()


def test_a_job_with_another_payload_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.set(tale.submit("more"), params={"tag": "more", "and": 1})
    assert "changed payload" in tale.verdict()


def test_a_worker_that_gets_another_payload_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.pull({**tale.lease(tale.submit("more"), "more-1"), "params": {"tag": "more", "and": 1}})
    tale.complete("job-more", "more-1")
    assert tale.verdict() == {"changed payload"}


def test_half_an_atomic_batch_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.made("none-1")
    assert "torn batch" in tale.verdict()


def test_a_batch_with_fewer_outcomes_than_jobs_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.ask(SUBMIT, {"jobs": [tale.body("m-1"), tale.body("m-2")]}, {"ok": True, "jobs": []})
    assert "torn batch" in tale.verdict()


def test_an_entry_of_a_batch_that_is_refused_for_no_reason_is_reported(tale: Tale) -> None:
    finish(tale)
    refused = {"ok": False, "code": "invalid_field", "status": 422}
    tale.ask(SUBMIT, {"jobs": [tale.body("m-1")]}, {"ok": True, "jobs": [refused]})
    assert tale.verdict() == {"unexpected answer"}


def test_a_lost_result_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.set("job-held", status="failed", reason="RETRIES_EXHAUSTED")
    assert "lost result" in tale.verdict()


def test_a_result_that_is_not_the_acknowledged_one_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.set("job-held", result="other")
    assert "changed result" in tale.verdict()


def test_a_result_that_changes_after_it_was_read_is_reported(tale: Tale) -> None:
    tale.complete("job-held", "held-1", answered=False)
    tale.read()
    tale.set("job-held", result="other")
    tale.say("job-held", "held-1", "result", ok=True, result="other", answered=False)
    assert tale.verdict() == {"changed result"}


def test_a_result_that_nobody_sent_is_reported(tale: Tale) -> None:
    tale.set("job-held", status="completed", result="of nobody")
    assert "unexpected end" in tale.verdict()


def test_a_failure_without_a_cause_is_reported(tale: Tale) -> None:
    tale.set("job-held", status="failed", reason="POISON", losses=1)
    assert "unexpected end" in tale.verdict()


def test_an_acknowledged_failure_that_was_not_counted_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.set("job-plain", failures=0)
    assert "failures miscounted" in tale.verdict()


def test_a_loss_that_nobody_suffered_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.set("job-held", losses=1)
    assert "losses miscounted" in tale.verdict()


def test_a_live_lease_that_is_handed_out_again_is_reported(tale: Tale) -> None:
    tale.now += LEASE_SECONDS - 0.5
    tale.pull(tale.lease("job-held", "held-2"))
    tale.set("job-held", losses=1)
    finish(tale, "held-2")
    assert tale.verdict() == {"double delivery"}


def test_a_lease_that_has_run_out_may_be_handed_out_again(tale: Tale) -> None:
    tale.now += LEASE_SECONDS
    tale.pull(tale.lease("job-held", "held-2"))
    tale.set("job-held", losses=1)
    finish(tale, "held-2")
    assert tale.verdict() == set()


@pytest.mark.parametrize(("answered", "verdict"), [(True, {"double delivery"}), (False, set())])
def test_an_acknowledged_extension_holds_the_lease(tale: Tale, answered: bool, verdict: set[str]) -> None:
    tale.now += 1
    tale.say("job-held", "held-1", "extend", seconds=3, answered=answered)
    tale.now += 1.5
    tale.pull(tale.lease("job-held", "held-2"))
    tale.set("job-held", losses=1)
    finish(tale, "held-2")
    assert tale.verdict() == verdict


def test_an_extension_without_an_answer_may_have_shortened_the_lease(tale: Tale) -> None:
    tale.say("job-held", "held-1", "extend", seconds=0.5, answered=False)
    tale.now += 0.5
    tale.pull(tale.lease("job-held", "held-2"))
    tale.set("job-held", losses=1)
    finish(tale, "held-2")
    assert tale.verdict() == set()


def test_a_lease_that_was_live_at_the_kill_has_the_restart_grace(tale: Tale) -> None:
    tale.now += LEASE_SECONDS - 0.5
    tale.restart()
    tale.pull(tale.lease("job-held", "held-2"))
    tale.set("job-held", losses=1)
    finish(tale, "held-2")
    assert tale.verdict() == {"double delivery"}


@pytest.mark.parametrize("answered", [True, False])
def test_a_released_job_may_be_handed_out_at_once(tale: Tale, answered: bool) -> None:
    tale.say("job-held", "held-1", "release", answered=answered)
    tale.pull(tale.lease("job-held", "held-2"))
    finish(tale, "held-2")
    assert tale.verdict() == set()


def test_a_refused_release_is_no_reason_to_hand_the_job_out(tale: Tale) -> None:
    tale.refuse("/api/jobs/job-held/release", {"lease_id": "held-1"}, "lease_superseded")
    tale.pull(tale.lease("job-held", "held-2"))
    tale.set("job-held", losses=1)
    finish(tale, "held-2")
    assert tale.verdict() == {"double delivery", "live lease refused"}


def test_two_leases_of_one_attempt_are_reported(tale: Tale) -> None:
    tale.now += LEASE_SECONDS
    tale.set("job-held", attempt=0)
    tale.pull(tale.lease("job-held", "held-2"))
    finish(tale, "held-2")
    assert "double delivery" in tale.verdict()


def test_an_attempt_that_does_not_grow_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.submit("more")
    late = tale.lease("job-more", "more-1")
    tale.pull(tale.lease("job-more", "more-2"))
    tale.now += LEASE_SECONDS
    tale.pull(late)
    tale.complete("job-more", "more-2")
    assert "attempt did not grow" in tale.verdict()


def test_one_lease_for_two_jobs_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.pull(tale.lease(tale.submit("more"), "held-1"))
    assert "double delivery" in tale.verdict()


def test_a_delivery_after_an_acknowledged_result_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.now += LEASE_SECONDS
    tale.pull(tale.lease("job-held", "held-2"))
    tale.set("job-held", status="completed", losses=1)
    assert "double delivery" in tale.verdict()


def test_more_deliveries_of_a_job_than_pulls_without_an_answer_are_reported(tale: Tale) -> None:
    finish(tale)
    tale.set("job-held", attempt=3, losses=2)
    assert tale.verdict() == {"delivery to nobody", "double delivery"}


def test_more_deliveries_of_all_jobs_than_those_pulls_had_room_for_are_reported(tale: Tale) -> None:
    finish(tale)
    for number in range(5):
        job_id = tale.submit(f"more-{number}")
        tale.lease(job_id, "never told")
        tale.set(job_id, losses=1)
        tale.pull(tale.lease(job_id, f"more-{number}-2"))
        tale.complete(job_id, f"more-{number}-2")
    assert tale.verdict() == {"delivery to nobody"}


def test_an_attempt_that_was_told_too_early_for_those_before_it_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.submit("more")
    tale.set("job-more", attempt=2, losses=2)
    tale.pull(tale.lease("job-more", "more-3"))
    tale.complete("job-more", "more-3")
    tale.pull(answered=False)
    tale.pull(answered=False)
    assert tale.verdict() == {"delivery to nobody"}


def test_an_attempt_that_goes_back_is_reported(tale: Tale) -> None:
    finish(tale)
    tale.set("job-held", attempt=0, losses=-1)
    assert "attempt did not grow" in tale.verdict()


def test_one_lease_with_two_attempts_is_reported(tale: Tale) -> None:
    tale.pull(tale.lease("job-held", "held-1"), pull_id="last")
    tale.set("job-held", attempt=1)
    finish(tale)
    assert tale.verdict() == {"attempt did not grow"}


def test_a_word_about_a_lease_of_nobody_must_be_refused(tale: Tale) -> None:
    tale.say("job-held", "invented", "extend", seconds=1)
    finish(tale)
    assert tale.verdict() == {"foreign lease accepted"}


def test_a_word_about_a_former_lease_must_be_refused(tale: Tale) -> None:
    tale.now += LEASE_SECONDS
    tale.pull(tale.lease("job-held", "held-2"))
    tale.set("job-held", losses=1)
    tale.say("job-held", "held-1", "extend", seconds=1)
    finish(tale, "held-2")
    assert tale.verdict() == {"superseded lease accepted"}


def test_a_word_about_a_live_lease_must_be_taken(tale: Tale) -> None:
    finish(tale)
    done = tale.history.exchanges.pop()
    tale.refuse(done.path, done.body, "lease_superseded")
    assert "live lease refused" in tale.verdict()


def test_a_repeated_result_must_be_answered_alike(tale: Tale) -> None:
    finish(tale)
    done = tale.history.exchanges[-1]
    tale.refuse(done.path, done.body, "lease_superseded")
    assert tale.verdict() == {"repeat refused"}


def test_a_repeated_pull_that_gets_a_lease_more_is_reported(tale: Tale) -> None:
    tale.restart()
    held = tale.history.exchanges[-1].answer["jobs"]
    tale.pull(*held, tale.lease(tale.submit("more"), "more-1"), pull_id="last")
    tale.complete("job-more", "more-1")
    finish(tale)
    assert tale.verdict() == {"leases of a pull changed"}


def test_a_repeated_pull_that_forgets_a_live_lease_is_reported(tale: Tale) -> None:
    tale.restart()
    tale.pull(pull_id="last")
    finish(tale)
    assert tale.verdict() == {"leases of a pull changed"}


@pytest.mark.parametrize("name", ["queue_depth", "inflight_jobs", "dlq_size", "idempotency_store_size"])
def test_a_counter_that_is_not_what_the_hub_lists_is_reported(tale: Tale, name: str) -> None:
    finish(tale)
    tale.read(**{name: 17})
    assert tale.verdict() == {"wrong counter"}


@pytest.mark.parametrize(("status", "code"), [(404, "job_not_found"), (500, "internal"), (409, "already_finished")])
def test_an_answer_that_nobody_should_get_is_reported(tale: Tale, status: int, code: str) -> None:
    finish(tale)
    tale.refuse("/api/jobs/job-held/result", {"lease_id": "held-1", "ok": True}, code, status)
    assert "unexpected answer" in tale.verdict()


def test_the_story_of_a_job_tells_all_that_was_said_of_it_in_order(tale: Tale) -> None:
    finish(tale)
    story = tale.history.story("job-keyed", "keyed")
    order = [
        '"idempotency_key": "key"',
        "keyed-1",
        "hub 2 is started",
        "lease_superseded",
        "no answer",
        "hub 3 is started",
    ]
    places = [next(place for place, line in enumerate(story) if text in line) for text in order]
    assert places == sorted(places)
    assert not any("held" in line for line in story)


def test_a_word_may_be_refused_for_one_that_was_sent_while_it_was_under_way(tale: Tale) -> None:
    refused = tale.refuse("/api/jobs/job-held/release", {"lease_id": "held-1"}, "result_conflict")
    finish(tale)
    refused.done = tale.now
    assert tale.verdict() == set()
