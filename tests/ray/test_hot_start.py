"""Hot start: a fork behaves like a plainly started worker, and no process outlives its owner."""

import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest
import torch
from ray._private.runtime_env.context import RuntimeEnvContext
from ray._private.utils import update_envs

from ftexp.cluster.hot_start import driver, launcher
from ftexp.cluster.hot_start.driver import HotStart
from ftexp.cluster.hot_start.forker import MARK, import_all
from ftexp.config.schema import ScalingConfig
from tests.support import processes
from tests.support.processes import many_open_files

DEADLINE_S = 60
wait_until = functools.partial(processes.wait_until, every_s=0.01, within_s=DEADLINE_S)
LIGHT = (
    "import sys, ftexp.cluster.hot_start.preloader as preloader, ftexp.cluster.hot_start.forker as forker;"
    "preloader.BEFORE_THE_CLUSTER = (); forker.WITH_THE_CLUSTER = ('ray',);"
)  # preloading takes 1 s instead of 8 s, for tests that need their own preloader
DRAWS = """
    import json, random, uuid
    import numpy as np
    from ftexp.cluster import ray_private
    print(json.dumps([random.random(), np.random.rand(), str(uuid.uuid4()), ray_private.random_id()]))
"""
READY_THEN_READ = """
    import os, sys
    print(os.getpid(), flush=True)
    sys.stdin.read()
    print("read to the end")
"""
STEP = """
    import json, sys, torch
    from torch.nn.parallel import DistributedDataParallel
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(8, 3))
    model(torch.full((4, 8), rank + 0.3)).square().sum().backward()
    print(json.dumps([parameter.grad.tolist() for parameter in model.parameters()]))
    torch.distributed.barrier()
    del model  # it holds the group, whose threads would outlive Python's end now and then, and abort the process
    torch.distributed.destroy_process_group()
"""


def python_path_without_torch(directory):
    """Return a PYTHONPATH with which preloading takes 1 s, not 8 s: modules that can't be imported are skipped."""
    for name in ("torch", "torchvision", "timm"):
        (directory / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name={name!r})")
    return os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))


