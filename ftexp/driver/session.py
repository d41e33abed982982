"""One call of the command once the config is good: Ray up, data in, train, Ray down."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import ray
from omegaconf import OmegaConf

from ftexp.cluster.hot_start.driver import HotStart, on_joined_nodes
from ftexp.cluster.interruptible import fit_interruptibly
from ftexp.cluster.ray_cluster import RunningRay, SharedRay, import_meanwhile, quiet_data, start_ray
from ftexp.cluster.resources import Workers, decoding_cpus, lacking_resources
from ftexp.config.masking import masked
from ftexp.config.schema import Config
from ftexp.driver.restart import Restart
from ftexp.driver.resume import changes, labels_as_begun, repeated_samples, require_same_data
from ftexp.driver.terminal import Terminal
from ftexp.driver.tracker_session import close_trackers, outcome_of, trackers_of
from ftexp.errors import ConfigError, RayLostError
from ftexp.registry import load_plugins
from ftexp.rundir.record import CONFIG_FILE, FAILED, RUNNING, RunRecord, RunState
from ftexp.storage.directory import Storage
from ftexp.storage.lease import Lease
from ftexp.trackers.run import check_names as check_trackers

if TYPE_CHECKING:
    from ftexp.data.info import DataBundle
    from ftexp.driver.supervisor import Supervisor


def run_session(
    config: Config,
    overrides: list[str],
    workers: Workers,
    run_dir: Storage,
    state: RunState,
    lease: Lease,
    shared: SharedRay | None,
    restart: Restart | None = None,
    begin_again: Callable[[Restart], NoReturn] | None = None,
) -> dict[str, float]:
    """Train in a Ray that is started here, or joined, and left again; returns the last metrics.

    restart: where this is a command that has begun again, since its Ray had died.
    begin_again: how it does; None: it can't, so that the run fails.
    """
    joins = shared is not None or config.scaling.address is not None
    terminal = Terminal()
    hot_start = HotStart(config.scaling, workers.num_threads, joins)
    importing = import_meanwhile("ftexp.driver.trainer")

    def records() -> tuple[RunRecord, Supervisor]:
        from ftexp.driver.supervisor import Supervisor

        score = (config.checkpoint.checkpoint_score_attribute, config.checkpoint.checkpoint_score_order)
        record = RunRecord(run_dir, state, score, noticed_at=restart.noticed_at if restart else None)
        num_before = restart.num_before if restart else None
        return record, Supervisor(record, terminal, config, num_before, _no_new_ray(joins, begin_again is not None))

    try:
        try:
            with hot_start.raylet_settings():
                running = start_ray(config, shared.runtime_env if shared else hot_start.runtime_env(), shared)
            importing.join()
            build = functools.partial(_build, config, workers, state, terminal)
            bundle = fit_interruptibly(build, lease, lambda _: False, lost=running.lost)
        except RayLostError as error:
            importing.join()
            record, supervisor = records()
            supervisor.ray_lost(error)
            if not error.begins_again:
                record.close(FAILED, supervisor.stopped)
            raise
        record, supervisor = records()
        return _run(
            config, overrides, workers, run_dir, record, terminal, lease, running, shared, bundle, supervisor, restart
        )
    except RayLostError as error:
        if begin_again is None or not error.begins_again:
            raise
        hot_start.stop()
        lease.release()
        try:
            begin_again(supervisor.restart(overrides))
        except OSError as failed:
            reason = f"{error}; the command could not begin again: {failed}"
            record.close(FAILED, reason)
            raise RayLostError(reason) from failed
    finally:
        ray.shutdown()
        hot_start.stop()


def _no_new_ray(joins: bool, is_command: bool) -> str | None:
    """Why a Ray that has died can't be replaced; None if it can."""
    if joins:
        return "a Ray that was joined can't be started again from here"
    return None if is_command else "only python -m ftexp.train starts a new Ray by itself"


