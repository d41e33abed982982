"""Detection of silent corruption: replicas of the weights that differ, and steps with another result when repeated.

After each step, DDP's replicas are bitwise identical, and so are the results of a step that is computed twice. If they
differ, a processor or its memory is faulty. Replicas are compared before each checkpoint, so the newest checkpoint
precedes the corruption.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ftexp.errors import ConfigError, CorruptionError
from ftexp.job.job import Job
from ftexp.model.parallel.parts import local
from ftexp.wire import events
from ftexp.wire.messages import Happened

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer types by bytes of a value
_MAX_NAMED = 5  # limit of tensors named in an error
REPLICAS, REPEAT = "replicas", "repeat"  # kinds of checks


def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of each tensor's values, read as integers: int64 [tensors]. A change of a single value changes it.

    Sums of integers don't depend on the order of addition or on the device.
    """
    return torch.stack([_words(tensor).sum(dtype=torch.int64) for tensor in tensors])


def _words(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(_WORDS[tensor.element_size()])


class _Cost:
    """Reports the cost of a check once per attempt: of the second one, since the first also connects and allocates."""

    def __init__(self, job: Job, check: str, every_steps: int) -> None:
        self._job, self._about = job, (check, every_steps)
        self._num_checks, self._since = 0, 0.0

    def note(self, seconds: float) -> None:
        """Note that a check has taken this long."""
        self._num_checks += 1
        now = time.perf_counter()
        if self._num_checks == 2 and self._job.group.rank == 0:
            share = seconds / (now - self._since)
            self._job.channel.send(Happened(events.CorruptionChecked(*self._about, seconds, share)))
        self._since = now


class ReplicaCheck:
    """Compares the weights of all ranks every `failure.check_replicas_every_steps` steps and before each checkpoint."""

    def __init__(self, job: Job) -> None:
        """Raise ConfigError if there is only one rank."""
        self._job, self._every = job, job.config.failure.check_replicas_every_steps
        if self._every is not None:
            _require_replicas(job)
        self._cost = _Cost(job, REPLICAS, self._every or 0)

    def check(self, saves: bool) -> None:
        """Compare if due, or if the weights are about to be saved; collective. CorruptionError on every rank."""
        if self._every is None or not (saves or self._job.progress.step % self._every == 0):
            return
        began = time.perf_counter()
        names, own = zip(*self._job.learner.model.named_parameters(), strict=True)
        sums = _of_all_ranks(checksums(own))
        if not bool((sums == sums[0]).all()):
            self._refuse(names, sums)
        self._cost.note(time.perf_counter() - began)

    def _refuse(self, names: Sequence[str], sums: Tensor) -> None:
        rank = odd_rank([tuple(row.tolist()) for row in sums])
        others = sums[0 if rank != 0 else 1]
        differs = (sums != others).any(dim=0) if rank is None else sums[rank] != others
        where = f"rank {rank} differs from the others" if rank is not None else "ranks differ, none is in the minority,"
        what = f"silent corruption: the weights after step {self._job.progress.step}: {where} in "
        raise CorruptionError(what + _listed(names, differs), rank)


class StepRepeat:
    """Computes every `failure.repeat_step_every`-th step twice and compares losses and gradients bitwise."""

    def __init__(self, job: Job) -> None:
        self._job, self._every = job, job.config.failure.repeat_step_every
        self._cost = _Cost(job, REPEAT, self._every or 0)

    @property
    def is_due(self) -> bool:
        """Whether the next step is to be computed twice."""
        return self._every is not None and (self._job.progress.step + 1) % self._every == 0

    def compare(self, losses: Sequence[Tensor], again: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Repeat the step by `again`, return its losses; collective. CorruptionError if losses or gradients differ."""
        names, before = self._result(losses)
        began = time.perf_counter()
        losses = again()
        _, after = self._result(losses)
        differs = _of_all_ranks((before != after).to(torch.int64)).bool()
        if bool(differs.any()):
            self._refuse(names, differs, len(losses))
        self._cost.note(time.perf_counter() - began)
        return losses

    def _result(self, losses: Sequence[Tensor]) -> tuple[list[str], Tensor]:
        """Return names and checksums of the losses, and of the gradients, which are summed over ranks."""
        named = [(f"loss of micro-batch {number}", values) for number, values in enumerate(losses)]
        parameters = self._job.learner.trainable.named_parameters()
        named += [(f"gradient of {name}", each.grad) for name, each in parameters if each.grad is not None]
        return [name for name, _ in named], checksums(local(values) for _, values in named)

    def _refuse(self, names: Sequence[str], differs: Tensor, num_losses: int) -> None:
        """Raise CorruptionError, with the faulty rank if losses differ: each rank has its own, unlike gradients."""
        ranks = differs[:, :num_losses].any(dim=1).nonzero().flatten().tolist() or ([0] if len(differs) == 1 else [])
        rank = ranks[0] if len(ranks) == 1 else None
        where = f"rank {rank}" if rank is not None else "a rank"
        step = self._job.progress.step + 1
        what = f"silent corruption: step {step}, computed twice: {where} has another result in "
        raise CorruptionError(what + _listed(names, differs.any(dim=0)), rank)


def _require_replicas(job: Job) -> None:
    key = f"failure.check_replicas_every_steps={job.config.failure.check_replicas_every_steps}"
    if job.group.world_size == 1:
        raise ConfigError(f"{key} compares ranks, and there is one: set scaling.num_workers=2 or more, or remove it")


def _of_all_ranks(own: Tensor) -> Tensor:
    """Return every rank's values on the CPU, [ranks, ...]; collective."""
    if not dist.is_initialized():
        return own[None].cpu()
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return torch.stack(found).cpu()


def _listed(names: Sequence[str], chosen: Tensor) -> str:
    wrong = [name for name, is_chosen in zip(names, chosen.tolist(), strict=True) if is_chosen]
    more = f" and {len(wrong) - _MAX_NAMED} more" if len(wrong) > _MAX_NAMED else ""
    return f"{', '.join(wrong[:_MAX_NAMED])}{more}"


def odd_rank(rows: Sequence[tuple[int, ...]]) -> int | None:
    """Return the rank whose row differs from the majority's; None if there is no majority."""
    usual, count = Counter(rows).most_common(1)[0]
    if 2 * count <= len(rows):
        return None
    return next(rank for rank, row in enumerate(rows) if row != usual)
