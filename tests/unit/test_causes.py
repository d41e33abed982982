"""Causes: the original failure is distinguished from its consequences. The errors are from real failures."""

import datetime
import errno
import io
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow.fs
import pyarrow.parquet
import pytest
import ray.exceptions
import torch
import torch.nn.functional as F
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from torch import nn

from ftexp.errors import CheckpointError, ConfigError, DataError, NonFiniteError, StateError, StorageError
from ftexp.failure.causes import (
    BUG,
    CONFIG,
    CRASH,
    HANG,
    NON_FINITE,
    OUT_OF_MEMORY,
    PREEMPTION,
    STORAGE,
    Cause,
    Ending,
    as_death,
    as_hang,
    find_cause,
)
from ftexp.failure.phases import AGREEMENT, EVALUATION, STEP
from ftexp.failure.reporter import FailureReporter, StopRun
from ftexp.wire.hub import Hub, HubAddress
from ftexp.wire.messages import Begin, GroupFailed, Hung, Retry, Stop

DIED = WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.ActorDiedError())
PREEMPTED = WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.RayActorError(preempted=True))
SILENT = WorkerHealthCheckTimeoutError("A worker health check has been hanging for 60.2 seconds.")
# gloo's error when the other rank is killed during an all-reduce
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
        ({0: ECHO, 1: RuntimeError("x")}, CRASH, 1),
        ({0: DIED, 1: PREEMPTED}, PREEMPTION, 1),
        ({0: BUG_ERROR, 1: NonFiniteError("3 losses were NaN")}, NON_FINITE, 1),
        ({0: ECHO}, CRASH, None),  # the dead rank itself had not been polled yet
        ({}, CRASH, None),
    ],
)
def test_the_cause_is_that_of_the_rank_that_began_it(errors, kind, rank):
    cause = find_cause(errors)
    assert (cause.kind, cause.rank) == (kind, rank)


def call(model, shape, dtype=torch.float32):
    return lambda: model(torch.ones(shape, dtype=dtype))


def load(state):
    return lambda: nn.Linear(2, 2).load_state_dict(state)


def write_to_a_full_disk():
    with pyarrow.fs.LocalFileSystem().open_output_stream("/dev/full") as stream:
        stream.write(b"x")


# errors in a user's model or data, and errors of their surroundings
REAL = {
    "shapes of a product": (lambda: torch.ones(2, 3) @ torch.ones(4, 5), BUG),
    "shapes of a sum": (lambda: torch.ones(3) + torch.ones(4), BUG),
    "shape of a view": (lambda: torch.ones(3).view(2, 2), BUG),
    "channels": (call(nn.Conv2d(3, 4, 3), (1, 1, 8, 8)), BUG),
    "dtype of a convolution": (call(nn.Conv2d(1, 1, 1), (1, 1, 2, 2), torch.double), BUG),
    "missing attribute": (lambda: nn.Linear(1, 1).missing, BUG),
    "loss of whole numbers": (lambda: F.cross_entropy(torch.ones(2, 3).long(), torch.ones(2).long()), BUG),
    "label that is no class": (lambda: F.cross_entropy(torch.ones(2, 3), torch.full((2,), 7)), BUG),
    "batch of labels": (lambda: F.cross_entropy(torch.ones(2, 3), torch.zeros(3).long()), BUG),
    "weights of another size": (load(nn.Linear(3, 2).state_dict()), BUG),
    "index beyond an embedding": (lambda: nn.Embedding(2, 2)(torch.tensor([5])), BUG),
    "nothing to differentiate": (lambda: torch.ones(2).sum().backward(), BUG),
    "missing key": (lambda: {}["x"], BUG),
    "wrong number of arguments": (lambda: nn.Linear(2, 2)(1, 2), BUG),
    "torn Parquet": (lambda: pyarrow.parquet.read_table(io.BytesIO(b"not one at all")), BUG),
    "numpy's memory": (lambda: np.ones(2**50), OUT_OF_MEMORY),
    "full disk": (write_to_a_full_disk, STORAGE),
    "missing file": (lambda: pyarrow.fs.LocalFileSystem().open_input_file("/missing/x"), CRASH),
}


