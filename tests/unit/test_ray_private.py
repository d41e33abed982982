"""Ray's private names. If one of these tests fails after an upgrade, fix ftexp/cluster/ray_private.py."""

import asyncio
import copy
import dataclasses
import inspect
import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import ray.exceptions
import ray.train
import ray.train.torch
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from ftexp.cluster import ray_private
from tests.support.command import DEADLINE_S


def test_the_snapshot_has_the_name_that_is_dropped_before_a_fit():
    assert ray_private.SNAPSHOT == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME


def test_the_nccl_detector_reads_what_is_set_and_leaves_its_findings_where_they_are_looked_for(monkeypatch):
    from ray.train.v2._internal import constants
    from ray.train.v2._internal.callbacks import nccl_ras

    names = {"RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR", "RAY_TRAIN_NCCL_RAS_ACTION"}
    for name in [*names, ray_private._NCCL_POLL_S, ray_private._NCCL_CONFIRM_S]:
        monkeypatch.setenv(name, "")  # so that values set in this test are removed afterwards
        monkeypatch.delenv(name)
    ray_private.detect_nccl_hangs(within_s=30.0)
    trainer = ray.train.torch.TorchTrainer(lambda: None)
    (detector,) = [each for each in trainer._create_default_callbacks() if isinstance(each, nccl_ras.NCCLRASCallback)]
    assert (detector._confirm_duration_s, detector._poll_interval_s) == (30.0, 7.5)
    assert detector._action == constants.NCCL_RAS_ACTION_OBSERVE  # the watchdog kills hung workers
    assert ray_private.NCCL_FINDINGS == constants.HANG_DETECTOR_DIRNAME
    stored = []
    monkeypatch.setattr(nccl_ras, "_upload_to_fs_path", lambda directory, filesystem, path: stored.append(path))
    storage = SimpleNamespace(experiment_fs_path="/runs/first", storage_filesystem=None)
    detector._worker_group = SimpleNamespace(_storage_context=storage)
    detector.dump_ras_query_history("rank 1 is behind")
    assert stored == [f"/runs/first/{ray_private.NCCL_FINDINGS}/nccl_ras"]
    assert ray_private._MAX_NCCL_POLL_S == constants.DEFAULT_NCCL_RAS_MIN_POLL_INTERVAL_S


def test_the_error_of_a_dead_worker_is_unwrapped_and_that_of_a_silent_one_known():
    died = ray.exceptions.ActorDiedError()
    assert ray_private.unwrap(WorkerHealthCheckFailedError("no answer", died)) is died
    bug = TypeError("x")
    assert ray_private.unwrap(bug) is bug
    assert ray_private.is_unanswered(WorkerHealthCheckTimeoutError("no answer"))
    assert not any(map(ray_private.is_unanswered, (died, bug)))


def test_a_group_that_never_began_is_told_from_one_that_failed():
    reasons = [
        WorkerGroupStartupTimeoutError(2),
        WorkerGroupStartupFailedError("x"),
        InsufficientClusterResourcesError(),
    ]
    for reason in reasons:
        assert ray_private.is_startup_failure(ray.train.ControllerError(reason))
    assert not ray_private.is_startup_failure(ray.train.ControllerError(TypeError("x")))
    assert not ray_private.is_startup_failure(ray.train.WorkerGroupError("x", {0: TypeError("x")}))


def test_raylets_messages_are_printed_by_the_thread_that_is_silenced(monkeypatch):
    import ray._private.worker as worker

    assert "listen_error_messages" in inspect.getsource(worker.connect)
    monkeypatch.setattr(worker, "listen_error_messages", worker.listen_error_messages)
    ray_private.silence_raylet_messages()
    assert worker.listen_error_messages(None, None) is None


