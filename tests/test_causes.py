"""Causes: the failure that began it, told from those that followed. The errors are those of real failures."""

import pytest
import ray.exceptions
import torch
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from ftexp.errors import StateError
from ftexp.failure.causes import BUG, CRASH, OUT_OF_MEMORY, find_cause

DIED = WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.ActorDiedError())
# gloo, when the other rank was killed in the middle of an all-reduce
ECHO = RuntimeError(
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:34444: Connection "
    "reset by peer. This is typically caused by a remote worker hanging or bugs in the application. Check the logs of "
    "the remote worker before reporting an error. GLHF! 🏖️"
)
BUG_ERROR = RuntimeError("mat1 and mat2 shapes cannot be multiplied (32x128 and 64x10)")


@pytest.mark.parametrize(
    ("errors", "kind", "rank"),
    [
        ({0: DIED}, CRASH, 0),
        ({0: ECHO, 1: DIED}, CRASH, 1),
        ({0: BUG_ERROR}, BUG, 0),
        ({0: ECHO, 1: BUG_ERROR}, BUG, 1),
        ({0: BUG_ERROR, 1: BUG_ERROR}, BUG, 0),
        ({2: ray.exceptions.OutOfMemoryError("killed by the memory monitor"), 1: ECHO}, OUT_OF_MEMORY, 2),
        ({0: torch.OutOfMemoryError("CUDA out of memory"), 1: DIED}, OUT_OF_MEMORY, 0),
        ({0: MemoryError()}, OUT_OF_MEMORY, 0),
        ({0: ECHO}, CRASH, None),  # the dead rank itself wasn't polled yet
        ({}, CRASH, None),
    ],
)
def test_the_cause_is_that_of_the_rank_that_began_it(errors, kind, rank):
    cause = find_cause(errors)
    assert (cause.kind, cause.rank) == (kind, rank)


def test_the_error_is_one_line_that_says_what_happened():
    assert find_cause({0: BUG_ERROR}).error == f"RuntimeError: {BUG_ERROR}"
    assert "process died" in find_cause({0: DIED}).error
    assert find_cause({0: StateError("the checkpoint holds 'ema'")}).error == "the checkpoint holds 'ema'"
    assert find_cause({0: KeyError()}).error == "KeyError"
