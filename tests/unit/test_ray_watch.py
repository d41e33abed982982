"""Detecting a lost Ray: our own by its processes, a joined one by its answers."""

import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from ftexp.cluster import ray_cluster, ray_private, ray_watch, signals
from ftexp.cluster.interruptible import Terminated
from ftexp.cluster.ray_cluster import RunningRay, leave_ray, start_ray
from ftexp.cluster.ray_watch import JoinedRay, OwnRay, end_workers
from ftexp.config.schema import Config, ScalingConfig
from ftexp.errors import RunFailedError
from ftexp.wire.messages import Stop
from tests.support.processes import many_open_files, wait_for_command_line


def waiting():
    return subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_a_ray_of_our_own_is_lost_with_its_gcs_or_its_raylet_and_all_of_it_is_ended(monkeypatch):
    gcs, raylet, ended = waiting(), waiting(), []
    monkeypatch.setattr(ray_private, "started_processes", lambda: {"GCS": gcs, "raylet": raylet})
    monkeypatch.setattr(ray_private, "logs_dir", lambda: "/logs")
    monkeypatch.setattr(ray_private, "kill_started", lambda: ended.append(True))
    watch = OwnRay()
    assert (watch.lost(), ended) == (None, [])
    raylet.communicate(b"")  # EOFError
    assert watch.lost() == "Ray's raylet process ended with exit code 1 (its logs: /logs)"
    assert ended
    gcs.kill()
    gcs.communicate()
    assert watch.lost() == "Ray's GCS process was killed by SIGKILL (its logs: /logs)"


class Interrupted(BaseException):
    """The exception that the watch over Ray raises in the training thread."""


@pytest.mark.parametrize(
    ("is_own", "lost", "is_alive", "is_asked"),
    [
        (True, None, True, True),
        (True, None, False, False),  # raylet has left the GCS, and ends in a moment
        (True, "Ray's raylet process was killed", True, False),
        (False, None, False, True),  # the node that has died is another's
    ],
)
def test_a_controller_that_dies_of_its_rays_end_is_not_started_again(monkeypatch, is_own, lost, is_alive, is_asked):
    """Ray exits a process that would then use its object store."""
    import ray

    from ftexp.driver import trainer

    def died(*_):
        raise ray.exceptions.RayActorError

    def interrupt(_):
        raise Interrupted

    asked = []
    monkeypatch.setattr(trainer, "build_trainer", lambda *_: None)
    monkeypatch.setattr(ray_private, "fitted", died)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": is_alive}])
    monkeypatch.setattr(ray_cluster.time, "sleep", interrupt)
    hub = SimpleNamespace(address=None, handle=lambda message: asked.append(message) or Stop("no more"))
    session = SimpleNamespace(bundle=None, running=RunningRay("127.0.0.1", is_own, lambda: lost))
    with pytest.raises(RunFailedError if is_asked else Interrupted):
        trainer._fit(SimpleNamespace(config=Config()), session, hub)
    assert len(asked) == is_asked


def test_a_dead_rays_workers_are_ended_and_no_process_that_got_their_numbers():
    worker = subprocess.Popen(["ray::worker", "-S", "-c", "input()"], executable=sys.executable, stdin=subprocess.PIPE)
    wait_for_command_line(worker.pid, b"ray::worker")
    other = waiting()
    end_workers([worker.pid, other.pid])
    worker.communicate()
    other.communicate(b"1\n")
    assert (worker.returncode, other.returncode) == (-signal.SIGKILL, 0)


@pytest.fixture
def raylet(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "raylet"))
        listener.listen()
        yield listener


def test_a_joined_ray_is_lost_when_this_machines_raylet_hangs_up(raylet):
    with socket.create_server(("127.0.0.1", 0)) as gcs:
        watch = JoinedRay(raylet.getsockname(), f"127.0.0.1:{gcs.getsockname()[1]}")
        connection, _ = raylet.accept()
        assert watch.lost() is None
        connection.close()
        assert "the raylet of this machine" in watch.lost()


def test_a_watch_that_was_closed_keeps_no_connection_and_no_thread_and_finds_nothing_lost(raylet, monkeypatch):
    monkeypatch.setattr(ray_watch, "_PROBE_EVERY_S", 60)
    before, shut = set(threading.enumerate()), []
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(shutdown=lambda: shut.append(True)))
    with socket.create_server(("127.0.0.1", 0)) as gcs:
        watch = JoinedRay(raylet.getsockname(), f"127.0.0.1:{gcs.getsockname()[1]}")
        (probe,) = set(threading.enumerate()) - before
        connection, _ = raylet.accept()
        connection.settimeout(20)
        leave_ray(RunningRay("127.0.0.1", is_own=False, lost=watch.lost, close=watch.close))
        assert connection.recv(1) == b""
        connection.close()
    probe.join(20)
    assert not probe.is_alive()
    watch._silent_since = -1e9
    assert watch.lost() is None
    watch.close()
    leave_ray(None)
    assert shut == [True, True]


def test_a_joined_ray_is_watched_by_a_process_with_many_open_files(raylet):
    with many_open_files(), socket.create_server(("127.0.0.1", 0)) as gcs:
        watch = JoinedRay(raylet.getsockname(), f"127.0.0.1:{gcs.getsockname()[1]}")
        connection, _ = raylet.accept()
        assert connection.fileno() > 1023
        assert watch.lost() is None
        connection.close()
        assert "the raylet of this machine" in watch.lost()


def test_a_joined_ray_is_lost_when_its_gcs_has_been_silent_for_long_and_only_then(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(ray_watch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ray_watch.threading, "Thread", lambda **_: raylet_thread)
    raylet_thread = type("Never", (), {"start": lambda self: None})()
    with socket.create_server(("127.0.0.1", 0)) as gcs:
        port = gcs.getsockname()[1]
        watch = JoinedRay(str(tmp_path / "in another container"), f"127.0.0.1:{port}")
        watch.probe()
        assert watch.lost() is None
    watch.probe()
    now[0] += ray_watch._GCS_SILENT_S
    assert watch.lost() is None
    now[0] += 1
    watch.probe()
    assert watch.lost() == f"Ray's GCS at 127.0.0.1:{port} has not answered for 45 s"
    with socket.create_server(("127.0.0.1", port)):
        watch.probe()
        assert watch.lost() is None


def test_a_command_that_only_reads_ends_by_one_line_when_ray_dies_and_not_after_it_is_done():
    program = (
        "import time\n"
        "from ftexp.cluster.ray_watch import ending_with\n"
        "with ending_with(lambda: None): pass\n"
        "done = ending_with(lambda: 'it died later')\n"
        "with done: pass\n"
        "time.sleep(1.2); print('so far', end='')\n"
        "with ending_with(lambda: 'the raylet has died'): time.sleep(60)"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=50)
    assert (child.returncode, child.stdout) == (1, "so far")
    assert child.stderr == "ftexp: the raylet has died: run the same command again\n"


@pytest.mark.parametrize(("address", "num_ended"), [(None, 1), ("auto", 0)])
def test_what_a_signal_leaves_of_a_ray_that_starts_is_ended_and_nothing_of_others(monkeypatch, address, num_ended):
    import ray

    def interrupted(**_):
        raise SystemExit(15)

    ended = []
    monkeypatch.setattr(ray, "init", interrupted)
    monkeypatch.setattr(ray_private, "kill_started", lambda: ended.append(True))
    monkeypatch.setattr(signals, "_set_handler", lambda _: None)
    with pytest.raises(Terminated):
        start_ray(Config(scaling=ScalingConfig(address=address), verbose=True), decodes=False)
    assert len(ended) == num_ended
