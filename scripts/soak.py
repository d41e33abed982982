"""Kill a run again and again at random moments, and show that it ends as if nothing had happened.

    uv run python scripts/soak.py [--kills 20] [--seed 0] [--target "worker 1"] [--json FILE] [overrides ...]

One clean run of the config (the default one, unless overridden), then one that is killed: a worker, the command itself
or the keeper of its snapshots in memory, at a step drawn from the seed, or in the middle of a checkpoint. A killed
command is run again. Then weights, optimiser and extra state are compared bitwise, with every logged metric and the
samples that drove each update; no attempt may have begun before a checkpoint that was verified, and no process of the
run may be left. Exits with 1 if anything is off.
20 kills take about 5 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ftexp.drill.report import compare
from ftexp.rundir.sample_ledger import read_updates
from ftexp.storage.directory import Storage

_POLL_S = 0.005
_DEADLINE_S = 300.0
_CLEAN, _SOAKED = "clean", "soaked"
WORKER_0, WORKER_1, COMMAND, IN_SAVE_WORKER, IN_SAVE_COMMAND, KEEPER = TARGETS = (
    *("worker 0", "worker 1", "the command"),
    *("worker 0 in a save", "the command in a save", "the keeper of snapshots"),
)


def main() -> None:
    """Run both, print a table of the kills and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=TARGETS, help="kill only these")
    parser.add_argument("--json", type=Path, help="keep the result in this file")
    parser.add_argument("overrides", nargs="*", help="as for python -m ftexp.train")
    options = parser.parse_args()
    console, storage = Console(highlight=False, width=140), Path(tempfile.mkdtemp(prefix="soak_"))
    words = [*options.overrides, f"run.storage={storage}", "train.ledger=true", "train.log_every_steps=1"]
    began = time.time()
    subprocess.run(_command(words, _CLEAN), check=True, stdout=subprocess.DEVNULL)
    clean_s = time.time() - began
    record = json.loads((storage / _CLEAN / "run.json").read_text())
    total_steps = record["step"]
    console.print(f"{storage}: clean run of {total_steps} steps in {clean_s:.0f} s")
    soak = Soak(
        [*words, "failure.max_failures=-1"],
        storage / _SOAKED,
        options.kills,
        options.seed,
        options.target or [*TARGETS, WORKER_0, WORKER_1],
        total_steps,
        console,
    )
    code = soak.run()
    batch = record["fingerprint"]["train.global_batch_size"]
    report = compare(Storage.at(str(storage / _CLEAN)), Storage.at(str(storage / _SOAKED)), batch, code)
    problems = [*report.differences, *_lost_checkpoints(soak.events()), *_left_behind(soak.events())]
    if len(soak.kills) < options.kills:
        problems.append(f"only {len(soak.kills)} of {options.kills} kills came before the end")
    _print(console, soak.kills)
    soaked_s = time.time() - began - clean_s
    console.print(
        f"{len(soak.kills)} kills, {soak.num_commands} commands, {soaked_s:.0f} s (clean: {clean_s:.0f} s); "
        f"{soak.num_checkpoints()} checkpoints verified, none lost"
        if not problems
        else "\n".join(["FAILED:", *problems[:10]])
    )
    console.print(f"recovered: {_recoveries(soak.events())}")
    if not problems:
        console.print(report.verdict)
    if options.json:
        num_updates = len(read_updates(Storage.at(str(storage / _SOAKED))))
        result = {"kills": soak.kills, "problems": problems, "seconds": soaked_s, "num_updates": num_updates}
        options.json.write_text(json.dumps(result, indent=1))
    sys.exit(1 if problems else 0)


def _command(words: list[str], name: str) -> list[str]:
    return [sys.executable, "-m", "ftexp.train", *words, f"run.name={name}"]


