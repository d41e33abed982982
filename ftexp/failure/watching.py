"""Ray Train's controller where a failure restarts all workers."""

from __future__ import annotations

from ftexp.cluster.ray_replacing import WatchingController


class TrainController(WatchingController):  # Ray names the process after the class
    """Controller that notices a worker's death as soon as possible."""
