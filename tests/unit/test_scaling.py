"""Number of workers and their resources."""

import os

import pytest
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

import ftexp.cluster.resources
from ftexp.cluster.ray_cluster import prepare_environment
from ftexp.cluster.resources import Workers, decide_workers, decoding_cpus, living_nodes, num_possible
from ftexp.config.schema import Config, DataConfig, ScalingConfig
from ftexp.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch):
    """Function that sets the number of GPUs that this machine appears to have; initially 0."""

    def set_to(number):
        monkeypatch.setattr(ftexp.cluster.resources, "num_local_gpus", lambda: number)

    set_to(0)
    return set_to


@pytest.mark.parametrize(
    ("num_cpus", "num_workers", "threads"), [(1, 1, 1), (2, 2, 1), (3, 2, 1), (4, 2, 2), (8, 2, 4), (64, 2, 8)]
)
def test_auto_without_gpus_takes_two_workers_at_most_and_shares_the_cores(num_cpus, num_workers, threads, gpus):
    assert decide_workers(ScalingConfig(), num_cpus) == Workers(num_workers, False, {"CPU": threads})


@pytest.mark.parametrize(
    ("num_cpus", "num_gpus", "threads"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (64, 4, 8), (64, 16, 4)]
)
def test_auto_with_gpus_takes_a_worker_for_each(num_cpus, num_gpus, threads, gpus):
    gpus(num_gpus)
    assert decide_workers(ScalingConfig(), num_cpus) == Workers(num_gpus, True, {"CPU": threads, "GPU": 1})


def test_gpus_are_left_alone_where_use_gpu_is_false(monkeypatch):
    monkeypatch.setattr(ftexp.cluster.resources, "num_local_gpus", lambda: pytest.fail("asked for GPUs"))
    assert decide_workers(ScalingConfig(use_gpu=False), 8) == Workers(2, False, {"CPU": 4})


@pytest.mark.parametrize(("num_workers", "threads"), [(1, 8), (2, 8), (16, 4), (64, 1)])
def test_a_number_of_workers_is_kept(num_workers, threads, gpus):
    assert decide_workers(ScalingConfig(num_workers=num_workers), 64) == Workers(num_workers, False, {"CPU": threads})


def test_an_elastic_range_becomes_a_pair_and_threads_are_shared_by_the_most(gpus):
    workers = decide_workers(ScalingConfig(num_workers=[1, 2]), 8)
    assert workers == Workers((1, 2), False, {"CPU": 4})
    assert type(workers.num_workers) is tuple
    assert workers.max_workers == 2
    assert str(workers) == "1 to 2 × (4 CPU)"


def test_resources_that_are_given_are_kept(gpus):
    gpus(1)
    config = ScalingConfig(num_workers=2, resources_per_worker={"GPU": 0.5, "memory": 1e9})
    workers = decide_workers(config, 8)
    assert workers.resources_per_worker == {"CPU": 4, "GPU": 0.5, "memory": 1e9}
    assert config.resources_per_worker == {"GPU": 0.5, "memory": 1e9}  # the config is unchanged


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (ScalingConfig(num_workers=3), "scaling.num_workers=3 with 1 CPU each want more than the 2 cores"),
        (ScalingConfig(num_workers=[1, 3]), "scaling.num_workers=3 with 1 CPU each want more than the 2 cores"),
        (
            ScalingConfig(num_workers=1, resources_per_worker={"CPU": 4}),
            "scaling.num_workers=1 with 4 CPU each want more than the 2 cores",
        ),
    ],
)
def test_more_cpu_than_there_is_is_refused_and_the_way_out_named(config, wanted, gpus):
    with pytest.raises(ConfigError) as raised:
        decide_workers(config, 2)
    assert wanted in str(raised.value)
    assert "scaling.resources_per_worker={CPU: 0.5}" in str(raised.value)


def test_the_way_out_that_the_error_names_works(gpus):
    workers = decide_workers(ScalingConfig(num_workers=4, resources_per_worker={"CPU": 0.5}), 2)
    assert workers == Workers(4, False, {"CPU": 0.5})


