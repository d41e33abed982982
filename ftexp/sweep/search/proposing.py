"""The next point to try: a pure function of the space, the seed, the proposal's number and the known trials.

Optuna's samplers propose; its studies are not kept. For each proposal, a new study is built from all known trials, with
a seed of its own. So a sweep that is resumed after a kill proposes what it would have proposed without it.

Running trials are in the study as running. Until they end, TPE assumes the worst of them (Optuna's constant liar), so
that parallel trials differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from ftexp.rundir.state import FINISHED, RUNNING
from ftexp.rundir.sweep_record import STOPPED
from ftexp.sweep.search.space import Dimension, Options, all_points, num_points, plain_key

_MAX_DRAWS = 20  # draws before the remaining points are enumerated
# Optuna ranks pruned trials below complete ones: by their last step, then by the value there
_STATES = {RUNNING: TrialState.RUNNING, FINISHED: TrialState.COMPLETE, STOPPED: TrialState.PRUNED}


@dataclass(frozen=True)
class Known:
    """An earlier proposal and its result."""

    words: dict[str, str]  # {plain key: word}
    status: str  # RUNNING, FINISHED, STOPPED, or FAILED, which has no objective
    value: float | None = None  # the objective of a finished trial
    curve: list[float] = field(default_factory=list)  # curve of a stopped trial; empty: the worst possible


def propose(
    space: Sequence[Dimension], search: str, mode: str, seed: int, number: int, known: Sequence[Known]
) -> dict[str, str] | None:
    """Return proposal `number`, {plain key: word}, different from all known ones; None if no other is left.

    search: random or tpe. mode: max or min.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    own_seed = int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")
    sampler = optuna.samplers.TPESampler if search == "tpe" else optuna.samplers.RandomSampler
    study = optuna.create_study(direction=f"{mode}imize", sampler=sampler(seed=own_seed))
    distributions = {plain_key(each): _distribution(each) for each in space}
    study.add_trials([_trial(space, distributions, each) for each in known if each.status in _STATES])
    taken = {_point(each.words) for each in known}
    for _ in range(_MAX_DRAWS):
        drawn = study.ask(distributions).params  # a taken point stays in the study as running, and is avoided then
        words = {plain_key(each): each.word(drawn[plain_key(each)]) for each in space}
        if _point(words) not in taken:
            return words
    if num_points(space) is None:  # a real interval so narrow that its rounded values are all taken
        return None
    return next((point for point in all_points(space) if _point(point) not in taken), None)


def _point(words: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(words.items()))


def _trial(space: Sequence[Dimension], distributions: dict[str, BaseDistribution], known: Known) -> FrozenTrial:
    return create_trial(
        state=_STATES[known.status],
        params={plain_key(each): each.value(known.words[plain_key(each)]) for each in space},
        distributions=distributions,
        value=known.value,
        intermediate_values=dict(enumerate(known.curve)),
    )


def _distribution(dimension: Dimension) -> BaseDistribution:
    """Return the distribution of a dimension's values."""
    if isinstance(dimension, Options):
        indices = range(len(dimension.words))
        return IntDistribution(0, indices[-1]) if dimension.is_ordered else CategoricalDistribution(indices)
    kind = IntDistribution if dimension.is_whole else FloatDistribution
    return kind(dimension.low, dimension.high, log=dimension.is_log)
