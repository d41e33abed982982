"""The content of extra_state.pt: named states, chosen by `checkpoint.extra_state`. Knows names, never types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ftexp.errors import StateError
from ftexp.job.context import TrainingContext
from ftexp.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ftexp.job.hooks import Hooks
    from ftexp.wire.channel import Channel


@dataclass(frozen=True, kw_only=True)
class StateContext(TrainingContext):
    """The run that a state belongs to, on one rank, with the objects that training uses.

    States are built before a checkpoint is loaded: `progress` is at step 0, and the model has its initial weights.
    Model and optimiser are loaded before the states.
    """

    scheduler: Any  # a timm scheduler; step_update(n) is called after n steps
    scaler: torch.amp.GradScaler  # disabled unless train.precision=fp16
    channel: Channel  # to the driver
    hooks: Hooks
    projection: nn.Module | None = None  # from the model's features to the teacher's width, with distill=features


class State(Protocol):
    """State that a run must not lose. Built once per attempt, with a `StateContext` as its only argument.

    `state_dict` is called on every rank, and rank 0's result is saved. It must be plain (numbers, text, tensors, lists,
    tuples, dicts), since it is read back with `weights_only=True`. `load_state_dict` receives it on every rank.

    A class may also have `optional = True` (a checkpoint may lack the state, and a run may ignore a saved one), and
    `migrate(state, version)`, a static method that converts a state of an older `version` to the current one.
    """

    version: int

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


StateClass = Callable[[StateContext], State]
C = TypeVar("C", bound=StateClass)

_states: Registry[StateClass] = Registry("checkpoint.extra_state")


def register_state(name: str) -> Callable[[C], C]:
    """Return a class decorator that registers a state for `checkpoint.extra_state` under `name`."""

    def decorate(state_class: C) -> C:
        if not isinstance(getattr(state_class, "version", None), int):
            raise ValueError(f"state '{name}': give the class a whole number `version`, raised when its format changes")
        _states.register(name)(state_class)
        return state_class

    return decorate


def check_names(names: list[str]) -> None:
    """Raise UnknownNameError if any of `names` is not registered."""
    for name in names:
        _states.get(name)


class ExtraState:
    """The states of one run, by their names in its config."""

    def __init__(self, names: list[str], context: StateContext) -> None:
        self._states = {name: _states.get(name)(context) for name in names}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return {name: state}; collective, since a state may sum over ranks."""
        return {name: state.state_dict() for name, state in self._states.items()}

    def versions(self) -> dict[str, int]:
        """Return {name: version of its format}."""
        return {name: state.version for name, state in self._states.items()}

    def load(self, saved: dict[str, dict[str, Any]], versions: dict[str, int], written_by: str) -> None:
        """Restore every state; StateError, naming the config that wrote them, if names or versions disagree."""
        for name in saved:
            if name not in self._states and not (name in _states and _is_optional(_states.get(name))):
                raise StateError(
                    f"the checkpoint holds a state '{name}' that this run would drop; {written_by} saved it with "
                    f"checkpoint.extra_state=[{','.join(saved)}]. Use the same list"
                    + ("" if name in _states else f", and the plugins=[...] that register '{name}'")
                )
        for name, state in self._states.items():
            if name not in saved:
                if not _is_optional(state):
                    raise StateError(
                        f"checkpoint.extra_state names '{name}', which the checkpoint does not hold; {written_by} "
                        f"saved checkpoint.extra_state=[{','.join(saved)}]. Use that list, or start a new run"
                    )
                continue
            state.load_state_dict(self._migrated(name, saved[name], versions.get(name, 1), written_by))

    def _migrated(self, name: str, saved: dict[str, Any], version: int, written_by: str) -> dict[str, Any]:
        state = self._states[name]
        if version == state.version:
            return saved
        migrate = getattr(state, "migrate", None)
        if version > state.version or migrate is None:
            raise StateError(
                f"state '{name}' was saved in version {version} of its format by {written_by}, and this code "
                f"reads version {state.version}"
                + (": update ftexp or the plug-in" if version > state.version else f": give '{name}' a migrate()")
            )
        migrated: dict[str, Any] = migrate(saved, version)
        return migrated


def _is_optional(state: object) -> bool:
    return bool(getattr(state, "optional", False))
