"""Fixtures of all test directories, and the distribution of tests over two workers."""

import importlib.util
import io
import logging
import os
import sys
from pathlib import Path

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

from ftexp.cluster.importing import importing_for_good

pytest.register_assert_rewrite("tests.support")

# read when Ray is imported: without it, under `uv run pytest` Ray starts every worker through `uv run`, in a new
# environment
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
# Ray's default niceness is 15: a run would make no progress while other tests keep a core busy
os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}

# otherwise every process that a test starts compiles ftexp again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Two workers of pytest-xdist share the tests. One starts with the files of FIRST, in sequence, because other load
# disturbs them most. The other starts with the files that share a Ray instance, so that there is only one instance.
# Then come the commands, the tests that start processes as Ray does, and finally the unit tests, the longest file
# first: they are short, so both workers finish at about the same time.
FIRST = ("cluster", "exactly_once", "end_to_end")
RAYLESS = ("sharding", "hot_start", "sharded_checkpoints", "replacing")  # in tests/ray, without the shared Ray
SINGLY = ("data_command", "failures", "predict", "cli", "imports")  # in tests/command: distributed test by test
LONG = ("cli", "config", "recipe", "augment", "search", "causes")  # in tests/unit

# the time of an example depends on the machine
hypothesis.settings.register_profile("ftexp", deadline=None)
hypothesis.settings.load_profile("ftexp")


def pytest_configure(config):
    """Restart with the group dev if this is `uv run pytest` in an environment without it."""
    lacking = [name for name in ("mlflow", "moto", "onnx", "optuna", "wandb") if not importlib.util.find_spec(name)]
    if lacking and (uv := os.environ.get("UV")):
        config.pluginmanager.getplugin("capturemanager").stop_global_capturing()
        os.execv(uv, [uv, "run", "--group", "dev", "pytest", *sys.argv[1:]])
    if lacking:
        raise pytest.UsageError(f"the tests need {', '.join(lacking)}: pip install --group dev")
    if hasattr(config, "workerinput"):  # otherwise torch's threads of all workers compete for the cores
        import torch

        torch.set_num_threads(1)


def pytest_xdist_make_scheduler(config, log):
    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            path = Path(nodeid.partition("::")[0])
            lane, name = path.parts[1], _name(path)
            if lane != "command":
                return str(path)
            return "first" if name in FIRST else nodeid if name in SINGLY else str(path)

    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(_lane(item))
    items.sort(key=_place)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    with importing_for_good():  # otherwise every pass of the garbage collector visits all of torch and Ray
        return (yield)


def _lane(item):
    return item.path.relative_to(Path(__file__).parent).parts[0]


def _place(item):
    lane, name = _lane(item), _name(item.path)
    first = {"command": FIRST, "ray": RAYLESS, "unit": LONG}[lane]
    part = "first" if lane == "command" and name in FIRST else "rayless" if lane == "ray" and name in RAYLESS else lane
    place = first.index(name) if name in first else len(first)
    return ("first", "ray", "command", "rayless", "unit").index(part), place


def _name(path):
    return path.stem.removeprefix("test_")


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory):
    """The process from which most commands and Ray's workers are forked."""
    from tests.support.preloaded import Preloaded
    from tests.support.reference import shared_folder

    process = Preloaded(shared_folder(tmp_path_factory) / "preloaded")
    yield process
    process.stop()


@pytest.fixture(scope="module")
def s3_server():
    """Port of an S3 server with an empty bucket named `bucket`."""
    from moto.server import ThreadedMotoServer

    from ftexp.storage.directory import Storage
    from tests.support.s3 import s3_uri

    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        logging.getLogger("werkzeug").setLevel("ERROR")  # it logs every request
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        port = server.get_host_and_port()[1]
        Storage(s3_uri(port, "bucket")).open()[0].create_dir("bucket")
        yield port
        server.stop()


@pytest.fixture
def s3(s3_server, request):
    """Storage in the bucket, for this test only."""
    from ftexp.storage.directory import Storage
    from tests.support.s3 import s3_uri

    return Storage.at(s3_uri(s3_server, "bucket"), request.node.name)


@pytest.fixture
def memory(monkeypatch):
    """URI on an in-memory imitation of an object store; every Storage under memory:// reads and writes there."""
    from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    import ftexp.storage.directory

    class Written(MemoryFile):
        is_whole = False

        def close(self):
            if not self.is_whole:  # the garbage collector closes it again
                self.is_whole = True
                self.commit()

    class WholeFiles(MemoryFileSystem):
        """Like an object store: a file is visible once it is complete, and each reader has its own position."""

        def _open(self, path, mode="rb", **kwargs):
            if mode == "wb":
                return Written(self, self._strip_protocol(path))
            return io.BytesIO(super()._open(path, mode, **kwargs).getvalue())

    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    filesystem = PyFileSystem(FSSpecHandler(WholeFiles(skip_instance_cache=True)))
    opened = ftexp.storage.directory._opened

    def open_in_memory(uri):
        if not uri.startswith("memory://"):
            return opened(uri)
        return filesystem, uri.removeprefix("memory://").partition("?")[0]

    monkeypatch.setattr(ftexp.storage.directory, "_opened", open_in_memory)
    return "memory://bucket/run"
