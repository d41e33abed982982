"""`python -m ftexp.evaluate`: where it writes its result. tests/command/test_end_to_end.py checks the result itself."""

import contextlib
import io
import sys

import pytest
from omegaconf import OmegaConf

import ftexp.cluster.ray_cluster
import ftexp.evaluate.command as command
import ftexp.evaluate.measure as measuring
from ftexp.cli.trained_run import load_run_config
from ftexp.config.schema import ScalingConfig
from ftexp.errors import ConfigError, DataError, StorageError
from ftexp.evaluate.command import EvaluateConfig, MovedData, _on_other_data, evaluate
from ftexp.rundir.names import CONFIG_FILE
from tests.support.configs import composed
from tests.support.saved_runs import saved_run


def test_an_out_that_cannot_be_written_is_refused_before_anything_is_counted(tmp_path):
    run = saved_run(tmp_path / "run", "data=synthetic")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"out: .*file can't be written: .*Give another out"):
        evaluate(EvaluateConfig(run=run.storage.uri, out=str(tmp_path / "file" / "told.json")))


def test_other_data_need_neither_the_runs_machine_nor_what_its_weights_were_taken_for(tmp_path):
    words = ["scaling.num_workers=64", "scaling.use_gpu=true", "model.pretrained_partial=true"]
    run = saved_run(tmp_path / "run", "data=synthetic", *words)
    (tmp_path / "photos").mkdir()
    made = _on_other_data(run.config, composed("data=image_folder", f"data.root={tmp_path}/photos"), run.storage)
    assert (made.scaling, made.model.pretrained_partial) == (ScalingConfig(), False)


def test_data_that_is_not_where_it_was_is_asked_for_and_taken_from_where_it_is(tmp_path, monkeypatch):
    run = saved_run(tmp_path / "run", "data=image_folder", f"data.root={tmp_path}/photos", "data.image_size=8")
    seen = []
    monkeypatch.setattr(ftexp.cluster.ray_cluster, "private_ray", contextlib.nullcontext)
    monkeypatch.setattr(measuring, "measure", lambda _, run_config, *__, **___: seen.append(run_config.data.root))
    with pytest.raises(
        ConfigError, match=rf"data.root={tmp_path}/photos, the run.s data, does not exist: add data\.root="
    ):
        evaluate(EvaluateConfig(run=run.storage.uri))
    (tmp_path / "moved").mkdir()
    monkeypatch.chdir(tmp_path)
    evaluate(EvaluateConfig(run=run.storage.uri, data=MovedData(root="moved")))
    assert seen == [f"{tmp_path}/moved"]


def test_other_data_that_are_not_there_are_noticed_before_ray_starts(tmp_path, monkeypatch):
    run = saved_run(tmp_path / "run", "data=synthetic")
    monkeypatch.setattr(ftexp.cluster.ray_cluster, "private_ray", lambda _: pytest.fail("Ray is next"))
    other = composed("data=image_folder", f"data.root={tmp_path}/nowhere")
    with pytest.raises(DataError, match=rf"^data\.root={tmp_path}/nowhere does not exist$"):
        evaluate(EvaluateConfig(run=run.storage.uri), other)


def test_a_run_that_is_older_than_some_fields_has_their_defaults(tmp_path):
    run = saved_run(tmp_path / "run", "data=synthetic")
    config = OmegaConf.create(run.storage.read_bytes(CONFIG_FILE).decode())
    whole = load_run_config(run.storage)
    for group, names in {"data": ["task", "label_separator"], "augment": ["splits"], "loss": ["clip", "alpha"]}.items():
        for name in names:
            del config[group][name]
    del config["profile"]
    run.storage.write_bytes(CONFIG_FILE, OmegaConf.to_yaml(config).encode())
    assert load_run_config(run.storage) == whole


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("output", "shown"), [(Screen, True), (io.StringIO, False)])
def test_only_a_terminal_shows_that_a_result_is_awaited(monkeypatch, output, shown):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "argv", ["evaluate", "run=somewhere"])
    monkeypatch.setattr(sys, "stdout", output())
    monkeypatch.setattr(command, "evaluate", lambda _: {})
    monkeypatch.setattr(command, "print_result", lambda _: None)
    command.main()
    assert ("evaluating" in sys.stdout.getvalue()) is shown
