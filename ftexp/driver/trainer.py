"""The driver: builds the TorchTrainer from the config, supervises it, and keeps the run's records."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import CheckpointConfig, DataConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from ftexp.cluster import ray_private
from ftexp.cluster.interruptible import fit_interruptibly
from ftexp.cluster.ray_cluster import RunningRay
from ftexp.cluster.ray_watch import end_workers
from ftexp.cluster.resources import Workers, lacking_resources, num_possible
from ftexp.config.schema import Config
from ftexp.data.info import DataBundle
from ftexp.driver.supervisor import Supervisor
from ftexp.driver.terminal import Terminal
from ftexp.errors import ConfigError, RayLostError, RunFailedError, StorageError
from ftexp.failure.causes import FailureReporter, find_cause
from ftexp.job.spec import JobSpec
from ftexp.rundir.record import FAILED, FINISHED, INTERRUPTED, RUNNING, RunRecord, RunState
from ftexp.storage.directory import Storage
from ftexp.storage.lease import Lease
from ftexp.trackers.run import Trackers
from ftexp.wire.hub import SAVE, Hub, HubAddress

_LOOK_EVERY_S = 1.0
_WAITING_S = 20.0  # without workers, before it is told
_SAVE_EVERY_S = 5.0  # while Ray Train is about to resize the group
_RESIZE_TAKES_S = 30.0  # on top of its monitor's interval; if nothing has happened by then, others have the room


def run_training(
    config: Config,
    workers: Workers,
    bundle: DataBundle,
    run_dir: Storage,
    record: RunRecord,
    terminal: Terminal,
    lease: Lease,
    running: RunningRay,
    trackers: Trackers,
    supervisor: Supervisor,
) -> dict[str, float]:
    """Train to the end; returns the last metrics. Every way out leaves run.json telling how it ended.

    RunFailedError when failures are spent; KeyboardInterrupt passes through once the run is marked interrupted.
    A RayLostError that `begins_again` is no end: the run's records stay open.
    """
    hub = Hub(running.host, supervisor.handle)
    trackers.start(hub.take)
    status, reason = FAILED, None
    done = threading.Event()
    _advise(hub, _tell_of_waiting, hub, supervisor, workers, done)

    def lost() -> str | None:
        if (why := running.lost()) is not None:
            hub.close()  # what follows from it is no failure of its own
            if running.is_own:
                end_workers(record.pids())
        return why

    if workers.fewest < workers.most:
        interval_s = config.scaling.elastic_resize_monitor_interval_s
        _advise(hub, _save_before_a_resize, hub, supervisor, workers, done, interval_s)
    try:
        fit = functools.partial(_fit, config, workers, bundle, run_dir, record, hub, running)
        stop = functools.partial(supervisor.stop, hub)
        result = fit_interruptibly(fit, lease, stop, lambda: hub.failed, lost)
        metrics: dict[str, float] | None = result.return_value
        if metrics is None:
            raise supervisor.interrupted()
        status = FINISHED
    except KeyboardInterrupt as interrupt:
        status = INTERRUPTED
        if isinstance(interrupt.__cause__, RayLostError):
            terminal.say(f"! no last save: {interrupt.__cause__}", "yellow")
        raise
    except RayLostError as error:
        supervisor.ray_lost(error)
        status, reason = RUNNING if error.begins_again else FAILED, supervisor.stopped
        raise
    except ray.train.TrainingFailedError as error:
        reason = _reason(error, supervisor)
        if ray_private.is_startup_failure(error):
            hub.handle({"kind": "could_not_start", "error": reason})
        raise (ConfigError if supervisor.is_config_wrong else RunFailedError)(reason) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if error is hub.failed:
            record.event("driver_failed", error=reason, traceback=traceback.format_exc())
        raise
    finally:
        done.set()
        hub.close()
        terminal.close()
        if status != RUNNING:
            _close(record, status, reason, terminal)
    return metrics


def _fit(
    config: Config,
    workers: Workers,
    bundle: DataBundle,
    run_dir: Storage,
    record: RunRecord,
    hub: Hub,
    running: RunningRay,
) -> ray.train.Result:
    """Fit, and again if Ray Train's controller itself dies, for as long as the policy allows.

    In a Ray that was joined, what the controller held can't be told from what others hold: there the run ends.
    """
    while True:
        trainer = build_trainer(config, workers, bundle, run_dir, record.state, hub.address)
        try:
            return trainer.fit()
        except ray.exceptions.RayActorError:
            answer = hub.handle({"kind": "controller_died"})
            if answer is None:  # the command ends, and nothing is heard any more
                raise
            if "stop" in answer or not running.is_own:
                reason = answer.get("stop", "Ray Train's controller died: give the same command again")
                raise RunFailedError(reason) from None
            _release_workers()
            time.sleep(answer["delay_s"])


def _advise(hub: Hub, advise: Callable[..., None], *arguments: Any) -> None:
    """Run `advise` on a thread. The run does without it, so what it raises is recorded and ends only the advice."""

    def run() -> None:
        try:
            advise(*arguments)
        except Exception as error:
            hub.handle({"kind": "advice_failed", "error": f"{advise.__name__}: {type(error).__name__}: {error}"})

    threading.Thread(target=run, daemon=True, name=advise.__name__).start()


def _tell_of_waiting(hub: Hub, supervisor: Supervisor, workers: Workers, done: threading.Event) -> None:
    """Ray tries to start workers in silence, for as long as it takes."""
    while not done.wait(_LOOK_EVERY_S):
        if supervisor.waiting_s > _WAITING_S:
            reason = lacking_resources(workers) or "what they need is there, but taken by others, or they don't start"
            hub.handle({"kind": "waiting", "reason": reason})


def _save_before_a_resize(
    hub: Hub, supervisor: Supervisor, workers: Workers, done: threading.Event, interval_s: float
) -> None:
    """Where there is room for more workers, Ray Train will soon stop those that train: have them save until then."""
    expected, since, saved = None, 0.0, -_SAVE_EVERY_S
    while not done.wait(_LOOK_EVERY_S):
        now, possible, there = time.monotonic(), num_possible(workers), supervisor.world_size
        if there is None or possible <= there:
            expected = None
            continue
        if expected != possible:
            expected, since = possible, now
            hub.handle({"kind": "resize_expected", "num_workers": possible})
        if now - since < interval_s + _RESIZE_TAKES_S and now - saved >= _SAVE_EVERY_S:
            saved = now
            hub.tell(SAVE)


def _release_workers() -> None:
    """Give back what a dead controller held: its workers' placement groups, for which the next would wait for ever."""
    for group_id, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))


