"""What a logged point tells of speed."""

from __future__ import annotations

from ftexp.job.job import Job


def speeds(job: Job) -> dict[str, float]:
    """images/s over all ranks, MFU, and milliseconds of a step, since the last logged point; see `ftexp.job.stopwatch`.

    To be called where the GPU has caught up with the loop. Empty on other ranks than 0, which log nothing.
    """
    found = job.stopwatch.take(job.progress.position)
    if job.group.rank != 0 or not found:
        return {}
    utilisation = job.utilisation
    if utilisation.problem is None:
        share = utilisation.at(found["images_per_s"], job.learner.model)
        if share is not None:
            found["mfu"] = share
        elif utilisation.problem is not None:
            job.line.send("event", name="mfu_unknown", reason=utilisation.problem)
    return found
