"""Readable YAML: in the given order, scripts as blocks, no references."""

from __future__ import annotations

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Dumper that writes each value where it is used, and text of several lines as a block."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        """Return True: a value that occurs twice is written twice."""
        return True


def _represent_text(dumper: Any, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def as_yaml(content: dict[str, Any]) -> str:
    """Return the YAML of a document."""
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=1_000_000)
    return text
