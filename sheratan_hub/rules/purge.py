"""Purge: waiting jobs that an operator wants out of the queue are cancelled, and their evidence stays (rule 14)."""

from __future__ import annotations

import msgspec

from sheratan_hub.rules.command import Decision, Scene
from sheratan_hub.rules.finish import Cancelled
from sheratan_hub.rules.jobs import found, job_event, job_key
from sheratan_hub.rules.retry import end
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Wants


class Purge(msgspec.Struct, frozen=True, gc=False):
    """Cancel a job if it still waits. What somebody has taken meanwhile, or what is finished, is left alone."""

    job_id: str

    def wants(self, scene: Scene) -> Wants:
        """The job."""
        return Wants(keys={job_key(self.job_id)})

    def decide(self, view: View) -> Decision:
        """Refused: `job_not_found`."""
        job = found(view, self.job_id)
        if job.status not in ("pending", "quarantined"):
            return Decision(Cancelled(job.id, job.status, False))
        done = end(job, "cancelled", view.now, "PURGED")
        event = job_event(done, "cancelled", view.now, "operator", reason="PURGED")
        return Decision(Cancelled(job.id, "cancelled", False), put=(done.row,), events=(event,))
