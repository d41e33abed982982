"""Evaluation of checkpoints while training continues: one Ray task for each; the driver logs and passes on the results.

The driver owns the tasks, so they survive the failure of a worker group. A result depends only on the checkpoint, the
split and the batch size: on the same kind of machine it is bitwise identical wherever the task runs.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from ftexp.config.schema import BESIDE, Config
from ftexp.data.info import DataBundle, DataInfo, IndexedSplit
from ftexp.errors import CheckpointError, ConfigError
from ftexp.wire.messages import DAMAGED, FAILED, EvaluateCheckpoint, Evaluated

if TYPE_CHECKING:
    from ray.data import Dataset

    from ftexp.cluster.resources import Workers
    from ftexp.data.feeds.feed import Rows
    from ftexp.wire.hub import Hub

_RETRY_AFTER_S = (1, 4, 15, 60, 60)  # pauses before retries if the store doesn't answer, in seconds
_MAX_BATCH = 256  # limit of a batch, in images, if train.eval_batch_size isn't set


def require_room(config: Config, workers: Workers) -> None:
    """Raise ConfigError if the workers leave too few resources for an evaluation task."""
    if config.train.eval != BESIDE:
        return
    there, wanted = ray.cluster_resources(), workers.evaluation_resources
    for name, amount in wanted.items():
        taken = workers.max_workers * workers.resources_per_worker.get(name, 0)
        if there.get(name, 0) - taken < amount:
            raise ConfigError(
                f"train.eval=beside needs {amount:g} {name} besides the workers, and {workers.max_workers} workers "
                f"take {taken:g} of the cluster's {there.get(name, 0):g}: take fewer workers, "
                f"scaling.resources_per_worker={{{name}: ...}}, or train.eval=inline"
            )


@dataclass(frozen=True)
class EvaluationSpec:
    """Facts that a task needs to evaluate a run's checkpoints on val."""

    config: Config
    info: DataInfo
    run_uri: str
    cached: Dataset | None  # val, if it is cached in memory
    indexed: IndexedSplit | None  # val, if its files are streamed

    @classmethod
    def of(cls, config: Config, bundle: DataBundle, run_uri: str) -> EvaluationSpec:
        """Return the spec for a run on `bundle`."""
        streamed = bundle.streamed
        return cls(
            config,
            bundle.info,
            run_uri,
            cached=None if streamed else bundle.datasets["val"],
            indexed=bundle.indexed["val"] if streamed else None,
        )


class Evaluations:
    """Runs the evaluation tasks of one invocation. `hub`: logs each result and sends it to the workers."""

    def __init__(self, spec: EvaluationSpec, workers: Workers, hub: Hub) -> None:
        self._spec, self._hub = spec, hub
        wanted, scaling = workers.evaluation_resources, spec.config.scaling
        self._task = ray.remote(_evaluate).options(
            num_cpus=wanted["CPU"],
            num_gpus=wanted.get("GPU", 0),
            accelerator_type=scaling.accelerator_type,
            label_selector=scaling.label_selector if isinstance(scaling.label_selector, dict) else None,
            runtime_env=dict(workers.runtime_env) or None,
        )
        self._lock = threading.Lock()
        self._found: dict[str, Future[Evaluated]] = {}  # by checkpoint
        self._running: set[ray.ObjectRef[Any]] = set()
        self._closed = threading.Event()

    def request(self, wanted: EvaluateCheckpoint) -> None:
        """Have a checkpoint evaluated, unless it was before, and its result logged and passed on; return at once."""
        with self._lock:
            if self._closed.is_set():
                return
            found = self._found.get(wanted.checkpoint)
            if found is None or (found.done() and found.result().failure == FAILED):  # retried if it failed
                found = self._found[wanted.checkpoint] = Future()
                threading.Thread(target=self._run, args=(wanted, found), daemon=True, name="evaluation").start()
        found.add_done_callback(self._pass_on)

    def close(self) -> None:
        """Cancel running tasks; no further result is passed on."""
        with self._lock:
            self._closed.set()
            running = list(self._running)
        for task in running:
            _cancel(task)

    def _run(self, wanted: EvaluateCheckpoint, found: Future[Evaluated]) -> None:
        found.set_result(self._result(wanted))

    def _result(self, wanted: EvaluateCheckpoint) -> Evaluated:
        """Return the result of a task, or its failure; waits on a background thread."""
        about = (wanted.step, wanted.epoch, wanted.checkpoint)
        for wait_s in (*_RETRY_AFTER_S, None):
            try:
                return Evaluated(*about, values=self._values(wanted.checkpoint))
            except ray.exceptions.RayTaskError as error:
                # the checkpoint may be fine if the store doesn't answer: retry while the workers train
                if isinstance(error.cause, OSError) and wait_s is not None and not self._closed.wait(wait_s):
                    continue
                is_damaged = isinstance(error.cause, CheckpointError)
                return Evaluated(*about, failure=DAMAGED if is_damaged else FAILED, problem=_in_a_line(error.cause))
            except Exception as error:  # for example, its process died more often than Ray retries
                return Evaluated(*about, failure=FAILED, problem=_in_a_line(error))
        raise AssertionError("the last try returns")

    def _values(self, checkpoint: str) -> dict[str, float]:
        task = self._task.remote(self._spec, checkpoint)
        with self._lock:
            self._running.add(task)
            if self._closed.is_set():
                _cancel(task)
        try:
            values: dict[str, float] = ray.get(task)
            return values
        finally:
            with self._lock:
                self._running.discard(task)

    def _pass_on(self, done: Future[Evaluated]) -> None:
        # on its own thread: if the result already exists, this callback runs while the hub holds its lock
        threading.Thread(target=self._log_and_broadcast, args=(done.result(),), daemon=True).start()

    def _log_and_broadcast(self, found: Evaluated) -> None:
        with self._lock:
            if self._closed.is_set():
                return
        if self._hub.take(found):
            self._hub.broadcast(found)