class Soak:
    """Runs the command and kills it, until all kills are spent."""

    def __init__(
        self,
        words: list[str],
        run_dir: Path,
        num_kills: int,
        seed: int,
        targets: list[str],
        total_steps: int,
        console: Console,
    ) -> None:
        self._targets = targets
        self._words, self._run_dir, self._total_steps, self._console = words, run_dir, total_steps, console
        self._num_kills, self._random = num_kills, random.Random(seed)
        self.kills: list[dict[str, Any]] = []
        self._num_ready = 0  # starts of training when the last worker was killed: one that is replaced is one more
        self.num_commands = 0

    def run(self) -> int:
        """Give the command until it ends by itself; returns its exit code."""
        while True:
            self.num_commands += 1
            with (self._run_dir.parent / "soaked.log").open("a") as log:
                process = subprocess.Popen(_command(self._words, _SOAKED), stdout=log, stderr=subprocess.STDOUT)
                while len(self.kills) < self._num_kills and process.poll() is None:
                    self._kill_once(process)
                code = process.wait(timeout=_DEADLINE_S)
            if code != -signal.SIGKILL:
                return code

    def _kill_once(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the attempt to train, then for the moment that was drawn, and kill."""
        if not self._wait(process, self._trains_again):
            return
        num_ready, ready = len(self._events("ready")), self._events("ready")[-1]
        left, kills_left = self._total_steps - ready["step"], self._num_kills - len(self.kills)
        target = self._random.choice(self._targets)
        at_step = ready["step"] + self._random.randint(0, max(1, 2 * left // (kills_left + 3)))
        if not self._wait(process, lambda: self._step() >= at_step):
            return
        in_save = target in (IN_SAVE_WORKER, IN_SAVE_COMMAND)
        if in_save and not self._wait(process, self._is_saving):
            return
        pid = process.pid if target in (COMMAND, IN_SAVE_COMMAND) else ready["pids"][int(target == WORKER_1)]
        if target == KEEPER:
            if not self._wait(process, lambda: self._events("snapshots_begun")):
                return
            pid = self._events("snapshots_begun")[-1]["pid"]
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # a keeper that was killed already, and whose successor isn't known yet
            return
        kill = {"target": target, "at_step": self._step(), "attempt": ready["attempt"]}
        self.kills.append(kill)
        self._num_ready = num_ready if target != KEEPER else self._num_ready
        self._console.print(f"kill {len(self.kills)}: {target} at step {kill['at_step']} of attempt {ready['attempt']}")
        if pid == process.pid:
            process.wait()

    def _trains_again(self) -> bool:
        return len(self._events("ready")) > self._num_ready

    def _wait(self, process: subprocess.Popen[bytes], condition: Any) -> bool:
        """Whether `condition` came to hold before the command ended."""
        end = time.monotonic() + _DEADLINE_S
        while not condition():
            if process.poll() is not None:
                return False
            if time.monotonic() > end:
                process.kill()
                raise TimeoutError(f"nothing happened for {_DEADLINE_S:.0f} s; see {self._run_dir.parent}/soaked.log")
            time.sleep(_POLL_S)
        return True

    def _is_saving(self) -> bool:
        directory = self._run_dir / "checkpoints"
        return directory.is_dir() and any(path.name.startswith(".tmp-") for path in directory.iterdir())

    def _step(self) -> int:
        path = self._run_dir / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2000))
            lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def events(self) -> list[dict[str, Any]]:
        """All of events.jsonl."""
        path = self._run_dir / "events.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def _events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events() if event["event"] == name]

    def num_checkpoints(self) -> int:
        """Return the number of checkpoints that were completed and verified."""
        return len(self._events("checkpoint_saved"))


def _lost_checkpoints(events: list[dict[str, Any]]) -> list[str]:
    """Attempts that began before a step that was verified on disk."""
    problems, newest, restored = [], 0, 0
    for event in events:
        if event["event"] == "attempt_started":
            restored = 0
        elif event["event"] == "restored":
            restored = event["step"]
        elif event["event"] == "ready" and event.get("source") != "replaced" and restored < newest:
            problems.append(f"attempt {event['attempt']} began at step {restored}, though step {newest} was saved")
        elif event["event"] == "checkpoint_saved":
            newest = max(newest, event["step"])
    return problems


def _left_behind(events: list[dict[str, Any]]) -> list[str]:
    """Processes of the run that still are: their memory goes with them."""
    pids = {pid for event in events for pid in (*event.get("pids", []), event.get("pid"))} - {None}
    titles = {pid: Path(f"/proc/{pid}/cmdline") for pid in pids}
    left = [pid for pid, title in titles.items() if title.exists() and b"ray::" in title.read_bytes()]
    return [f"process {pid} is left" for pid in left]


def _recoveries(events: list[dict[str, Any]]) -> str:
    """Return {source of the recovery: number of failures}."""
    found = [event["recovery"] for event in events if event["event"] == "recovered"]
    return ", ".join(f"{found.count(kind)} from {kind}" for kind in dict.fromkeys(found))


def _print(console: Console, kills: list[dict[str, Any]]) -> None:
    table = Table("killed", "times", "at steps", box=None)
    for target in TARGETS:
        steps = [kill["at_step"] for kill in kills if kill["target"] == target]
        table.add_row(target, str(len(steps)), ", ".join(map(str, steps)))
    console.print(table)


if __name__ == "__main__":
    main()
