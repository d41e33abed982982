"""Helpers shared by the benchmarks: options, machine description, table of targets, exit status."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Check = tuple[str, float, float, bool]  # title, measured, target, whether the target is a lower bound


def options_parser(description: str, rounds: int, rounds_help: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark: --rounds, --check and --json."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help=rounds_help)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--json", type=Path, help="keep the numbers in this file")
    return parser


def scratch_directory() -> Path:
    """Make a directory that is removed when the benchmark ends."""
    path = Path(tempfile.mkdtemp(prefix="bench_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def describe_machine(console: Console) -> None:
    """Print the CPU, the number of cores and the Python version."""
    console.print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )


def print_targets(console: Console, checks: list[Check], digits: int = 3) -> list[str]:
    """Print the table of targets; return a line for each target that is missed."""
    table = Table("figure", "measured", "target", "", box=None)
    misses = []
    for title, value, target, at_least in checks:
        met = value >= target if at_least else value <= target
        bound = f"{'at least' if at_least else 'at most'} {target:g}"
        table.add_row(title, f"{value:.{digits}f}", bound, "ok" if met else "missed")
        if not met:
            misses.append(f"{title}: {value:.{digits}f}, target {bound}")
    console.print(table)
    return misses


def finish(console: Console, results: Any, file: Path | None, misses: list[str], check: bool) -> None:
    """Write the numbers to `file`; if there are misses, print them on the last line and, if `check`, exit with 1."""
    if file:
        file.write_text(json.dumps(results, indent=1))
    if misses:
        console.print("; ".join(misses))
        sys.exit(1 if check else 0)


def figures(values: list[float]) -> tuple[float, float, float]:
    """Return median, minimum and maximum."""
    return statistics.median(values), min(values), max(values)


def quotients(ours: list[float], theirs: list[float]) -> list[float]:
    """Return the ratio of the two sides in each round."""
    return [our / their for our, their in zip(ours, theirs, strict=True)]


def in_turns(sides: Iterable[str], rounds: int) -> Iterator[str]:
    """Yield each side once a round; every second round is reversed, so that no side always follows the same one."""
    order = list(sides)
    for number in range(rounds):
        yield from order[:: -1 if number % 2 else 1]


def quartiles(blocks: list[float]) -> list[float]:
    """Return the three quartiles; sides are compared by the first, because other load only ever slows a block down."""
    return statistics.quantiles(blocks, n=4)


def composed(*overrides: str) -> Any:
    """Return the config of a run with these overrides."""
    from hydra import compose, initialize_config_dir

    import ftexp.cli.compose  # registers the schema
    from ftexp.config.schema import config_dir

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return ftexp.cli.compose.to_config(compose("config", list(overrides)))


def default_recipe() -> dict[str, Any]:
    """Return the arguments of the default model (for `timm.create_model`) and of the default optimiser (for AdamW)."""
    config = composed()
    arguments = {"model_name": config.model.name, "img_size": 8, "in_chans": 1, "num_classes": 10}
    recipe = {"lr": config.optim.lr, "weight_decay": config.optim.weight_decay}
    return {"model": {**arguments, **config.model.all_kwargs()}, **recipe}


def memory_mib(root: int | None = None) -> float:
    """Return the proportional set size of a process (None: this one) and its descendants: shared pages count once."""
    total = 0
    for process in _family(root):
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1024


def cpu_s(root: int | None = None) -> float:
    """Return the CPU seconds of a process (None: this one) and its descendants, including children that have exited."""
    used = 0
    for process in _family(root):
        with contextlib.suppress(OSError):
            used += sum(int(ticks) for ticks in _stat(process)[11:15])
    return used / os.sysconf("SC_CLK_TCK")


def _family(root: int | None) -> list[int]:
    """Return the pids of a process (None: this one) and its descendants."""
    children: dict[int, list[int]] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            children.setdefault(int(_stat(int(directory.name))[1]), []).append(int(directory.name))
    found, waiting = [], [root or os.getpid()]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found


def _stat(process: int) -> list[str]:
    """Return the fields of /proc/N/stat from the third one, the state."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
