"""Exceptions that ftexp raises for its users.

FtexpError
├── ConfigError      the command or a config value is wrong; exit code 2
│   └── UnknownNameError   a registry has no entry of that name
├── DataError        a data source is missing, empty, or holds unreadable samples
├── StorageError     the run directory can't be read or written
│   └── RunInUseError      another process is running in it
├── CheckpointError  a checkpoint is corrupt, or does not fit the run
│   └── StateError   a saved state and the configured states disagree
├── NonFiniteError   a loss or gradient is NaN or infinite
├── CorruptionError  ranks that must be bitwise identical differ
├── ExportError      an exported model differs from the original
├── RunFailedError   training stopped and the failure policy allows no further restart
│   └── RayLostError       Ray's own processes died, and no new Ray is started
└── SweepFailedError   trials of a sweep failed; the others are done

Every message names the key or file, its value, and what to do about it.
"""

from __future__ import annotations


class FtexpError(Exception):
    """Base of every error that ftexp raises on purpose."""

    exit_code = 1


class ConfigError(FtexpError):
    """The command or a config value is wrong. Raised before training starts."""

    exit_code = 2


class UnknownNameError(ConfigError):
    """A name was looked up in a registry that has no such entry."""


class DataError(FtexpError):
    """A data source is missing, empty, or holds samples that can't be read."""


class StorageError(FtexpError):
    """The run directory can't be read or written."""


class RunInUseError(StorageError):
    """Another living process has the run directory."""


class CheckpointError(FtexpError):
    """A checkpoint is corrupt, or does not fit the run that loads it."""


class StateError(CheckpointError):
    """A saved state and the states named in `checkpoint.extra_state` disagree."""


class NonFiniteError(FtexpError):
    """A loss or a gradient is NaN or infinite."""


class CorruptionError(FtexpError):
    """Ranks that must be bitwise identical differ: a processor or its memory has failed.

    rank: the one that differs; None if that can't be known.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank

    def __reduce__(self) -> tuple[type[CorruptionError], tuple[str, int | None]]:
        return type(self), (str(self), self.rank)


class ExportError(FtexpError):
    """An exported model's outputs differ from the original's."""


class RunFailedError(FtexpError):
    """Training stopped, and the failure policy allows no further restart."""


class RayLostError(RunFailedError):
    """One of Ray's own processes died: its raylet or its GCS. The checkpoints are still there.

    begins_again: whether the run resumes with a new Ray.
    """

    begins_again = False


class SweepFailedError(FtexpError):
    """Trials of a sweep failed; the others finished."""
