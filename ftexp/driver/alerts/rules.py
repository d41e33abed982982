"""Rules for alerts: functions of a run's events and of the time since its last new step, without I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ftexp.config.schema import NotifyConfig
from ftexp.counting import counted
from ftexp.rundir.state import RunState
from ftexp.wire import events


@dataclass(frozen=True)
class Alert:
    """An alert to an operator, sent once."""

    kind: str  # one of ftexp.config.schema.ALERTS
    text: str  # a sentence without the run's name
    details: dict[str, Any] = field(default_factory=dict)


class Rules:
    """Decides on the alerts of one invocation. `state`: the run's state, which the records keep up to date."""

    def __init__(self, config: NotifyConfig, state: RunState, now: float) -> None:
        self._config, self._state = config, state
        self._farthest, self._since = state.farthest_step, now
        self._is_stalled = self._saves_fail = False
        self._stragglers: set[tuple[int, str | None]] = set()  # (rank, node) pairs that had an alert

    def after(self, event: events.Event) -> Alert | None:
        """Return the alert that follows from an event, if any."""
        match event:
            case events.Failed(error):
                return Alert("gave_up", f"gave up at step {self._state.step}: {error}", {"error": error})
            case events.Finished():
                return Alert("finished", f"finished at step {self._state.step}", {"metrics": self._metrics()})
            case events.Ready():
                return self._recovered()
            case events.CheckpointFailed(step, error):
                is_news, self._saves_fail = not self._saves_fail, True
                text = f"the checkpoint of step {step} could not be saved: {error}"
                return Alert("failing_saves", text, {"error": error}) if is_news else None
            case events.CheckpointSaved():
                self._saves_fail = False
            case events.Straggler():
                return self._straggler(event)
        return None

    def at(self, now: float) -> Alert | None:
        """Return an alert if there was no new step for too long; it is repeated only after a new step."""
        if self._state.farthest_step != self._farthest:
            self._farthest, self._since, self._is_stalled = self._state.farthest_step, now, False
        limit_s, still_s = self._config.no_progress_s, now - self._since
        if limit_s is None or still_s <= limit_s or self._is_stalled:
            return None
        self._is_stalled = True
        text = f"no new step for {still_s:.0f} s, since step {self._farthest}"
        return Alert("no_progress", text, {"seconds": round(still_s, 1), "attempts": self._state.attempts})

    def _straggler(self, event: events.Straggler) -> Alert | None:
        """Return an alert the first time that a rank on a node is slow."""
        who = (event.rank, event.node)
        if who in self._stragglers:
            return None
        self._stragglers.add(who)
        return Alert("straggler", described(event), event.fields)

    def _recovered(self) -> Alert | None:
        """Return an alert at the first recovery beyond `notify.max_recoveries`; none at later ones."""
        limit, recovered = self._config.max_recoveries, [each for each in self._state.failures if _is_over(each)]
        if limit is None or len(recovered) != limit + 1 or recovered[-1] is not self._state.failures[-1]:
            return None
        causes = sorted({failure.cause for failure in recovered})
        times = counted(len(recovered), "time")
        text = f"recovered {times}, more than notify.max_recoveries={limit}: {', '.join(causes)}"
        return Alert("recoveries", text, {"recoveries": len(recovered), "causes": causes})

    def _metrics(self) -> dict[str, float]:
        return {name: value for name, value in self._state.metrics["last"].items() if value is not None}


def described(event: events.Straggler) -> str:
    """Return a sentence about a straggler, for messages."""
    where = f" on {event.node}" if event.node is not None else ""
    return (
        f"rank {event.rank}{where} stays slow: {event.own_ms:.1f} ms a step without waiting for others, "
        f"{event.ratio:.1f} times the median, most of the excess in {event.part}"
    )


def _is_over(failure: Any) -> bool:
    """Return whether training continued after a failure."""
    return failure.steps_replayed is not None
