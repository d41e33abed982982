"""One invocation after its config was validated: start or join Ray, list the data, train, leave Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING

import ray  # noqa: F401 - before a thread imports modules that import it
from omegaconf import OmegaConf

from ftexp.cluster.hot_start.driver import on_joined_nodes
from ftexp.cluster.importing import import_meanwhile
from ftexp.cluster.interruptible import fit_interruptibly
from ftexp.cluster.ray_cluster import leave_ray, quiet_data, start_ray
from ftexp.cluster.resources import decoding_cpus, lacking_resources
from ftexp.config.masking import masked
from ftexp.config.schema import PREPROCESSING, Config
from ftexp.data.augment.registry import augmentations
from ftexp.driver.alerts.watch import Alerts
from ftexp.driver.beside import require_room
from ftexp.driver.context import RunContext, Session
from ftexp.driver.printer import unsent
from ftexp.driver.resume import (
    changes,
    labels_as_begun,
    repeated_samples,
    require_same_data,
    require_shared_statistics,
)
from ftexp.driver.terminal import Terminal
from ftexp.driver.tracker_session import close_trackers, outcome_of, trackers_of
from ftexp.errors import ConfigError, RayLostError
from ftexp.evaluation.metric_registry import check_metrics, check_num_classes
from ftexp.job.early_stopping import check_measured
from ftexp.job.hook_registry import check_hooks
from ftexp.model.loss_registry import check_name as check_loss
from ftexp.model.loss_registry import check_num_weights
from ftexp.model.teacher_spec import require_same_classes
from ftexp.registry import load_plugins
from ftexp.rundir.names import CONFIG_FILE, OVERRIDES_FILE
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import FAILED, RUNNING
from ftexp.trackers.run import check_names as check_trackers
from ftexp.wire import events

if TYPE_CHECKING:
    from ftexp.cluster.hot_start.driver import HotStart
    from ftexp.data.info import DataBundle
    from ftexp.driver.supervisor import Supervisor


def run_session(context: RunContext, hot_start: HotStart) -> dict[str, float]:
    """Start or join Ray, train, leave Ray; return the last metrics."""
    config, shared, terminal = context.config, context.shared, Terminal()
    importing = import_meanwhile("ftexp.driver.trainer")
    alerts, running = Alerts(config.notify), None
    try:
        try:
            with hot_start.raylet_settings():
                running = start_ray(config, shared.runtime_env if shared else hot_start.runtime_env(), shared)
            importing.join()
            prepare = functools.partial(_prepare, context, terminal)
            context, why_cold, bundle = fit_interruptibly(prepare, context.lease, lambda _: False, lost=running.lost)
        except RayLostError as error:
            importing.join()
            record, supervisor = _records(context, terminal, alerts)
            supervisor.ray_lost(error)
            if not error.begins_again:
                record.close(FAILED, str(supervisor.given_up))
            raise
        record, supervisor = _records(context, terminal, alerts)
        trackers = trackers_of(config, record, context.run_dir.parent if shared is not None else None)
        return _run(context, Session(running, bundle, record, supervisor, terminal, trackers, alerts, why_cold))
    except RayLostError as error:
        if context.begin_again is None or not error.begins_again:
            raise
        hot_start.stop()
        context.lease.release()
        try:
            context.begin_again(supervisor.restart(context.config, context.overrides))
        except OSError as failed:
            reason = f"{error}; the command could not restart: {failed}"
            record.close(FAILED, reason)
            raise RayLostError(reason) from failed
    finally:
        leave_ray(running)
        alerts.close(lambda event: terminal.say(f"! {unsent(event)}", "yellow"))


def _records(context: RunContext, terminal: Terminal, alerts: Alerts) -> tuple[RunRecord, Supervisor]:
    from ftexp.driver.supervisor import Supervisor

    config, restart = context.config.checkpoint, context.restart
    score = (config.checkpoint_score_attribute, config.checkpoint_score_order)
    noticed_at, num_before = (restart.noticed_at, restart.num_before) if restart else (None, None)
    record = RunRecord(context.run_dir, context.state, score, noticed_at=noticed_at)
    if restart is not None:
        record.add_unwritten(restart.unwritten)
    alerts.follow(record)
    return record, Supervisor(record, terminal, context.decided_config, num_before, context.no_new_ray)


def _prepare(context: RunContext, terminal: Terminal) -> tuple[RunContext, str | None, DataBundle]:
    """Return the context and the reason from `_with_joined_nodes`, and the data."""
    context, why_cold = _with_joined_nodes(context)
    return context, why_cold, _build(context, terminal)


def _build(context: RunContext, terminal: Terminal) -> DataBundle:
    """Check the config against plug-ins, cluster and data; return the data. ConfigError if a check fails."""
    import ftexp.checkpoint.states  # noqa: F401 - registers the built-in states
    from ftexp.checkpoint.registry import check_names
    from ftexp.data.build import build_data, drawn_by_class

    config, workers, state = context.config, context.workers, context.state
    quiet_data(config)
    load_plugins(config.plugins)
    check_names(config.checkpoint.extra_state)
    check_loss(config.loss.name)
    check_metrics(config, config.data.task)
    check_hooks(config.hooks)
    augmentations(config.augment.custom)
    check_trackers(config.tracker.names)
    if lacking := lacking_resources(workers):
        if config.scaling.address is None:
            raise ConfigError(f"{lacking}: take fewer workers, or set scaling.resources_per_worker")
        terminal.say(f"waiting: {lacking} now", "yellow")
    require_room(config, workers)
    config = dataclasses.replace(config, data=labels_as_begun(config.data, state.data))
    bundle = build_data(config.data, config.augment, workers.runtime_env)
    require_same_data(config, state, bundle.info)
    check_num_weights(config.loss, bundle.info.num_classes)
    check_num_classes(config.train.metrics, bundle.info.num_classes)
    if context.teacher is not None:
        require_same_classes(context.teacher, bundle.info, config.distill.kind)
    check_measured(config.stopping.metric, bundle.info.num_samples)
    require_shared_statistics(config, bundle.info)
    bundle = drawn_by_class(config, bundle)
    if bundle.streams:
        bundle = dataclasses.replace(bundle, decode_cpus=decoding_cpus(config, workers))
    return bundle


def _run(context: RunContext, session: Session) -> dict[str, float]:
    from ftexp.driver.trainer import run_training

    changed = _record_command(context, session)
    if session.why_cold is not None:
        session.record.event(events.ColdStart(session.why_cold))
    _record_data(session)
    if context.restart is None or not context.state.attempts:
        _introduce(context, session, changed)
    try:
        return run_training(context, session)
    finally:
        if context.state.status != RUNNING:
            _conclude(context, session)


def _record_command(context: RunContext, session: Session) -> list[str]:
    """Write the config, the overrides and run.json; return the differences from the run's last invocation."""
    config, run_dir, bundle = context.config, context.run_dir, session.bundle
    context.state.data = {"name": config.data.name, "feed": bundle.feed, **masked(bundle.info)}
    changed = changes(config, context.state, run_dir)
    for name, content in ((CONFIG_FILE, config), (OVERRIDES_FILE, context.overrides)):
        run_dir.write_bytes(name, OmegaConf.to_yaml(OmegaConf.create(masked(content))).encode())
    if context.restart is None:
        session.record.event(events.CommandStarted(changed or None))
    session.record.write()
    return changed


