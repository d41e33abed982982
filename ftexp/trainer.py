"""The driver: builds the TorchTrainer from the config, supervises it, and keeps the run's records."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray.train
from ray.train import CheckpointConfig, DataConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from ftexp import ray_private
from ftexp.config import Config
from ftexp.data.splits import DataBundle
from ftexp.errors import RunFailedError
from ftexp.failure.causes import Cause, FailureReporter, find_cause
from ftexp.job import JobSpec
from ftexp.loop import train_loop
from ftexp.scaling import Workers
from ftexp.storage import Storage
from ftexp.terminal import Terminal
from ftexp.tracking import FAILED, FINISHED, INTERRUPTED, RunRecord
from ftexp.wire import Hub, HubAddress, Message

CHECKPOINTS = "checkpoints"


class Supervisor:
    """Turns what workers and controller say into records and lines on the terminal."""

    def __init__(self, record: RunRecord, terminal: Terminal, config: Config) -> None:
        self._record, self._terminal, self._config = record, terminal, config
        self.num_failures = 0  # of this call; Ray counts against failure.max_failures likewise
        self.last_failure: str | None = None
        self._restored: dict[str, Any] = {}
        self._rejected = 0
        self._problem: str | None = None

    def handle(self, message: Message) -> Message | None:
        """The hub's handler: one message at a time."""
        kind = message["kind"]
        if kind == "failure":
            self._failed(Cause(message["cause"], message["rank"], message["error"]))
            return None
        answer = self._record.handle(message)
        if self._record.problem != self._problem and (problem := self._record.problem) is not None:
            self._terminal.say(f"! the run's records can't be written: {problem}; trying again", "yellow")
        self._problem = self._record.problem
        if kind == "hello" and message["rank"] == 0:
            self._restored, self._rejected = {}, 0
        elif kind == "ready":
            self._ready(message)
        elif kind == "tick":
            self._terminal.step(self._record.state)
        elif kind == "metrics" and message["split"] == "val":
            self._terminal.epoch(self._record.state)
        elif kind == "event":
            self._on_event(message)
        return answer

    def _failed(self, cause: Cause) -> None:
        self.num_failures += 1
        failure = self._record.fail(cause.kind, cause.rank, cause.error)
        self.last_failure = f"rank {cause.rank}: {cause.error}" if cause.rank is not None else cause.error
        self._terminal.failure(failure, self._config.failure.max_failures, self.num_failures)

    def _ready(self, message: Message) -> None:
        state, train = self._record.state, self._config.train
        pids = self._record.pids()
        if self.num_failures:
            self._terminal.recovered(state.failures[-1], self._restored.get("checkpoint"), self._rejected, pids)
        elif self._restored:
            name = self._restored["checkpoint"]
            self._terminal.say(f"{'resumed':<9}at step {message['step']} from {name}")
        if message["weights"] and message["step"] == 0:
            self._terminal.say(f"{'weights':<9}{message['weights']}")
        self._terminal.ready(
            state, message["total_steps"], train.global_batch_size, train.epochs, pids, message["device"]
        )

    def _on_event(self, message: Message) -> None:
        if message["name"] == "restored":
            self._restored = message
        elif message["name"] == "checkpoint_rejected":
            self._rejected += 1
            self._terminal.say(f"! checkpoint {message['checkpoint']} is damaged: {message['reason']}", "yellow")
        elif message["name"] == "checkpoint_failed":
            self._terminal.say(f"! checkpoint at step {message['step']} not written: {message['error']}", "yellow")


def run_training(
    config: Config,
    workers: Workers,
    bundle: DataBundle,
    run_dir: Storage,
    record: RunRecord,
    terminal: Terminal,
    host: str,
) -> dict[str, float]:
    """Train to the end; returns the last metrics. Every way out leaves run.json telling how it ended.

    RunFailedError when failures are spent; KeyboardInterrupt passes through once the run is marked interrupted.
    """
    supervisor = Supervisor(record, terminal, config)
    hub = Hub(host, supervisor.handle)
    trainer = build_trainer(config, workers, bundle, run_dir, record.state.name, hub.address)
    status, reason = FAILED, None
    try:
        result = _fit(trainer.fit)
        status = FINISHED
    except KeyboardInterrupt:
        status = INTERRUPTED
        raise
    except ray.train.TrainingFailedError as error:
        reason = _reason(error, supervisor)
        raise RunFailedError(reason) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        hub.close()
        terminal.close()
        record.close(status, reason)
    metrics: dict[str, float] = result.return_value
    return metrics


def build_trainer(
    config: Config, workers: Workers, bundle: DataBundle, run_dir: Storage, run_name: str, hub: HubAddress
) -> TorchTrainer:
    """The TorchTrainer of a run. Ray's own snapshot of an earlier call is dropped: the manifests decide."""
    run_dir.delete_file(ray_private.SNAPSHOT)
    scaling, failure = config.scaling, config.failure
    filesystem, path = run_dir.open()
    base, _, name = path.rpartition("/")
    spec = JobSpec(config, bundle.info, run_name, run_dir.child(CHECKPOINTS).uri, hub)
    return TorchTrainer(
        _train_function,
        # as bytes: Ray unpacks this config in its controller too, where importing torch and timm would only cost time
        train_loop_config={"spec": pickle.dumps(spec)},
        torch_config=TorchConfig(backend=scaling.backend, timeout_s=scaling.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=workers.use_gpu,
            resources_per_worker=workers.resources_per_worker,
            placement_strategy=scaling.placement_strategy,
            accelerator_type=scaling.accelerator_type,
            label_selector=scaling.label_selector,
            elastic_resize_monitor_interval_s=scaling.elastic_resize_monitor_interval_s,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=base,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(**dataclasses.asdict(failure)),
            # the store thins out; Ray must not delete what it keeps
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            callbacks=[FailureReporter(hub)],
            logging_config=LoggingConfig("INFO" if config.verbose else "CRITICAL"),
        ),
        datasets=bundle.datasets,
        # every rank reads the blocks in place and picks its rows by index
        dataset_config=DataConfig(datasets_to_split=[]),
    )


def _train_function(loop_config: dict[str, Any]) -> dict[str, float]:
    return train_loop(pickle.loads(loop_config["spec"]))


def _fit(fit: Callable[[], Any]) -> Any:
    """Run fit() on a thread, so that Ctrl-C reaches this one instead of Ray's own handler. SIGTERM does the same."""
    with _interruptible():
        return _fit_on_thread(fit)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGINT (also where a shell's `&` left it ignored) and SIGTERM raise KeyboardInterrupt here."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _fit_on_thread(fit: Callable[[], Any]) -> Any:
    outcome: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(fit())
        except BaseException as error:  # raised again below, on the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="fit")
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.5)
    if errors:
        raise errors[0]
    return outcome[0]


def _reason(error: Exception, supervisor: Supervisor) -> str:
    failures = getattr(error, "worker_failures", None)
    cause = find_cause(failures) if failures else None
    last = supervisor.last_failure or (f"rank {cause.rank}: {cause.error}" if cause else str(error))
    if supervisor.num_failures:
        return f"failure {supervisor.num_failures} was one more than failure.max_failures allows; {last}"
    return last
