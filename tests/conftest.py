"""The fixtures of all lanes, and how two workers share the tests."""

import io
import logging
import os
from pathlib import Path

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

pytest.register_assert_rewrite("tests.support")

from tests.support.command import FOUR_EPOCHS, Command, RunFolder  # noqa: E402
from tests.support.s3 import s3_uri  # noqa: E402

# read when Ray is imported: else `uv run pytest` has Ray start every worker through `uv run`, in an environment anew
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
# Ray's own is 15: beside tests that keep a core busy, a run would stand still
os.environ |= {"RAY_worker_niceness": "0"}

# else every process that a test starts compiles ftexp anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Two workers of pytest-xdist share the files: those of FIRST run one after the other on one worker, since they mind
# most what runs beside them; the other worker begins with what is light, and ends with what starts the command, too.
# The tests of EACH need nothing of one another: they are given out singly, so that both workers end at about one time.
FIRST = ("cluster", "exactly_once", "end_to_end")
EACH = ("data_command", "failures", "nonfinite", "experiments", "loop", "fitting")  # the longest first
LAST = ("streaming", "sweep", "search_sweep", "trackers", "s3", "predict", "hot_start", "export", *EACH)

# how long an example takes is the machine's affair
hypothesis.settings.register_profile("ftexp", deadline=None)
hypothesis.settings.load_profile("ftexp")


def pytest_xdist_make_scheduler(config, log):
    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            name = _name(Path(nodeid.partition("::")[0]))
            return nodeid if name in EACH else "first" if name in FIRST else name

    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(_lane(item.path))
    places = {name: place - len(FIRST) for place, name in enumerate(FIRST)}
    places |= {name: place + 1 for place, name in enumerate(LAST)}
    items.sort(key=lambda item: places.get(_name(item.path), 0))


def _lane(path):
    return path.relative_to(Path(__file__).parent).parts[0]


def _name(path):
    return path.stem.removeprefix("test_")


@pytest.fixture(scope="session")
def clean_run(tmp_path_factory):
    """A run of FOUR_EPOCHS that nothing happened to: others, to which something does, must end as it did."""
    folder = tmp_path_factory.mktemp("clean")
    command = Command("train", [*FOUR_EPOCHS, f"run.storage={folder}", "run.name=clean"], folder)
    assert command.wait() == 0, command.output
    return RunFolder(folder / "clean")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """The default data as a folder of images: the words that train on it, by either feed."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("pictures")
    for number, (pixels, label) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
        path = root / str(label) / f"{number:04d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.rint(pixels.reshape(8, 8) * (255 / 16)).astype(np.uint8)).save(path)
    shape = [
        "data.image_size=8",
        "data.channels=1",
        "data.mean=[0.3053]",
        "data.std=[0.3760]",
        "data.test_fraction=0.2",
    ]
    return ["data=image_folder", f"data.root={root}", "augment=digits", *shape]


@pytest.fixture(scope="module")
def data_ray():
    """A Ray on this machine for the tests of a module; its workers ask a store again at once."""
    import ray

    def hurry():  # in here, so that it is sent whole: workers can't import this file
        import ftexp.data.listing

        ftexp.data.listing._RETRY_AFTER_S = (0.0, 0.0, 0.0)

    logging.getLogger("ray").setLevel(logging.WARNING)  # it fills the report of a failed test otherwise
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"worker_process_setup_hook": hurry},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def s3_server():
    """The port of an S3 server with an empty bucket named `bucket`."""
    from moto.server import ThreadedMotoServer

    from ftexp.storage.directory import Storage

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
    """A folder of the test's own."""
    from ftexp.storage.directory import Storage

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
    open_uri = ftexp.storage.directory.open_uri

    def open_in_memory(uri, key):
        if not uri.startswith("memory://"):
            return open_uri(uri, key)
        return filesystem, uri.removeprefix("memory://").partition("?")[0]

    monkeypatch.setattr(ftexp.storage.directory, "open_uri", open_in_memory)
    return "memory://bucket/run"


@pytest.fixture
def ftexp(tmp_path):
    """Start `python -m ftexp.train <overrides>` with its storage in tmp_path/runs."""
    started = []

    def start(*overrides, module="train"):
        given = [f"run.storage={tmp_path / 'runs'}"] if module == "train" else []
        if module == "train" and not any(word.startswith("report.") for word in overrides):
            given.append("report.enabled=false")  # half a second, which few tests look at
        command = Command(module, [*overrides, *given], tmp_path)
        started.append(command)
        return command

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.terminate()
            command.process.wait(timeout=60)


@pytest.fixture
def run_folder(tmp_path):
    return lambda name: RunFolder(tmp_path / "runs" / name)