def test_forks_of_a_process_that_imported_ray_without_drawing_have_ids_of_their_own():
    code = """
import importlib, json, sys
from ftexp.cluster import ray_private
from ftexp.cluster.hot_start.forker import _in_a_fork
def imports():
    for name in ("ray.train", "ray.data"):
        importlib.import_module(name)
ray_private.import_without_drawing(imports)
import ray.actor, ray._raylet
assert "ray.data" in sys.modules
assert ray.actor.ActorClassID is ray._raylet.ActorClassID, "the original is back"
print(json.dumps([_in_a_fork(ray_private.random_id) for _ in range(2)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ids = json.loads(done.stdout)
    assert len(set(ids)) == 2, (
        "Ray has drawn while it was imported, so all forks would share their ids, and every worker starts plainly: "
        "find what draws (break on ray._raylet's from_random) and have import_without_drawing stand in for it"
    )


def test_what_a_forker_says_of_its_job_is_what_ray_says_of_none():
    from ray._raylet import JobID

    from ftexp.cluster.hot_start.preloader import NO_JOB

    assert JobID.nil().hex() == NO_JOB


def test_the_original_is_back_when_an_import_fails():
    import ray.actor

    original = ray.actor.ActorClassID
    with pytest.raises(ImportError, match="broken"):
        ray_private.import_without_drawing(fail)
    assert ray.actor.ActorClassID is original


def fail():
    raise ImportError("broken")


def test_the_decorator_of_actor_classes_draws_by_the_name_that_is_replaced():
    """Otherwise import_without_drawing would replace a name that Ray doesn't use."""
    import ray.actor

    assert "ActorClassID.from_random()" in inspect.getsource(ray.actor), (
        "Ray draws the ids of actor classes elsewhere now: have ray_private.import_without_drawing replace that name"
    )
    drawn = []
    ray_private.import_without_drawing(lambda: drawn.append(ray.actor.ActorClassID.from_random()))
    assert isinstance(drawn[0], ray.actor.ActorClassID)


