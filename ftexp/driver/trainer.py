"""Training on the driver: builds the TorchTrainer, runs it, and closes the run's records."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import time
import traceback
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import CheckpointConfig, DataConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from ftexp.cluster import ray_private
from ftexp.cluster.interruptible import fit_interruptibly
from ftexp.cluster.ray_cluster import wait_if_ending
from ftexp.cluster.ray_elastic import RoomAwaited
from ftexp.cluster.ray_watch import end_workers
from ftexp.cluster.signals import ignore_termination
from ftexp.config.schema import REPLACE, Config
from ftexp.data.info import DataBundle
from ftexp.data.shared import Shared
from ftexp.driver.advice import Advice
from ftexp.driver.beside import Evaluations, EvaluationSpec
from ftexp.driver.context import RunContext, Session
from ftexp.driver.keepers import Keepers
from ftexp.driver.nccl import detect_hangs, take_findings, uses_nccl
from ftexp.driver.terminal import Terminal
from ftexp.errors import RayLostError, RunFailedError, StorageError
from ftexp.failure import replacing, watching
from ftexp.failure.causes import find_cause
from ftexp.failure.group_start import ReportingTorchConfig
from ftexp.failure.reporter import FailureReporter
from ftexp.job.spec import JobSpec
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import FAILED, FINISHED, INTERRUPTED, RUNNING
from ftexp.wire import events
from ftexp.wire.hub import Hub, HubAddress
from ftexp.wire.messages import ControllerDied, CouldNotStart, Happened, Retry, Stop


def run_training(context: RunContext, session: Session) -> dict[str, float]:
    """Train to the end and return the last metrics. run.json holds the outcome, also after an error.

    RunFailedError if no restart is allowed any more. KeyboardInterrupt is raised again once the run is recorded as
    interrupted. RayLostError if Ray died; if its `begins_again` is set, the run resumes and its records stay open.
    """
    record, supervisor, terminal, running = session.record, session.supervisor, session.terminal, session.running
    hub = Hub(running.host, supervisor.handle)
    session.trackers.start(lambda event: hub.take(Happened(event)))
    session.alerts.report = lambda event: hub.take(Happened(event))
    advice = Advice(context, supervisor.group, hub)
    spec = EvaluationSpec.of(_anywhere(context.config), session.bundle, context.run_dir.uri)
    evaluations = Evaluations(spec, context.workers, hub)
    supervisor.on_evaluation_wanted = evaluations.request
    keepers = Keepers(context.config.failure, context.workers, hub)
    supervisor.on_message = keepers.note
    if uses_nccl(context.config, context.workers):
        detect_hangs(context.config)
        supervisor.nccl_findings = functools.partial(take_findings, context.run_dir)
    status, reason = FAILED, None

    def lost() -> str | None:
        if (why := running.lost()) is not None:
            hub.close()  # what follows from Ray's death is no failure of its own
            if running.is_own:
                end_workers(record.pids())
        return why

    try:
        fit = functools.partial(_fit, context, session, hub)
        stop = functools.partial(supervisor.stop, hub)
        result = fit_interruptibly(fit, context.lease, stop, lambda: hub.failed, lost)
        metrics: dict[str, float] | None = result.return_value
        if metrics is None:
            raise supervisor.interrupted()
        status = FINISHED
    except KeyboardInterrupt as interrupt:
        status = INTERRUPTED
        if isinstance(interrupt.__cause__, RayLostError):
            terminal.say(f"! no final checkpoint: {interrupt.__cause__}", "yellow")
        raise
    except RayLostError as error:
        supervisor.ray_lost(error)
        if error.begins_again:
            status = RUNNING
        else:
            reason = str(supervisor.given_up)
        raise
    except ray.train.TrainingFailedError as error:
        failed = supervisor.given_up or RunFailedError(_reason(error))
        reason = str(failed)
        if ray_private.is_startup_failure(error):
            hub.handle(CouldNotStart(reason))
        raise failed from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if error is hub.failed:
            record.event(events.DriverFailed(reason, traceback.format_exc()))
        raise
    finally:
        if status != RUNNING:
            ignore_termination()
        advice.stop()
        evaluations.close()
        keepers.close()
        hub.close()
        terminal.close()
        if status != RUNNING:
            _close(record, status, reason, terminal)
    return metrics


def _fit(context: RunContext, session: Session, hub: Hub) -> ray.train.Result:
    """Call fit(), and again if Ray Train's controller itself died, as long as the policy allows.

    In a Ray that was joined, the run ends instead: it is unknown which resources the dead controller held.
    """
    is_replaced = context.config.failure.recovery == REPLACE
    controller = replacing.TrainController if is_replaced else watching.TrainController
    while True:
        trainer = build_trainer(context, session.bundle, hub.address)
        try:
            return ray_private.fitted(trainer, controller)
        except ray.exceptions.RayActorError:
            wait_if_ending(session.running)  # the controller's death would follow from Ray's
            match hub.handle(ControllerDied()):
                case Retry(delay_s) if session.running.is_own:
                    _release_workers()
                    time.sleep(delay_s)
                case Retry():
                    raise RunFailedError("Ray Train's controller died: run the same command again") from None
                case Stop(reason):
                    raise RunFailedError(reason) from None
                case _:  # the hub is closed: the invocation is ending
                    raise


def _release_workers() -> None:
    """Remove the placement groups of a dead controller's workers: the next controller would wait for them for ever."""
    for group_id, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))


