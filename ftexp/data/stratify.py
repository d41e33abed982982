"""Seeded, disjoint, stratified splits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ftexp.data.order import Int64s
from ftexp.data.targets import Labels, strata


def stratified_split(labels: Labels, fractions: Sequence[float], seed: int) -> list[Int64s]:
    """Split indices into one part per fraction and the rest, in the same proportions for each class (see `strata`).

    Args:
        labels: labels of the samples.
        fractions: share of each part, e.g. (val_fraction, test_fraction).
        seed: seed of the shuffle within each class.

    Returns:
        Sorted indices: [rest, part of fractions[0], ...]. The parts are disjoint and together contain all samples.
    """
    rng = np.random.default_rng(seed)
    parts: list[list[Int64s]] = [[] for _ in range(len(fractions) + 1)]
    groups = strata(labels)
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        # cumulative rounding keeps every class within one sample of its share, and leaves at least one in the rest
        cuts = np.floor(np.cumsum(fractions) * len(members) + 0.5).astype(int)
        cuts = np.minimum(cuts, max(len(members) - 1, 0))
        for part, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(members)], strict=True)):
            parts[(part + 1) % len(parts)].append(members[start:stop])
    return [np.sort(np.concatenate(part)) if part else np.empty(0, np.int64) for part in parts]
