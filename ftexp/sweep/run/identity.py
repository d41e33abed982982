"""Names of trials: from the values in which they differ, not from numbers, so that a later invocation finds them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

_UNSAFE = re.compile(r"[^A-Za-z0-9._=,+-]+")  # in names of directories, and in object stores' keys
_MAX_LENGTH = 100  # characters; file systems allow 255, and Ray appends to the name
_NOT_OF_A_TRIAL = ("sweep.", "run.", "hydra.", "hydra/")


def parse_words(words: Sequence[str], composed: DictConfig) -> dict[str, str]:
    """Return {key: value} of a job's overrides; values are as composed, so that 1e-3 and 0.001 are one trial."""
    chosen = {}
    for word in words:
        key, _, text = word.lstrip("+").partition("=")
        if not key.startswith(_NOT_OF_A_TRIAL):
            value = None if "/" in key or "~" in key else OmegaConf.select(composed, key, throw_on_missing=False)
            chosen[key] = text if value is None or isinstance(value, DictConfig) else _compact(value)
    return chosen


def swept_keys(jobs: Sequence[dict[str, str]], before: Sequence[str]) -> list[str]:
    """Return keys that differ between jobs, or did in an earlier invocation (`before`); of a single job, all keys."""
    keys = {key for job in jobs for key in job}
    swept = {key for key in keys if len({job.get(key) for job in jobs}) > 1} | set(before)
    return sorted(swept or keys)


def trial_name(job: dict[str, str], swept: Sequence[str]) -> str:
    """Return a name for a trial's directory.

    It is readable; it ends with a hash if it would be too long or has unsafe characters.
    """
    text = ",".join(f"{key}={job[key]}" for key in sorted(swept) if key in job) or "default"
    safe = _UNSAFE.sub("-", text)
    if safe == text and len(text) <= _MAX_LENGTH:
        return text
    return f"{safe[: _MAX_LENGTH - 9].rstrip('.-,')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _compact(value: Any) -> str:
    """Return a value as a user types it, without spaces."""
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if isinstance(plain, bool):
        return str(plain).lower()
    return re.sub(r"\s+", "", str(plain)) if isinstance(plain, list) else str(plain)