class Launchers:
    """Starts launchers that connect to the socket of a preloaded process."""

    def __init__(self, directory, socket, **variables):
        self.directory, self.socket = directory, socket
        unwanted = ("RAY_", "PYTHONUNBUFFERED")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        self.environment |= {"RAY_JOB_ID": "01000000", "RAY_RAYLET_PID": str(os.getpid()), **variables}
        self.launchers = []

    def start(self, script, *arguments, plain=False, socket=None, flags=(), **options):
        """Start `script` through the launcher, or by the plain interpreter."""
        path = self.directory / f"script_{len(self.launchers)}.py"
        path.write_text(textwrap.dedent(script))
        words = [] if plain else ["-S", "-E", launcher.__file__, socket or self.socket]
        options = {"env": self.environment, "cwd": self.directory, "stdin": subprocess.PIPE, **options}
        started = subprocess.Popen(
            [sys.executable, *words, *flags, path, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
        )  # fmt: skip
        self.launchers.append(started)
        return started

    def run(self, script, *arguments, **options):
        """Run `script`; return (exit code, standard output, standard error)."""
        return outcome(self.start(script, *arguments, **options))

    def stop(self):
        for process in self.launchers:
            process.kill()
            process.wait()


class Preloaded(Launchers):
    """Launchers with their own preloaded process."""

    def __init__(self, directory, command):
        super().__init__(directory, str(directory / "socket"))
        with launcher.listen(self.socket) as listener:
            number = listener.fileno()
            self.process = subprocess.Popen(
                [sys.executable, *command, self.socket, str(number)],
                stdin=subprocess.PIPE, cwd=directory, env=self.environment, pass_fds=[number],
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # `nohup pytest` ignores it
            )  # fmt: skip

    def stop(self):
        super().stop()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def preloaded(preloaded, tmp_path_factory):
    """Launchers on the preloaded process of all tests, which has imported everything."""
    *_, socket = preloaded.python
    path = preloaded.environment()["PYTHONPATH"]
    launchers = Launchers(tmp_path_factory.mktemp("full"), socket, PYTHONPATH=path)
    assert is_forked(launchers)  # the first worker: its environment becomes the forker's
    yield launchers
    assert is_forked(launchers), "a test has ended it"
    launchers.stop()


@pytest.fixture
def light(tmp_path):
    """Preloaded process with Ray only, for one test, which may end it."""
    started = Preloaded(tmp_path, ("-c", LIGHT + "preloader.main()"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def enduring(tmp_path_factory):
    """Preloaded process with Ray only, for tests that must not end it."""
    started = Preloaded(tmp_path_factory.mktemp("enduring"), ("-c", LIGHT + "preloader.main()"))
    yield started
    started.stop()


def forker_of(preloaded):
    """Return the pid of the process from which workers are forked."""
    code, output, errors = preloaded.run("import os; print(os.getppid())")
    assert code == 0, errors
    return int(output)


def outcome(started, given=""):
    output, errors = started.communicate(given, timeout=DEADLINE_S)
    return started.returncode, output, errors


def is_forked(preloaded, **options):
    code, output, errors = preloaded.run(f"import os; print(os.environ.get('{MARK}'))", **options)
    assert code == 0, errors
    return output == "1\n"


def wait_for_end_of(pid, within_s=DEADLINE_S):
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with open(process):  # noqa: PTH123 - a descriptor
        assert launcher.readable([process], within_s), f"{pid} goes on"


def has_signal(pid, number, field):
    """Return whether the process catches (field SigCgt) or ignores (SigIgn) the signal."""
    signals = Path(f"/proc/{pid}/status").read_text().partition(f"{field}:")[2].split()[0]
    return bool(int(signals, 16) >> (number - 1) & 1)


# The environment of a script


def test_a_script_sees_what_the_plain_interpreter_would_have_shown_it(preloaded, tmp_path):
    look = """
    import json, os, sys
    mask = os.umask(0)
    print("to stderr", file=sys.stderr)
    print(json.dumps([
        sys.argv[1:], dict(os.environ), os.getcwd(), mask, sys.stdin.read(), __name__, os.path.basename(__file__),
        os.path.basename(sys.argv[0]), sys.path[0], sys.executable, sys.modules["__main__"].__name__,
    ]))
    """
    unlike = preloaded.environment | {"ONE": "1", "LINES": "a\nb", "NAME": "\udcff"}
    del unlike["PATH"]
    options = {"env": unlike, "cwd": tmp_path, "umask": 0o027}
    arguments = ("--text", "a b", "", "ü", "\udcff")
    seen = []
    for plain in (False, True):
        code, output, errors = outcome(preloaded.start(look, *arguments, plain=plain, **options), "from stdin")
        assert (code, errors) == (0, "to stderr\n")
        seen.append(json.loads(output))
        for value in (6, 7):
            seen[-1][value] = seen[-1][value].startswith("script_")
    assert seen[0][1].pop(MARK) == "1"
    assert seen[0] == seen[1]
    assert seen[0][0] == list(arguments)


def test_a_script_may_have_an_argument_of_the_interpreters_name(preloaded):
    assert preloaded.run("import sys; print(sys.argv[1:])", "-u", "-c")[1] == "['-u', '-c']\n"


@pytest.mark.parametrize("flag", ["-s", "-u"])
def test_an_option_of_the_interpreter_holds(preloaded, flag):
    """Ray passes -s to workers if the driver runs with PYTHONNOUSERSITE."""
    code, output, errors = preloaded.run(
        "import sys; print(sys.flags.no_user_site, sys.stdout.write_through)", flags=[flag]
    )
    assert (code, output) == (0, "1 False\n" if flag == "-s" else "0 True\n"), errors


def test_a_process_title_leaves_the_environment_whole(preloaded):
    code, output, errors = preloaded.run("""
    import os, subprocess
    from ray._raylet import setproctitle
    before = dict(os.environ)
    setproctitle("ray::title" + "-" * 200)
    assert dict(os.environ) == before
    print(open("/proc/self/cmdline").read().startswith("ray::title"))
    print(subprocess.run(["env"], capture_output=True, text=True).stdout.count("RAY_JOB_ID=01000000"))
    """)
    assert (code, output) == (0, "True\n1\n"), errors


# The end of a worker


@pytest.mark.parametrize(
    "script",
    [
        "pass",
        "raise SystemExit(7)",
        "raise SystemExit(-1)",
        "raise SystemExit('the reason')",
        "raise ValueError('boom')",
        "raise KeyboardInterrupt",
        "import os; os._exit(9)",
        "import os; os.abort()",
        "import sys; sys.stdout.close()",
        "import sys; sys.stdout = None",
        "import atexit; atexit.register(print, 'at the end', flush=True)",
        "import threading; threading.Timer(0.1, print, ['from a thread']).start()",
    ],
)
def test_a_worker_ends_as_a_plain_one_ends(preloaded, script):
    ends = []
    for plain in (False, True):
        code, output, errors = preloaded.run(script, plain=plain)
        ends.append((code, output, errors.splitlines()[-1:]))
    assert ends[0] == ends[1]


def test_an_exception_is_told_with_the_line_that_raised_it(preloaded):
    code, _, errors = preloaded.run("def deep():\n    return 1 / 0\ndeep()")
    assert code == 1
    assert "return 1 / 0" in errors
    assert errors.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_the_launcher_reaches_the_worker(preloaded, number):
    worker = preloaded.start(f"""
    import signal, sys, time
    def end(number, frame):
        print("got", number)
        sys.exit(5)
    signal.signal({number.value}, end)
    print("ready", flush=True)
    while True:  # a pause() that begins just after the signal came would last for ever
        time.sleep(0.05)
    """)
    assert worker.stdout.readline() == "ready\n"
    # SIGUSR2 is the last signal whose handler the launcher installs; SIGINT is caught by Python from its start
    wait_until(lambda: has_signal(worker.pid, signal.SIGUSR2, "SigCgt"))
    worker.send_signal(number)
    assert outcome(worker) == (5, f"got {number.value}\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_the_launcher_ends_by_the_signal_that_ended_the_worker(preloaded, number):
    worker = preloaded.start(READY_THEN_READ)
    child = int(worker.stdout.readline())
    assert child != worker.pid
    os.kill(child, number)
    assert worker.wait(DEADLINE_S) == -number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_launcher_ends_by_a_signal_that_it_was_started_to_ignore(preloaded, number):
    """`nohup` has this effect."""
    worker = preloaded.start(READY_THEN_READ, preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    os.kill(int(worker.stdout.readline()), number)
    assert worker.wait(DEADLINE_S) == -number


def test_a_worker_is_gone_when_its_launcher_is_killed(preloaded):
    worker = preloaded.start(READY_THEN_READ)
    child = int(worker.stdout.readline())
    worker.kill()
    wait_for_end_of(child)


def test_a_worker_is_gone_when_its_launcher_is_killed_after_the_preloader(light):
    worker = light.start(READY_THEN_READ)
    child = int(worker.stdout.readline())
    light.process.kill()
    light.process.wait()
    worker.kill()
    wait_for_end_of(child)


@pytest.mark.parametrize("preloader_first", [False, True])
def test_a_worker_is_gone_when_its_raylet_has_ended_and_a_driver_is_not(light, preloader_first):
    """A killed driver takes the preloader with it, and then its raylet."""
    with subprocess.Popen(["sleep", "600"]) as raylet:
        worker = light.start(READY_THEN_READ, env=light.environment | {"RAY_RAYLET_PID": str(raylet.pid)})
        without = {name: value for name, value in light.environment.items() if name != "RAY_RAYLET_PID"}
        driver = light.start(READY_THEN_READ, env=without)
        child, other = int(worker.stdout.readline()), int(driver.stdout.readline())
        forkers = [parent_of(child), parent_of(other)]
        assert len({*forkers, light.process.pid}) == 3
        if preloader_first:
            light.process.kill()
            light.process.wait()
            wait_for_end_of(forkers[1])
            assert parent_of(child) == forkers[0]
        raylet.kill()
    wait_for_end_of(child)
    wait_for_end_of(forkers[0])
    assert worker.wait(DEADLINE_S) != 0
    assert outcome(driver)[1:] == ("read to the end\n", "")


def test_workers_start_and_end_where_a_process_holds_many_files_open(tmp_path):
    """First the preloader and its forker hold many open files, then the launcher."""

    def hold():
        for descriptor in range(3, 1024):
            os.dup2(0, descriptor)

    held = "import os; held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)];"
    with many_open_files():
        started = Preloaded(tmp_path, ("-c", LIGHT + held + "preloader.main()"))
        try:
            assert is_forked(started)
            assert is_forked(started, close_fds=False, preexec_fn=hold)
            worker = started.start(READY_THEN_READ)
            child = int(worker.stdout.readline())
            worker.kill()  # the forker must notice
            wait_for_end_of(child)
        finally:
            started.stop()


def test_workers_do_not_share_a_process_group_with_the_preloader(preloaded):
    """Ray kills the whole process group of a worker that has died."""
    groups = [int(preloaded.run("import os; print(os.getpgrp())")[1]) for _ in range(2)]
    assert len({*groups, os.getpgid(parent_of(forker_of(preloaded)))}) == 3


def test_a_signal_that_follows_the_fork_at_once_is_not_lost(preloaded):
    for _ in range(20):
        reading, writing = os.pipe()
        connection = ask(preloaded, "import sys; sys.stdin.read()", stdin=reading)
        with connection:
            os.kill(int.from_bytes(connection.recv(8), "big"), signal.SIGTERM)
            os.close(writing)
            os.close(reading)
            assert int.from_bytes(connection.recv(8), "big") == signal.SIGTERM


# A fork as a complete process


def test_forks_draw_different_numbers_and_ids(preloaded):
    first, second = (json.loads(preloaded.run(DRAWS)[1]) for _ in range(2))
    assert len({*first, *second}) == 8


def test_torch_works_in_a_fork_and_no_gpu_was_touched(preloaded):
    code, output, errors = preloaded.run("""
    import sys
    assert "torch" in sys.modules and "timm" in sys.modules and "ray.data" in sys.modules
    import torch
    assert not torch.cuda.is_initialized()
    assert not torch.cuda._is_in_bad_fork()
    a = torch.arange(250_000.0).reshape(500, 500) % 7
    print(torch.equal(a @ a, (a.long() @ a.long()).float()))
    """)
    assert (code, output) == (0, "True\n"), errors


def test_the_collector_of_a_fork_leaves_alone_what_it_shares_with_others(preloaded):
    code, output, errors = preloaded.run("import gc; print(len(gc.get_objects()), gc.get_freeze_count())")
    own, shared = map(int, output.split())
    assert code == 0, errors
    assert own < shared / 10


def test_a_ddp_step_among_forks_has_the_gradient_of_a_plain_process(preloaded, tmp_path):
    ranks = [preloaded.start(STEP, str(rank), tmp_path / "store") for rank in range(2)]
    gradients = []
    for code, output, errors in map(outcome, ranks):
        assert code == 0, errors
        gradients.append(json.loads(output))
    assert gradients == [mean_of_both_ranks()] * 2


def mean_of_both_ranks():
    """Return STEP's gradient as DDP defines it, computed here: half from each rank, which is exact."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 3)
    for rank in range(2):
        loss = model(torch.full((4, 8), rank + 0.3)).square().sum()
        (loss / 2).backward()
    return [parameter.grad.tolist() for parameter in model.parameters()]


def test_what_is_forked_from_has_no_thread_of_pythons_or_torchs(preloaded):
    """The only other threads belong to pyarrow's allocator, which stops and restarts them around a fork."""
    forker = forker_of(preloaded)
    for pid in (parent_of(forker), forker):
        names = [(task / "comm").read_text().strip() for task in Path(f"/proc/{pid}/task").iterdir()]
        assert len([name for name in names if name != "jemalloc_bg_thd"]) == 1, names


# Workers that may share a forker


def test_a_worker_that_imports_from_elsewhere_starts_plainly(preloaded):
    assert not is_forked(preloaded, env=preloaded.environment | {"PYTHONPATH": "1"})
    assert is_forked(preloaded)


@pytest.mark.parametrize("name", ["RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_task_retry_delay_ms"])
def test_a_worker_of_another_raylet_or_setting_has_another_forker_and_one_of_another_job_has_not(enduring, name):
    """Ray reads all three variables when it is imported; at that time the forker has no job."""
    look = f"import os, ray; print(os.getppid(), os.environ['{name}'], os.environ['{MARK}'])"
    values = ["1", *[str(os.getppid())] * 2] if name == "RAY_RAYLET_PID" else ["02000000", "3", "3"]
    seen = [enduring.run(look, env=enduring.environment | {name: value})[1].split() for value in values]
    assert [value for _, value, _ in seen] == values
    assert (seen[0][0] == seen[1][0]) == (name == "RAY_JOB_ID")
    assert seen[1][0] == seen[2][0]


def test_a_forker_ends_when_its_job_asks_for_nothing_and_comes_back_when_it_does(tmp_path):
    idle = Preloaded(tmp_path, ("-c", LIGHT + "forker._IDLE_S = 0.05; preloader.main()"))
    try:
        worker = idle.start("import os, sys; print(os.getppid(), flush=True); sys.stdin.read()")
        first = int(worker.stdout.readline())
        assert first != idle.process.pid
        outcome(worker)
        wait_for_end_of(first)
        second = forker_of(idle)
        assert second not in (first, idle.process.pid)
        wait_for_end_of(second)
    finally:
        idle.stop()


def test_workers_start_plainly_without_a_socket(preloaded, tmp_path):
    assert not is_forked(preloaded, socket=tmp_path / "none")


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o606])
def test_workers_start_plainly_when_others_may_use_the_socket(enduring, mode):
    Path(enduring.socket).chmod(mode)
    assert not is_forked(enduring)
    Path(enduring.socket).chmod(0o600)
    assert is_forked(enduring)


def test_a_socket_of_another_user_is_not_used(monkeypatch, preloaded):
    monkeypatch.setattr(os, "getuid", lambda: os.stat(preloaded.socket).st_uid + 1)  # noqa: PTH116
    with pytest.raises(ValueError, match="this user's alone"):
        launcher.ask_for_a_fork(preloaded.socket, ["script.py"])


def test_a_link_to_a_socket_is_not_used(preloaded, tmp_path):
    (tmp_path / "link").symlink_to(preloaded.socket)
    with pytest.raises(ValueError, match="this user's alone"):
        launcher.ask_for_a_fork(str(tmp_path / "link"), ["script.py"])


def test_workers_start_plainly_when_their_ids_would_be_the_same(tmp_path):
    same = "import ftexp.cluster.ray_private as ray_private; ray_private.random_id = lambda: 'same';"
    unfit = Preloaded(tmp_path, ("-c", LIGHT + same + "preloader.main()"))
    try:
        assert not is_forked(unfit)
    finally:
        unfit.stop()


# The end of the preloader


def test_workers_start_plainly_when_the_preloader_is_dead(light):
    assert is_forked(light)
    light.process.kill()
    light.process.wait()
    assert Path(light.socket).exists()
    assert not is_forked(light)


def test_a_worker_runs_to_its_end_when_the_preloader_is_killed(light):
    worker = light.start(READY_THEN_READ)
    worker.stdout.readline()
    light.process.kill()
    light.process.wait()
    assert outcome(worker)[1:] == ("read to the end\n", "")


def test_a_worker_starts_plainly_when_the_preloader_is_killed_while_it_asks(light):
    light.process.send_signal(signal.SIGSTOP)
    worker = light.start(READY_THEN_READ)
    wait_until(lambda: is_connecting_to(light.socket))
    light.process.kill()
    child = int(worker.stdout.readline())
    assert child == worker.pid
    assert outcome(worker) == (0, "read to the end\n", "")


def is_connecting_to(path):
    """Return whether a process has connected to the socket, in addition to its listener."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sum(line.endswith(f" {path}") for line in lines) > 1


def test_the_preloader_ends_with_its_standard_input_and_workers_go_on(light):
    worker = light.start(READY_THEN_READ)
    worker.stdout.readline()
    light.process.stdin.close()
    assert light.process.wait(DEADLINE_S) == 0
    assert not Path(light.socket).exists()
    assert worker.poll() is None
    assert outcome(worker)[1:] == ("read to the end\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_the_terminal_does_not_end_the_preloader(enduring, number):
    wait_until(lambda: has_signal(enduring.process.pid, number, "SigIgn"))
    enduring.process.send_signal(number)
    assert is_forked(enduring)


def ask(preloaded, script, stdin=0):
    """Send a request as a launcher does; return the connection."""
    path = preloaded.directory / "asked.py"
    path.write_text(script)
    request = {
        "arguments": [str(path)],
        "environment": preloaded.environment,
        "folder": str(preloaded.directory),
        "umask": 0o022,
        "oom_score_adj": "",
    }
    message = json.dumps(request).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(DEADLINE_S)
    connection.connect(preloaded.socket)
    socket.send_fds(connection, [len(message).to_bytes(8, "big")], [stdin, 1, 2])
    connection.sendall(message)
    return connection


def test_where_memory_runs_out_a_forked_worker_goes_as_early_as_a_plain_one(enduring):
    score = Path("/proc/self/oom_score_adj")
    look = "print(open('/proc/self/oom_score_adj').read().strip())"
    for plain in (False, True):
        started = enduring.start(look, plain=plain, preexec_fn=lambda: score.write_text("700"))  # as the raylet does
        assert outcome(started)[:2] == (0, "700\n")


def test_launchers_that_hang_up_do_not_end_the_preloader(enduring):
    assert is_forked(enduring)
    enduring.process.send_signal(signal.SIGSTOP)  # so that it notices only when it answers
    ask(enduring, f"open({str(enduring.directory / 'has_run')!r}, 'w')").close()
    enduring.process.send_signal(signal.SIGCONT)
    assert is_forked(enduring)
    # a launcher that hangs up starts its worker plainly: a fork would be a second worker with the same id
    assert not (enduring.directory / "has_run").exists()


def test_launchers_that_are_killed_while_they_ask_do_not_end_the_preloader(enduring):
    for _ in range(20):
        ask(enduring, "import signal; signal.pause()").close()
    assert is_forked(enduring)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\0" * 7 + b"\x09[1, 2", b"\0" * 7 + b"\x06[1, 2]"])
def test_what_is_no_request_does_not_end_the_preloader(enduring, content):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(enduring.socket)
        connection.sendall(content)
    assert is_forked(enduring)


# The driver


def test_no_process_is_started_where_there_is_nothing_to_gain(monkeypatch):
    monkeypatch.setattr(driver.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    for config in (ScalingConfig(hot_start="off"), ScalingConfig(address="ray://head:10001")):
        hot_start = HotStart(config, 1)
        assert hot_start.runtime_env() == {}
        hot_start.stop()
    monkeypatch.delattr(os, "pidfd_open")
    assert not driver.supported()
    assert HotStart(ScalingConfig(), 1).runtime_env() == {}


def test_the_driver_starts_one_preloader_and_leaves_neither_process_nor_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(driver.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", python_path_without_torch(tmp_path))
    hot_start = HotStart(ScalingConfig(), 1, imports=["not_there", "colorsys"])
    try:
        words = shlex.split(hot_start.runtime_env()["py_executable"])
        path = Path(words[-1])
        wait_until(path.exists)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        script = tmp_path / "script.py"
        script.write_text(f"import os, sys; print(os.environ['{MARK}'], os.getppid(), 'colorsys' in sys.modules)")
        forked = subprocess.run([*words, script], capture_output=True, text=True, timeout=DEADLINE_S)
        mark, forker, has_import = forked.stdout.split()
        assert (mark, has_import) == ("1", "True")
    finally:
        hot_start.stop()
    wait_for_end_of(int(forker))
    assert list(tmp_path.glob("ftexp-*")) == []
    assert hot_start.runtime_env() == {}
    hot_start.stop()


def test_nothing_is_left_when_the_driver_is_killed(tmp_path):
    code = """
import sys
from ftexp.config.schema import ScalingConfig
from ftexp.cluster.hot_start import driver
hot_start = driver.HotStart(ScalingConfig(), 1)
print(hot_start._process.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": python_path_without_torch(tmp_path)},
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as killed:
        preloader = int(killed.stdout.readline())
        wait_until(lambda: list(tmp_path.glob("*/socket")))
        killed.kill()
    wait_for_end_of(preloader)
    assert list(tmp_path.glob("ftexp-*")) == []


def test_rays_workers_are_forks_and_nothing_outlives_the_cluster(tmp_path):
    code = f"""
import json, os, ray
from pathlib import Path
from ftexp.config.schema import ScalingConfig
from ftexp.cluster.hot_start.driver import HotStart
from ftexp.cluster.ray_private import starting_fewer_processes
hot_start = HotStart(ScalingConfig(), 1)
options = dict(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=hot_start.runtime_env())
with hot_start.raylet_settings(), starting_fewer_processes(prints_logs=False):
    ray.init(address="local", **options)
@ray.remote(runtime_env={{"env_vars": {{"GIVEN": "${{FTEXP_TEST}}!"}}}})
class Worker:
    def look(self):
        raylet = int(os.environ["RAY_RAYLET_PID"])
        started = [Path(f"/proc/{{pid}}/cmdline").read_text().split("\\0") for pid in children(raylet)]
        ways = {{Path(words[1]).parent.name for words in started if words[1].endswith("setup_worker.py")}}
        actor = ray.get_runtime_context().get_actor_id()
        assert ray.get_runtime_context().get_job_id() == os.environ["RAY_JOB_ID"]
        return os.environ.get("{MARK}"), actor, os.getpid(), sorted(ways), os.environ["GIVEN"]
def children(pid):
    return Path(f"/proc/{{pid}}/task/{{pid}}/children").read_text().split()
workers = [Worker.remote() for _ in range(2)]
print(json.dumps(ray.get([worker.look.remote() for worker in workers])))
ray.shutdown()
hot_start.stop()
"""
    name = f"FTEXP_TEST={uuid.uuid4().hex}"  # marks every process that it starts
    environment = {**os.environ, **dict([name.split("=")]), "PYTHONPATH": python_path_without_torch(tmp_path)}
    session = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert session.returncode == 0, session.stderr
    (one, first, pid, *ways), (other, second, other_pid, *others) = json.loads(session.stdout.splitlines()[-1])
    assert (one, other) == ("1", "1")
    assert first != second
    assert ways == others == [["hot_start"], name.split("=")[1] + "!"]  # not by Ray's own setup_worker.py
    for left in {pid, other_pid, *processes_with(name)}:
        wait_for_end_of(left)


def agents_of(raylet):
    """Return the pids of the agents of a raylet that have started; their guards are its children."""
    agents = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")
    found = [child for guard in children_of(raylet) for child in children_of(guard)]
    return [pid for pid in found if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(agents)]


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


MORTAL_RAY = """
import os, ray, sys
from ftexp.config.schema import Config, ScalingConfig
from ftexp.cluster import ray_private
from ftexp.cluster.ray_cluster import start_ray
start_ray(Config(), decodes=False)
kept = ray.put("found")  # the driver looks for it when the node is said to be dead
vital = ray_private.started_processes()
print(vital["raylet"].pid, flush=True)
if sys.stdin.readline() == "the GCS\\n":
    vital["GCS"].kill()
    ray_private.kill_started()
print(vital["raylet"].wait(), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("killed", ["an agent", "the driver", "the GCS", "the raylet"])
def test_the_agents_and_their_raylet_end_together_and_at_once(tmp_path, killed):
    """An agent of Ray's own would wait a minute for the GCS; and Ray would exit the driver after an agent's death."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", MORTAL_RAY], cwd=tmp_path, **options) as driver:
        raylet = int(driver.stdout.readline())
        wait_until(lambda: len(agents_of(raylet)) == 2)
        agents = agents_of(raylet)
        victim = {"an agent": agents[0], "the driver": driver.pid, "the raylet": raylet}.get(killed)
        if victim is not None:
            os.kill(victim, signal.SIGKILL)
        if killed != "the driver":
            print(killed, file=driver.stdin, flush=True)
            assert driver.stdout.readline() == f"{-signal.SIGKILL}\n"
        for pid in agents:
            wait_for_end_of(pid, within_s=10)
        if killed == "the driver":
            assert driver.wait(DEADLINE_S) == -signal.SIGKILL
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                driver.wait(0.3)  # Ray looks for objects every 0.1 s
        driver.kill()


# The raylet's own start of a worker


SETUP_WORDS = ["default_worker.py", "--node-id=1", "--language=PYTHON", "--worker-launch-time-ms=2"]


def context_of(**fields):
    return RuntimeEnvContext(**fields).serialize()


@pytest.fixture(scope="module")
def setup_worker():
    """setup_worker.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(launcher.__file__).parent))
        yield importlib.import_module("setup_worker")


@pytest.mark.parametrize("joined", [True, False])
def test_a_workers_context_is_read_as_ray_reads_it(setup_worker, joined):
    context = context_of(env_vars={"A": "1"})
    name = "--serialized-runtime-env-context"
    words = [*SETUP_WORDS, *([f"{name}={context}"] if joined else [name, context]), "--last"]
    assert setup_worker.read(words) == (
        json.loads(context), "PYTHON", ["default_worker.py", "--node-id=1", "--worker-launch-time-ms=2", "--last"]
    )  # fmt: skip


def test_variables_are_set_as_ray_sets_them(setup_worker, monkeypatch):
    values = {"ONE": "a", "TWO": "${ONE}:$ONE", "THREE": "${NOT_THERE}x$NOT_THERE", "FOUR": "${not_there}", "ONE_": ""}
    found = []
    for set_variables in (setup_worker.set_variables, update_envs):
        with monkeypatch.context() as patch:
            for name in values:
                patch.setenv(name, "before")
            set_variables(values)
            found.append({name: os.environ[name] for name in values})
    assert found[0] == found[1]
    assert found[0]["TWO"] == "a:a"


@pytest.mark.parametrize(
    "fields", [{"command_prefix": ["nice"]}, {"override_worker_entrypoint": "x"}, {"java_jars": ["x"]}, {"new": 1}]
)
def test_a_worker_that_needs_more_gets_rays_own_setup(setup_worker, monkeypatch, fields):
    context = json.dumps({**json.loads(context_of()), **fields})
    words = [*SETUP_WORDS, f"--serialized-runtime-env-context={context}"]
    monkeypatch.setattr(sys, "argv", ["setup_worker.py", *words])
    monkeypatch.setattr(os, "execv", lambda *command: pytest.fail(str(command)))
    with pytest.raises(pytest.fail.Exception, match=r"'-m', 'ray\._private\.workers\.setup_worker', 'default_worker"):
        setup_worker.main()


def test_rays_own_setup_is_where_it_is_looked_for(tmp_path):
    (tmp_path / "default_worker.py").write_text("import os, sys; print(sys.argv[1:], os.environ['A'], os.environ['C'])")
    context = context_of(env_vars={"A": "b"}, command_prefix=["export", "C=d", "&&"])
    command = [sys.executable, setup_path(), *SETUP_WORDS, f"--serialized-runtime-env-context={context}"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert output.stdout == "['--node-id=1', '--worker-launch-time-ms=2'] b d\n"


def setup_path():
    return str(Path(launcher.__file__).with_name("setup_worker.py"))


@pytest.mark.parametrize("executable", [None, "env NAMED=1 " + shlex.quote(sys.executable)])
def test_a_worker_without_the_launcher_has_the_interpreter_that_was_named(tmp_path, executable):
    (tmp_path / "default_worker.py").write_text("import os, sys; print(sys.argv[1:], os.environ.get('NAMED'))")
    context = json.dumps({**json.loads(context_of()), "py_executable": executable})
    command = [sys.executable, setup_path(), *SETUP_WORDS, f"--serialized-runtime-env-context={context}"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    named = "1" if executable else None
    assert output.stdout == f"['--node-id=1', '--worker-launch-time-ms=2'] {named}\n"


# The nodes of a joined Ray


class Node:
    """A process that stands in for a raylet, and launchers that look for its preloader."""

    def __init__(self, directory):
        self.directory, self.prefix = directory, str(directory / "ftexp-key")
        self.raylet = subprocess.Popen(["sleep", "600"])
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment["PYTHONPATH"] = python_path_without_torch(directory)
        self.environment = environment | {"RAY_RAYLET_PID": str(self.raylet.pid)}

    @property
    def kept(self):
        return Path(f"{self.prefix}-{self.raylet.pid}")

    def start(self, job="01000000"):
        script = self.directory / "worker.py"
        script.write_text(f"import os; print(os.environ.get('{MARK}'), os.getppid())")
        command = [sys.executable, "-S", "-E", launcher.__file__, f"node:{self.prefix}", str(script)]
        environment = self.environment | {"RAY_JOB_ID": job}
        return subprocess.Popen(command, env=environment, cwd=self.directory, stdout=subprocess.PIPE, text=True)

    def run(self, job="01000000"):
        """Run a worker; return (whether it was forked, its parent's pid)."""
        return self.told(self.start(job))

    @staticmethod
    def told(worker):
        mark, parent = worker.communicate(timeout=DEADLINE_S)[0].split()
        return mark == "1", int(parent)

    def preloaders(self):
        """Yield the pids of the node's preloaders."""
        text = f"{self.kept}/socket"
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (directory / "cmdline").read_text().split("\0")
                if text in words and parent_of(int(directory.name)) == 1:
                    yield int(directory.name)


def num_waiting_for(lock):
    """Return the number of processes that wait for the lock."""
    inode = f":{os.fstat(lock.fileno()).st_ino} "
    return sum("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())


def parent_of(pid):
    return int(Path(f"/proc/{pid}/status").read_text().partition("PPid:")[2].split()[0])


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    started = Node(tmp_path_factory.mktemp("node"))
    yield started
    started.raylet.kill()
    started.raylet.wait()


def test_workers_that_start_together_on_a_node_start_one_preloader_that_later_jobs_find(node):
    node.kept.mkdir(mode=0o700)
    with (node.kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        workers = [node.start() for _ in range(3)]
        wait_until(lambda: num_waiting_for(lock) == 3)
    told = [node.told(worker) for worker in workers]
    (preloader,) = node.preloaders()
    assert {forked for forked, _ in told} == {True}
    (forker,) = {parent for _, parent in told}
    assert parent_of(forker) == preloader
    assert node.run(job="02000000") == (True, forker)
    assert list(node.preloaders()) == [preloader]
    assert stat.S_IMODE(node.kept.stat().st_mode) == 0o700


def test_workers_start_plainly_when_others_may_use_the_nodes_folder(node):
    node.run()
    node.kept.chmod(0o750)
    assert not node.run()[0]
    node.kept.chmod(0o700)
    assert node.run()[0]


def test_a_nodes_preloader_that_was_killed_is_replaced_and_the_last_ends_with_the_raylet(node):
    node.run()
    (first,) = node.preloaders()
    os.kill(first, signal.SIGKILL)
    wait_for_end_of(first)
    assert node.run()[0]
    (second,) = node.preloaders()
    node.raylet.kill()
    node.raylet.wait()
    wait_for_end_of(second)
    assert not node.kept.exists()


def processes_with(text):
    for directory in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if directory.name.isdigit() and text.encode() in (directory / "environ").read_bytes():
                yield int(directory.name)


def test_a_preloaded_process_imports_without_what_only_a_library_of_its_would_use(tmp_path, monkeypatch):
    (tmp_path / "takes_it.py").write_text(
        "try:\n    import unwanted\nexcept ImportError:\n    unwanted = None\n", encoding="utf-8"
    )
    (tmp_path / "unwanted.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    try:
        import_all(("takes_it", "not_there"), without=("unwanted",))
        import takes_it
        import unwanted  # a worker can still import it

        assert takes_it.unwanted is None
        assert unwanted.__file__
    finally:
        gc.unfreeze()
        for name in ("takes_it", "unwanted"):
            sys.modules.pop(name, None)
