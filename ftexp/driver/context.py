"""Shared context of the driver's functions: facts of a run before Ray is up, and the objects that come with it."""

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
    """One invocation, once its config is good."""

    config: Config
    overrides: list[str]  # what was typed
    workers: Workers
    run_dir: Storage
    state: RunState
    lease: Lease
    shared: SharedRay | None = None  # the Ray of the sweep that this is a trial of
    restart: Restart | None = None  # where the command has begun again, since its Ray had died
    begin_again: Callable[[Restart], NoReturn] | None = None  # how it does; None: it can't, so that the run fails
    teacher: TeacherSpec | None = None

    @property
    def decided_config(self) -> Config:
        """The config with failure.recovery decided, as the workers and the failure policy take it."""
        return decided(self.config, self.workers.num_workers, self.workers.use_gpu)

    @property
    def joins_ray(self) -> bool:
        """Whether its Ray is somebody else's."""
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
    why_cold: str | None = None  # why workers aren't forked, if they aren't