def _close(record: RunRecord, status: str, reason: str | None, terminal: Terminal) -> None:
    """Close the records. An error is raised only if the run finished; otherwise it would hide why the run failed."""
    try:
        record.close(status, reason)
    except StorageError as error:
        if status == FINISHED:
            raise
        terminal.say(f"! {error}", "yellow")


def build_trainer(context: RunContext, bundle: DataBundle, hub: HubAddress) -> TorchTrainer:
    """Return the TorchTrainer of a run.

    Ray's own snapshot of an earlier fit() is deleted: the checkpoints' manifests decide where a run resumes.
    """
    config, workers, run_dir, state = context.decided_config, context.workers, context.run_dir, context.state
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
        teacher=context.teacher,
    )
    # not in the spec: an object reference doesn't survive pickle
    classes = Shared(bundle.classes) if bundle.classes is not None else None
    reporter = FailureReporter(hub)
    return TorchTrainer(
        _train_function,
        # as bytes: Ray unpickles this config in its controller too, which would then import torch and timm for nothing
        train_loop_config={"spec": pickle.dumps(spec), "streams": bundle.streams, "classes": classes},
        torch_config=ReportingTorchConfig(backend=scaling.backend, timeout_s=scaling.timeout_s, reporter=reporter),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            **workers.ray_scaling(scaling),
            elastic_resize_monitor_interval_s=scaling.elastic_resize_monitor_interval_s,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=base,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                # no limit: ftexp.failure.policy decides, and FailureReporter ends the run
                max_failures=-1,
                max_preemption_failures=-1,
                controller_failure_limit=failure.controller_failure_limit,
                relax_collectives_on_preemption=failure.relax_collectives_on_preemption,
                preemption_grace_s=failure.preemption_grace_s,
            ),
            # the store deletes old checkpoints; Ray must not delete those that it keeps
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            callbacks=[reporter, RoomAwaited()],
            worker_runtime_env=workers.runtime_env,
            logging_config=LoggingConfig("INFO" if config.verbose else "CRITICAL"),
        ),
        datasets=bundle.datasets,
        # every rank reads the blocks in place and picks its rows by index
        dataset_config=DataConfig(datasets_to_split=[]),
    )


def _anywhere(config: Config) -> Config:
    """Return the config with the weights' path absolute: Ray Train starts workers in another working directory."""
    if not isinstance(config.model.pretrained, str):
        return config
    path = str(Path(config.model.pretrained).expanduser().absolute())
    return dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=path))


def _train_function(loop_config: dict[str, Any]) -> dict[str, float] | None:
    from ftexp.worker.loop import train_loop  # it imports timm, which takes seconds; the driver needs none of it

    spec = dataclasses.replace(pickle.loads(loop_config["spec"]), classes=loop_config["classes"])
    return train_loop(spec, loop_config["streams"])


def _reason(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        cause = find_cause(failures)
        return f"rank {cause.rank}: {cause.error}"
    return str(getattr(error, "controller_failure", error))