def _build(config: Config, workers: Workers, state: RunState, terminal: Terminal) -> DataBundle:
    """What is trained on, once what else is named in the config is there; ConfigError if something isn't."""
    import ftexp.checkpoint.states  # noqa: F401 - registers what is built in
    from ftexp.checkpoint.registry import check_names
    from ftexp.data.build import build_data

    quiet_data(config)
    load_plugins(config.plugins)
    check_names(config.checkpoint.extra_state)
    check_trackers(config.tracker.names)
    if lacking := lacking_resources(workers):
        if config.scaling.address is None:
            raise ConfigError(f"{lacking}: take fewer workers, or set scaling.resources_per_worker")
        terminal.say(f"waiting: {lacking} now", "yellow")
    config = dataclasses.replace(config, data=labels_as_begun(config.data, state.data))
    bundle = build_data(config.data)
    require_same_data(config, state, bundle.info)
    if bundle.streamed:
        bundle = dataclasses.replace(bundle, decode_cpus=decoding_cpus(config, workers))
    return bundle


def _run(
    config: Config,
    overrides: list[str],
    workers: Workers,
    run_dir: Storage,
    record: RunRecord,
    terminal: Terminal,
    lease: Lease,
    running: RunningRay,
    shared: SharedRay | None,
    bundle: DataBundle,
    supervisor: Supervisor,
    restart: Restart | None,
) -> dict[str, float]:
    from ftexp.driver.trainer import run_training

    state = record.state
    state.data = {"name": config.data.name, "feed": bundle.feed, **masked(bundle.info)}
    changed = changes(config, state, run_dir)
    run_dir.write_bytes(CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(masked(config))).encode())
    run_dir.write_bytes("overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(masked(overrides))).encode())
    trackers = trackers_of(config, record, run_dir.parent if shared is not None else None)
    if restart is None:
        record.event("command_started", **({"changed": changed} if changed else {}))
    record.write()
    why_cold = shared.why_cold if shared is not None else None  # a sweep has seen to its trials' jobs
    if config.scaling.address is not None and shared is None:
        runtime_env, why_cold = on_joined_nodes(config.scaling, workers.num_threads)
        workers = dataclasses.replace(workers, runtime_env=runtime_env)
    if why_cold is not None:
        record.event("cold_start", reason=why_cold)
    if bundle.info.bad_samples:
        samples = [vars(sample) for sample in bundle.info.bad_samples]
        record.event("bad_samples", count=len(samples), samples=samples)
    if bundle.info.warnings:
        record.event("data_warnings", warnings=bundle.info.warnings)
    if bundle.info.excluded:
        record.event("entries_excluded", entries=[vars(excluded) for excluded in bundle.info.excluded])
    if restart is None or not state.attempts:
        terminal.header(
            state.name,
            run_dir.uri,
            config.model.name,
            bundle.info,
            config.data.name,
            str(workers),
            f"{bundle.feed}: {bundle.why}" + (f" · {bundle.decode_cpus} CPUs decode" if bundle.streamed else ""),
        )
        terminal.changed(changed)
        if (repeated := repeated_samples(config, bundle.info)) is not None:
            terminal.say(f"! {repeated}", "yellow")
            record.event("repeated_samples", reason=repeated)
    try:
        return run_training(config, workers, bundle, run_dir, record, terminal, lease, running, trackers, supervisor)
    finally:
        if record.state.status != RUNNING:
            trackers.end(outcome_of(record.state, run_dir))
            terminal.summary(record.state, run_dir)
            if config.report.enabled:
                _leave_report(run_dir, record, terminal)
            close_trackers(trackers, record, terminal)


def _leave_report(run_dir: Storage, record: RunRecord, terminal: Terminal) -> None:
    """Write the run's report. What goes wrong with that is told, and takes nothing from the run."""
    try:
        from ftexp.report.write import write_report

        terminal.say(f"{'report':<15}{write_report(run_dir)}")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        terminal.say(f"! the report can't be written: {reason}; later: python -m ftexp.report {run_dir.uri}", "yellow")
        with contextlib.suppress(OSError):
            record.late_event("report_failed", error=reason)
