"""The part of a sweep that has a Ray: started or joined once, for all trials."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import ray

from ftexp.cli.exit_codes import interrupted_code
from ftexp.cluster.hot_start.driver import HotStart, on_joined_nodes
from ftexp.cluster.interruptible import collected_signals
from ftexp.cluster.ray_cluster import SharedRay, import_meanwhile, start_ray
from ftexp.cluster.resources import may_stream
from ftexp.config.machine import usable_cpus
from ftexp.config.schema import Config
from ftexp.errors import ConfigError, RayLostError
from ftexp.rundir.record import FINISHED
from ftexp.rundir.sweep_record import Ledger, reached
from ftexp.storage.directory import Storage
from ftexp.sweep.run.parent import tracked_sweep
from ftexp.sweep.run.records import Records
from ftexp.sweep.run.runner import Job, Runner, config_of, require_room
from ftexp.sweep.run.sweep import failures_of, most_threads
from ftexp.sweep.run.trial import Order
from ftexp.sweep.show.display import Display
from ftexp.sweep.show.leaderboard import publish

if TYPE_CHECKING:
    from ftexp.sweep.search.search import Search

_LOOK_EVERY_S, _LOOK_EVERY_REMOTE_S = 1.0, 10.0  # at the run directories of running trials


def run_trials(
    folder: Storage,
    ledger: Ledger,
    jobs: list[Job],
    share: int,
    hot_start: HotStart | None,
    search: Search | None = None,
) -> list[float | None]:
    """Run the trials that wait; returns the objective of each job. Every way out leaves the ledger right.

    search: what adds more of them to `jobs`.
    hot_start: what trials' drivers are forked by, whoever started Ray, and their workers, if that is done here; None if
    no trial waits.
    SweepFailedError if trials failed, ConfigError if one can never fit, SystemExit after a signal.
    """
    display = Display(folder, ledger, jobs, total=search.plan.num_trials if search is not None else None)
    display.header(search.plan.describe() if search is not None else None)
    if hot_start is not None:
        try:
            like = search.probes if search is not None else jobs
            with tracked_sweep(like[0].config, folder, ledger, display):
                _with_ray(folder, ledger, jobs, share, display, hot_start, search)
        except KeyboardInterrupt as interrupt:
            display.close()
            display.say(f"stopped; the same command with sweep.name={ledger.name} goes on")
            raise SystemExit(interrupted_code(interrupt)) from None
        except RayLostError as error:
            raise RayLostError(f"{error}; the same command with sweep.name={ledger.name} goes on") from error
        finally:
            display.close()
            ledger.write(folder)
    else:
        ledger.write(folder)
    trials = [reached(folder, trial, is_alive=True) for trial in ledger.trials]
    publish(folder, ledger, trials, display.console)
    if (failure := failures_of(jobs)) is not None:
        raise failure
    by_name = {each.trial.name: each.value(ledger.metric) for each in trials if each.status == FINISHED}
    return [by_name.get(job.trial.name) for job in jobs]


def _with_ray(
    folder: Storage,
    ledger: Ledger,
    jobs: list[Job],
    share: int,
    display: Display,
    hot_start: HotStart,
    search: Search | None,
) -> None:
    """Start or join Ray, and run."""
    like = search.probes if search is not None else jobs  # every trial's needs are among those of these
    config = _widest(like)
    is_own = config.scaling.address is None
    importing = import_meanwhile("ray.tune.search.optuna") if search is not None else None
    try:
        with hot_start.raylet_settings() if is_own else contextlib.nullcontext():
            running = start_ray(config)
        capacity = dict(ray.cluster_resources())
        if is_own:
            capacity["CPU"] = usable_cpus()  # what decodes is counted on top
        if too_large := require_room(like, capacity):
            raise ConfigError("\n".join(["trials that can never run:", *too_large]))
        address = ray.get_runtime_context().gcs_address
        runtime_env, why_cold = hot_start.runtime_env(), None
        if not is_own:
            runtime_env, why_cold = on_joined_nodes(config.scaling, most_threads(like))
        shared = SharedRay(address, runtime_env, why_cold, share)
        interval_s = _LOOK_EVERY_S if folder.local_path is not None else _LOOK_EVERY_REMOTE_S
        looked = 0.0

        settle = search.settle if search is not None else lambda: None
        records = Records(folder, ledger, settle, display.say)

        def tick() -> None:
            nonlocal looked
            if time.monotonic() - looked > interval_s:
                looked = time.monotonic()
                with records.riding_out():
                    if not records.is_written:
                        records.write()
                    display.update()
                    for job, epoch in search.to_stop() if search is not None else ():
                        runner.stop_early(job, epoch)
                        records.write()

        def changed(job: Job) -> None:
            with records.riding_out():
                records.write()
            with records.riding_out():
                display.changed(job)

        def more() -> Job | None:
            while search is not None:
                with records.riding_out():
                    return search.next_job()
                if asked or any(job.process is not None for job in jobs):
                    return None  # it is asked for again
                time.sleep(interval_s)
            return None

        if search is not None and importing is not None:
            importing.join()
            search.begin()
        with collected_signals() as asked:  # now, since Ray has set a handler of its own
            runner = Runner(
                jobs=jobs,
                capacity=capacity,
                most=config.sweep.max_concurrent,
                python=hot_start.python(),
                order=lambda job: Order(config_of(job), job.overrides, shared),
                changed=changed,
                tick=tick,
                asked=asked,
                more=more,
                least=search.least if search is not None else {},
                lost=running.lost,
            )
            runner.run()
    finally:
        ray.shutdown()


def _widest(jobs: list[Job]) -> Config:
    """The config that Ray is started by: one whose data is decoded beside training, if there is one."""
    return next((job.config for job in jobs if may_stream(job.config.data)), jobs[0].config)
