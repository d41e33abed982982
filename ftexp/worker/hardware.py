"""Description of a worker's hardware."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

_LINUX = platform.system() == "Linux"


def describe(device: torch.device) -> dict[str, Any]:
    """Return this node's system, processor and memory, the cores that this process may use, and its GPU, if any."""
    facts: dict[str, Any] = {"node": platform.node(), "system": f"{platform.system()} {platform.release()}"}
    facts |= {"processor": _processor(), "cores": len(os.sched_getaffinity(0)) if _LINUX else os.cpu_count()}
    if _LINUX:
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _processor() -> str:
    """Return the processor's model name, or its architecture if Linux gives no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
