"""The schema of events.jsonl: every line of a run is one of its events, with the right fields and types."""

import dataclasses
import json
import types
import typing

import pytest

from ftexp.rundir.names import EVENTS_FILE
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import RunState
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.wire.events import EVENTS, Event
from ftexp.wire.messages import Happened, from_line, to_line
from tests.support.events import problems

EXAMPLES = {
    str: "x", int: 3, float: 0.5, bool: True, dict[str, typing.Any]: {"a": 1}, list[str]: ["x"], list[int]: [0, 32],
    list[dict[str, typing.Any]]: [{"where": "a.png", "reason": "torn"}],
}  # fmt: skip


def example(kind):
    hints = typing.get_type_hints(kind)
    options = {name: typing.get_args(hint)[0] if None in of(hint) else hint for name, hint in hints.items()}
    return kind(**{name: EXAMPLES[option] for name, option in options.items()})


def of(hint):
    return [None if one is types.NoneType else one for one in typing.get_args(hint)]


def lines_of(storage):
    return [json.loads(line) for line in storage.read_bytes(EVENTS_FILE).decode().splitlines()]


@pytest.mark.parametrize("name", EVENTS)
def test_every_event_is_written_as_its_class_says_whoever_sends_it(tmp_path, name):
    event, record = example(EVENTS[name]), RunRecord(Storage.at(str(tmp_path)), RunState(name="x"), ("loss", "min"))
    record.event(event)
    sent = from_line(to_line(Happened(event)))
    assert sent.event == event
    record.handle(sent)
    own, workers = lines_of(record.storage)
    assert (problems(own), problems(workers)) == ([], [])
    assert {**own, "time": None} == {**workers, "time": None}
    assert workers["time"] == sent.time
    assert own == {**own, "event": name, **dataclasses.asdict(event)}


def test_a_field_that_has_its_default_is_not_written():
    assert events.Chaos("kill_worker", 1, 5).fields == {"fault": "kill_worker", "rank": 1, "step": 5}
    assert events.Chaos("flip_byte", 1, 5, []).fields["damaged"] == []


def test_names_are_those_of_the_classes():
    assert EVENTS["checkpoint_saved"] is events.CheckpointSaved
    assert {type(example(kind)) for kind in EVENTS.values()} == set(Event.__subclasses__())


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"event": "unheard_of"}, "unheard_of is no event"),
        ({"more": 1}, "more is unknown"),
        ({"rank": "1"}, "rank='1' is no"),
        ({"rank": True}, "rank=True is no"),
        ({"reason": None}, "reason=None is no"),
    ],
)
def test_what_is_no_event_is_found(changed, problem):
    line = {"time": 1.0, "event": "slow_data", "attempt": 1, "step": 2, "rank": 1, "reason": "x"}
    assert problems(line) == []
    (found,) = problems({**line, **changed})
    assert problem in found
    assert problems({key: value for key, value in line.items() if key != "rank"}) == ["rank is missing"]
