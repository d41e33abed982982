"""`python -m ftexp.drill <any train overrides> [drill.faults=[kill_worker,flip_byte]] [drill.steps=200]`

Runs your config twice, clean and with faults, and checks that the results are bitwise identical: weights, optimiser,
extra state, every logged metric, and which samples drove which update. Exit codes: 0 identical, 1 not, 2 the command
was wrong.

drill.faults  names, or {kind: ..., step: ..., rank: ...}; see conf/chaos. Each is injected once, in this order
drill.steps   stop both runs after so many optimiser steps (default: the whole run)
drill.recovery  source from which the broken run resumes: the living workers (replace), memory (a snapshot every few
              steps), storage (checkpoints only), or as the config says (config, the default)

Both runs are stored under <run.storage>/drill_<time>/, with drill.json, and may be deleted. The drill sets
train.ledger, train.log_every_steps=1, the checkpoint interval of the broken run, and failure.max_failures if it allows
fewer failures than there are faults. None of these changes a bit of the result.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ftexp.cli.compose import run_hydra, to_config
from ftexp.cli.entry import command_words, exiting_on_error
from ftexp.cli.parse import parse_words
from ftexp.cli.wrapping import print_wrapped, say
from ftexp.config.checks.validate import validate
from ftexp.config.fields import choice, field_problems, ranged
from ftexp.config.schema import REPLACE, RESTART, Config, fault_fields
from ftexp.errors import ConfigError, RunFailedError
from ftexp.rundir.names import RUN_FILE
from ftexp.storage.lease import unused_name
from ftexp.wire.messages import MEMORY, STORAGE

if TYPE_CHECKING:
    from ftexp.drill.report import DrillReport
    from ftexp.storage.directory import Storage

_KILLED = -9
_SNAPSHOTS = 4  # snapshots in memory per checkpoint, with drill.recovery=memory
_SHOWN = ("⚡", "✗", "↻", "!", "resumed")  # prefixes of the run's lines that are printed
CLEAN, BROKEN = "clean", "broken"
CONFIG = "config"


@dataclass(kw_only=True)
class DrillConfig:
    """Settings under `drill.`"""

    faults: list[Any] = field(
        default_factory=lambda: ["kill_worker", "truncate_checkpoint", "disk_full", "flip_byte", "kill_driver"]
    )
    steps: int | None = ranged(None, low=2)
    recovery: str = choice(CONFIG, (CONFIG, REPLACE, MEMORY, STORAGE))


def main() -> None:
    """Run the command."""
    words = command_words(__doc__)
    own = [word for word in words if word.startswith("drill.")]
    overrides = [word for word in words if not word.startswith("drill.")]
    with exiting_on_error():
        config = parse(own)
        refuse(overrides, config)
    identical = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the run is stopped with the drill
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)

    def task(composed: DictConfig) -> None:
        nonlocal identical
        identical = drill(to_config(composed, overrides), config, overrides)

    code = run_hydra(task, overrides)
    sys.exit(code or (0 if identical else 1))


def parse(words: list[str]) -> DrillConfig:
    """Parse drill.key=value words; ConfigError names what is wrong."""
    config: DrillConfig = parse_words(_Root, words).drill
    problems = list(dict(field_problems(config, "drill.")).values())
    if not config.faults:
        problems.append("drill.faults=[] is empty: name at least one fault")
    if problems:
        raise ConfigError("\n".join(problems))
    return config


@dataclass
class _Root:
    drill: DrillConfig = field(default_factory=DrillConfig)


def refuse(overrides: list[str], own: DrillConfig) -> None:
    """Raise ConfigError if the overrides set a key that the drill sets."""
    for word in overrides:
        key = word.lstrip("+~").partition("=")[0]
        if key == "chaos" or key.startswith("chaos."):
            raise ConfigError(f"{word}: the drill sets chaos itself; write drill.faults=[...]")
        if key in _recovery_settings(own, every=1):
            raise ConfigError(f"{word}: drill.recovery={own.recovery} sets it; remove one of them")
        if key in ("run.name", "resume", "train.ledger", "train.max_steps"):
            raise ConfigError(f"{word}: the drill sets {key} itself; remove it" + _instead(key))
        if word in ("-m", "--multirun"):
            raise ConfigError("-m: a drill runs one config; remove it")


def _instead(key: str) -> str:
    return ", and write drill.steps=..." if key == "train.max_steps" else ""


def drill(config: Config, own: DrillConfig, overrides: list[str]) -> bool:
    """Run the config clean and with faults, compare, and print; return whether the results are identical.

    Raises:
        ConfigError: the config is wrong; nothing was started.
        RunFailedError: the clean run failed, so there is nothing to compare with.
    """
    with_faults = dataclasses.replace(config, chaos=dataclasses.replace(config.chaos, faults=own.faults))
    settings = {key.removeprefix("failure."): value for key, value in _recovery_settings(own, every=1).items()}
    validate(dataclasses.replace(with_faults, failure=dataclasses.replace(config.failure, **settings)))
    from ftexp.drill.report import compare
    from ftexp.storage.directory import Storage

    name = f"drill_{unused_name()}"
    directory = Storage.at(config.run.storage, name)
    words = [*overrides, f"run.storage={_quoted(directory.uri)}", "train.ledger=true", "train.log_every_steps=1"]
    if own.steps is not None:
        words.append(f"train.max_steps={own.steps}")
    print(f"drill    {directory.uri}")
    began = time.time()
    if _run(words, CLEAN, 1, directory) != 0:
        raise RunFailedError(f"the clean run failed: see {directory.child(CLEAN).uri} and {_log(directory, CLEAN)}")
    total_steps = json.loads(directory.child(CLEAN).read_bytes(RUN_FILE))["step"]
    print(f"clean    {total_steps:,} steps, the whole command {time.time() - began:.1f} s")
    code = _run([*words, *_broken_words(config, own, total_steps)], BROKEN, len(own.faults) + 1, directory)
    report = compare(directory.child(CLEAN), directory.child(BROKEN), config.train.global_batch_size, code, config)
    directory.write_bytes("drill.json", json.dumps(dataclasses.asdict(report), indent=1).encode())
    _print(report)
    return report.identical


def _broken_words(config: Config, own: DrillConfig, total_steps: int) -> list[str]:
    """Return the overrides of the broken run: faults, each between two checkpoints, and enough failures allowed."""
    number = len(own.faults)
    every = max(1, total_steps // (2 * (number + 1)))
    faults = []
    for place, fault in enumerate(own.faults, start=1):
        chosen = fault_fields(fault)
        step = place * total_steps // (number + 1) // every * every + max(1, every // 2)
        chosen.setdefault("step", max(1, min(step, total_steps - 1)))
        chosen.setdefault("rank", place % 2)
        faults.append("{" + ", ".join(f"{key}: {value}" for key, value in chosen.items()) + "}")
    words = [f"chaos.faults=[{', '.join(faults)}]"]
    words += [f"checkpoint.every_steps={every}", "checkpoint.every_epochs=null", "checkpoint.every_seconds=null"]
    words += [f"{key}={value}" for key, value in _recovery_settings(own, every).items()]
    if 0 <= config.failure.max_failures < number:
        words.append(f"failure.max_failures={number}")
    return words


def _recovery_settings(own: DrillConfig, every: int) -> dict[str, Any]:
    """Return the overrides that drill.recovery sets, by key. every: steps between checkpoints."""
    if own.recovery == CONFIG:
        return {}
    if own.recovery == REPLACE:
        return {"failure.recovery": REPLACE}
    snapshots = max(1, every // _SNAPSHOTS) if own.recovery == MEMORY else 0
    return {"failure.recovery": RESTART, "failure.memory_every_steps": snapshots}


def _run(words: list[str], name: str, max_starts: int, directory: Storage) -> int:
    """Run the command, again if it is killed; return the last exit code."""
    command = [sys.executable, "-m", "ftexp.train", *words, f"run.name={name}"]
    code = _KILLED
    for _ in range(max_starts):
        code = _run_once(command, _log(directory, name))
        if code != _KILLED:
            break
        print("         the command was killed: running the same command again", flush=True)
    return code


def _run_once(command: list[str], log: str) -> int:
    with (
        open(log, "a", encoding="utf-8") as file,  # noqa: PTH123 - for a remote directory, a file in a temporary one
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        ) as process,  # fmt: skip
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if line.startswith(_SHOWN):
                    print_wrapped([f"         {line.rstrip()}"], sys.stdout)
        except KeyboardInterrupt:
            process.terminate()
            raise
    return process.returncode


def _log(directory: Storage, name: str) -> str:
    """Return the local file for a run's output."""
    import tempfile
    from pathlib import Path

    path = directory.local_path or Path(tempfile.gettempdir()) / directory.name
    path.mkdir(parents=True, exist_ok=True)
    return str(path / f"{name}.log")


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _print(report: DrillReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("fault", "at step", "what happened", "replayed", "lost", "identical", box=None, pad_edge=False)
    for row in report.rows:
        seconds = "" if row.seconds_lost is None else f"{row.seconds_lost:.1f} s"
        cells = (str(row.step), row.happened, f"{row.steps_replayed} steps", seconds, "yes" if row.identical else "NO")
        table.add_row(row.fault, *cells)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    console.print(table)
    say(console, report.verdict)