def _with_joined_nodes(context: RunContext) -> tuple[RunContext, str | None]:
    """Return the context with the workers' runtime env for a joined Ray; the reason if they can't be forked there."""
    shared, workers, scaling = context.shared, context.workers, context.config.scaling
    why_cold = shared.why_cold if shared is not None else None  # a sweep sets the runtime env of its trials' jobs
    if scaling.address is not None and shared is None:
        runtime_env, why_cold = on_joined_nodes(scaling, workers.num_threads)
        context = dataclasses.replace(context, workers=dataclasses.replace(workers, runtime_env=runtime_env))
    return context, why_cold


def _record_data(session: Session) -> None:
    info, record = session.bundle.info, session.record
    if info.bad_samples:
        record.event(events.BadSamples(len(info.bad_samples), [vars(sample) for sample in info.bad_samples]))
    if info.warnings:
        record.event(events.DataWarnings(info.warnings))
    if info.excluded:
        record.event(events.EntriesExcluded([vars(excluded) for excluded in info.excluded]))


def _introduce(context: RunContext, session: Session, changed: list[str]) -> None:
    """Print the run's header, the changes since its last invocation, and warnings."""
    from ftexp.data.sampling import epoch_in_words

    config, bundle, terminal = context.config, session.bundle, session.terminal
    decoding = f" · {bundle.decode_cpus} CPUs decode" if bundle.streams else ""
    terminal.header(
        context.state.name,
        context.run_dir.uri,
        config.model.name,
        bundle.info,
        config.data.name,
        str(context.workers),
        f"{bundle.feed}: {bundle.why}{decoding}",
        epoch_in_words(config, bundle.info),
        _weights(config),
        _teacher(context),
    )
    terminal.changed(changed)
    if (repeated := repeated_samples(config, bundle.info)) is not None:
        terminal.say(f"! {repeated}", "yellow")
        session.record.event(events.RepeatedSamples(repeated))


def _weights(config: Config) -> str | None:
    """Return the source of the pretrained weights and their preprocessing, for the header; None without them."""
    data, pretrained = config.data, config.model.pretrained
    if pretrained is False:
        return None
    source = "timm's" if pretrained is True else pretrained
    return f"{source} · " + " · ".join(f"{name} {getattr(data, name)}" for name in PREPROCESSING)


def _teacher(context: RunContext) -> str | None:
    """Return a description of the teacher, for the header; None without a teacher."""
    spec, distill = context.teacher, context.config.distill
    if spec is None:
        return None
    size = f" · {spec.image_size} px" if spec.image_size != context.config.data.image_size else ""
    return f"{spec.model.name}{size} · {spec.source} · {distill.kind}, alpha {distill.alpha:g}"


def _conclude(context: RunContext, session: Session) -> None:
    """Once the records are closed: print the summary, write the report, and wait for the trackers."""
    run_dir, terminal = context.run_dir, session.terminal
    session.trackers.end(outcome_of(context.state, run_dir))
    terminal.summary(context.state, run_dir)
    if context.config.report.enabled:
        _leave_report(session.record, terminal)
    close_trackers(session.trackers, session.record, terminal)


def _leave_report(record: RunRecord, terminal: Terminal) -> None:
    """Write report.html. Errors are logged and never fail the run."""
    run_dir = record.storage
    try:
        from ftexp.report.write import write_report

        terminal.say(f"{'report':<15}{write_report(run_dir)}")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        terminal.say(f"! the report can't be written: {reason}; later: python -m ftexp.report {run_dir.uri}", "yellow")
        with contextlib.suppress(OSError):
            record.late_event(events.ReportFailed(reason))
