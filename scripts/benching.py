"""What the benchmarks share: the options, the machine's line, the table of targets, and how they end."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Check = tuple[str, float, float, bool]  # title, measured, target, whether the target is a lower bound


def options_parser(description: str, rounds: int, rounds_help: str) -> argparse.ArgumentParser:
    """The options that every benchmark has: --rounds, --check and --json."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help=rounds_help)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--json", type=Path, help="keep the numbers in this file")
    return parser


def describe_machine(console: Console) -> None:
    """Print what the numbers were taken on."""
    console.print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )


def print_targets(console: Console, checks: list[Check], digits: int = 3) -> list[str]:
    """Print the table of targets; returns a line for each that is missed."""
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
    """Keep the numbers in `file`; with misses, print them on the last line, and exit with 1 if `check`."""
    if file:
        file.write_text(json.dumps(results, indent=1))
    if misses:
        console.print("; ".join(misses))
        sys.exit(1 if check else 0)


def composed(*overrides: str) -> Any:
    """The config of a run with these overrides."""
    from hydra import compose, initialize_config_dir

    import ftexp.cli.compose  # registers the schema
    from ftexp.config.schema import config_dir

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return ftexp.cli.compose.to_config(compose("config", list(overrides)))


def default_recipe() -> dict[str, Any]:
    """The default model and optimiser, as `timm.create_model` and AdamW take them."""
    config = composed()
    arguments = {"model_name": config.model.name, "img_size": 8, "in_chans": 1, "num_classes": 10}
    recipe = {"lr": config.optim.lr, "weight_decay": config.optim.weight_decay}
    return {"model": {**arguments, **config.model.all_kwargs()}, **recipe}
