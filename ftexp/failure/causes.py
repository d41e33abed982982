"""The cause of a worker group's failure, from the exceptions that Ray passes."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from enum import StrEnum, auto

import ray.exceptions

from ftexp.cluster import ray_private
from ftexp.config.schema import CAUSES, CORRUPTION
from ftexp.errors import ConfigError, CorruptionError, DataError, FtexpError, NonFiniteError, StateError, StorageError
from ftexp.failure.phases import WAITED_IN
from ftexp.wire.messages import Hung

BUG, OUT_OF_MEMORY, CRASH, HANG, PREEMPTION, NON_FINITE, STORAGE, STARTUP, RAY, _ = CAUSES
CONFIG = "config"  # a mistake in the config that only a worker could find; it ends the run, so it has no budget

# kinds in order of precedence: what starts a failure, before what follows from it
_FIRST = (PREEMPTION, OUT_OF_MEMORY, HANG, CRASH, CORRUPTION, NON_FINITE, STORAGE, STARTUP, CONFIG, BUG)
_FINAL = (ConfigError, DataError, StateError, StorageError)  # another attempt would end the same way
_BUGS = (
    *(TypeError, AttributeError, NameError, ImportError, LookupError, AssertionError, ArithmeticError),
    *(NotImplementedError, SyntaxError, ValueError),
)
# messages of torch's RuntimeErrors about shapes, types or devices that don't match
_BUG_WORDS = re.compile(
    r"shapes? cannot be multiplied|size mismatch|must match the size|shape '.*' is invalid|"
    r"[Ss]izes of tensors must match|expected scalar type|expected target dtype|have the same dtype|should be the same|"
    r"Expected .*-dimensional|Expected \dD |to have \d+ channels|Expected all tensors to be on the same device|"
    r"is not on the expected device|"
    r"(?:Missing|Unexpected) key\(s\) in state_dict|out of bounds|does not require grad|has no attribute|"
    r"is not implemented for"
)
# messages of gloo, NCCL and the store when another rank is gone; not NCCL's errors about what this machine can't do
_BROKEN_WORDS = re.compile(
    r"Connection reset|Connection closed|Connection was likely closed|Connection refused|Broken pipe|[gG]loo|"
    r"process group|Socket Timeout|[Tt]imed out waiting|wait timeout after|ncclRemoteError|remote process exit|"
    r"communicator was aborted|Watchdog caught collective"
)
# messages of out-of-memory errors that aren't torch.OutOfMemoryError: torch on the CPU, CUDA, cuBLAS, cuDNN, NCCL
_NO_MEMORY_WORDS = re.compile(
    r"can't allocate memory|CUDA error: out of memory|Cuda failure 2\b|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED"
)
_STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE)


class Ending(StrEnum):
    """How the process that failed first ended."""

    RAISED = auto()
    GAVE_UP = auto()  # it raised one of _FINAL: another attempt would end the same way
    DIED = auto()  # it was gone, so the error doesn't show what it did


@dataclass(frozen=True)
class Cause:
    """Cause of a worker group's failure: its kind, the rank that failed first, and that rank's error in one line."""

    kind: str
    rank: int | None
    error: str
    ending: Ending = Ending.RAISED


def find_cause(worker_exceptions: dict[int, Exception]) -> Cause:
    """Return the first failure, not those that followed: a dead rank makes the others' collectives fail."""
    errors = {rank: ray_private.unwrap(error) for rank, error in worker_exceptions.items()}
    if not errors:
        return Cause(CRASH, None, "the worker group was lost", Ending.DIED)
    ranked = sorted(errors.items(), key=lambda item: (is_echo(item[1]), _FIRST.index(_kind(item[1])), item[0]))
    rank, error = ranked[0]
    if is_echo(error):
        return Cause(CRASH, None, "the connection to another worker was lost", Ending.DIED)
    # every rank raises a CorruptionError, which names the faulty rank if it is known
    began = error.rank if isinstance(error, CorruptionError) else rank
    return Cause(_kind(error), began, _in_a_line(error), _ending(error))


def as_death(cause: Cause, died_rank: int | None) -> Cause:
    """Return the cause with the rank whose process ended first, if Ray passed only the consequences of its death."""
    if cause.rank is not None or died_rank is None or cause.ending is not Ending.DIED:
        return cause
    return Cause(CRASH, died_rank, _DIED, Ending.DIED)


def as_hang(cause: Cause, hung: dict[int, Hung]) -> Cause:
    """Return the cause, given the ranks that killed themselves because they made no progress: `hung`, by rank."""
    if not hung or cause.ending is not Ending.DIED:
        return cause
    # ranks that wait for a stuck one make no progress either
    rank = min(hung, key=lambda rank: (hung[rank].doing in WAITED_IN, rank))
    found = hung[rank]
    error = f"no progress for {found.seconds:.0f} s ({found.doing}); stack traces: {found.file}"
    return Cause(HANG, rank, error, Ending.DIED)


def as_preemption(cause: Cause, leaving: list[int]) -> Cause:
    """Return the cause, given the ranks `leaving`, of whose machines a preemption was announced."""
    if not leaving or cause.ending is not Ending.DIED:
        return cause
    return Cause(PREEMPTION, leaving[0], "its machine was taken away, as announced", Ending.DIED)


_DEAD = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError)
_DIED = "the process died (killed, or crashed below Python)"
_NO_ANSWER = "the process did not answer Ray in time: it is stopped, or its machine or network is gone"


def _kind(error: Exception) -> str:
    if isinstance(error, (ray.exceptions.OutOfMemoryError, MemoryError)) or type(error).__name__ == "OutOfMemoryError":
        return OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and _NO_MEMORY_WORDS.search(str(error)):
        return OUT_OF_MEMORY
    if isinstance(error, _DEAD):
        return PREEMPTION if getattr(error, "preempted", False) else CRASH
    if isinstance(error, NonFiniteError):
        return NON_FINITE
    if isinstance(error, CorruptionError):
        return CORRUPTION
    if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS):
        return STORAGE
    if isinstance(error, ConfigError):
        return CONFIG
    if isinstance(error, FtexpError):
        return BUG if isinstance(error, _FINAL) else CRASH
    if isinstance(error, _BUGS) or (isinstance(error, RuntimeError) and _BUG_WORDS.search(str(error))):
        return BUG
    return CRASH


def _ending(error: Exception) -> Ending:
    if isinstance(error, _DEAD) or ray_private.is_unanswered(error):
        return Ending.DIED
    return Ending.GAVE_UP if isinstance(error, _FINAL) else Ending.RAISED


def is_echo(error: Exception) -> bool:
    """Return whether this looks like the error of a collective after another rank's death."""
    return isinstance(error, RuntimeError) and _BROKEN_WORDS.search(str(error)) is not None


def _in_a_line(error: Exception) -> str:
    if isinstance(error, _DEAD):
        return _DIED
    if ray_private.is_unanswered(error):
        return _NO_ANSWER
    if isinstance(error, FtexpError):
        return str(error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    # the last line says most, except in CUDA errors, which end with advice
    telling = next((line for line in lines if "CUDA error" in line), lines[-1] if lines else "")
    return f"{type(error).__name__}: {telling.strip()}" if lines else type(error).__name__