def error_of(act):
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError("it did not fail")


@pytest.mark.parametrize("what", REAL)
def test_real_errors_have_their_kind(what):
    act, kind = REAL[what]
    cause = find_cause({1: error_of(act)})
    assert (cause.kind, cause.rank, cause.ending) == (kind, 1, Ending.RAISED)
    assert "\n" not in cause.error


@pytest.mark.parametrize(
    "act",
    [
        lambda: F.cross_entropy(torch.ones(2, 3), torch.ones(2)),  # expected target dtype to be Long ...
        lambda: nn.Linear(2, 2)(torch.ones(2, 2).long()),  # mat1 and mat2 must have the same dtype ...
        lambda: nn.Conv2d(3, 4, 3)(torch.ones(8, 8)),  # Expected 3D (unbatched) or 4D ...
        load({}),  # Missing key(s) in state_dict
        lambda: nn.Linear(2, 2)(torch.ones(2, 2, device="meta")),  # ... is not on the expected device
        lambda: torch.cat([torch.ones(2, 3), torch.ones(2, 4)]),  # Sizes of tensors must match except in ...
    ],
    ids=["dtype of labels", "dtype of a product", "dimensions", "missing weights", "device", "sizes of parts"],
)
def test_more_real_errors_of_torchs_are_bugs(act):
    assert find_cause({0: error_of(act)}).kind == BUG


def test_torchs_own_lack_of_memory_is_one():
    assert find_cause({0: error_of(lambda: torch.empty(2**60, dtype=torch.uint8))}).kind == OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("error", "kind", "ending"),
    [
        (RuntimeError("x"), CRASH, Ending.RAISED),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), CRASH, Ending.RAISED),
        (OSError(errno.ENOSPC, "No space left on device"), STORAGE, Ending.RAISED),
        (OSError(errno.EIO, "Input/output error"), STORAGE, Ending.RAISED),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), CRASH, Ending.RAISED),
        (StorageError("2 saves in a row failed"), STORAGE, Ending.GAVE_UP),
        (ConfigError("x"), CONFIG, Ending.GAVE_UP),
        (DataError("x"), BUG, Ending.GAVE_UP),
        (StateError("x"), BUG, Ending.GAVE_UP),
        (CheckpointError("torn"), CRASH, Ending.RAISED),
        (NonFiniteError("3 losses were NaN or infinite by step 5"), NON_FINITE, Ending.RAISED),
        (ray.exceptions.ActorDiedError(), CRASH, Ending.DIED),
        (ray.exceptions.WorkerCrashedError(), CRASH, Ending.DIED),
        (ray.exceptions.RayActorError(preempted=True), PREEMPTION, Ending.DIED),
        (PREEMPTED, PREEMPTION, Ending.DIED),
        (DIED, CRASH, Ending.DIED),
        (SILENT, CRASH, Ending.DIED),
        (ray.exceptions.OutOfMemoryError("killed"), OUT_OF_MEMORY, Ending.RAISED),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_known_of_an_error_is_told(error, kind, ending):
    cause = find_cause({1: error})
    assert (cause.kind, cause.rank, cause.ending) == (kind, 1, ending)


def test_a_worker_that_does_not_answer_is_the_cause_of_the_others_waiting():
    cause = find_cause({0: ECHO, 1: SILENT})
    assert (cause.rank, cause.error) == (
        1,
        "the process did not answer Ray in time: it is stopped, or its machine or network is gone",
    )


