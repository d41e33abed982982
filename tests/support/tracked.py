"""A run with trackers, without training."""

import json

from ftexp.config.schema import Config
from ftexp.rundir.names import METRICS_FILE
from ftexp.storage.append_log import AppendLog, read_lines
from ftexp.storage.directory import Storage
from ftexp.trackers.run import Trackers, tracked_run

ALL = ("tensorboard", "mlflow", "wandb")
PATIENCE_S = 60.0


def points_of(steps):
    for step in steps:
        yield {"time": 1e9 + step, "split": "train", "step": step, "epoch": 0, "train_loss": 1 / step, "lr": 0.1}
        if step % 10 == 0:
            yield {"time": 1e9 + step + 0.5, "split": "val", "step": step, "epoch": 1, "val_loss": 2 / step}


def log(lines, followed, point):
    lines.append(json.dumps(point))
    followed.offer(point)


def settings(directory, uri, names=ALL, timeout_s=PATIENCE_S):
    config = Config()
    config.run.storage = Storage.at(str(directory)).parent.uri
    config.model.kwargs = {"api_key": "very secret"}
    config.tracker.use, config.tracker.timeout_s = dict.fromkeys(names, True), timeout_s
    config.tracker.mlflow.tracking_uri = uri
    config.tracker.tags = {"team": "blue"}
    return config


def made(directory, uri, names=ALL, sweep=None, **kwargs):
    """Return the trackers of the run in a directory, and its metrics.jsonl."""
    config, run_dir = settings(directory, uri, names, **kwargs), Storage.at(str(directory))
    lines = AppendLog(run_dir, METRICS_FILE)
    run = tracked_run(config, run_dir, run_dir.name, 1e9, sweep)
    return Trackers(config.tracker, run, run_dir, lambda: read_lines(run_dir, METRICS_FILE)), lines
