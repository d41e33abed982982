"""Construction of a job's checkpoint manager."""

from __future__ import annotations

from ftexp.checkpoint.manager import CheckpointManager
from ftexp.checkpoint.memory.keeper import Links
from ftexp.checkpoint.registry import ExtraState, StateContext
from ftexp.checkpoint.states import HOOKS
from ftexp.checkpoint.store import CheckpointStore
from ftexp.job.context import shared_fields
from ftexp.job.job import Job


def build_manager(job: Job, store: CheckpointStore, links: Links | None = None) -> CheckpointManager:
    """Build the manager that saves this rank's job to `store`, with the states that the config names.

    links: to the keepers of snapshots; None: no snapshots.
    """
    takes = job.config.failure.takes_snapshots and not job.hooks.change_before_saves
    return CheckpointManager(
        config=job.config,
        run=job.run,
        group=job.group,
        learner=job.learner,
        progress=job.progress,
        ledger=job.ledger,
        channel=job.channel,
        store=store,
        extra=ExtraState(_state_names(job), state_context(job)),
        links=links if takes else None,
    )


def _state_names(job: Job) -> list[str]:
    """Return the names of the configured states, and of the hooks' state if there are hooks."""
    names = job.config.checkpoint.extra_state
    return [*names, HOOKS] if job.hooks and HOOKS not in names else names


def state_context(job: Job) -> StateContext:
    """Return the context that the job's states are built with."""
    learner = job.learner
    return StateContext(
        **shared_fields(job.config, job.group, learner, job.progress),
        scheduler=learner.scheduler,
        scaler=learner.scaler,
        channel=job.channel,
        projection=learner.distiller.projection if learner.distiller is not None else None,
        hooks=job.hooks,
    )