def test_on_a_cluster_nothing_is_read_from_this_machine(monkeypatch):
    monkeypatch.setattr(ftexp.cluster.resources, "num_local_gpus", lambda: pytest.fail("asked for this machine's GPUs"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: pytest.fail("asked for this machine's cores"))
    joined = {"num_workers": 500, "address": "auto"}
    assert decide_workers(ScalingConfig(use_gpu=True, **joined)) == Workers(500, True, {"CPU": 1, "GPU": 1})
    assert decide_workers(ScalingConfig(use_gpu=False, **joined)) == Workers(500, False, {"CPU": 1})


def test_cores_are_those_that_this_process_may_use(monkeypatch, gpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4, 5})
    assert decide_workers(ScalingConfig()) == Workers(2, False, {"CPU": 3})


def test_the_environment_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setattr(os, "environ", {"RAY_CHDIR_TO_TRIAL_DIR": "1"})
    prepare_environment(Config())
    assert os.environ["RAY_CHDIR_TO_TRIAL_DIR"] == "1"
    assert os.environ["RAY_TRAIN_V2_ENABLED"] == "1"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize(("num_workers", "start_timeout_s"), [(2, None), ([1, 2], "5")])
def test_on_a_cluster_only_the_controller_of_the_run_is_tuned(monkeypatch, num_workers, start_timeout_s):
    monkeypatch.setattr(os, "environ", {})
    prepare_environment(Config(scaling=ScalingConfig(address="auto", num_workers=num_workers)))
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.5"
    assert os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] == "60"
    assert os.environ.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S") == start_timeout_s
    assert "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER" not in os.environ
    # Ray passes these on to the controller, whatever the environment of the cluster
    assert {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S",
    } <= ENV_VARS_TO_PROPAGATE


def test_verbose_leaves_rays_output_alone(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    prepare_environment(Config(verbose=True))
    assert "RAY_LOG_TO_STDERR" not in os.environ
    prepare_environment(Config())
    assert os.environ["RAY_LOG_TO_STDERR"] == "0"


def test_there_is_room_for_as_many_workers_as_fit_on_living_nodes_and_no_more_than_wanted(monkeypatch):
    import ray

    nodes = [
        {"Alive": True, "Resources": {"CPU": 5.0, "GPU": 2.0}},
        {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}},
        {"Alive": True, "Resources": {"CPU": 3.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)

    def room(most, **resources):
        return num_possible(Workers((1, most), use_gpu=False, resources_per_worker=resources), living_nodes())

    assert room(9, CPU=2) == 2 + 1  # per node, not 8 / 2
    assert room(9, CPU=0.5, GPU=0) == 9
    assert room(99, CPU=0.5, GPU=0) == 16
    assert room(9, CPU=2, GPU=1) == 2
    assert room(9, CPU=1, TPU=1) == 0


@pytest.fixture
def cluster(monkeypatch):
    """Function that sets the number of CPUs that Ray appears to have."""
    import ray

    return lambda num_cpus: monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(num_cpus)})


@pytest.mark.parametrize(
    ("num_workers", "cpus_each", "taken", "there"),
    [(4, 1, "4 workers take 4", 4), (2, 2, "2 workers take 4", 4.5), (3, 1, "3 workers take 3", 2)],
)
def test_workers_that_leave_no_cpu_to_decode_on_are_refused_and_the_ways_out_named(
    cluster, num_workers, cpus_each, taken, there
):
    cluster(there)
    with pytest.raises(ConfigError) as raised:
        decoding_cpus(Config(), Workers(num_workers, False, {"CPU": cpus_each}))
    assert f"{taken} of the cluster's {there:g}: take fewer workers" in str(raised.value)
    assert "scaling.resources_per_worker={CPU: 0.5}, or data.feed=cached" in str(raised.value)


@pytest.mark.parametrize(
    ("workers", "configured", "expected"),
    [
        (Workers(2, False, {"CPU": 1}), None, 6),
        (Workers(8, False, {"CPU": 0.5}), None, 4),
        (Workers((1, 8), False, {"CPU": 1}), None, 7),  # the CPUs left by min_workers
        (Workers(2, True, {"GPU": 1}), None, 6),
        (Workers(2, False, {"CPU": 1}), 3, 3),
    ],
)
def test_what_workers_leave_decodes_unless_a_number_is_given(cluster, workers, configured, expected):
    cluster(8)
    assert decoding_cpus(Config(data=DataConfig(decode_cpus=configured)), workers) == expected
