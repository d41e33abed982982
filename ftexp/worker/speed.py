"""Speed figures of a logged point."""

from __future__ import annotations

from ftexp.job.job import Job
from ftexp.wire import events
from ftexp.wire.messages import Happened


def speeds(job: Job) -> dict[str, float]:
    """Return images/s over all ranks, MFU, and milliseconds of a step by section, since the last logged point.

    See `ftexp.job.stopwatch`. If tasks prepare this rank's samples, also the milliseconds of a sample by part, see
    `ftexp.data.feeds.feed.COSTS`.

    To be called when the GPU has caught up with the loop. {} on ranks other than 0, which log nothing.
    """
    found = job.stopwatch.take(job.progress.position)
    if job.group.rank != 0 or not found:
        return {}
    found |= job.data.rows["train"].costs_ms()
    utilisation = job.utilisation
    if utilisation.problem is None:
        share = utilisation.at(found["images_per_s"], job.learner.countable(), job.data.image_size)
        if share is not None:
            found["mfu"] = share
        elif utilisation.problem is not None:
            job.channel.send(Happened(events.MfuUnknown(utilisation.problem)))
    return found
