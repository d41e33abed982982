"""Checks of data.root and run.storage: existence, free space, speed, and the operations that run directories need."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ftexp.config.masking import masked
from ftexp.config.schema import Config
from ftexp.config.source_names import reads_files
from ftexp.data.root import is_missing
from ftexp.doctor.finding import Finding, fails, not_here, ok, warning
from ftexp.errors import ConfigError
from ftexp.storage.directory import Storage, Writer
from ftexp.storage.uri import is_remote

_MIB = 2**20
_PROBE_BYTES = 64 * _MIB
_SLOW_SAVE_S = 60.0
_CONTENT = b"ftexp doctor"


def disk_space(config: Config, checkpoint_bytes: int | None) -> Finding:
    """Compare the free space below run.storage with the size of the run's checkpoints."""
    check, storage = "disk space", Storage.at(config.run.storage)
    if storage.local_path is None:
        return not_here(check, f"{masked(storage.uri)} is an object store")
    free = shutil.disk_usage(_existing(storage.local_path)).free
    if checkpoint_bytes is None:
        return ok(check, f"{free / 1e9:,.1f} GB free at {storage.uri}")
    kept = config.checkpoint.num_to_keep
    # the best one is kept in addition, and a new one is complete before an old one is deleted
    needed = checkpoint_bytes * ((kept or 2) + 2)
    found = f"{free / 1e9:,.1f} GB free at {storage.uri}; {(kept or 2) + 2} checkpoints take {needed / 1e9:,.2f} GB"
    if free < needed:
        return fails(check, found, "make room, or set run.storage to a larger disk")
    if kept is None:
        return warning(check, f"{found}, and checkpoint.num_to_keep=null keeps all", "set checkpoint.num_to_keep")
    return ok(check, found)


def _existing(path: Path) -> Path:
    """Return the nearest existing directory, `path` or above it."""
    return path if path.is_dir() or path == path.parent else _existing(path.parent)


@contextmanager
def probed(config: Config) -> Iterator[Storage]:
    """Yield a temporary directory below run.storage; remove it at the end, and run.storage if it did not exist."""
    root = Storage.at(config.run.storage)
    was_there = root.exists()
    directory = root.child(f"doctor-{secrets.token_hex(4)}")
    try:
        yield directory
    finally:
        directory.delete()
        if root.local_path is not None and not was_there and root.local_path.is_dir():
            with suppress(OSError):  # another process has written there in the meantime
                root.local_path.rmdir()


def storage_speed(directory: Storage, checkpoint_bytes: int | None) -> Finding:
    """Measure writing a file as a checkpoint is written (on a local disk, with fsync), and reading it."""
    content = os.urandom(_MIB) * (_PROBE_BYTES // _MIB)
    began = time.perf_counter()
    directory.write_bytes("speed", content)
    wrote_s = time.perf_counter() - began
    began = time.perf_counter()
    directory.read_bytes("speed")
    read_s = time.perf_counter() - began
    rate = len(content) / wrote_s
    found = f"writes {rate / 1e6:,.0f} MB/s (on the disk), reads {len(content) / read_s / 1e6:,.0f} MB/s (maybe cached)"
    if checkpoint_bytes is None:
        return ok("storage speed", found)
    save_s = checkpoint_bytes / rate
    found += f"; a checkpoint of {checkpoint_bytes / 1e6:,.0f} MB takes {save_s:.1f} s, in parallel to training"
    if save_s > _SLOW_SAVE_S:
        return warning("storage speed", found, "save less often (checkpoint.every_seconds), or to a faster run.storage")
    return ok("storage speed", found)


def storage_operations(directory: Storage) -> Finding:
    """Write, publish by renaming, list, read and delete, as saving and removing checkpoints do."""
    check = "storage: write, rename, list"
    began = time.perf_counter()
    saved = directory.child("checkpoint")
    files = {name: _writer(content) for name, content in (("a", _CONTENT), ("manifest", b"{}"))}
    saved.publish(files, last="manifest")
    listed = directory.list_directories()
    if listed != ["checkpoint"] or saved.list_files() != ["a", "manifest"]:
        return fails(check, f"a new file is not listed: {listed}", "use a storage that lists new files")
    if saved.read_bytes("a") != _CONTENT:
        return fails(check, "the content read differs from the content written", "use another run.storage")
    saved.delete()
    if directory.list_directories():
        return fails(check, "a deleted file is still listed", "use a storage whose lists are up to date")
    return ok(check, f"{masked(directory.parent.uri)}: all in {1000 * (time.perf_counter() - began):.0f} ms")


def _writer(content: bytes) -> Writer:
    return lambda stream: stream.write(content)


def data_root(config: Config) -> Finding:
    """Check whether the files or the directory at data.root exist."""
    check, data = "data", config.data
    if data.root is None or not reads_files(data.name):
        return not_here(check, f"data={data.name}: nothing to check before a run")
    if is_remote(data.root):
        return not_here(check, f"data.root={masked(data.root)} is listed when a run starts")
    if is_missing(data):
        return fails(check, f"data.root={data.root} does not exist", "set data.root to where the images are")
    return ok(check, f"data.root={data.root} exists")


def storage_checks(config: Config, checkpoint_bytes: int | None) -> list[Finding]:
    """Return the findings of all storage checks; an error of any of them becomes the only finding."""
    try:
        findings = [disk_space(config, checkpoint_bytes)]
        with probed(config) as directory:
            return [*findings, storage_operations(directory), storage_speed(directory, checkpoint_bytes)]
    except (OSError, ConfigError) as error:
        fix = "set run.storage to a directory or URI that can be written"
        return [fails("storage: write, rename, list", f"{masked(config.run.storage)}: {masked(str(error))}", fix)]
