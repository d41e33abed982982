"""Comparison of the ranks' own times in a step, to find stragglers, which keep all others waiting.

A step that ends in a collective takes equally long on every rank. So only each rank's own time is compared, without its
waiting for others. Ranks wait

- with DDP, after the last gradient of a backward pass, and at the start of a forward pass if the model has buffers,
  which rank 0 broadcasts;
- with a sharded model, when the forward pass gathers a block, and throughout the backward pass, which isn't compared;
- with train.sync_bn, in each batch norm; then neither pass is compared.

The times are exchanged in the collective that sums the metrics of a logged point: each rank fills its own slots of a
list, and adds zeros to the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ftexp.failure.stragglers import Stragglers, median, totals
from ftexp.job.job import Job
from ftexp.job.stopwatch import BACKWARD, FORWARD, OWN, RANKS
from ftexp.wire import events
from ftexp.wire.messages import Happened

_US = 1_000_000  # microseconds per second; times are summed as whole microseconds


class RankTimes:
    """One rank's part in the comparison. Nothing is compared with one rank, or without `scaling.straggler_factor`."""

    def __init__(self, job: Job) -> None:
        self._job = job
        factor, self._world_size = job.config.scaling.straggler_factor, job.group.world_size
        self._stragglers = None
        if factor is not None and self._world_size > 1:
            self._stragglers = Stragglers(factor, job.config.train.log_every_steps)
        self._compared = _compared_sections(job)
        self._remove: list[Callable[[], None]] = []
        self._gradients: dict[Tensor, Any] = {}  # parameter -> handle of its hook
        self._last: Tensor | None = None  # parameter whose gradient is computed last
        self.watch()

    def watch(self) -> None:
        """Add hooks where the model waits. To be called again when other parameters are trained, or DDP is rebuilt."""
        self.stop()
        self._job.stopwatch.go_on()  # the backward pass of `settle_gradient_order` belongs to no step
        if self._stragglers is None:
            return
        learner = self._job.learner
        if learner.sharding is not None and FORWARD in self._compared:
            for module in learner.model.modules():
                if isinstance(module, FSDPModule):
                    self._watch_forward(module, module)
        elif FORWARD in self._compared and _has_buffers(learner.trainable):
            self._watch_forward(learner.wrapped, learner.trainable)
        if BACKWARD in self._compared:
            trained = [parameter for parameter in learner.trainable.parameters() if parameter.requires_grad]
            self._gradients = {each: _hooked(each, self._computed) for each in trained}

    def stop(self) -> None:
        """Remove the hooks."""
        for remove in [*self._remove, *(handle.remove for handle in self._gradients.values())]:
            remove()
        self._remove, self._gradients, self._last = [], {}, None

    def _watch_forward(self, outer: nn.Module, inner: nn.Module) -> None:
        """Count the time from the call of `outer` to the start of `inner`'s own forward pass as waiting."""
        stopwatch = self._job.stopwatch
        before = outer.register_forward_pre_hook(lambda *_: stopwatch.wait(), prepend=True)
        after = inner.register_forward_pre_hook(lambda *_: stopwatch.go_on())
        self._remove += [before.remove, after.remove]

    def _computed(self, parameter: Tensor) -> None:
        self._last = parameter
        self._job.stopwatch.wait(only_from_now=True)

    def own(self) -> list[int]:
        """Return this rank's mean times of a step since the last point, in its slots of a list for all ranks.

        In microseconds; [] if nothing is compared.
        """
        if self._stragglers is None:
            return []
        if self._last is not None and len(self._gradients) > 1:  # their order doesn't change: one hook is enough
            for parameter, handle in self._gradients.items():
                if parameter is not self._last:
                    handle.remove()
            self._gradients = {self._last: self._gradients[self._last]}
        times = [0] * (len(OWN) * self._world_size)
        first, seconds = self._job.group.rank * len(OWN), self._job.stopwatch.own_s()
        times[first : first + len(OWN)] = [
            max(0, round(_US * seconds[section])) if section in self._compared else 0 for section in OWN
        ]
        return times

    def take(self, summed: Sequence[int]) -> dict[str, float]:
        """Return the values of RANKS for a logged point, and report new and former stragglers; {} except on rank 0.

        summed: the sum of all ranks' `own`.
        """
        if self._stragglers is None or self._job.group.rank != 0 or not any(summed):
            return {}
        times = [summed[first : first + len(OWN)] for first in range(0, len(summed), len(OWN))]
        of_ranks = [total / 1000 for total in totals(times)]
        usual = median(of_ranks)
        became, ended = self._stragglers.note(times)
        step = self._job.progress.step
        for slow in became:
            ratio, own_ms, usual_ms = round(slow.ratio, 2), round(of_ranks[slow.rank], 3), round(usual, 3)
            self._report(events.Straggler(slow.rank, OWN[slow.part], ratio, own_ms, usual_ms, step))
        for rank in ended:
            self._report(events.StragglerOver(rank, step))
        highest = max(of_ranks)
        return dict(zip(RANKS, (min(of_ranks), usual, highest, of_ranks.index(highest)), strict=True))

    def _report(self, event: events.Straggler | events.StragglerOver) -> None:
        self._job.channel.send(Happened(event))


def _compared_sections(job: Job) -> tuple[str, ...]:
    """Return the sections of OWN in which a rank's own time can be measured."""
    train, learner = job.config.train, job.learner
    unknown = set[str]()
    if train.sync_bn and job.group.device.type == "cuda":
        unknown |= {FORWARD, BACKWARD}
    if learner.sharding is not None:
        unknown |= {BACKWARD} if train.compiled == "none" else {FORWARD, BACKWARD}
    elif train.compiled == "model" and _has_buffers(learner.trainable):  # a hook would be compiled with the model
        unknown.add(FORWARD)
    return tuple(section for section in OWN if section not in unknown)


def _hooked(parameter: Tensor, hook: Callable[[Tensor], None]) -> Any:
    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _has_buffers(model: nn.Module) -> bool:
    return next(model.buffers(), None) is not None
