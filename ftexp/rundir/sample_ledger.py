"""Sample ledger: which samples drove which update. Written during training if `train.ledger` is set; read to verify it.

Every rank appends a line per step to its own file, ledger/a<attempt>.r<rank>.jsonl, before a checkpoint can contain
that step. So every step of a checkpoint is in the ledger, whichever process is killed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftexp.rundir.names import LEDGER
from ftexp.storage.append_log import AppendLog, parse_lines, read_lines
from ftexp.storage.directory import Storage

if TYPE_CHECKING:
    from ftexp.data.batches import Batch
    from ftexp.data.order import Int64s

    Identities = Callable[[Sequence[int]], tuple[Int64s, Int64s]]  # positions -> (rounds, places)


class SampleLedger:
    """One rank's writer; does nothing if `storage` is None."""

    def __init__(self, storage: Storage | None, attempt: int, rank: int) -> None:
        self._log = AppendLog(storage, f"a{attempt:04d}.r{rank}.jsonl") if storage is not None else None

    def note(self, step: int, batch: Batch, skipped: bool = False) -> None:
        """Record that this rank's share of `batch` drove update number `step`, or was skipped."""
        line = {"step": step, "positions": batch.positions.tolist(), "samples": batch.samples.tolist()}
        self._append({**line, "skipped": True} if skipped else line)

    def back_to(self, step: int) -> None:
        """Record that the weights after `step` were restored: later steps are done again."""
        self._append({"back_to": step})

    def last_step(self) -> int:
        """Return the last step of this attempt in the rank's file; 0 if there is none."""
        lines = parse_lines(self._log.lines()) if self._log is not None else []
        return max(_standing(lines), default=0)

    def _append(self, line: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.append(json.dumps(line))

    def flush(self) -> None:
        """Wait until other processes can read every line; OSError if that fails."""
        if self._log is not None:
            self._log.flush()


@dataclass(frozen=True)
class Update:
    """The samples of one optimiser step, over all ranks: positions ascending, and the sample at each."""

    step: int
    attempt: int  # last attempt that did this step: the weights contain its update
    positions: tuple[int, ...]
    samples: tuple[int, ...]
    skipped: bool = False  # the gradient was not finite: no update


def last_attempt(run_dir: Storage) -> int:
    """Return the highest attempt that has written a ledger; 0 if none has."""
    return max((_attempt(name) for name in run_dir.child(LEDGER).list_files()), default=0)


def _attempt(name: str) -> int:
    return int(name.partition(".")[0].removeprefix("a"))


def read_updates(run_dir: Storage) -> list[Update]:
    """Return the updates that produced the weights, by step; for a repeated step, the last one."""
    shares: dict[int, dict[int, list[dict[str, Any]]]] = {}  # step -> attempt -> a line per rank
    directory = run_dir.child(LEDGER)
    for name in directory.list_files():
        for step, line in _standing(read_lines(directory, name)).items():
            shares.setdefault(step, {}).setdefault(_attempt(name), []).append(line)
    updates = []
    for step in sorted(shares):
        attempt = max(shares[step])
        lines = shares[step][attempt]
        used = sorted(pair for line in lines for pair in zip(line["positions"], line["samples"], strict=True))
        positions, samples = zip(*used, strict=True) if used else ((), ())
        updates.append(Update(step, attempt, positions, samples, any("skipped" in line for line in lines)))
    return updates


def _standing(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return one rank's lines of one attempt by step, without steps that were rolled back."""
    standing: dict[int, dict[str, Any]] = {}
    for line in lines:  # a truncated line is not here; no checkpoint contains its step
        if "back_to" in line:
            standing = {step: kept for step, kept in standing.items() if step <= line["back_to"]}
        else:
            standing[line["step"]] = line
    return standing


def problems(
    updates: list[Update], num_samples: int, global_batch_size: int, identities: Identities | None = None
) -> Iterator[tuple[int, str]]:
    """Yield (step, violation of exactly-once): a missing step, wrong positions, or a sample used twice in an epoch.

    identities: for a run whose epoch isn't each sample once; see `ftexp.data.sampling.identities`. A violation is then
    a sample at a position where the order draws another.
    """
    draws = _EachOnce(num_samples) if identities is None else _ByIdentity(identities)
    for expected, update in enumerate(updates, start=1):
        if update.step != expected:
            yield expected, f"step {expected} is missing"
            return
        start = (expected - 1) * global_batch_size
        end = start + len(update.positions)
        if update.positions != tuple(range(start, end)):
            yield expected, f"step {expected} was driven by other positions than {start} to {end - 1}"
        if len(update.positions) != global_batch_size and expected != len(updates):
            yield expected, f"step {expected} was driven by {len(update.positions)} samples, not {global_batch_size}"
        yield from draws.add(update)
    yield from draws.end()


class _EachOnce:
    """Check for samples that are used twice in an epoch, or not at all."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._seen: dict[int, dict[int, int]] = {}  # epoch -> sample -> the step that used it

    def add(self, update: Update) -> Iterator[tuple[int, str]]:
        for position, sample in zip(update.positions, update.samples, strict=True):
            used = self._seen.setdefault(position // self._num_samples, {})
            if sample in used:
                yield update.step, f"sample {sample} drove step {used[sample]} and step {update.step} of one epoch"
            used[sample] = update.step

    def end(self) -> Iterator[tuple[int, str]]:
        for epoch in sorted(self._seen)[:-1]:
            used = self._seen[epoch]
            if len(used) != self._num_samples:
                yield max(used.values()), f"epoch {epoch} used {len(used)} of {self._num_samples} samples"


class _ByIdentity:
    """Check for places of a round with two different samples, and samples of a round at two different places."""

    def __init__(self, identities: Identities) -> None:
        self._identities = identities
        self._samples: dict[tuple[int, int], tuple[int, int]] = {}  # (round, place) -> (sample, step that used it)
        self._places: dict[tuple[int, int], tuple[int, int]] = {}  # (round, sample) -> (place, step that used it)

    def add(self, update: Update) -> Iterator[tuple[int, str]]:
        step = update.step
        rounds, places = self._identities(update.positions)
        for turn, place, sample in zip(rounds.tolist(), places.tolist(), update.samples, strict=True):
            other, before = self._samples.setdefault((turn, place), (sample, step))
            if other != sample:
                yield step, f"sample {sample} drove step {step}, where the order draws sample {other} of step {before}"
            other, before = self._places.setdefault((turn, sample), (place, step))
            if other != place:
                yield step, f"sample {sample} drove step {before} and step {step}, where the order draws another"

    def end(self) -> Iterator[tuple[int, str]]:
        yield from ()
