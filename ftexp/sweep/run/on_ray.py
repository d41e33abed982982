"""The part of a sweep that uses Ray, which is started or joined once, for all trials."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import ray

from ftexp.cli.exit_codes import interrupted_code
from ftexp.cluster.hot_start.driver import HotStart, on_joined_nodes
from ftexp.cluster.interruptible import collected_signals
from ftexp.cluster.ray_cluster import SharedRay, leave_ray, start_ray
from ftexp.cluster.resources import may_decode
from ftexp.config.machine import usable_cpus
from ftexp.config.schema import Config
from ftexp.errors import ConfigError, RayLostError
from ftexp.rundir.state import FINISHED
from ftexp.rundir.sweep_record import SweepRecord, reached
from ftexp.storage.directory import Storage
from ftexp.sweep.run.parent import tracked_sweep
from ftexp.sweep.run.proposer import Proposer
from ftexp.sweep.run.records import Records
from ftexp.sweep.run.runner import Runner, TrialProcess, config_of, failures_of, max_threads, require_room
from ftexp.sweep.run.trial import TrialRequest
from ftexp.sweep.show.display import Display
from ftexp.sweep.show.leaderboard import publish

_LOOK_EVERY_S, _LOOK_EVERY_REMOTE_S = 1.0, 10.0  # interval of reading the run directories of running trials


def run_trials(
    directory: Storage, record: SweepRecord, proposer: Proposer, share: int, hot_start: HotStart | None
) -> list[float | None]:
    """Run the waiting trials and those yet to be proposed; return the objective of each.

    The record is correct at every exit.

    hot_start: forks the trials' drivers, and their workers too if Ray is started here; None if no trial waits.

    SweepFailedError if trials failed, ConfigError if one can never fit, SystemExit after a signal.
    """
    processes = proposer.processes
    display = Display(directory, record, processes, proposer.num_trials)
    display.header(proposer.description)
    if hot_start is not None:
        try:
            with tracked_sweep(proposer.probes[0].config, directory, record, display):
                _with_ray(directory, record, proposer, share, display, hot_start)
        except KeyboardInterrupt as interrupt:
            display.close()
            display.say(f"stopped; run the same command with sweep.name={record.name} to resume")
            raise SystemExit(interrupted_code(interrupt)) from None
        except RayLostError as error:
            raise RayLostError(f"{error}; run the same command with sweep.name={record.name} to resume") from error
        finally:
            display.close()
            record.write(directory)
    else:
        record.write(directory)
    trials = [reached(directory, trial, is_alive=True) for trial in record.trials]
    publish(directory, record, trials, display.console)
    if (failure := failures_of(processes)) is not None:
        raise failure
    by_name = {each.trial.name: each.value(record.metric) for each in trials if each.status == FINISHED}
    return [by_name.get(process.trial.name) for process in processes]


def _with_ray(
    directory: Storage, record: SweepRecord, proposer: Proposer, share: int, display: Display, hot_start: HotStart
) -> None:
    """Start or join Ray, and run the trials."""
    probes, processes = proposer.probes, proposer.processes
    config = _widest(probes)
    is_own, running = config.scaling.address is None, None
    try:
        with hot_start.raylet_settings() if is_own else contextlib.nullcontext():
            running = start_ray(config)
        capacity = dict(ray.cluster_resources())
        if is_own:
            capacity["CPU"] = usable_cpus()  # without the CPUs for decoding, which are counted on top
        if too_large := require_room(probes, capacity):
            raise ConfigError("\n".join(["trials that can never run:", *too_large]))
        address = ray.get_runtime_context().gcs_address
        runtime_env, why_cold = hot_start.runtime_env(), None
        if not is_own:
            runtime_env, why_cold = on_joined_nodes(config.scaling, max_threads(probes))
        shared = SharedRay(address, runtime_env, why_cold, share)
        interval_s = _LOOK_EVERY_S if directory.local_path is not None else _LOOK_EVERY_REMOTE_S
        looked = 0.0
        records = Records(directory, record, proposer.settle, display.say)

        def tick() -> None:
            nonlocal looked
            if time.monotonic() - looked > interval_s:
                looked = time.monotonic()
                with records.riding_out():
                    if not records.is_written:
                        records.write()
                    display.update()
                    for process, epoch in proposer.to_stop():
                        runner.stop_early(process, epoch)
                        records.write()

        def changed(process: TrialProcess) -> None:
            with records.riding_out():
                records.write()
            with records.riding_out():
                display.changed(process)

        def next_process() -> TrialProcess | None:
            while True:
                with records.riding_out():
                    return proposer.next_process()
                if asked or any(process.popen is not None for process in processes):
                    return None  # the runner asks again later
                time.sleep(interval_s)

        with collected_signals() as asked:
            runner = Runner(
                processes=processes,
                capacity=capacity,
                max_concurrent=config.sweep.max_concurrent,
                python=hot_start.python(),
                request=lambda process: TrialRequest(config_of(process), process.overrides, shared),
                changed=changed,
                tick=tick,
                asked=asked,
                next_process=next_process,
                min_needs=proposer.min_needs,
                lost=running.lost,
            )
            runner.run()
    finally:
        leave_ray(running)


def _widest(processes: Sequence[TrialProcess]) -> Config:
    """Return the config with which Ray is started: one whose data is decoded during training, if there is one."""
    return next((process.config for process in processes if may_decode(process.config)), processes[0].config)
