"""Ray Train's controller where a failure restarts all workers."""

from __future__ import annotations

from ftexp.cluster.ray_replacing import WatchingController


class TrainController(WatchingController):  # its name is that of its process
    """Notices a death as soon as it can."""
