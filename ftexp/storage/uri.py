"""Paths of this machine and URIs."""

from __future__ import annotations

import re


def is_remote(uri: str) -> bool:
    """Return whether `uri` names an object store or the like, not a directory of this machine."""
    return bool(re.match(r"^\w[\w+.-]*://", uri)) and not uri.startswith("file://")
