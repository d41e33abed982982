"""Evaluation on data other than a run's: classes are matched with the model's by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ftexp.errors import ConfigError

_MAX_SHOWN = 5  # names of classes in a message


class MatchedClasses:
    """Maps labels of other data to the model's labels; excludes samples of classes that the model lacks."""

    def __init__(self, known: Sequence[str], found: Sequence[str]) -> None:
        """Match the model's class names, `known`, with the data's, `found`; ConfigError if none is in both."""
        self._found = list(found)
        self.missing = [name for name in known if name not in found]
        self.new = [name for name in found if name not in known]
        self.excluded = Counter[str]()  # new class -> number of excluded samples
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