def test_an_id_is_drawn_from_rays_own_generator_of_unique_ids():
    first, second = ray_private.random_id(), ray_private.random_id()
    assert first != second
    assert bytes.fromhex(first) != bytes(len(first) // 2)


def test_the_processes_that_ray_has_started_are_where_they_are_looked_for(monkeypatch):
    import ray._private.ray_constants as constants
    import ray._private.services as services
    import ray._private.worker as worker
    from ray._private.node import Node

    assert set(ray_private._VITAL) == {constants.PROCESS_TYPE_GCS_SERVER, constants.PROCESS_TYPE_RAYLET}
    assert "process" in services.ProcessInfo._fields
    for start in (Node.start_gcs_server, Node.start_raylet):
        assert "self.all_processes[ray_constants.PROCESS_TYPE_" in inspect.getsource(start)
    assert callable(Node.get_logs_dir_path)
    assert hasattr(worker, "_global_node")
    monkeypatch.setattr(worker, "_global_node", None)  # an earlier test may have left a Ray in this process
    assert ray_private.started_processes() == {}


STARTS = ["start_monitor", "start_api_server", "start_log_monitor"]


@pytest.mark.parametrize(
    ("counts_usage", "prints_logs", "left"),
    [(False, False, []), (False, True, STARTS[2:]), (True, False, STARTS[1:2])],
)
def test_a_ray_of_a_command_starts_without_what_nothing_uses(monkeypatch, counts_usage, prints_logs, left):
    from ray._private.node import Node

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1" if counts_usage else "0")
    originals = {name: getattr(Node, name) for name in STARTS}
    with ray_private.starting_fewer_processes(prints_logs):
        assert [name for name in STARTS if getattr(Node, name) is originals[name]] == left
        for name in {*STARTS} - {*left}:
            getattr(Node, name)(None, include_dashboard=False, raise_on_failure=False)  # starts nothing
    assert {name: getattr(Node, name) for name in STARTS} == originals
    with pytest.raises(ImportError), ray_private.starting_fewer_processes(prints_logs):
        fail()
    assert {name: getattr(Node, name) for name in STARTS} == originals


def test_the_dashboards_process_does_nothing_but_count_usage_where_there_is_no_dashboard():
    import ray._private.services as services
    from ray._private.node import Node

    assert "if not include_dash:" in inspect.getsource(services.start_api_server)
    assert '"--modules-to-load=UsageStatsHead"' in inspect.getsource(services.start_api_server)
    started = inspect.getsource(Node.start_head_processes) + inspect.getsource(Node.start_ray_processes)
    assert all(f"self.{name}(" in started for name in STARTS), "Ray starts them elsewhere now"


class Trainer:
    """The parts of Ray's trainer that `fitted` uses; fit() returns the callbacks for Ray Train's controller."""

    def __init__(self):
        self.kept = object()
        self.run_config = ray.train.RunConfig()

    def _create_default_callbacks(self):
        from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

        return [PlacementGroupCleanerCallback(), self.kept]

    def fit(self):
        return self._create_default_callbacks()


@pytest.mark.parametrize(("has_api_server", "num_callbacks"), [(True, 2), (False, 1)])
def test_no_actor_waits_for_an_api_server_that_does_not_run(monkeypatch, has_api_server, num_callbacks):
    monkeypatch.setattr(ray_private, "has_api_server", lambda: has_api_server)
    trainer = Trainer()
    callbacks = ray_private.fitted(trainer)
    assert (len(callbacks), callbacks[-1]) == (num_callbacks, trainer.kept)


def test_trains_controller_begins_as_its_workers_do(monkeypatch):
    """So do the actors that it creates: an actor inherits its creator's runtime env."""
    made = []

    def remote(**options):
        made.append(options)
        raise StopIteration

    monkeypatch.setattr(ray_private, "has_api_server", lambda: True)
    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    runtime_env = {"py_executable": "fork", "env_vars": {"OMP_NUM_THREADS": "3"}}
    trainer = ray.train.torch.TorchTrainer(lambda: None, run_config=ray.train.RunConfig(worker_runtime_env=runtime_env))
    monkeypatch.setattr(trainer, "fit", lambda: trainer._initialize_and_run_controller())
    with pytest.raises(StopIteration):
        ray_private.fitted(trainer)
    (options,) = made
    assert options["runtime_env"]["py_executable"] == "fork"
    variables = options["runtime_env"]["env_vars"]
    assert variables["OMP_NUM_THREADS"] == "3"
    assert variables["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.5"  # a variable that Ray Train itself passes on
    assert options["num_cpus"] == 0
    assert sys.modules[type(trainer).__mro__[1].__module__].ray is ray, "the original is back"


def test_an_elastic_group_counts_the_nodes_that_are_alive_when_it_is_asked_for(monkeypatch):
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor
    from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client, elastic
    from ray.train.v2.api import data_parallel_trainer

    from ftexp.cluster import ray_elastic

    nodes = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 1.0}, "Labels": {}} for name in ("first", "second")]
    coordinator = _AutoscalingCoordinatorActor(
        send_resources_request=lambda *_, **__: None, get_cluster_nodes=lambda: copy.deepcopy(nodes)
    )

    def remote(call):
        return SimpleNamespace(remote=call)

    stub = SimpleNamespace(
        get_reserved_resources=remote(coordinator.get_reserved_resources),
        request_resources=remote(coordinator.request_resources),
    )
    now = [100.0]
    monkeypatch.setattr(elastic, "time_monotonic", lambda: now[0])
    monkeypatch.setattr(elastic.ray, "get", lambda answer, timeout=None: answer)
    monkeypatch.setattr(autoscaling_coordinator_client, "get_or_create_autoscaling_coordinator", lambda: stub)
    config = ray.train.ScalingConfig(num_workers=(1, 2), resources_per_worker={"CPU": 1})
    trainer = Trainer()
    monkeypatch.setattr(trainer, "fit", lambda: data_parallel_trainer.create_scaling_policy(config))
    monkeypatch.setattr(ray_private, "has_api_server", lambda: True)
    policy = ray_private.fitted(trainer)
    policy.after_controller_start(SimpleNamespace(run_id="run"))

    def num_workers():
        now[0] += policy.GET_RESERVED_RESOURCES_INTERVAL_S
        return policy.make_decision_for_non_running_worker_group().num_workers

    assert num_workers() == 2
    nodes[1]["Alive"] = False
    assert num_workers() == 1
    nodes[1]["Alive"] = True
    assert num_workers() == 2
    fixed = ray_elastic.scaling_policy(ray.train.ScalingConfig(num_workers=2))
    assert type(fixed).__name__ == "FixedScalingPolicy"
    assert data_parallel_trainer.create_scaling_policy is not ray_elastic.scaling_policy, "the original is back"


