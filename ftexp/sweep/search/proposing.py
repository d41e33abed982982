"""The next point to try: a pure function of the space, the seed, the proposal's number and what is known.

Ray Tune's searchers and schedulers are used as libraries; its Tuner is not. A Tuner keeps trials under names of its own
with a pickle of its own state, runs each as an actor, and starts a search anew where that pickle is torn; here a trial
is the process, run directory and ledger entry that it is in every sweep, and there is no state of a search at all. Each
proposal is made by a searcher that is built for it, is told everything that is known, and has a seed of its own. So a
sweep that goes on after a kill proposes what it would have proposed.

Optuna is reached through `ray.tune.search.optuna`. Trials that run are points that it was asked to evaluate; until they
end it assumes the worst of them (Optuna's constant liar), so that trials side by side differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ftexp.rundir.state import FINISHED, RUNNING
from ftexp.rundir.sweep_record import STOPPED
from ftexp.sweep.search.space import Dimension, Options, all_points, num_points, plain_key

_MOST_DRAWS = 20  # before the points that are left are counted out
_OBJECTIVE = "objective"


@dataclass(frozen=True)
class Known:
    """What is known of an earlier proposal."""

    words: dict[str, str]  # {plain key: word}
    status: str  # RUNNING, FINISHED, STOPPED, or FAILED, which tells nothing
    value: float | None = None  # the objective, of one that has finished
    curve: list[float] = field(default_factory=list)  # of one that was stopped; empty: it is as bad as can be


def propose(
    space: Sequence[Dimension], search: str, mode: str, seed: int, number: int, known: Sequence[Known]
) -> dict[str, str] | None:
    """Proposal `number`, {plain key: word}, unlike all that are known; None if no other is left.

    search: random or tpe. mode: max or min.
    """
    taken = {tuple(sorted(each.words.items())) for each in known}
    for draw in range(_MOST_DRAWS):
        own_seed = int.from_bytes(hashlib.sha256(f"{seed}/{number}/{draw}".encode()).digest()[:4], "big")
        values = _tpe(space, mode, own_seed, known) if search == "tpe" else _random(space, own_seed)
        words = {plain_key(each): each.word(value) for each, value in zip(space, values, strict=True)}
        if tuple(sorted(words.items())) not in taken:
            return words
    return _first_left(space, taken)


def _first_left(space: Sequence[Dimension], taken: set[tuple[tuple[str, str], ...]]) -> dict[str, str] | None:
    if num_points(space) is None:  # twenty draws that were there already: it is no wider than its digits
        return None
    return next((point for point in all_points(space) if tuple(sorted(point.items())) not in taken), None)


def _random(space: Sequence[Dimension], seed: int) -> list[Any]:
    import numpy as np

    generator = np.random.default_rng(seed)
    return [_domain(dimension).sample(random_state=generator) for dimension in space]


def _tpe(space: Sequence[Dimension], mode: str, seed: int, known: Sequence[Known]) -> list[Any]:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = [str(number) for number in range(len(space))]  # a key may hold what Ray Tune takes for a path

    def point(words: dict[str, str]) -> dict[str, Any]:
        return {name: each.value(words[plain_key(each)]) for name, each in zip(names, space, strict=True)}

    running = [point(each.words) for each in known if each.status == RUNNING]
    searcher = OptunaSearch(
        OptunaSearch.convert_search_space({name: _domain(each) for name, each in zip(names, space, strict=True)}),
        metric=_OBJECTIVE,
        mode=mode,
        points_to_evaluate=running or None,
        sampler=optuna.samplers.TPESampler(seed=seed),
    )
    for each in known:
        if each.status in (FINISHED, STOPPED):
            # Optuna ranks what was pruned below the others, by how far it came, and then by its last value
            searcher.add_evaluated_point(
                point(each.words), each.value, pruned=each.status == STOPPED, intermediate_values=each.curve or None
            )
    for number in range(len(running)):
        searcher.suggest(f"running {number}")
    drawn = searcher.suggest("next")
    return [drawn[name] for name in names]


def _domain(dimension: Dimension) -> Any:
    """As Ray Tune names it. Its whole numbers leave the upper end out."""
    from ray import tune

    if isinstance(dimension, Options):
        count = len(dimension.words)
        return tune.randint(0, count) if dimension.is_ordered else tune.choice(list(range(count)))
    low, high = dimension.low, dimension.high
    if dimension.is_whole:
        return tune.lograndint(low, high + 1) if dimension.is_log else tune.randint(low, high + 1)
    return tune.loguniform(low, high) if dimension.is_log else tune.uniform(low, high)
