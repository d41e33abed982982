"""Names of hooks, and what a hook is. Imports neither torch nor timm: the driver knows hooks by name only."""

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
    """The run that a hook belongs to, on one rank. The objects are those that train: a hook reads them.

    `request_stop(reason)` ends the run after the step just done, as if it were its last: with an evaluation, a
    checkpoint and the test. What rank 0 requests in `after_step` or `after_evaluation` counts, on all ranks.
    """

    request_stop: Callable[[str], None]


class Hook:
    """Something of the user's that watches a run. Subclasses override what they need; made once per attempt.

    Every rank calls each point at the same steps. After a failure, steps since the last checkpoint are done again, and
    so are their points; `state_dict` is what makes a hook's counting come out the same.
    """

    def __init__(self, context: HookContext) -> None:
        """Subclasses may take keyword arguments, those of `hooks.<name>`."""
        self.context = context

    def after_step(self) -> None:
        """Called after each optimiser step, before what is logged, evaluated and saved at it."""

    def after_evaluation(self, step: int, epoch: int) -> None:
        """Called once `context.progress.metrics` holds what the validation split gave for the weights of `step`.

        With train.eval=beside that is an earlier step than `context.progress.step`.
        """

    def before_save(self) -> None:
        """Called before a checkpoint of the step is made."""

    def at_end(self) -> None:
        """Called after the test. No checkpoint holds what it changes."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the hook: plain data, as for `State`; rank 0's is saved."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; called on every rank, unless the checkpoint is older than the hook."""


STOPPING = "early_stopping"  # the name of its state
HookClass = type[Hook]
C = TypeVar("C", bound=HookClass)
_hooks: Registry[HookClass] = Registry("hooks")


def register_hook(name: str) -> Callable[[C], C]:
    """Class decorator: makes a subclass of `Hook` available as `hooks.<name>`, with keyword arguments below it."""

    def decorate(hook_class: C) -> C:
        if not (isinstance(hook_class, type) and issubclass(hook_class, Hook)):
            raise ValueError(f"hook '{name}' must be a subclass of ftexp.plugins.Hook")
        if name == STOPPING:
            raise ValueError(f"hook '{name}' is ftexp's own, see the group stopping: choose another name")
        _hooks.register(name)(hook_class)
        return hook_class

    return decorate


def hook_class(name: str) -> HookClass:
    """Return what was registered under `name`."""
    return _hooks.get(name)


def check_hooks(hooks: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UnknownNameError for a name that no plug-in has, ConfigError for arguments that a hook doesn't take."""
    for name, arguments in hooks.items():
        try:
            inspect.signature(_hooks.get(name)).bind(None, **arguments)
        except TypeError as error:
            raise ConfigError(f"hooks.{name}={dict(arguments)} doesn't fit the hook's arguments: {error}") from None
