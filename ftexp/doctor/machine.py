"""Checks of this machine: versions, GPUs, shared memory, open files, Ray's directory. Only GPUs need torch."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from ftexp.config.machine import num_local_gpus, ray_problem
from ftexp.config.schema import Config
from ftexp.doctor.finding import Finding, fails, not_here, ok, warning

_SHARED_MEMORY = Path("/dev/shm")
_RAYS_SHARE = 0.3  # share of memory that Ray's object store uses by default
_MIN_OPEN_FILES = 1024  # Ray's processes on a machine with a few cores use some hundred
_GOOD_OPEN_FILES = 8192
_BUSY_GPU_SHARE = 0.1  # share of a GPU's memory in use from which it counts as busy


def versions() -> Finding:
    """Compare the installed packages with ftexp's requirements."""
    from packaging.requirements import Requirement

    wrong = []
    for text in requires("ftexp") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    if wrong:
        return fails("versions", "; ".join(wrong), "uv sync, or pip install --upgrade ftexp")
    shown = ", ".join(f"{name} {version(name)}" for name in ("ftexp", "torch", "ray", "timm"))
    return ok("versions", shown)


def gpus(config: Config) -> Finding:
    """Check whether torch can use the driver's GPUs, and whether other processes use them."""
    check, count = "GPUs and driver", num_local_gpus()
    if count == 0:
        wanted = config.scaling.use_gpu is True and config.scaling.address is None
        if wanted:
            return fails(check, "no NVIDIA GPU is visible here", "scaling.use_gpu=false, or CUDA_VISIBLE_DEVICES")
        return not_here(check, "no NVIDIA GPU on this machine: nothing to check")
    import torch

    driver, memory = _driver()
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        found = f"{count} GPUs, driver {driver}, but torch {torch.__version__}, built for {built}, can't use them"
        return fails(check, found, "install a newer driver, or a torch for an older CUDA")
    found = f"{count} × {torch.cuda.get_device_name(0)}, driver {driver}, torch's CUDA {torch.version.cuda}"
    if busy := [str(number) for number, share in enumerate(memory) if share > _BUSY_GPU_SHARE]:
        return warning(check, f"{found}; memory of GPU {', '.join(busy)} is in use", "see nvidia-smi: who uses it?")
    return ok(check, found)


def _driver() -> tuple[str, list[float]]:
    """Return the driver's version, and the share of memory in use of each GPU."""
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.used,memory.total", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    rows = [line.split(", ") for line in listed.stdout.splitlines() if line.count(",") == 2]
    return (rows[0][0] if rows else "unknown"), [float(used) / float(total) for _, used, total in rows]


def shared_memory(directory: Path = _SHARED_MEMORY) -> Finding:
    """Check whether Ray's object store, which holds cached data, fits into shared memory."""
    check = "shared memory"
    if not directory.is_dir():
        return not_here(check, f"this system has no {directory}")
    free = shutil.disk_usage(directory).free
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{free / 1e9:.1f} GB free in {directory}, {memory / 1e9:.1f} GB of memory"
    if free < _RAYS_SHARE * memory:
        fix = f"docker run --shm-size={_RAYS_SHARE * memory / 1e9:.0f}g, Kubernetes: an emptyDir of medium Memory"
        return warning(check, f"{found}: Ray will keep objects on disk", fix)
    return ok(check, found)


def open_files(limits: tuple[int, int] | None = None) -> Finding:
    """Check how many files a process may have open."""
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    found = f"{_limit(soft)}, which may be raised to {_limit(hard)}"
    if soft != endless and soft < _MIN_OPEN_FILES:
        return fails("open files", found, "ulimit -n 65536 before the command, or LimitNOFILE= of the service")
    if soft != endless and soft < _GOOD_OPEN_FILES:
        return warning("open files", found, "ulimit -n 65536: a node of many cores or workers needs more")
    return ok("open files", found)


def _limit(number: int) -> str:
    return "no limit" if number == resource.RLIM_INFINITY else f"{number:,}"


def ray_directory(config: Config, environment: Mapping[str, str] = os.environ) -> Finding:
    """Check whether Ray can keep its sockets and logs in its directory: owner, length of the path, permissions."""
    check = "Ray's directory"
    if config.scaling.address is not None:
        return not_here(check, f"Ray runs already, at {config.scaling.address}")
    base, problem = ray_problem(environment)
    if problem is not None and "RAY_TMPDIR" in environment:
        return fails(check, problem, "set RAY_TMPDIR to a short directory that you can write, or unset it")
    if problem is not None:
        return ok(check, f"{problem}, so ftexp uses /tmp/ftexp-{os.getuid()} instead")
    directory = Path(base) / "ray"
    return ok(check, f"{directory}{_owner(directory)}")


def _owner(directory: Path) -> str:
    try:
        status = directory.stat()
    except OSError:
        return ", not there yet"
    return f", of user {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o}"
