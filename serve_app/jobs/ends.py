"""The ends of jobs in metrics and in the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve_app.observability import metrics, telemetry

if TYPE_CHECKING:
    from serve_app.jobs.records import StoredError
    from serve_app.jobs.tables import Job, State

HANDED_ON = "handed on"
"""Outcome of a job that this server began and did not end. It is queued again, or another server has it."""


def report_end(job: Job, state: State | None, seconds: float = 0, why: StoredError | None = None) -> None:
    """Counts a job that has ended, and writes its line.

    Args:
        job: the job.
        state: its state; None if this server began it and did not end it.
        seconds: seconds that it took here.
        why: why it failed.
    """
    if state:
        metrics.JOBS_ENDED.add(api=job.api, model=job.model, state=state)
    if why:
        metrics.ERRORS.add(code=why.code)
    telemetry.log_job_end(job, state or HANDED_ON, seconds, why)
