"""Ray's NCCL hang detector: enabled where NCCL is used; its findings are stored with the records of the hang."""

from __future__ import annotations

from ftexp.cluster import ray_private
from ftexp.cluster.resources import Workers
from ftexp.config.schema import Config
from ftexp.rundir.names import HANGS
from ftexp.storage.directory import Storage


def uses_nccl(config: Config, workers: Workers) -> bool:
    """Return whether ranks communicate by NCCL."""
    return workers.use_gpu if config.scaling.backend is None else "nccl" in config.scaling.backend


def detect_hangs(config: Config) -> None:
    """Enable the detector, with a limit that reports a hang before the watchdog ends the process."""
    limit_s = config.failure.hang_timeout_s
    ray_private.detect_nccl_hangs(limit_s / 2 if limit_s is not None else None)


def take_findings(run_dir: Storage, attempt: int) -> list[str]:
    """Move the detector's findings in an attempt to hangs/; return the files' names in the run directory."""
    found, hangs, moved = run_dir.child(ray_private.NCCL_FINDINGS), run_dir.child(HANGS), list[str]()
    if not found.exists():
        return moved
    for kind in found.list_directories():
        for name in found.child(kind).list_files():
            moved.append(f"a{attempt}.{kind}.{name}")
            hangs.write_bytes(moved[-1], found.child(kind).read_bytes(name))
    found.delete()
    return [f"{HANGS}/{name}" for name in moved]
