"""Compares how long ranks take for a step, each without waiting for the others, to find those that keep all waiting.

The times of a step that ends in a collective are the same on every rank; so what is compared is each rank's own time.
Ranks wait for others

- under DDP, once a backward pass has computed its last gradient; and at the beginning of a forward pass, where the
  model has buffers, which rank 0 broadcasts;
- in a sharded model, where the forward pass gathers a block, and all through the backward pass, which isn't compared;
- with train.sync_bn, in each batch norm: then neither pass is compared.

Each rank's times are summed over ranks with what a logged point sums anyway, each in its own place.
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

_US = 1_000_000  # times are summed as whole microseconds


class RankTimes:
    """One rank's part in the comparison; none is made with one rank, or without `scaling.straggler_factor`."""

    def __init__(self, job: Job) -> None:
        self._job = job
        factor, self._world_size = job.config.scaling.straggler_factor, job.group.world_size
        self._stragglers = None
        if factor is not None and self._world_size > 1:
            self._stragglers = Stragglers(factor, job.config.train.log_every_steps)
        self._compared = _compared_sections(job)
        self._remove: list[Callable[[], None]] = []
        self._gradients: dict[Tensor, Any] = {}  # parameter -> the handle of its hook
        self._last: Tensor | None = None  # whose gradient is computed last
        self.watch()

    def watch(self) -> None:
        """Notice where the model waits; to be called again when other parts of it are trained."""
        self.stop()
        self._job.stopwatch.go_on()  # gradients that were computed for their order alone belong to no step
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
        """Notice nothing any more."""
        for remove in [*self._remove, *(handle.remove for handle in self._gradients.values())]:
            remove()
        self._remove, self._gradients, self._last = [], {}, None

    def _watch_forward(self, outer: nn.Module, inner: nn.Module) -> None:
        """A forward pass waits from the call of `outer` to the beginning of `inner` itself."""
        stopwatch = self._job.stopwatch
        before = outer.register_forward_pre_hook(lambda *_: stopwatch.wait(), prepend=True)
        after = inner.register_forward_pre_hook(lambda *_: stopwatch.go_on())
        self._remove += [before.remove, after.remove]

    def _computed(self, parameter: Tensor) -> None:
        self._last = parameter
        self._job.stopwatch.wait(only_from_now=True)

    def own(self) -> list[int]:
        """Return this rank's times since the last point, in its place among those of all ranks; empty without them."""
        if self._stragglers is None:
            return []
        if self._last is not None and len(self._gradients) > 1:  # the order of gradients stays as it is
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
        """Return what a logged point holds of all ranks' `own`; rank 0 reports who is a straggler, or none any more."""
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
