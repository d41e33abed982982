"""Base class and registry of hooks. Imports neither torch nor timm: the driver knows hooks by name only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ftexp.errors import ConfigError
from ftexp.job.context import TrainingContext
from ftexp.registry import Registry


@dataclass(frozen=True, kw_only=True)
class HookContext(TrainingContext):
    """The run that a hook belongs to, on one rank, with the objects that training uses: a hook reads them.

    `request_stop(reason)` ends the run after the current step, as if it were the last one: with an evaluation, a
    checkpoint and the test. Rank 0's requests in `after_step` or `after_evaluation` apply to all ranks; others' don't.
    """

    request_stop: Callable[[str], None]


class Hook:
    """User code that observes a run. Subclasses override the points that they need; built once per attempt.

    Every rank calls each point at the same steps. After a failure, the steps since the last checkpoint are repeated,
    and so are their points: a hook that counts must save its counts with `state_dict`.
    """

    def __init__(self, context: HookContext) -> None:
        """Keep the context; subclasses may take the keyword arguments of `hooks.<name>`."""
        self.context = context

    def after_step(self) -> None:
        """Called after each optimiser step, before its logging, evaluation and checkpoint."""

    def after_evaluation(self, step: int, epoch: int) -> None:
        """Called once `context.progress.metrics` has the validation metrics of the weights of `step`.

        With train.eval=beside, this step is earlier than `context.progress.step`.
        """

    def before_save(self) -> None:
        """Called before a checkpoint of the step is saved."""

    def at_end(self) -> None:
        """Called after the test. Changes made here are not saved."""

    def state_dict(self) -> dict[str, Any]:
        """Return the hook's state for a checkpoint: plain data, as for `State`; rank 0's is saved."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; called on every rank, unless the checkpoint is older than the hook."""


STOPPING = "early_stopping"  # name of early stopping's state
HookClass = type[Hook]
C = TypeVar("C", bound=HookClass)
_hooks: Registry[HookClass] = Registry("hooks")


def register_hook(name: str) -> Callable[[C], C]:
    """Return a class decorator that registers a subclass of `Hook` as `hooks.<name>`, with its arguments below that."""

    def decorate(hook_class: C) -> C:
        if not (isinstance(hook_class, type) and issubclass(hook_class, Hook)):
            raise ValueError(f"hook '{name}' must be a subclass of ftexp.plugins.Hook")
        if name == STOPPING:
            raise ValueError(f"hook '{name}' is ftexp's own, see the group stopping: choose another name")
        _hooks.register(name)(hook_class)
        return hook_class

    return decorate


def hook_class(name: str) -> HookClass:
    """Return the hook that is registered under `name`."""
    return _hooks.get(name)


def check_hooks(hooks: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UnknownNameError for a name that isn't registered, ConfigError for arguments that a hook doesn't take."""
    for name, arguments in hooks.items():
        try:
            inspect.signature(_hooks.get(name)).bind(None, **arguments)
        except TypeError as error:
            raise ConfigError(f"hooks.{name}={dict(arguments)} doesn't fit the hook's arguments: {error}") from None
