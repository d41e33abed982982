"""Silent corruption: every flipped bit is found, and named."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ftexp.worker.corruption
import ftexp.worker.step
from ftexp.chaos.strike import flip_bit
from ftexp.config.schema import Config
from ftexp.errors import ConfigError, CorruptionError
from ftexp.failure.causes import CORRUPTION, find_cause
from ftexp.job.group import ProcessGroup
from ftexp.wire.messages import Happened
from ftexp.worker.corruption import ReplicaCheck, StepRepeat, checksums, odd_rank
from ftexp.worker.step import train_step
from tests.support.jobs import make_job


class Ranks:
    """The weights of several ranks in one process; all_gather returns the checksums of all of them."""

    def __init__(self, monkeypatch, world_size, every=5, dtype=torch.float32):
        torch.manual_seed(0)
        first = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
        self.models = [first, *(pickle.loads(pickle.dumps(first)) for _ in range(world_size - 1))]
        self.sent, config = [], Config()
        config.failure.check_replicas_every_steps = every
        self.job = SimpleNamespace(
            config=config, group=ProcessGroup(0, world_size, torch.device("cpu")), learner=SimpleNamespace(model=first),
            progress=SimpleNamespace(step=0), channel=SimpleNamespace(send=self.sent.append),
        )  # fmt: skip
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: world_size)
        monkeypatch.setattr("torch.distributed.all_gather", self._gather)

    def _gather(self, found, own):
        for place, model in zip(found, self.models, strict=True):
            place.copy_(checksums(model.parameters()))
        assert torch.equal(found[0], own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_any_bit_of_any_value_changes_the_checksum_of_its_tensor_alone(dtype):
    tensors = [torch.arange(6, dtype=dtype).view(2, 3).T, torch.zeros((), dtype=dtype)]
    before = checksums(tensors)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensors[0].element_size()]
    for bit in range(8 * tensors[0].element_size()):
        flipped = tensors[0].contiguous().clone()
        word = 1 << bit if bit < 8 * flipped.element_size() - 1 else -(1 << bit)
        flipped.view(bits)[1, 1] ^= word
        assert (checksums([flipped, tensors[1]]) == before).tolist() == [False, True]


def test_replicas_are_compared_at_their_steps_and_before_saves(monkeypatch):
    ranks = Ranks(monkeypatch, 3)
    check = ReplicaCheck(ranks.job)
    flip_bit(next(ranks.models[1].parameters()))
    ranks.job.progress.step = 4
    check.check(saves=False)
    with pytest.raises(CorruptionError) as raised:
        check.check(saves=True)
    assert str(raised.value) == (
        "silent corruption: the weights after step 4: rank 1 differs from the others in 0.weight"
    )
    ranks.job.progress.step = 5
    with pytest.raises(CorruptionError):
        check.check(saves=False)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_rank_that_differs_is_named_and_so_are_its_tensors(monkeypatch, rank):
    ranks = Ranks(monkeypatch, 3)
    for parameter in ranks.models[rank].parameters():
        flip_bit(parameter)
    with pytest.raises(
        CorruptionError, match=f"rank {rank} differs.* in 0.weight, 0.bias, 1.weight, 1.bias$"
    ) as raised:
        ReplicaCheck(ranks.job).check(saves=True)
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.rank) == (str(raised.value), rank)
    cause = find_cause({0: again, 1: again})
    assert (cause.kind, cause.rank) == (CORRUPTION, rank)


def test_of_two_ranks_nobody_knows_which_is_right(monkeypatch):
    ranks = Ranks(monkeypatch, 2)
    flip_bit(ranks.models[1][1].bias)
    with pytest.raises(CorruptionError, match=r"ranks differ, none is in the minority, in 1\.bias") as raised:
        ReplicaCheck(ranks.job).check(saves=True)
    assert raised.value.rank is None
    assert find_cause({0: raised.value}).rank is None


def test_the_cost_is_told_once(monkeypatch):
    ranks, now = Ranks(monkeypatch, 2), iter([0.0, 9.0, 10.0, 20.0, 20.5, 110.0, 120.0, 121.0, 122.0])
    monkeypatch.setattr(ftexp.worker.corruption.time, "perf_counter", lambda: next(now))
    check = ReplicaCheck(ranks.job)
    # checks last from 0 to 9, 20 to 20.5 and 120 to 121; the second is noted at 110, 100 s after the first
    for _ in range(3):
        check.check(saves=True)
    ((event),) = [message.event for message in ranks.sent if isinstance(message, Happened)]
    assert (event.check, event.every_steps, event.seconds, event.share) == ("replicas", 5, 0.5, 0.005)


def test_nothing_is_compared_unless_asked_for_and_one_rank_has_no_replica(monkeypatch):
    ranks = Ranks(monkeypatch, 2, every=None)
    flip_bit(next(ranks.models[1].parameters()))
    ReplicaCheck(ranks.job).check(saves=True)
    with pytest.raises(ConfigError, match="check_replicas_every_steps=5 compares ranks, and there is one"):
        ReplicaCheck(Ranks(monkeypatch, 1).job)


def test_the_odd_one_is_the_one_unlike_a_majority():
    assert odd_rank([(1,), (2,), (1,)]) == 1
    assert odd_rank([(1,), (2,)]) is None
    assert odd_rank([(1,), (2,), (3,)]) is None


def trained(every):
    """Return the weights and sums after four steps of a small job, and the job."""
    job = make_job()
    job.config.failure.repeat_step_every = every
    repeat = StepRepeat(job)
    for batch in job.data.feed.from_position(0):
        train_step(job, batch, repeat)
        job.progress.advance(batch.end, len(job.data.rows["train"]))
        if job.progress.step == 4:
            break
    return [*job.learner.model.state_dict().values(), job.progress.train.taken()], job


def test_a_repeated_step_changes_nothing():
    wanted, _ = trained(None)
    for every in (1, 2):
        found, _ = trained(every)
        assert all(torch.equal(one, two) for one, two in zip(wanted, found, strict=True))


def test_a_step_that_gives_another_result_when_repeated_is_an_error(monkeypatch):
    add = ftexp.worker.step._forward_backward
    calls = []

    def wrong(job, micro):
        losses = add(job, micro)
        calls.append(job.progress.step)
        if calls.count(3) == 2:  # the second computation of the fourth step
            flip_bit(next(each.grad for each in job.learner.model.parameters() if each.grad is not None))
        return losses

    monkeypatch.setattr(ftexp.worker.step, "_forward_backward", wrong)
    with pytest.raises(CorruptionError, match=r"step 4, computed twice: rank 0 has .* in gradient of") as raised:
        trained(2)
    assert raised.value.rank == 0
    assert calls == [0, 1, 1, 2, 3, 3]
