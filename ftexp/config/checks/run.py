"""Checks of the run's name and storage."""

from __future__ import annotations

from collections.abc import Iterator

from ftexp.config.schema import Config
from ftexp.storage.uri import is_remote


def check_run(config: Config) -> Iterator[str]:
    """Check the names of the run and the sweep, and their storage."""
    name = config.run.name
    if name is not None and (not name.strip() or {".", ".."} & set(name.split("/")) or name.startswith("/")):
        yield (
            f"run.name={name!r} is not a valid directory name under run.storage: give another name, or remove it for "
            "a new run"
        )

    if name is None and config.resume == "must":
        yield "resume=must needs run.name: without one, every invocation starts a new run"
    if is_remote(config.run.storage):
        for key, value in (("run.storage", config.run.storage), ("run.name", name), ("sweep.name", config.sweep.name)):
            if value is not None and (found := sorted(set(value) & set("#" if key == "run.storage" else "#%?"))):
                yield f"{key}={value} holds {' and '.join(found)}, which have another meaning in a URI: remove them"
