"""The series that `tracker=prometheus` exports: names, labels and meaning, by Prometheus' naming conventions.

Base units (seconds, bytes, ratios of 1) are in the names; a counter's name ends in _total. Ray's exporter adds the
prefix ray_ to each.
"""

from __future__ import annotations

from dataclasses import dataclass

RUN_LABELS = ("run", "sweep")  # labels of every series; sweep is empty outside of one
RAY_PREFIX = "ray_"
STEP_PARTS = ("feed", "forward", "backward", "optimizer", "save", "teacher")  # <part>_ms in a logged point
SAMPLE_PARTS = ("read", "decode", "crop", "augment")  # likewise


@dataclass(frozen=True)
class Series:
    """A metric in Prometheus' sense: one time series for each combination of label values."""

    name: str
    help: str
    labels: tuple[str, ...] = ()  # in addition to RUN_LABELS

    @property
    def is_counter(self) -> bool:
        """Whether it only grows, over all invocations of a run."""
        return self.name.endswith("_total")


INFO = Series("ftexp_run_info", "Always 1; says what runs", ("model", "data", "run_dir"))
WORKERS = Series("ftexp_workers", "Workers of the current attempt")
ATTEMPTS = Series("ftexp_attempts_total", "Worker groups that have started")
STEP = Series("ftexp_step", "Last optimiser step that was done; falls when a restart replays steps")
EPOCH = Series("ftexp_epoch", "Epochs that are complete")
METRIC = Series("ftexp_metric", "Last logged value of a metric: losses, accuracies, learning rate", ("metric",))
IMAGES = Series("ftexp_images_per_second", "Images trained on, over all workers, since the point logged before")
MFU = Series("ftexp_mfu_ratio", "Share of the device's peak arithmetic that the model uses")
STEP_PART = Series("ftexp_step_part_seconds", "Mean time of a part of a step, on rank 0", ("part",))
RANK_STEP = Series(
    "ftexp_rank_step_seconds", "Mean time of a step that a rank spends alone: min, median, max over ranks", ("ranks",)
)
SLOWEST_RANK = Series("ftexp_slowest_rank", "The rank that spends most time alone in a step")
STRAGGLER = Series(
    "ftexp_straggler_ratio",
    "Time alone of a rank that stays slow, in medians over ranks, when that was noticed; 0 once it is over",
    ("rank", "node", "part"),
)
SAMPLE_PART = Series("ftexp_sample_part_seconds", "Mean time of a part of making one sample, in a task", ("part",))
FEED_QUEUE = Series("ftexp_feed_queue_batches", "Mean number of prefetched batches ready when a step asked for one")
GOODPUT = Series("ftexp_goodput_ratio", "Share of the run's wall time that went into steps not done before")
FAILURES = Series("ftexp_failures_total", "Failures of the worker group", ("cause",))
REPLAYED = Series("ftexp_replayed_steps_total", "Steps that restarts had to do again")
RESTART = Series("ftexp_restart_seconds_total", "Time from failures to the first batch after them")
CHECKPOINT_AGE = Series("ftexp_checkpoint_age_seconds", "Time since the last verified checkpoint was saved")
CHECKPOINT_BYTES = Series("ftexp_checkpoint_bytes", "Size of the last verified checkpoint")
CHECKPOINT_STEP = Series("ftexp_checkpoint_step", "Step of the last verified checkpoint")
SAVES = Series("ftexp_saves_total", "Checkpoints that were saved")
FAILED_SAVES = Series("ftexp_failed_saves_total", "Checkpoints that could not be saved, each try counted")
BLOCKED = Series("ftexp_save_blocked_seconds", "Time that training was blocked by the last checkpoint")
BLOCKED_SUM = Series("ftexp_save_blocked_seconds_total", "Time that training was blocked by all checkpoints")
HEARTBEAT_AGE = Series("ftexp_heartbeat_age_seconds", "Time since the last message of a worker")

SERIES = (
    *(INFO, WORKERS, ATTEMPTS, STEP, EPOCH, METRIC, IMAGES, MFU, STEP_PART, SAMPLE_PART, FEED_QUEUE, GOODPUT),
    *(RANK_STEP, SLOWEST_RANK, STRAGGLER),
    *(FAILURES, REPLAYED, RESTART),
    *(CHECKPOINT_AGE, CHECKPOINT_BYTES, CHECKPOINT_STEP, SAVES, FAILED_SAVES, BLOCKED, BLOCKED_SUM, HEARTBEAT_AGE),
)
