"""Commands and test programs as forks of a process that has imported everything, and a shared Ray for them.

Imports and the start of a Ray are two thirds of a command's cost. `python -m ftexp.<module>` in a fork needs neither.
Otherwise it is like the command: it has its own process, environment, directory, output and signals.

Run as a script, this file is the fork's program: `preloaded.py <module> <words>`. `preloaded.py ray` runs the shared
Ray until its standard input ends.
"""

import contextlib
import fcntl
import json
import logging
import os
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from ftexp.cluster import ray_private
from ftexp.cluster.hot_start import driver
from ftexp.cluster.hot_start.forker import MARK, MORE
from tests.support.command import DEADLINE_S

FOLDER = "FTEXP_TESTS_PRELOADED"  # environment variable of a fork: the directory with the preloaded process's socket
COMMANDS_IMPORT = "hydra.main,ftexp.cli.compose,ftexp.report.write"  # in addition to the workers' imports
RAYS_WORKERS_IMPORT = "ftexp.evaluation.metric_set"  # as workers of a run with metrics do in a Ray of their own
ROOT = str(Path(__file__).parents[2])  # in the workers' PYTHONPATH, so that they can import the tests
NUM_CPUS = 8  # of the shared Ray: for a run's workers and its decoding tasks


class Preloaded:
    """The preloaded process, and the shared Ray, which the first command that needs it starts.

    All workers of pytest-xdist share both through files in `directory`. The first worker that needs one of them starts
    it. It exits when its standard input ends, which is when no worker holds that open any more.
    """

    def __init__(self, directory):
        from ftexp.cluster.ray_cluster import prepare_environment
        from ftexp.config.schema import Config

        self._directory, self._address, self._started, self._held = directory, None, {}, []
        directory.mkdir(exist_ok=True)
        before = dict(os.environ)
        try:
            os.environ["RAY_AUTH_MODE"] = "token"  # Ray's default in a cluster; read when Ray is imported
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, before.get("PYTHONPATH")]))
            prepare_environment(Config())
            self.python = self._shared("python", _start_preloader)
            self._settings = {name: value for name, value in os.environ.items() if before.get(name) != value}
        finally:
            os.environ.clear()
            os.environ.update(before)
        *_, where = self.python
        self._settings |= {FOLDER: str(Path(where).parent), MORE: COMMANDS_IMPORT}

    def _shared(self, name, start):
        """Return `what` of `start`'s (what, process), from this worker's call or from that of another worker."""
        kept = self._directory / name
        with self._alone_with(kept):
            with contextlib.suppress(FileNotFoundError):  # not started yet, or the worker that started it has exited
                standard_input, what = json.loads(kept.read_text())
                self._held.append(os.open(standard_input, os.O_WRONLY))
                return what
            what, process = start()
            kept.write_text(json.dumps([f"/proc/{os.getpid()}/fd/{process.stdin.fileno()}", what]))
            self._started[kept] = process
            return what

    @staticmethod
    @contextlib.contextmanager
    def _alone_with(kept):
        with kept.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def words(self, module):
        """Return the command line that replaces `python -m ftexp.<module>`."""
        return [*self.python, __file__, module]

    def environment(self):
        """Return the environment of a fork."""
        return {**os.environ, **self._settings}

    def run(self, program, *words, **environment):
        """Run a program of tests.support in a fork and return its output; fail if it fails."""
        done = subprocess.run(
            [*self.python, f"{ROOT}/tests/support/{program}.py", *words],
            env={**self.environment(), **environment}, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def runtime_env(self):
        """Return the runtime_env that makes Ray fork its workers; AWS_* gives them access to a test's S3 server."""
        variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        variables["PYTHONPATH"] = self._settings["PYTHONPATH"]
        return {"py_executable": shlex.join(self.python), "env_vars": variables}

    def raylet_settings(self):
        """Return a context in which a started raylet sets up workers by driver._SETUP, without importing Ray first."""
        return ray_private.workers_set_up_by(driver._SETUP)

    def joining(self):
        """Return (environment, overrides) with which a command joins the shared Ray, whose workers are forks too."""
        if self._address is None:
            self._address = self._shared("ray", self._start_ray)
        environment = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": self.runtime_env()})}
        return {**self.environment(), **environment}, [f"scaling.address={self._address}", "scaling.use_gpu=false"]

    def _start_ray(self):
        words, pipe = [*self.python, __file__, "ray"], subprocess.PIPE
        process = subprocess.Popen(words, env=self.environment(), stdin=pipe, stdout=pipe, text=True)
        return process.stdout.readline().strip(), process

    def stop(self):
        """Release both; wait until those that this worker started exit, unless another worker still needs them."""
        for kept, process in self._started.items():
            with self._alone_with(kept):
                kept.unlink()
                process.stdin.close()
        for descriptor in self._held:
            os.close(descriptor)
        for process in self._started.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)


def _start_preloader():
    from ftexp.config.schema import Config

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup pytest` ignores SIGHUP, and forks would inherit that
    hot_start = driver.HotStart(Config().scaling, num_threads=1)
    signal.signal(signal.SIGHUP, before)
    return hot_start.python(), hot_start._process


class Shared(driver.HotStart):
    """The HotStart of a fork: uses the preloaded process that already runs, and never stops it."""

    def __init__(self, config, num_threads, joins=None, imports=()):
        super().__init__(config, num_threads, joins=True)
        joins = config.address is not None if joins is None else joins
        self._directory = None if joins or config.hot_start == "off" else os.environ[FOLDER]

    def stop(self):
        self._directory = None


class ForkedCommand(subprocess.Popen):
    """The subprocess.Popen of a forked drill: its command is a fork too."""

    def __init__(self, words, **options):
        python, is_module, module, *overrides = words
        assert (python, is_module) == (sys.executable, "-m")
        forked = driver._fork_words(f"{os.environ[FOLDER]}/socket")
        super().__init__([*forked, __file__, module.removeprefix("ftexp."), *overrides], **options)


def become(module):
    """Become the command; its workers are forks of the same preloaded process."""
    if module == "drill":
        subprocess.Popen = ForkedCommand
    for name in (MARK, MORE):  # variables of a forked worker, not of a command
        os.environ.pop(name, None)
    sys.stdin = sys.stdout = sys.stderr = None  # they are the preloaded process's: each command opens missing streams
    sys.orig_argv = [sys.executable, "-m", f"ftexp.{module}", *sys.argv[1:]]  # what a restart executes
    own, driver.HotStart = driver.HotStart, Shared
    for imported in [*sys.modules.values()]:
        if getattr(imported, "HotStart", None) is own:
            imported.HotStart = Shared
    sys.path[0] = str(Path.cwd())
    runpy.run_module(f"ftexp.{module}", run_name="__main__", alter_sys=True)


def hold_ray():
    """Start a Ray, print its address, and stop it when standard input ends."""
    import ray

    from ftexp.config.schema import Config

    logging.getLogger("ray").setLevel("ERROR")
    os.environ[MORE] = RAYS_WORKERS_IMPORT
    hot_start = Shared(Config().scaling, num_threads=1)
    with hot_start.raylet_settings(), ray_private.starting_fewer_processes(prints_logs=False):
        ray.init(address="local", num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False)
    print(ray.get_runtime_context().gcs_address, flush=True)
    os.read(0, 1)
    ray.shutdown()


if __name__ == "__main__":
    name = sys.argv.pop(1)
    hold_ray() if name == "ray" else become(name)
