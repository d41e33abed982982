"""Fixtures that start commands and read their run directories."""

import pytest

from tests.support.command import Command, RunFolder
from tests.support.hooks import AlertServer
from tests.support.reference import PLUGIN, made_once, overrides_of, shared_folder, train_reference, write_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Overrides that train on the default data as a directory of images, for either feed."""
    directory = made_once(
        shared_folder(tmp_path_factory) / "pictures", lambda directory: write_pictures(directory / "root")
    )
    return overrides_of(directory / "root")


@pytest.fixture(scope="session")
def clean_run(tmp_path_factory, pictures, preloaded):
    """An undisturbed run of reference.OPTIONS; disturbed runs must end with the same state."""
    directory = shared_folder(tmp_path_factory) / "clean_run"
    return RunFolder(made_once(directory, lambda directory: train_reference(directory, pictures, preloaded)) / "clean")


@pytest.fixture
def ftexp(tmp_path, preloaded):
    """Function that starts `python -m ftexp.<module> <overrides>`; train has its storage in tmp_path/runs.

    as_typed: start it as users do, with its own imports and its own Ray; otherwise it is a fork. own_ray: whether a
    fork has its own Ray instead of the one that commands share; None: true for all commands except train and drill.
    """
    started = []
    (tmp_path / "obedient.py").write_text(PLUGIN)  # which reference.OPTIONS names

    def start(*overrides, module="train", as_typed=False, own_ray=None):
        given = []
        if module == "train" and not any(word.startswith("run.storage=") for word in overrides):
            given.append(f"run.storage={tmp_path / 'runs'}")
        if module == "train" and not any(word.startswith("report.") for word in overrides):
            given.append("report.enabled=false")  # it takes half a second, and few tests need it
        joins = not as_typed and not (module not in ("train", "drill") if own_ray is None else own_ray)
        if joins and not any(word.startswith("scaling.num_workers=") for word in overrides):
            given.append("scaling.num_workers=2")
        command = Command(module, [*overrides, *given], tmp_path, None if as_typed else preloaded, joins)
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


@pytest.fixture
def alert_server():
    server = AlertServer()
    yield server
    server.close()