# rank 1 exits; rank 0 prints the resulting error of its collective
RANK = """
    import datetime, os, sys
    import torch, torch.distributed as dist
    rank, path, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=2)
    dist.all_reduce(torch.ones(1))
    group = dist.new_group(timeout=datetime.timedelta(seconds=3 if how == "hangs" else 60))
    if rank == 1:
        if how == "dies":
            os.kill(os.getpid(), 9)
        sys.stdin.read()
        os._exit(0)
    try:
        while True:
            dist.all_reduce(torch.ones(100000), group=group)
    except Exception as error:
        sys.stdout.write(f"{type(error).__name__}|{error}")
        sys.stdout.flush()
        os._exit(0)
"""


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_what_gloo_says_of_another_rank_is_not_taken_for_its_cause(tmp_path, how):
    command = [sys.executable, "-c", textwrap.dedent(RANK)]
    other = subprocess.Popen([*command, "1", str(tmp_path / "store"), how], stdin=subprocess.PIPE)
    try:
        told = subprocess.run(
            [*command, "0", str(tmp_path / "store"), how], capture_output=True, text=True, check=True, timeout=120
        )
    finally:
        other.kill()
        other.communicate()
    name, _, text = told.stdout.partition("|")
    assert issubclass(getattr(torch.distributed, name, RuntimeError), RuntimeError), told.stdout
    alone, with_other = find_cause({0: RuntimeError(text)}), find_cause({0: RuntimeError(text), 1: BUG_ERROR})
    assert (alone.kind, alone.rank, alone.ending) == (CRASH, None, Ending.DIED), text
    assert alone.error == "the connection to another worker was lost"
    assert (with_other.kind, with_other.rank) == (BUG, 1)


# rank 0's store, which every rank uses to create groups
STORE = """
    import sys
    from torch.distributed import TCPStore
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print(store.port, flush=True)
    sys.stdin.read()
"""


def test_what_the_store_says_of_a_dead_or_silent_rank_is_not_taken_for_its_cause():
    command = [sys.executable, "-c", textwrap.dedent(STORE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as host:
        store = torch.distributed.TCPStore("127.0.0.1", int(host.stdout.readline()), wait_for_workers=False)
        with pytest.raises(torch.distributed.DistStoreError) as silent:
            store.wait(["never set"], datetime.timedelta(seconds=1))
        host.kill()
        host.wait()
        with pytest.raises(torch.distributed.DistNetworkError) as dead:
            store.get("x")
    lost = Cause(CRASH, None, "the connection to another worker was lost", Ending.DIED)
    assert find_cause({0: silent.value}) == find_cause({0: dead.value}) == lost


def hung(doing, seconds, rank=0):
    return Hung(rank, doing, seconds, "x.txt")


IN_STEP, BETWEEN = hung(STEP, 3.2), hung("between steps", 4.0)


@pytest.mark.parametrize(
    ("found", "rank"),
    [
        ({0: IN_STEP, 1: BETWEEN}, 1),  # rank 0 waits for rank 1 in an all-reduce
        ({1: BETWEEN, 0: IN_STEP}, 1),
        ({2: IN_STEP, 1: IN_STEP}, 1),
        ({3: hung(EVALUATION, 9.0), 2: IN_STEP}, 3),
        ({0: hung(AGREEMENT, 5.0), 1: BETWEEN}, 1),
        ({0: BETWEEN}, 0),
    ],
)
def test_of_ranks_that_stood_still_the_one_that_does_not_wait_for_another_is_blamed(found, rank):
    cause = as_hang(find_cause({0: DIED, 1: ECHO}), found)
    error = f"no progress for {found[rank].seconds:.0f} s ({found[rank].doing}); stack traces: x.txt"
    assert cause == Cause(HANG, rank, error, Ending.DIED)


def test_nobody_is_blamed_for_standing_still_who_did_not_or_where_something_was_raised():
    died, raised = find_cause({0: DIED}), find_cause({0: ECHO, 1: BUG_ERROR})
    assert as_hang(died, {}) == died
    assert as_hang(raised, {0: IN_STEP}) == raised  # rank 0 waited for rank 1, which had raised an error
    lost = find_cause({0: ECHO})  # the hung rank has killed itself, and had not been polled yet
    assert (as_hang(lost, {1: BETWEEN}).kind, as_hang(lost, {1: BETWEEN}).rank) == (HANG, 1)


def test_a_process_that_is_known_to_have_died_is_told_instead_of_what_followed():
    lost = find_cause({0: ECHO})
    told = as_death(lost, 1)
    assert told == find_cause({1: DIED})
    assert as_death(lost, None) == lost
    assert as_hang(told, {1: BETWEEN}).kind == HANG
    for other in (find_cause({0: DIED}), find_cause({0: BUG_ERROR})):
        assert as_death(other, 1) == other


# messages of CUDA and NCCL from reports of users; no GPU was available
CUDA = "CUDA kernel errors might be asynchronously reported.\nCompile with `TORCH_USE_CUDA_DSA` to enable assertions."
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3356, {}, NCCL version 2.27.5\n{}\nLast error:\n{}"


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        (f"CUDA error: device-side assert triggered\n{CUDA}", CRASH, "CUDA error: device-side assert triggered"),
        (f"CUDA error: out of memory\n{CUDA}", OUT_OF_MEMORY, "CUDA error: out of memory"),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            OUT_OF_MEMORY,
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        ),
        (
            NCCL.format("unhandled cuda error", "ncclUnhandledCudaError: ...", "Cuda failure 2 'out of memory'"),
            OUT_OF_MEMORY,
            "Cuda failure 2 'out of memory'",
        ),
        (
            NCCL.format("invalid usage", "ncclInvalidUsage: ...", "Duplicate GPU detected : rank 0 and rank 1"),
            CRASH,
            "Duplicate GPU detected : rank 0 and rank 1",
        ),
    ],
)
def test_what_a_gpu_cannot_do_is_told_and_is_no_echo_of_another_rank(text, kind, told):
    cause = find_cause({0: RuntimeError(text), 1: RuntimeError(text)})
    assert (cause.kind, cause.rank, cause.error, cause.ending) == (kind, 0, f"RuntimeError: {told}", Ending.RAISED)


