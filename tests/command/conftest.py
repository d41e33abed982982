"""Commands and what they leave."""

import pytest

from tests.support.command import Command, RunFolder
from tests.support.reference import PLUGIN, made_once, overrides_of, shared_folder, train_reference, write_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """The default data as a directory of images: the overrides that train on it, by either feed."""
    folder = made_once(shared_folder(tmp_path_factory) / "pictures", lambda folder: write_pictures(folder / "root"))
    return overrides_of(folder / "root")


@pytest.fixture(scope="session")
def clean_run(tmp_path_factory, pictures):
    """A run of reference.OPTIONS that nothing happened to: others, to which something does, must end as it did."""
    folder = shared_folder(tmp_path_factory) / "clean_run"
    return RunFolder(made_once(folder, lambda folder: train_reference(folder, pictures)) / "clean")


@pytest.fixture
def ftexp(tmp_path):
    """Start `python -m ftexp.train <overrides>` with its storage in tmp_path/runs."""
    started = []
    (tmp_path / "obedient.py").write_text(PLUGIN)  # of reference.OPTIONS

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
