"""Shared context of the driver's functions: facts known before Ray runs, and objects that exist while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from ftexp.config.recovery import decided

if TYPE_CHECKING:
    from ftexp.cluster.ray_cluster import RunningRay, SharedRay
    from ftexp.cluster.resources import Workers
    from ftexp.config.schema import Config
    from ftexp.data.info import DataBundle
    from ftexp.driver.alerts.watch import Alerts
    from ftexp.driver.restart import Restart
    from ftexp.driver.supervisor import Supervisor
    from ftexp.driver.terminal import Terminal
    from ftexp.model.teacher_spec import TeacherSpec
    from ftexp.rundir.record import RunRecord
    from ftexp.rundir.state import RunState
    from ftexp.storage.directory import Storage
    from ftexp.storage.lease import Lease
    from ftexp.trackers.run import Trackers


@dataclass(frozen=True)
class RunContext:
    """Facts of one invocation, after its config was validated."""

    config: Config
    overrides: list[str]  # overrides as typed
    workers: Workers
    run_dir: Storage
    state: RunState
    lease: Lease
    shared: SharedRay | None = None  # Ray of the sweep that this run is a trial of
    restart: Restart | None = None  # set if the process restarted because its Ray had died
    begin_again: Callable[[Restart], NoReturn] | None = None  # restarts the process; None: Ray's death ends the run
    teacher: TeacherSpec | None = None

    @property
    def decided_config(self) -> Config:
        """Config with failure.recovery resolved, for the workers and the failure policy."""
        return decided(self.config, self.workers.num_workers, self.workers.use_gpu)

    @property
    def joins_ray(self) -> bool:
        """Whether its Ray was joined, not started here."""
        return self.shared is not None or self.config.scaling.address is not None

    @property
    def no_new_ray(self) -> str | None:
        """Why a Ray that has died can't be replaced; None if it can."""
        if self.joins_ray:
            return "a Ray that was joined can't be started again from here"
        return None if self.begin_again is not None else "only python -m ftexp.train starts a new Ray by itself"


@dataclass(frozen=True)
class Session:
    """The objects of an invocation while its Ray is up."""

    running: RunningRay
    bundle: DataBundle
    record: RunRecord
    supervisor: Supervisor
    terminal: Terminal
    trackers: Trackers
    alerts: Alerts
    why_cold: str | None = None  # why workers of a joined Ray can't be forked; None if they can