def test_nccl_of_a_rank_that_has_gone_is_an_echo():
    remote = NCCL.format("remote process exited or there was a network error", "ncclRemoteError: ...", "socket closed")
    assert find_cause({0: RuntimeError(remote), 1: DIED}).rank == 1


def test_the_error_is_one_line_that_says_what_happened():
    assert find_cause({0: BUG_ERROR}).error == f"RuntimeError: {BUG_ERROR}"
    assert "process died" in find_cause({0: DIED}).error
    assert find_cause({0: StateError("the checkpoint holds 'ema'")}).error == "the checkpoint holds 'ema'"
    assert find_cause({0: KeyError()}).error == "KeyError"


def reported(answer, monkeypatch):
    """Report one failure to a driver that returns `answer`; return (messages to the driver, seconds slept)."""
    told, slept = [], []
    monkeypatch.setattr("ftexp.failure.reporter.time.sleep", slept.append)

    def handle(message):
        told.append(message)
        return answer if isinstance(message, GroupFailed) else None

    hub = Hub("127.0.0.1", handle)
    try:
        FailureReporter(hub.address).after_exception(None, {0: ECHO, 1: BUG_ERROR})
    finally:
        hub.close()
    return told, slept


def test_the_controller_tells_the_driver_and_waits_as_long_as_it_says(monkeypatch):
    told, slept = reported(Retry(2.5), monkeypatch)
    assert told[0] == GroupFailed(*vars(find_cause({1: BUG_ERROR})).values())
    assert slept == [2.5]


def test_the_controller_ends_the_run_if_the_driver_says_so(monkeypatch):
    with pytest.raises(StopRun, match="stopping"):
        reported(Stop("rank 1 failed: stopping"), monkeypatch)


@pytest.mark.parametrize("answer", [None, Begin(3)])
def test_the_controller_ends_the_run_if_the_driver_decides_nothing(monkeypatch, answer):
    with pytest.raises(StopRun, match="no decision from the driver"):
        reported(answer, monkeypatch)


def test_a_controller_without_a_driver_ends_the_run_too():
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        address = HubAddress("127.0.0.1", taken.getsockname()[1], "token")
        with pytest.raises(StopRun, match=r"no decision from the driver: .+"):
            FailureReporter(address).after_exception(None, {0: DIED})
