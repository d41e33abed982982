"""Commands, and programs of tests, that begin as forks of a process that has imported everything; and a Ray for them.

Two thirds of what a command costs are imports and the start of a Ray. `python -m ftexp.<module>` in a fork has neither,
and is otherwise the command: its own process, environment, directory, output and signals.

Run as a script, this file is that fork's program: `preloaded.py <module> <words>`. As `preloaded.py ray`, it holds the
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

FOLDER = "FTEXP_TESTS_PRELOADED"  # in a fork's environment: where the preloaded process listens
COMMANDS_IMPORT = "hydra.main,ftexp.cli.compose,ftexp.report.write"  # besides what workers do
RAYS_WORKERS_IMPORT = "ftexp.evaluation.metric_set"  # as those of a run with metrics do in a Ray of its own
ROOT = str(Path(__file__).parents[2])  # workers that Ray starts for tests find these there
NUM_CPUS = 8  # of the shared Ray: for the workers of a run, and what decodes beside them


class Preloaded:
    """The preloaded process, and the Ray that the first command starts which asks for it.

    All workers of pytest-xdist share both, by way of `directory`. Whichever needs one first starts it, and it ends when
    its standard input does: when no worker holds that open any more.
    """

    def __init__(self, directory):
        from ftexp.cluster.ray_cluster import prepare_environment
        from ftexp.config.schema import Config

        self._directory, self._address, self._started, self._held = directory, None, {}, []
        directory.mkdir(exist_ok=True)
        before = dict(os.environ)
        try:
            os.environ["RAY_AUTH_MODE"] = "token"  # Ray's default where it is started; it is read when Ray is imported
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
        """Return what `start` returns besides a process, (what, process), or what it returned to another worker."""
        kept = self._directory / name
        with self._alone_with(kept):
            with contextlib.suppress(FileNotFoundError):  # nobody has, or who did has ended
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
        """The words that stand for `python -m ftexp.<module>`."""
        return [*self.python, __file__, module]

    def environment(self):
        """What a fork is started with."""
        return {**os.environ, **self._settings}

    def run(self, program, *words, **environment):
        """Return what a program of tests.support prints, in a fork; fail if it fails."""
        done = subprocess.run(
            [*self.python, f"{ROOT}/tests/support/{program}.py", *words],
            env={**self.environment(), **environment}, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def runtime_env(self):
        """Return the runtime_env with which Ray forks its workers, and with which these reach a test's S3 server."""
        variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        variables["PYTHONPATH"] = self._settings["PYTHONPATH"]
        return {"py_executable": shlex.join(self.python), "env_vars": variables}

    def raylet_settings(self):
        """Have the raylet that is started meanwhile begin workers as forks do, without importing Ray before."""
        return ray_private.workers_set_up_by(driver._SETUP)

    def joining(self):
        """(the environment, the overrides) with which a command joins the shared Ray, where all is forked as well."""
        if self._address is None:
            self._address = self._shared("ray", self._start_ray)
        environment = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": self.runtime_env()})}
        return {**self.environment(), **environment}, [f"scaling.address={self._address}", "scaling.use_gpu=false"]

    def _start_ray(self):
        words, pipe = [*self.python, __file__, "ray"], subprocess.PIPE
        process = subprocess.Popen(words, env=self.environment(), stdin=pipe, stdout=pipe, text=True)
        return process.stdout.readline().strip(), process

    def stop(self):
        """Need neither any more; wait for the end of what this worker has started, if no other needs that."""
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

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup pytest` ignores it, and forks would as well
    hot_start = driver.HotStart(Config().scaling, num_threads=1)
    signal.signal(signal.SIGHUP, before)
    return hot_start.python(), hot_start._process


class Shared(driver.HotStart):
    """In a fork: the hot start whose preloaded process runs already, and outlives it."""

    def __init__(self, config, num_threads, joins=None, imports=()):
        super().__init__(config, num_threads, joins=True)
        joins = config.address is not None if joins is None else joins
        self._directory = None if joins or config.hot_start == "off" else os.environ[FOLDER]

    def stop(self):
        self._directory = None


class ForkedCommand(subprocess.Popen):
    """In a fork: a command that a drill runs, as a fork as well."""

    def __init__(self, words, **options):
        python, is_module, module, *overrides = words
        assert (python, is_module) == (sys.executable, "-m")
        forked = driver._fork_words(f"{os.environ[FOLDER]}/socket")
        super().__init__([*forked, __file__, module.removeprefix("ftexp."), *overrides], **options)


def become(module):
    """Be the command, whose own workers are forks of the same preloaded process."""
    if module == "drill":
        subprocess.Popen = ForkedCommand
    for name in (MARK, MORE):  # of what was forked, not of a command
        os.environ.pop(name, None)
    sys.stdin = sys.stdout = sys.stderr = None  # the preloaded process's: each command opens what is lacking
    sys.orig_argv = [sys.executable, "-m", f"ftexp.{module}", *sys.argv[1:]]  # what begins again, where Ray has died
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
