"""The hooks of a run, called together, and their requests to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ftexp.config.fingerprint import stopping_rules
from ftexp.job.context import shared_fields
from ftexp.job.early_stopping import EarlyStopping
from ftexp.job.hook_registry import STOPPING, Hook, HookContext, hook_class
from ftexp.wire import events
from ftexp.wire.messages import Happened

if TYPE_CHECKING:
    from ftexp.config.schema import Config
    from ftexp.job.group import ProcessGroup
    from ftexp.job.learner import Learner
    from ftexp.job.progress import Progress
    from ftexp.wire.channel import Channel


class Hooks:
    """Calls each hook that overrides a point, in the config's order; early stopping comes last."""

    def __init__(self, config: Config, group: ProcessGroup, learner: Learner, progress: Progress, channel: Channel):
        self._group, self._progress, self._channel = group, progress, channel
        self._rules = stopping_rules(config)
        self._requested: str | None = None
        context = HookContext(**shared_fields(config, group, learner, progress), request_stop=self._request_stop)
        self._hooks: dict[str, Hook] = {name: hook_class(name)(context, **own) for name, own in config.hooks.items()}
        if config.stopping.metric is not None:
            self._hooks[STOPPING] = EarlyStopping(context)

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def after_step(self) -> None:
        """Call the hooks' `after_step`; collective if a hook has it."""
        if hooks := self._with(Hook.after_step):
            for hook in hooks:
                hook.after_step()
            self._decide()

    def after_evaluation(self, step: int, epoch: int) -> None:
        """Call the hooks' `after_evaluation`; collective if a hook has it."""
        if hooks := self._with(Hook.after_evaluation):
            for hook in hooks:
                hook.after_evaluation(step, epoch)
            self._decide()

    def before_save(self) -> None:
        """Call the hooks' `before_save`."""
        for hook in self._with(Hook.before_save):
            hook.before_save()

    @property
    def change_before_saves(self) -> bool:
        """Whether hooks may change the state just before it is saved."""
        return bool(self._with(Hook.before_save))

    def at_end(self) -> None:
        """Call the hooks' `at_end`."""
        for hook in self._with(Hook.at_end):
            hook.at_end()

    def _with(self, point: Callable[..., None]) -> list[Hook]:
        name = point.__name__
        return [hook for hook in self._hooks.values() if getattr(type(hook), name) is not point]

    def _request_stop(self, reason: str) -> None:
        self._requested = reason

    def _decide(self) -> None:
        """End the run after this step if rank 0 has requested it; collective."""
        if self._group.agree(int(self._requested is not None)) and self._progress.stopped is None:
            self._stop(self._group.agree_on(self._requested))
        self._requested = None

    def _stop(self, reason: str) -> None:
        progress = self._progress
        was_last, progress.stopped = progress.finished, reason
        if self._group.rank == 0 and not was_last:
            self._channel.send(Happened(events.StoppedEarly(progress.step, progress.epoch, reason, self._rules)))

    def state_dict(self) -> dict[str, Any]:
        """Return the hooks' states, the reason of a stop, and the rules for stopping."""
        states = {name: hook.state_dict() for name, hook in self._hooks.items()}
        return {"stopped": self._progress.stopped, "rules": self._rules, "hooks": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the states; a run that was stopped continues if the rules for stopping have changed since."""
        for name, hook in self._hooks.items():
            if name in state["hooks"]:
                hook.load_state_dict(state["hooks"][name])
        self._progress.stopped = None
        if state["stopped"] is not None and state["rules"] == self._rules:
            self._stop(state["stopped"])
