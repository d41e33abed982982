"""Evaluating on other data than a run's: their classes are matched by name with those of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ftexp.errors import ConfigError

_MAX_SHOWN = 5  # names of classes in a message


class MatchedClasses:
    """Turns the labels of other data into those of the model; excludes samples of classes that the model lacks."""

    def __init__(self, known: Sequence[str], found: Sequence[str]) -> None:
        """Take the class names of the model and of the data; ConfigError if they have none in common."""
        self._found = list(found)
        self.missing = [name for name in known if name not in found]
        self.new = [name for name in found if name not in known]
        self.excluded = Counter[str]()  # samples of each new class
        if len(self.missing) == len(known):
            raise ConfigError(
                f"the data have no class of the run: they have {_some(found)}, and the model knows {_some(known)}; "
                "classes are matched by name, so rename those of the data"
            )
        numbers = {name: number for number, name in enumerate(known)}
        self._numbers = torch.tensor([numbers.get(name, -1) for name in found])

    def batches(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) with the model's class numbers, without samples of new classes."""
        for images, labels in batches:
            numbers = self._numbers.to(labels.device)[labels]
            known = numbers >= 0
            self.excluded.update(self._found[label] for label in labels[~known].tolist())
            if known.any():
                yield images[known], numbers[known]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more