def test_ray_train_makes_its_callbacks_and_asks_the_api_server_where_that_is_looked_for():
    import ray.train.v2._internal.execution.controller.placement_group_cleaner as cleaner
    from ray.dashboard import utils
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    source = inspect.getsource(DataParallelTrainer._create_default_callbacks)
    assert "PlacementGroupCleanerCallback()" in source, "where it is made has moved: see ray_private.fitted"
    assert "self._create_default_callbacks()" in inspect.getsource(DataParallelTrainer)
    assert "is_actor_alive(" in inspect.getsource(cleaner), "it may work without an API server now: let it run"
    assert "ray_constants.DASHBOARD_ADDRESS" in inspect.getsource(utils.ray_address_to_api_server_url)


def test_the_controller_replaces_a_worker_by_the_methods_that_are_overridden():
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.execution.controller.controller import TrainController
    from ray.train.v2._internal.execution.worker_group import WorkerGroup
    from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus
    from ray.train.v2._internal.execution.worker_group.worker import ActorMetadata
    from ray.train.v2.api import data_parallel_trainer

    from ftexp.cluster import ray_replacing

    def parameters(function):
        # from the code: Ray adds a parameter to the signatures of a class once this process has made an actor of it
        return list(inspect.getargs(inspect.unwrap(function).__code__).args)

    assert parameters(TrainController._execute_resize_decision) == ["self", "decision"]
    assert parameters(WorkerGroup.replace_replica_group) == ["self", "replica_group_index"]
    assert parameters(WorkerGroup._init_train_context) == ["self", "workers", "sync_actor"]
    assert parameters(DatasetsCallback.before_init_train_context) == ["self", "workers"]
    assert TrainController.worker_group_cls is WorkerGroup
    assert data_parallel_trainer.TrainController.__name__ == "TrainController"  # the process is named after its actor
    assert isinstance(WorkerGroupPollStatus.errors, property)
    for source, names in (
        (WorkerGroup.__init__, ["_worker_group_start_timeout_s", "_execution_group_callbacks"]),
        (WorkerGroup._init_train_context, ["_execution_group_callbacks"]),
        (WorkerGroup._start_impl, ["_replica_groups", "ReplicaGroup("]),
        (WorkerGroup.poll_status, ["_poll_workers_and_collect_errors(", "after_worker_group_poll_status("]),
        (TrainController._execute_resize_decision, ["_start_worker_group("]),
        (
            TrainController._poll_workers,
            ["self._latest_poll_time", "self._health_check_interval_s", "time_monotonic()"],
        ),
        (
            WorkerGroup._replace_replica_group_impl,
            ["_init_train_context(new_workers", "placement_group_bundle_indices"],
        ),
        (TrainController._execute_resize_decision, ["_shutdown_worker_group()", "RunningState()"]),
        (DatasetsCallback.__init__, ["_data_context", "_dataset_shard_provider"]),
        (data_parallel_trainer.DataParallelTrainer._initialize_and_run_controller, [")(TrainController)"]),
    ):
        text = inspect.getsource(source)
        assert [name for name in names if name not in text] == []
    assert {"node_id", "pid"} <= {field.name for field in dataclasses.fields(ActorMetadata)}
    assert ray_replacing.ReplacingController.worker_group_cls is ray_replacing.SlotWorkerGroup


def test_a_process_that_ends_is_noticed_at_once_and_others_when_it_is_time():
    from ftexp.cluster.ray_replacing import first_ended

    async def ended(timeout_s, *processes):
        return await first_ended({process.pid for process in processes}, timeout_s)

    lives, dies = (subprocess.Popen(["cat"], stdin=subprocess.PIPE) for _ in range(2))
    with lives, dies:
        assert asyncio.run(ended(0.0, lives, dies)) == set()
        assert asyncio.run(ended(-1.0, lives, dies)) == set()
        threading.Timer(0.05, dies.kill).start()
        assert asyncio.run(ended(DEADLINE_S, lives, dies)) == {dies.pid}  # as a zombie
        dies.wait()
        assert asyncio.run(ended(DEADLINE_S, lives, dies)) == {dies.pid}
        lives.kill()


def test_a_controller_asks_its_workers_early_once_for_each_that_died(monkeypatch):
    from ftexp.cluster import ray_replacing

    async def asked(controller):
        return controller._latest_poll_time

    async def ended(pids, timeout_s):
        looked_at.append(sorted(pids))
        assert timeout_s > 1000
        return pids & {12}

    looked_at: list[list[int]] = []
    here, there = (SimpleNamespace(node_id=node, pid=pid) for node, pid in (("here", 12), ("there", 13)))
    group = SimpleNamespace(get_workers=lambda: [SimpleNamespace(metadata=each) for each in (here, there)])
    context = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(ray_replacing.controllers.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray_replacing.controllers.TrainController, "_poll_workers", asked)
    monkeypatch.setattr(ray_replacing, "first_ended", ended)
    controller = object.__new__(ray_replacing.WatchingController)
    controller._worker_group, controller._seen_dead, controller._health_check_interval_s = group, set(), 1e9
    for expected in (float("-inf"), 5.0):
        controller._latest_poll_time = 5.0
        assert asyncio.run(controller._poll_workers()) == expected
    assert looked_at == [[12], []]


def test_others_can_wait_where_one_worker_failed_and_all_others_say_so(monkeypatch):
    from ftexp.cluster import ray_replacing

    class Worker:
        def __init__(self, says):
            self.execute_async = lambda asked: (asked, says)

    def get(answers, timeout):
        assert timeout > 0
        if None in [says for _, says in answers]:
            raise ray_replacing.controllers.ray.exceptions.RayActorError
        return [says for _, says in answers]

    monkeypatch.setattr(ray_replacing.controllers.ray, "get", get)
    given = [([True, True], 2), ([True, False], 2), ([True], 2), ([True, None], 2)]
    found = [ray_replacing._all(bool, [Worker(says) for says in answers], count) for answers, count in given]
    assert found == [True, False, False, False]


def test_a_controller_replaces_only_a_worker_that_failed_alone(monkeypatch):
    from ftexp.failure.replacing import TrainController
    from ftexp.failure.reporter import FailureReporter

    def failed(*ranks):
        status = SimpleNamespace(errors=dict.fromkeys(ranks, OSError()))
        group = SimpleNamespace(has_started=lambda: True, get_latest_poll_status=lambda: status)
        return TrainController._failed_alone(SimpleNamespace(_worker_group=group, may_replace=may_replace))

    may_replace = lambda: FailureReporter.replaces  # noqa: E731
    monkeypatch.setattr(FailureReporter, "replaces", True)
    assert [failed(1), failed(), failed(0, 1)] == [1, None, None]
    monkeypatch.setattr(FailureReporter, "replaces", False)
    assert failed(1) is None
    assert TrainController._failed_alone(SimpleNamespace(_worker_group=None, may_replace=may_replace)) is None


def test_a_group_starts_once_ray_knows_of_room_for_it_or_after_a_while(monkeypatch):
    from ray.train.v2._internal.execution.worker_group import worker_group

    from ftexp.cluster import ray_elastic

    names = {field.name for field in dataclasses.fields(worker_group.WorkerGroupContext)}
    assert {"num_workers", "resources_per_worker"} <= names
    assert "callback.before_worker_group_start(worker_group_context)" in inspect.getsource(worker_group.WorkerGroup)
    context = SimpleNamespace(num_workers=2, resources_per_worker={"CPU": 1, "GPU": 0.5})
    answers = iter([{"CPU": 4}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}, {}])
    monkeypatch.setattr(ray, "available_resources", lambda: next(answers))
    ray_elastic.RoomAwaited().before_worker_group_start(context)
    assert next(answers) == {}, "it asks until there is room, and no more"
    monkeypatch.setattr(ray, "available_resources", dict)
    monkeypatch.setattr(ray_elastic, "_ROOM_S", 0.05)
    ray_elastic.RoomAwaited().before_worker_group_start(context)