def _cancel(task: ray.ObjectRef[Any]) -> None:
    with contextlib.suppress(Exception):  # Ray has died: nothing is left to cancel
        ray.cancel(task, force=True)


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _evaluate(spec: EvaluationSpec, name: str) -> dict[str, float]:
    """Evaluate a checkpoint on val, and its EMA if there is one; the body of the task.

    CheckpointError if the checkpoint is missing or corrupt.
    """
    import torch

    from ftexp.checkpoint.reading import read_weights
    from ftexp.checkpoint.store import CheckpointStore
    from ftexp.data.feeds.feed import ToTensors, evaluation_batches
    from ftexp.evaluation.counting import measured, metric_set_of
    from ftexp.job.build import autocast_of, settle_kernels
    from ftexp.model.build import as_logits, trained_model
    from ftexp.registry import load_plugins
    from ftexp.rundir.names import CHECKPOINTS
    from ftexp.storage.directory import Storage

    config, info = spec.config, spec.info
    load_plugins(config.plugins)
    torch.set_num_threads(1)
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    if config.train.deterministic:
        settle_kernels(device)
    store = CheckpointStore(Storage.at(spec.run_uri).child(CHECKPOINTS))
    manifest = store.by_name(name)
    weights = {"": read_weights(store, manifest, "raw")}
    if config.ema.decay is not None:
        weights["_ema"] = read_weights(store, manifest, "ema")
    models = {suffix: trained_model(config.model, info, state).to(device) for suffix, state in weights.items()}
    checked = functools.partial(as_logits, config=config.model, num_classes=info.num_classes)
    to_tensors = ToTensors(info, device, config.train.channels_last)
    size = config.train.eval_batch_size or min(config.train.global_batch_size, _MAX_BATCH)
    batches = evaluation_batches(_rows(spec), to_tensors, size, rank=0, world_size=1)
    autocast = autocast_of(device, config.train.precision)
    metric_set = metric_set_of(config.train.metrics, info, device)
    return measured("val", models, checked, batches, autocast, metric_set=metric_set, task=info.task)


def _rows(spec: EvaluationSpec) -> Rows:
    from ftexp.data.feeds.decoding import refuse_bad
    from ftexp.data.feeds.direct import DirectRows
    from ftexp.data.feeds.feed import CachedRows

    if spec.cached is not None:
        return CachedRows(spec.cached.iterator())
    assert spec.indexed is not None
    return DirectRows(spec.indexed, spec.info, lambda bad: refuse_bad(spec.config.data, bad))
