"""The fixtures of all lanes, and how two workers share the tests."""

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

# read when Ray is imported: else `uv run pytest` has Ray start every worker through `uv run`, in an environment anew
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
# Ray's own is 15: beside tests that keep a core busy, a run would stand still
os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}

# else every process that a test starts compiles ftexp anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Two workers of pytest-xdist share the tests. One begins with the files of FIRST, one after the other, since they mind
# most what runs beside them; the other with those that share a Ray instance, of which there is one then. Then come
# commands, what starts processes as Ray does, and files of unit tests last, the longest first: these are short, so that
# both workers end at about one time.
FIRST = ("cluster", "exactly_once", "end_to_end")
RAYLESS = ("sharding", "hot_start", "sharded_checkpoints", "replacing")  # of ray
SINGLY = ("data_command", "failures", "predict", "cli", "imports")  # of command: they need nothing of one another
LONG = ("cli", "config", "recipe", "augment", "search", "causes")  # of unit

# how long an example takes is the machine's affair
hypothesis.settings.register_profile("ftexp", deadline=None)
hypothesis.settings.load_profile("ftexp")


def pytest_configure(config):
    """Begin again with what all tests need, if this is `uv run pytest` where only training was installed."""
    lacking = [name for name in ("mlflow", "moto", "onnx", "optuna", "wandb") if not importlib.util.find_spec(name)]
    if lacking and (uv := os.environ.get("UV")):
        config.pluginmanager.getplugin("capturemanager").stop_global_capturing()
        os.execv(uv, [uv, "run", "--group", "dev", "pytest", *sys.argv[1:]])
    if lacking:
        raise pytest.UsageError(f"the tests need {', '.join(lacking)}: pip install --group dev")
    if hasattr(config, "workerinput"):  # or torch's threads of all workers wait for one another
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
    with importing_for_good():  # else each of the collector's passes looks at all of torch and Ray
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
    """What most commands, and Ray's workers, begin as forks of."""
    from tests.support.preloaded import Preloaded
    from tests.support.reference import shared_folder

    process = Preloaded(shared_folder(tmp_path_factory) / "preloaded")
    yield process
    process.stop()


@pytest.fixture(scope="module")
def s3_server():
    """The port of an S3 server with an empty bucket named `bucket`."""
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
    """A directory of the test's own."""
    from ftexp.storage.directory import Storage
    from tests.support.s3 import s3_uri

    return Storage.at(s3_uri(s3_server, "bucket"), request.node.name)


@pytest.fixture
def memory(monkeypatch):
    """A URI on something like an object store, in memory; every Storage under memory:// reads and writes there."""
    from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    import ftexp.storage.directory

    class Written(MemoryFile):
        is_whole = False

        def close(self):
            if not self.is_whole:  # it is closed once more when it is collected
                self.is_whole = True
                self.commit()

    class WholeFiles(MemoryFileSystem):
        """As an object store: nobody sees a file before it is whole, and each reader has a place of its own."""

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
