"""`python -m ftexp.checkpoints <run directory> [--diff A B | --convert ...]`: list and verify checkpoints.

Lists every checkpoint with its step, size and age, and verifies every byte of it. `--diff` names two of them
(a directory's name in the run, or the path of any other checkpoint or run) and shows every place where they differ.
`--convert full CHECKPOINT OUT` writes a sharded checkpoint as model.pt, optimizer.pt and extra_state.pt to
OUT/CHECKPOINT. `--convert sharded:N CHECKPOINT OUT` writes any checkpoint as N workers would save it.
Exit codes: 0 all verify, or no difference; 1 otherwise; 2 the command was wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
import time

from ftexp.checkpoint.manifest import Manifest
from ftexp.checkpoint.store import REJECTED, CheckpointStore, locate
from ftexp.cli.entry import as_value, exiting_on_error, prepare_streams
from ftexp.counting import counted
from ftexp.errors import CheckpointError, ConfigError
from ftexp.rundir.names import CHECKPOINTS
from ftexp.storage.directory import Storage

_SHARDED = re.compile(r"sharded:([1-9]\d*)")
_MAX_DIFFERENCES = 40  # differences that are printed; the rest are only counted


def main() -> None:
    """Run the command."""
    prepare_streams()
    parser = argparse.ArgumentParser(prog="python -m ftexp.checkpoints", description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", type=as_value, help="a run directory, or its URI")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="names, or paths, of two checkpoints to compare")
    parser.add_argument(
        "--convert",
        nargs=3,
        metavar=("FORMAT", "CHECKPOINT", "OUT"),
        help="write a checkpoint, by name or path, as full or sharded:N into the directory OUT",
    )
    options = parser.parse_args()
    with exiting_on_error():
        run_dir = Storage.at(options.run)
        if not run_dir.child(CHECKPOINTS).exists():
            raise ConfigError(f"{run_dir.uri} has no {CHECKPOINTS}/: give the directory of a run")
        if options.convert:
            good = convert(run_dir, *options.convert)
        else:
            good = show_differences(run_dir, *options.diff) if options.diff else show(run_dir)
    sys.exit(0 if good else 1)


def show(run_dir: Storage) -> bool:
    """Print the table; return whether every checkpoint that isn't in quarantine verifies."""
    from rich.console import Console
    from rich.table import Table

    store = CheckpointStore(run_dir.child(CHECKPOINTS))
    bad: dict[str, str] = {}
    manifests = store.manifests(bad.__setitem__)
    table = Table("checkpoint", "step", "epoch", "workers", "files", "size", "age", "verified", box=None)
    for manifest in manifests:
        reason = _damage(store, manifest)
        if reason:
            bad[manifest.name] = reason
        size, age = f"{manifest.num_bytes / 1e6:,.1f} MB", _age(time.time() - manifest.written_at)
        files = counted(manifest.num_shards, "shard") if manifest.num_shards is not None else "full"
        cells = (str(manifest.step), str(manifest.epoch), str(manifest.world_size), files, size, age)
        table.add_row(manifest.name, *cells, f"no: {reason}" if reason else "yes")
    unreadable = [name for name in bad if name not in {manifest.name for manifest in manifests}]
    for name in unreadable:
        table.add_row(name, *"------", f"no: {bad[name]}")
    rejected = store.storage.child(REJECTED).list_directories()
    for name in rejected:
        table.add_row(f"{REJECTED}/{name}", *"------", "no: in quarantine")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if manifests or unreadable or rejected:
        console.print(table)
    else:
        console.print(f"{store.storage.uri} holds no checkpoint yet", markup=False)
    return not bad


def show_differences(run_dir: Storage, first: str, second: str) -> bool:
    """Print every place where two checkpoints differ; return whether there is none."""
    from ftexp.checkpoint.compare import load, tree_differences

    sides = [_find(run_dir, name) for name in (first, second)]
    one, other = (load(*side) for side in sides)
    differences = list(tree_differences(one, other))
    for line in differences[:_MAX_DIFFERENCES]:
        print(line)
    if len(differences) > _MAX_DIFFERENCES:
        print(f"... and {len(differences) - _MAX_DIFFERENCES} more")
    names = " and ".join(manifest.name for _, manifest in sides)
    print(f"{names}: {f'{len(differences)} differences' if differences else 'bitwise identical'}")
    return not differences


def convert(run_dir: Storage, wanted: str, name: str, out: str) -> bool:
    """Write a checkpoint in another format, print its path, and return True."""
    from ftexp.checkpoint.converting import as_full, as_sharded

    found = _SHARDED.fullmatch(wanted)
    if wanted != "full" and found is None:
        raise ConfigError(f"--convert {wanted}: give full, or sharded:N for N shards")
    store, manifest = _find(run_dir, name)
    target = CheckpointStore(Storage.at(out))
    if target.storage.child(manifest.name).exists():
        raise ConfigError(f"{target.storage.child(manifest.name).uri} already exists: remove it, or give another OUT")
    if found is None and manifest.mesh is None:
        raise ConfigError(f"{manifest.name} is not sharded: convert it to sharded:N")
    written = as_full(store, manifest, target) if found is None else as_sharded(store, manifest, target, int(found[1]))
    print(f"written  {target.storage.child(written.name).uri}: {', '.join(sorted(written.files))}")
    return True


def _find(run_dir: Storage, name: str) -> tuple[CheckpointStore, Manifest]:
    if "/" in name:
        return locate(name)
    store = CheckpointStore(run_dir.child(CHECKPOINTS))
    return store, store.by_name(name)


def _damage(store: CheckpointStore, manifest: Manifest) -> str | None:
    try:
        store.verify(manifest)
    except CheckpointError as error:
        return str(error)
    return None


def _age(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    main()