def _close(record: RunRecord, status: str, reason: str | None, terminal: Terminal) -> None:
    """Close the records; what goes wrong then must not hide why the run failed."""
    try:
        record.close(status, reason)
    except StorageError as error:
        if status == FINISHED:
            raise
        terminal.say(f"! {error}", "yellow")


def build_trainer(
    config: Config, workers: Workers, bundle: DataBundle, run_dir: Storage, state: RunState, hub: HubAddress
) -> TorchTrainer:
    """The TorchTrainer of a run. Ray's own snapshot of an earlier call is dropped: the manifests decide."""
    run_dir.delete_file(ray_private.SNAPSHOT)
    scaling, failure = config.scaling, config.failure
    filesystem, path = run_dir.open()
    base, _, name = path.rpartition("/")
    spec = JobSpec(
        _anywhere(config),
        bundle.info,
        state.name,
        run_dir.uri,
        state.fingerprint,
        hub,
        bundle.blocks,
        bundle.decode_cpus,
    )
    return TorchTrainer(
        _train_function,
        # as bytes: Ray unpacks this config in its controller too, where importing torch and timm would only cost time
        train_loop_config={"spec": pickle.dumps(spec), "streams": bundle.indexed if bundle.streamed else {}},
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
            failure_config=FailureConfig(
                # ftexp.failure.policy decides, and ends the run by FailureReporter
                max_failures=-1,
                max_preemption_failures=-1,
                controller_failure_limit=failure.controller_failure_limit,
                relax_collectives_on_preemption=failure.relax_collectives_on_preemption,
                preemption_grace_s=failure.preemption_grace_s,
            ),
            # the store thins out; Ray must not delete what it keeps
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            callbacks=[FailureReporter(hub)],
            worker_runtime_env=workers.runtime_env,
            logging_config=LoggingConfig("INFO" if config.verbose else "CRITICAL"),
        ),
        datasets=bundle.datasets,
        # every rank reads the blocks in place and picks its rows by index
        dataset_config=DataConfig(datasets_to_split=[]),
    )


def _anywhere(config: Config) -> Config:
    """With the path of the weights absolute: Ray Train lets workers begin in a folder of its own."""
    if not isinstance(config.model.pretrained, str):
        return config
    path = str(Path(config.model.pretrained).expanduser().absolute())
    return dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=path))


def _train_function(loop_config: dict[str, Any]) -> dict[str, float] | None:
    from ftexp.worker.loop import train_loop  # it imports timm, which takes seconds that the driver can do without

    return train_loop(pickle.loads(loop_config["spec"]), loop_config["streams"])


def _reason(error: Exception, supervisor: Supervisor) -> str:
    if supervisor.stopped is not None:
        return supervisor.stopped
    failures = getattr(error, "worker_failures", None)
    if failures:
        cause = find_cause(failures)
        return f"rank {cause.rank}: {cause.error}"
    return str(getattr(error, "controller_failure", error))
