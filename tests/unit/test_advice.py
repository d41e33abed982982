"""What the driver does about a cluster that changes under a run, on nodes that the test makes up."""

import time
from types import SimpleNamespace

import pytest

from ftexp.cluster.resources import Workers
from ftexp.config.schema import Config
from ftexp.driver import advice
from ftexp.wire.events import ResizeExpected
from ftexp.wire.messages import Save

FORKS = {"py_executable": "fork"}


class Hub:
    """Keeps what it is given."""

    def __init__(self):
        self.events, self.told = [], []

    def handle(self, message):
        self.events.append(message.event)

    def broadcast(self, message):
        self.told.append(message)


def wait_until(is_so):
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def cluster(monkeypatch):
    """Nodes of one worker each, by id; and those that were warmed, with the runtime env."""
    nodes, warmed = {"first"}, []
    monkeypatch.setattr(advice, "_LOOK_EVERY_S", 0.005)
    monkeypatch.setattr(advice, "living_nodes", lambda: set(nodes))
    monkeypatch.setattr(advice, "num_possible", lambda workers: min(len(nodes), workers.max_workers))
    monkeypatch.setattr(advice, "warm_node", lambda *words: warmed.append(words))
    return SimpleNamespace(nodes=nodes, warmed=warmed)


@pytest.fixture
def advise():
    """Advise a run with this many workers and this runtime env on the first node; return its hub."""
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
    time.sleep(0.05)
    assert (hub.events, hub.told, cluster.warmed) == ([], [], [])
    cluster.nodes.add("second")
    wait_until(lambda: hub.told)
    time.sleep(0.05)
    assert cluster.warmed == [("second", FORKS)]
    assert hub.events == [ResizeExpected(2)]
    assert hub.told == [Save()], "the next one is due in five seconds"
    cluster.nodes.remove("second")
    time.sleep(0.05)
    cluster.nodes.add("second")
    wait_until(lambda: len(cluster.warmed) == 2)


def test_a_node_that_joins_is_left_alone_where_workers_start_plainly(cluster, advise):
    hub = advise((1, 2), {})
    cluster.nodes.add("second")
    wait_until(lambda: hub.told)
    assert cluster.warmed == []


def test_a_run_of_a_fixed_size_looks_for_no_room(cluster, advise):
    hub = advise(1, FORKS)
    cluster.nodes.add("second")
    time.sleep(0.05)
    assert (hub.events, hub.told, cluster.warmed) == ([], [], [])
