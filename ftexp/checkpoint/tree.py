"""Trees of dicts, lists and tuples with tensors as leaves, such as state dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Path = tuple[Any, ...]  # keys and indices that lead to a leaf


def mapped(tree: Any, change: Callable[[Any, Path], Any], path: Path = ()) -> Any:
    """Return a tree of the same shape with `change(leaf, path)` in each leaf's place; any mapping becomes a dict."""
    if isinstance(tree, Mapping):
        return {key: mapped(item, change, (*path, key)) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [mapped(item, change, (*path, number)) for number, item in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return change(tree, path)


def leaves(tree: Any) -> Iterator[tuple[Path, Any]]:
    """Yield (path, leaf) in the tree's order."""
    found: list[tuple[Path, Any]] = []
    mapped(tree, lambda leaf, path: found.append((path, leaf)))
    yield from found


def leaf_at(tree: Any, path: Path) -> Any:
    """Return the item at `path`; None if there is none."""
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree
