"""Failures that affect more than one worker: nodes, Ray's controller and storage are really gone."""

import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from ftexp.drill.report import compare
from ftexp.rundir.names import CHECKPOINTS
from ftexp.rundir.sample_ledger import problems, read_updates
from tests.support.command import Command, RunFolder
from tests.support.reference import BATCH, EVERY_FEW_STEPS, OPTIONS, PLUGIN, SAVE_EVERY

# environment of the cluster and of the command
ENVIRONMENT = {
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # a dead node refuses connections; a busy one has 10 s to answer
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "3",
}
RESIZES_EVERY_S = 12  # interval at which Ray Train checks for room for more workers
NODE_TAKES_S = 8  # until a new node has joined and a checkpoint has been requested, on a busy machine
SNAPSHOT_EVERY = 2
NOTICE_S = 6.0  # from the announcement of a node's end to its end
EPOCHS = 7  # of the run on the cluster: at least 80 s if every step is slowed


class TwoNodes:
    """A Ray cluster of two nodes on this machine, with one CPU each."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "include_dashboard": False, "no_monitor": True, "include_log_monitor": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        self.second = self.add_node()

    def add_node(self):
        self.second = self._cluster.add_node(num_cpus=1)
        return self.second

    def kill_node(self):
        """Remove the second node without notice."""
        self._cluster.remove_node(self.second, allow_graceful=False)

    def announce_end(self):
        """Announce the preemption of the second node; return its time, in seconds since 1970."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

        end = time.time() + NOTICE_S
        gcs = GcsClient(address=self.address)
        accepted, reason = gcs.drain_node(self.second.node_id, DRAIN_NODE_REASON_PREEMPTION, "spot", int(end * 1000))
        assert accepted, reason
        return end

    def rank_on_second(self, pids):
        """Return the rank on the second node; pids: of the workers, by rank."""
        raylet = self.second.all_processes["raylet"][0].process.pid
        variable = f"RAY_RAYLET_PID={raylet}"
        found = [Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in pids]
        (rank,) = [rank for rank, environment in enumerate(found) if variable in environment]
        return rank

    def shutdown(self):
        self._cluster.shutdown()


@dataclass
class Story:
    """Events of the run on the cluster, in this order; times in seconds since 1970."""

    run: RunFolder
    exit_code: int
    output: str
    killed_rank: int
    announced_rank: int
    taken_at: float


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A run that loses its second node, gets another, receives the announcement of its end, and loses it."""
    directory = tmp_path_factory.mktemp("cluster")
    (directory / "obedient.py").write_text(PLUGIN)
    (directory / "slow").touch()  # so that the run doesn't end before all of these events
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        nodes = TwoNodes()
        words = [
            *OPTIONS, *EVERY_FEW_STEPS, "report.enabled=false", "run.name=run", f"run.storage={directory}",
            f"scaling.address={nodes.address}",
            "scaling.num_workers=[1,2]", f"scaling.elastic_resize_monitor_interval_s={RESIZES_EVERY_S}",
            "scaling.use_gpu=false",
            f"train.epochs={EPOCHS}", f"train.eval_every_epochs={EPOCHS}", "failure.max_failures=1",
            f"failure.memory_every_steps={SNAPSHOT_EVERY}",
        ]  # fmt: skip
        command = Command("train", words, directory)
    try:
        yield tell(command, RunFolder(directory / "run"), nodes, directory / "slow")
    finally:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()
        nodes.shutdown()


def tell(command, run, nodes, slow):
    """Cause the events of the story."""

    def wait_for_save(attempt):
        command.wait_until(lambda: any(event["attempt"] == attempt for event in run.events("checkpoint_saved")))

    wait_for_save(attempt=1)
    command.wait_until(lambda: is_before_a_save(run))
    killed_rank = nodes.rank_on_second(run.events("ready")[-1]["pids"])
    nodes.kill_node()
    wait_for_save(attempt=2)
    (began,) = [event["time"] for event in run.events("attempt_started") if event["attempt"] == 2]
    # otherwise Ray Train might check in between, and resize before anyone is notified
    command.wait_until(lambda: (time.time() - began) % RESIZES_EVERY_S < RESIZES_EVERY_S - NODE_TAKES_S)
    nodes.add_node()
    wait_for_save(attempt=3)
    announced_rank = nodes.rank_on_second(run.events("ready")[-1]["pids"])
    taken_at = nodes.announce_end()
    command.wait_until(lambda: time.time() > taken_at)
    nodes.kill_node()
    command.wait_until(lambda: len(run.events("ready")) == 4)
    slow.unlink()
    return Story(run, command.wait(), command.output, killed_rank, announced_rank, taken_at)


def is_before_a_save(run):
    """Return whether the run takes snapshots and is a few steps after one checkpoint and before the next."""
    begun, step = run.events("snapshots_begun"), run.metrics()[-1]["step"]
    return step % SAVE_EVERY == 2 * SNAPSHOT_EVERY and bool(begun) and step > begun[0]["step"] + SAVE_EVERY


def newest(directory):
    """Return a list with the name of the newest checkpoint, complete or not; empty if there is none."""
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted(names, key=lambda name: name.removeprefix(".tmp-"))[-1:]


def assert_ends_as(clean, run):
    report = compare(clean.storage, run.storage, BATCH, 0)
    assert (report.differences, report.identical) == ([], True)


@pytest.mark.timeout(600)
def test_a_run_whose_node_dies_goes_on_with_the_worker_that_is_left(story):
    failure = story.run.record["failures"][0]
    assert (failure["attempt"], failure["cause"]) == (1, "crash")
    assert (failure["rank"], failure["node"]) == (story.killed_rank, socket.gethostname())
    assert failure["decision"] == "failure 1 of 1 allowed: restarting the workers"
    assert story.run.record["world_sizes"][:2] == [2, 1]
    restored = story.run.events("restored")[0]
    saved = [event["step"] for event in story.run.events("checkpoint_saved") if event["attempt"] == 1]
    # from the copy on the surviving node, whichever rank ran there
    assert (failure["recovery"], restored["source"]) == ("memory", "memory")
    assert restored["step"] > saved[-1]
    assert failure["steps_replayed"] <= 3 * SNAPSHOT_EVERY  # the copy to the other node takes a moment


def test_a_run_grows_again_when_a_node_is_added(story):
    assert story.run.record["world_sizes"][1:3] == [1, 2]
    (resized,) = story.run.events("resized")
    assert (resized["attempt"], resized["world_size"]) == (3, 2)
    saved = [event["step"] for event in story.run.events("checkpoint_saved") if event["attempt"] < 3]
    restored = [event["step"] for event in story.run.events("restored")][1]
    assert restored == resized["step"] >= saved[-1]  # the group may be stopped before it reports its last checkpoint


def test_a_run_saves_when_it_is_about_to_grow(story):
    (expected,) = story.run.events("resize_expected")
    assert (expected["attempt"], expected["num_workers"]) == (2, 2)
    saved = [event for event in story.run.events("checkpoint_saved") if event["time"] > expected["time"]]
    assert any("requested" in event["reasons"] for event in saved if event["attempt"] == 2)


def test_workers_on_every_node_of_a_cluster_are_forked(story):
    started = story.run.events("attempt_started")
    assert [event["hot_start"] for event in started] == [True] * 4
    assert story.run.events("cold_start") == []


def test_a_run_saves_before_an_announced_end_of_a_node_and_is_not_charged_for_it(story):
    run = story.run
    (notice,) = run.events("preemption_notice")
    assert (notice["attempt"], notice["ranks"]) == (3, [story.announced_rank])
    saved = next(event for event in run.events("checkpoint_saved") if event["time"] > notice["time"])
    assert saved["step"] == notice["step"]
    assert "preemption" in saved["reasons"]
    assert saved["time"] < story.taken_at
    failure = run.record["failures"][1]
    assert (failure["attempt"], failure["cause"]) == (3, "preemption")
    assert (failure["rank"], failure["node"]) == (story.announced_rank, socket.gethostname())
    # the one allowed failure had happened before
    assert failure["decision"].startswith("preemption 1 (no limit), not charged to failure.max_failures: restarting")
    assert run.record["world_sizes"][3:] == [1]
    latest = [event["step"] for event in run.events("checkpoint_saved") if event["attempt"] == 3][-1]
    assert run.events("restored")[2]["step"] >= latest >= saved["step"]


def test_a_run_that_lost_and_gained_nodes_finishes_with_each_position_done_once(story):
    assert story.exit_code == 0, story.output
    record = story.run.record
    assert (record["status"], record["attempts"], len(record["failures"])) == ("finished", 4, 2)
    updates = read_updates(story.run.storage)
    num_samples = record["data"]["num_samples"]["train"]
    assert sum(len(update.positions) for update in updates) == EPOCHS * num_samples
    assert list(problems(updates, num_samples, BATCH)) == []
    assert {update.attempt for update in updates} == {1, 2, 3, 4}


@pytest.mark.timeout(400)
def test_a_run_whose_controller_is_killed_ends_where_the_clean_run_ends(
    ftexp, run_folder, tmp_path, clean_run, pictures
):
    (tmp_path / "hold").touch()
    command = ftexp(*OPTIONS, *EVERY_FEW_STEPS, *pictures, "data.feed=streaming", "run.name=headless", own_ray=True)
    run = run_folder("headless")
    command.wait_until((tmp_path / "held").exists)
    command.kill_in_own_ray("ray::TrainController")
    (tmp_path / "held").unlink()
    assert command.wait() == 0, command.output
    (failure,) = run.record["failures"]
    assert (failure["cause"], failure["rank"]) == ("crash", None)
    assert failure["error"] == "Ray Train's controller died, and its workers with it"
    assert failure["decision"] == "failure 1 of 3 allowed: restarting the workers"
    assert_ends_as(clean_run, run)


@pytest.mark.timeout(400)
def test_a_run_whose_storage_is_gone_stops_and_goes_on_once_it_is_back(
    ftexp, run_folder, tmp_path, clean_run, pictures
):
    (tmp_path / "hold").touch()
    words = [*OPTIONS, *EVERY_FEW_STEPS, *pictures, "data.feed=streaming"]
    words += ["run.name=full", "checkpoint.max_failed_saves=1"]
    command, run = ftexp(*words), run_folder("full")
    command.wait_until((tmp_path / "held").exists)
    directory, away = run.path / CHECKPOINTS, tmp_path / "away"
    # the latest checkpoint is complete and reported
    command.wait_until(
        lambda: [event["checkpoint"] for event in run.events("checkpoint_saved")][-1:] == newest(directory)
    )
    shutil.move(directory, away)
    directory.touch()  # a file instead of the directory: not even root can create a directory in it
    (tmp_path / "slow").touch()  # otherwise the run might end before its second checkpoint has failed
    (tmp_path / "held").unlink()
    assert command.wait() == 1, command.output
    record = run.record
    assert (record["status"], record["attempts"]) == ("failed", 1)
    (failure,) = record["failures"]
    assert failure["cause"] == "storage"
    assert failure["error"].startswith(
        "2 checkpoints in a row could not be saved, and checkpoint.max_failed_saves=1; the last error: "
    )
    assert failure["error"].endswith(f"Fix {directory}, then run the same command again")
    assert record["error"] in command.output
    assert "another attempt would fail the same way: stopping" in command.output
    assert len(run.events("checkpoint_failed")) == 2
    assert "Traceback" not in command.output
    latest = run.events("checkpoint_saved")[-1]["step"]

    directory.unlink()
    shutil.move(away, directory)
    (tmp_path / "slow").unlink()
    again = ftexp(*words)
    assert again.wait() == 0, again.output
    assert f"at step {latest} from step_{latest:08d}.a1" in again.output
    assert run.record["status"] == "finished"
    assert_ends_as(clean_run, run)
