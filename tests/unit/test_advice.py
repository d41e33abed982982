"""The driver's advice to a run whose cluster changes, on simulated nodes."""

import functools
import threading
from types import SimpleNamespace

import pytest

from ftexp.cluster.resources import Workers
from ftexp.config.schema import Config
from ftexp.driver import advice
from ftexp.wire.events import ResizeExpected
from ftexp.wire.messages import Save
from tests.support.processes import wait_until

FORKS = {"py_executable": "fork"}
wait_soon = functools.partial(wait_until, every_s=0.005, within_s=20)


class Hub:
    """Records events and broadcasts."""

    def __init__(self):
        self.events, self.told = [], []

    def handle(self, message):
        self.events.append(message.event)

    def broadcast(self, message):
        self.told.append(message)


@pytest.fixture
def cluster(monkeypatch):
    """Simulated nodes with room for one worker each, by id; and the warmed nodes, with the runtime env."""
    nodes, warmed, looks = {"first"}, [], []

    def num_possible(workers, living):
        looks.append(len(living))
        return min(len(living), workers.max_workers)

    def looked_at():
        """Wait until the advice has seen the current nodes."""
        before = len(looks)
        wait_soon(lambda: len(looks) >= before + 3)

    monkeypatch.setattr(advice, "_LOOK_EVERY_S", 0.005)
    monkeypatch.setattr(advice, "living_nodes", lambda: [{"NodeID": node} for node in nodes])
    monkeypatch.setattr(advice, "num_possible", num_possible)
    monkeypatch.setattr(advice, "warm_node", lambda *words: warmed.append(words))
    return SimpleNamespace(nodes=nodes, warmed=warmed, looks=looks, looked_at=looked_at)


@pytest.fixture
def advise():
    """Function that advises a run with this many workers and this runtime env on the first node; returns its hub."""
    begun = []

    def begin(num_workers, runtime_env):
        workers = Workers(num_workers, use_gpu=False, resources_per_worker={"CPU": 1}, runtime_env=runtime_env)
        group, hub = SimpleNamespace(world_size=1, waiting_s=0.0), Hub()
        begun.append(advice.Advice(SimpleNamespace(workers=workers, config=Config()), group, hub))
        return hub

    yield begin
    for each in begun:
        each.stop()


def test_an_elastic_run_saves_and_warms_a_node_that_joins_once(cluster, advise):
    hub = advise((1, 2), FORKS)
    cluster.looked_at()
    assert (hub.events, hub.told, cluster.warmed) == ([], [], [])
    cluster.nodes.add("second")
    wait_soon(lambda: hub.told)
    cluster.looked_at()
    assert cluster.warmed == [("second", FORKS)]
    assert hub.events == [ResizeExpected(2)]
    assert hub.told == [Save()], "the next one is due in five seconds"
    cluster.nodes.remove("second")
    cluster.looked_at()
    cluster.nodes.add("second")
    wait_soon(lambda: len(cluster.warmed) == 2)


def test_a_node_that_joins_is_left_alone_where_workers_start_plainly(cluster, advise):
    hub = advise((1, 2), {})
    cluster.nodes.add("second")
    wait_soon(lambda: hub.told)
    assert cluster.warmed == []


def test_a_run_of_a_fixed_size_looks_for_no_room(cluster, advise):
    running = set(threading.enumerate())
    hub = advise(1, FORKS)
    cluster.nodes.add("second")
    assert [thread.name for thread in set(threading.enumerate()) - running] == ["_report_waiting"]
    assert (hub.events, hub.told, cluster.warmed, cluster.looks) == ([], [], [], [])
