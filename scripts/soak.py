"""Kill a run repeatedly at random moments, and check that its results are those of a clean run.

    uv run python scripts/soak.py [--kills 20] [--seed 0] [--target "worker 1"] [--json FILE] [overrides ...]

The config (the default one, unless overridden) is run twice: once undisturbed, once with kills. A kill hits a worker,
two workers at once, a second worker while the first is replaced, the command itself, the keeper of its in-memory
snapshots, or one of Ray's processes. It comes at a step drawn from the seed, or in the middle of a checkpoint. A killed
command is run again.

Then the two runs are compared: weights, optimiser and extra state bitwise, every logged metric, and the samples of each
update. No attempt may have started from a step before the last verified checkpoint, and no process and no shared memory
of the run may be left. Exits with 1 if any check fails. 20 kills take about 5 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import contextlib
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
_GONE_S = 20.0  # time limit for Ray's processes to exit after the command was killed
_CLEAN, _SOAKED = "clean", "soaked"
_MARK = "FTEXP_SOAK"  # environment variable that marks the processes of the runs
WORKER_0, WORKER_1, COMMAND, IN_SAVE_WORKER, IN_SAVE_COMMAND, KEEPER = _FIRST_TARGETS = (
    *("worker 0", "worker 1", "the command"),
    *("worker 0 in a save", "the command in a save", "the keeper of snapshots"),
)
ANY_WORKER, TWO_WORKERS = "any worker", "two workers"
AFTER_WORKER_1 = "worker 0 while worker 1 is replaced"
NEWCOMER = "worker 1 and the one in its place"
CONTROLLER, RAYLET, GCS, AGENT = _RAYS = ("Ray Train's controller", "Ray's raylet", "Ray's GCS", "Ray's agent")
_PROCESSES = {  # substrings of the first `_NUM_WORDS` words of their command lines
    CONTROLLER: (b"ray::TrainController",),
    RAYLET: (b"raylet/raylet",),
    GCS: (b"gcs/gcs_server",),
    AGENT: (b"ray::DashboardAgent", b"dashboard/agent.py"),
}
TARGETS = (*_FIRST_TARGETS, ANY_WORKER, TWO_WORKERS, AFTER_WORKER_1, NEWCOMER, *_RAYS)
_EARLY = 0.2  # share of kills that come within a second of the start of training
_NUM_WORDS = 3  # interpreter, option and script identify a process; further arguments of raylet name other scripts
_BUDGETS = ("max_failures", "max_ray_failures", "max_failures_without_progress")


def main() -> None:
    """Run both, print a table of the kills and the verdict, and exit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=TARGETS, help="kill only these")
    parser.add_argument("--json", type=Path, help="keep the result in this file")
    parser.add_argument("overrides", nargs="*", help="as for python -m ftexp.train")
    options = parser.parse_args()
    console, storage = Console(highlight=False, width=140), Path(tempfile.mkdtemp(prefix="soak_"))
    words = [*options.overrides, f"run.storage={storage}", "train.ledger=true", "train.log_every_steps=1"]
    os.environ |= {_MARK: str(storage), "RAY_TMPDIR": str(storage)}
    shared_before = _shared_memory()
    began = time.time()
    subprocess.run(_command(words, _CLEAN), check=True, stdout=subprocess.DEVNULL)
    clean_s = time.time() - began
    record = json.loads((storage / _CLEAN / "run.json").read_text())
    total_steps = record["step"]
    console.print(f"{storage}: clean run of {total_steps} steps in {clean_s:.0f} s")
    soak = Soak(
        [*words, *(f"failure.{budget}=-1" for budget in _BUDGETS), "failure.backoff_s=0"],
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
    problems = [*report.differences, *_lost_checkpoints(soak.events()), *_left_behind(str(storage), shared_before)]
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
    """Runs the command and kills its processes until the given number of kills is reached."""

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
        self._num_ready = 0  # number of `ready` events at the last kill; a replaced worker adds one
        self.num_commands = 0

    def run(self) -> int:
        """Run the command until one invocation ends without being killed; return its exit code."""
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
        """Wait until the attempt trains, then for the moment that was drawn, and kill."""
        if not self._wait(process, self._trains_again):
            return
        num_ready, ready = len(self._events("ready")), self._events("ready")[-1]
        farthest = max(ready["step"], self._step())
        left, kills_left = self._total_steps - farthest, self._num_kills - len(self.kills)
        target = self._random.choice(self._targets)
        is_early = self._random.random() < _EARLY
        if target in (IN_SAVE_WORKER, IN_SAVE_COMMAND):  # the next checkpoint: later ones would leave too few steps
            if not self._wait(process, self._is_saving):
                return
        elif is_early:  # by time, because replayed steps log nothing new
            time.sleep(self._random.uniform(0.0, 1.0))
        else:
            at_step = farthest + self._random.randint(1, max(1, 2 * left // (kills_left + 3)))
            if not self._wait(process, lambda: self._step() >= at_step):
                return
        victims = self._victims(target, process, ready["pids"])
        if not victims or not self._killed(victims):
            return
        kill = {"target": target, "at_step": self._step(), "attempt": ready["attempt"]}
        self.kills.append(kill)
        self._console.print(f"kill {len(self.kills)}: {target} at step {kill['at_step']} of attempt {ready['attempt']}")
        self._kill_another(target, process, ready["pids"])
        if target != KEEPER:  # training continues without it, and no new `ready` event follows
            self._num_ready = max(num_ready, len(self._events("ready")))
        if victims == [process.pid]:
            process.wait()

    def _victims(self, target: str, process: subprocess.Popen[bytes], pids: list[int]) -> list[int]:
        """Return the pids to kill first; empty if there is no such process. pids: those of the workers, by rank."""
        if target in (COMMAND, IN_SAVE_COMMAND):
            return [process.pid]
        if target in (WORKER_0, IN_SAVE_WORKER):
            return pids[:1]
        if target == ANY_WORKER:
            return [self._random.choice(pids)]
        if target == TWO_WORKERS:
            return self._random.sample(pids, 2)
        if target == KEEPER:
            begun = self._events("snapshots_begun")
            return [begun[-1]["pid"]] if begun else []
        if target in _PROCESSES:
            return _below(process.pid, _PROCESSES[target])[:1]
        return pids[1:2]

    def _kill_another(self, target: str, process: subprocess.Popen[bytes], pids: list[int]) -> None:
        """Kill the second process of a target that consists of two kills in sequence."""
        if target == AFTER_WORKER_1:
            time.sleep(self._random.uniform(0.0, 1.2))  # at some moment during the replacement
            self._killed(pids[:1])
        elif target == NEWCOMER:
            began = ("worker_replaced", "attempt_started")
            count = len([event for event in self.events() if event["event"] in began])
            if self._wait(process, lambda: len([e for e in self.events() if e["event"] in began]) > count):
                time.sleep(self._random.uniform(0.0, 0.3))
                self._killed([[event for event in self.events() if event["event"] in began][-1]["pid"]])

    def _killed(self, pids: list[int]) -> bool:
        """Kill these pids if all of them belong to the run; return whether they did."""
        if not all(_is_marked(pid, str(self._run_dir.parent)) for pid in pids):
            return False  # it was already killed, and its successor isn't known yet
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return True

    def _trains_again(self) -> bool:
        return len(self._events("ready")) > self._num_ready

    def _wait(self, process: subprocess.Popen[bytes], condition: Any) -> bool:
        """Wait for `condition`; return False if the command exits first."""
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
        """Return all events of events.jsonl."""
        path = self._run_dir / "events.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def _events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events() if event["event"] == name]

    def num_checkpoints(self) -> int:
        """Return the number of checkpoints that were completed and verified."""
        return len(self._events("checkpoint_saved"))


def _lost_checkpoints(events: list[dict[str, Any]]) -> list[str]:
    """Return a line for each attempt that started from a step before the last verified checkpoint."""
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


def _left_behind(storage: str, shared_before: set[str]) -> list[str]:
    """Return a line for each remaining process of the runs, and for each shared-memory file that no process maps."""
    end = time.monotonic() + _GONE_S
    while (left := _marked(storage)) and time.monotonic() < end:
        time.sleep(_POLL_S)
    problems = [f"process {pid} is left: {_title(pid)[:80].decode()}" for pid in left]
    maps = b"".join(_read(path) for path in Path("/proc").glob("[0-9]*/maps"))
    orphans = [name for name in _shared_memory() - shared_before if f"/dev/shm/{name}".encode() not in maps]
    return [*problems, *(f"/dev/shm/{name} is left" for name in sorted(orphans))]


def _marked(storage: str) -> list[int]:
    """Return the pids of all processes of the runs, except for this one."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if pid != os.getpid() and _is_marked(pid, storage)]


def _is_marked(pid: int, storage: str) -> bool:
    """Return whether a process is of the runs, by its environment, or by its files: Ray's agents lose the former."""
    if f"{_MARK}={storage}".encode() in _read(Path(f"/proc/{pid}/environ")).split(b"\0"):
        return True
    with contextlib.suppress(OSError):
        return any(str(file.readlink()).startswith(f"{storage}/ray/") for file in Path(f"/proc/{pid}/fd").iterdir())
    return False


def _below(root: int, titles: tuple[bytes, ...]) -> list[int]:
    """Return the descendants of `root` with one of `titles` in the first words of their command lines."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        if fields := _read(path).rpartition(b")")[2].split():
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        if any(title in b" ".join(_title(pid).split()[:_NUM_WORDS]) for title in titles):
            found.append(pid)
    return found


def _title(pid: int) -> bytes:
    return _read(Path(f"/proc/{pid}/cmdline")).replace(b"\0", b" ").strip()


def _read(path: Path) -> bytes:
    """Return the contents of a file of /proc; empty if its process has exited."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def _recoveries(events: list[dict[str, Any]]) -> str:
    """Return the number of recoveries by source, as text."""
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
