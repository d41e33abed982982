"""Survival of another rank's death within a step: the living ranks wait for its replacement and repeat the step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import ray.util
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from ftexp.checkpoint.manager import CheckpointManager
from ftexp.config.schema import REPLACE
from ftexp.errors import FtexpError
from ftexp.failure.causes import is_echo
from ftexp.failure.meeting import MEETING, Invitation, Waiting
from ftexp.failure.nonfinite import NonFiniteRecovery
from ftexp.failure.phases import EVALUATION, SAVE, START
from ftexp.failure.watchdog import Watchdog
from ftexp.job.job import Job
from ftexp.wire.messages import REPLACED
from ftexp.worker.log import announce
from ftexp.worker.ranks import RankTimes
from ftexp.worker.step import settle_gradient_order

_ELSEWHERE = (EVALUATION, SAVE)  # phases in which another rank's death raises an error in this one
_NOTICE_S = 30.0  # time limit for Ray to notice a death; after it, the error counts as this rank's own
_LOOK_S = 0.005
_CONNECT_S = 30.0
_INVITED_S = 90.0  # longer than the controller waits for a worker to start


@dataclass(frozen=True)
class Facts:
    """Facts of the attempt that a replacement needs in addition to the saved state."""

    began: int  # the step after which the attempt began
    num_skipped: int = 0  # number of skipped steps in a row
    sums: Tensor | None = None  # the dead rank's sums of metrics


class Replacing:
    """One rank's part in a replacement (failure.recovery=replace). Every living rank calls its methods."""

    def __init__(self, job: Job, checkpoints: CheckpointManager, facts: Facts) -> None:
        self._job, self._checkpoints, self._facts = job, checkpoints, facts
        self._store: TCPStore | None = None  # store through which the ranks form the new group

    def prepared(
        self, ranks: RankTimes, recovery: NonFiniteRecovery, watchdog: Watchdog
    ) -> Callable[[RuntimeError], bool] | None:
        """Return `recovers` for `train_step`; None unless failure.recovery=replace, with more than one rank."""
        if self._job.config.failure.recovery != REPLACE or self._job.group.world_size == 1:
            return None
        recovery.num_skipped = self._facts.num_skipped
        watchdog.on_phase = lambda phase: MEETING.expect(phase not in _ELSEWHERE)

        def recovers(error: RuntimeError) -> bool:
            with watchdog.during(START), self._job.stopwatch.apart():
                is_back = self._recovers(error, ranks, recovery)
            self._job.stopwatch.begin()  # restart the timing: the step is repeated
            return is_back

        return recovers

    def _recovers(self, error: RuntimeError, ranks: RankTimes, recovery: NonFiniteRecovery) -> bool:
        """Wait until a rank that died in the current step was replaced; return False if none was.

        If True, the step is to be repeated from the state before it, which the caller has restored.
        """
        while is_echo(error) and self._checkpoints.is_idle and not self._job.progress.pending:
            try:
                return self._met(ranks, recovery)
            except RuntimeError as again:  # the replacement has died too
                error = again
        return False

    def _met(self, ranks: RankTimes, recovery: NonFiniteRecovery) -> bool:
        job = self._job
        _leave_group(job)
        self._store = None
        if job.group.rank == 0:
            self._store = TCPStore(_own_address(), 0, is_master=True, wait_for_workers=False)
        address = (_own_address(), self._store.port) if self._store is not None else None
        MEETING.wait(Waiting(job.progress.step, address))
        if (invitation := self._summoned()) is None:
            return False
        assert self._store is not None
        join(job, invitation, self._store)
        sums = job.progress.train.shared(invitation.rank)
        self._checkpoints.hand_over(Facts(self._facts.began, recovery.num_skipped, sums))
        resume_together(job, self._checkpoints, ranks)
        return True

    def _summoned(self) -> Invitation | None:
        """Return the invitation of the meeting that the replacement has joined; None if no rank died or none came."""
        if MEETING.invitation(_NOTICE_S) is None and not MEETING.is_noticed:
            return None
        if MEETING.invitation(_INVITED_S) is None:
            return None
        while True:
            invitation = MEETING.invitation(0.0)
            assert invitation is not None, "there was one, and only a later one takes its place"
            if self._store is None:  # rank 0 serves the same store as long as it waits
                self._store = connected(invitation)
            if self._store.check([_key(invitation)]):
                MEETING.leave()
                return invitation
            time.sleep(_LOOK_S)


def come(job: Job, checkpoints: CheckpointManager) -> Replacing:
    """Join the waiting ranks as a replacement, and receive their state; collective with `Replacing`.

    FtexpError if no invitation comes.
    """
    invitation = MEETING.invitation(_INVITED_S)
    if invitation is None:
        raise FtexpError("the other workers don't wait for the one that was started again")
    store = connected(invitation)
    store.set(_key(invitation), "ready")
    join(job, invitation, store)
    facts: Facts = checkpoints.take_over()
    assert facts.sums is not None, "the others have shared them"
    job.progress.train.put_back(facts.sums)
    job.learner.freezing.settle(job.progress.epoch)
    _note_missing(job, facts.began)
    resume_together(job, checkpoints, None)
    return Replacing(job, checkpoints, facts)


def resume_together(job: Job, checkpoints: CheckpointManager, ranks: RankTimes | None) -> None:
    """Rebuild everything that depends on the process group; collective."""
    learner = job.learner
    learner.wrapped = learner.wrap(learner.trainable)
    settle_gradient_order(job)
    if ranks is not None:
        ranks.watch()
    checkpoints.rejoin()
    announce(job, REPLACED)


def connected(invitation: Invitation) -> TCPStore:
    """Return a client of the store that rank 0 serves."""
    return TCPStore(*invitation.address, is_master=False, timeout=timedelta(seconds=_CONNECT_S))


def join(job: Job, invitation: Invitation, store: TCPStore) -> None:
    """Form the new default process group; collective."""
    group, scaling = job.group, job.config.scaling
    dist.init_process_group(
        scaling.backend or "gloo",
        store=PrefixStore(str(invitation.number), store),
        rank=group.rank,
        world_size=group.world_size,
        timeout=timedelta(seconds=scaling.timeout_s),
    )


def _key(invitation: Invitation) -> str:
    return f"ready{invitation.number}"


def _own_address() -> str:
    return str(ray.util.get_node_ip_address())


def _leave_group(job: Job) -> None:
    """Break the connections to the other ranks, so that ranks that wait for this one notice the death too."""
    job.learner.wrapped = job.learner.trainable  # drop the DDP wrapper and what it holds of the unfinished step
    if dist.is_initialized():
        group = dist.distributed_c10d._get_default_group()
        group.abort()
        dist.destroy_process_group()


def _note_missing(job: Job, began: int) -> None:
    """Add the steps to the sample ledger that the dead process had done but not yet written."""
    progress, batch = job.progress, job.config.train.global_batch_size
    first = max(job.ledger.last_step(), began)
    for step, share in enumerate(job.data.feed.shares(first * batch), start=first + 1):
        if step > progress.step:
            return
        job.ledger.note(step, share, skipped=job.data.skipped.cover(share.start))
