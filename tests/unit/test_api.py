"""ftexp.api: Hydra, signals and the environment stay unchanged, and models get the same input as in their runs."""

import io
import os
import signal
import threading

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

import ftexp.driver.run
from ftexp import api
from ftexp.checkpoint.reading import read_weights
from ftexp.data.feeds.decoding import as_image
from ftexp.data.feeds.feed import ToTensors
from ftexp.errors import CheckpointError, ConfigError
from ftexp.rundir.names import METRICS_FILE
from tests.support.configs import composed
from tests.support.image_files import encoded, picture
from tests.support.saved_runs import CHECKPOINT, CLASSES, saved_run


@pytest.fixture
def run(tmp_path):
    return saved_run(tmp_path / "run", "model.name=test_resnet", "data=synthetic")


@pytest.mark.parametrize("initialised", [False, True])
def test_a_config_is_the_commands_and_hydra_stays_as_the_user_has_it(initialised):
    GlobalHydra.instance().clear()
    try:
        if initialised:
            hydra.initialize(version_base="1.3", config_path=None)
        before = GlobalHydra.instance().hydra
        config = api.compose(["model=resnet18", "model.kwargs.stem_width=8", "profile=true"])
        assert GlobalHydra.instance().hydra is before
        with pytest.raises(ConfigError, match=r"^optim\.lrr"):
            api.compose(["optim.lrr=1"])
        assert GlobalHydra.instance().hydra is before
    finally:
        GlobalHydra.instance().clear()
    assert config == composed("model=resnet18", "++model.kwargs.stem_width=8", "profile.enabled=true")


def test_training_knows_what_was_typed_and_leaves_the_process_as_it_was(monkeypatch, tmp_path):
    calls = []

    def spoiling(config, overrides):
        calls.append((config.run.name, overrides))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        monkeypatch.setenv("RAY_SOMETHING", "1")
        monkeypatch.setenv("RAY_TMPDIR", "elsewhere")
        return {}

    monkeypatch.setattr(ftexp.driver.run, "train", spoiling)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    before, environment = signal.getsignal(signal.SIGTERM), dict(os.environ)
    words = [f"run.storage={tmp_path}", "run.name=mine"]
    run = api.train(api.compose(words))
    assert run.uri == str(tmp_path / "mine")
    assert (signal.getsignal(signal.SIGTERM), dict(os.environ)) == (before, environment)
    api.train(composed(*words))
    assert calls == [("mine", words), ("mine", None)]


def test_on_a_thread_no_signal_is_touched(monkeypatch, tmp_path):
    monkeypatch.setattr(ftexp.driver.run, "train", lambda *_: {})
    found = []
    thread = threading.Thread(target=lambda: found.append(api.train(composed(f"run.storage={tmp_path}"))))
    thread.start()
    thread.join()
    assert found


def test_a_ray_of_the_users_is_not_taken_away(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=r"^this process is connected to a Ray \(ray\.init\): call ray\.shutdown\(\)"):
        api.train(composed())


def test_a_run_tells_its_metrics_checkpoints_and_failures(run):
    points = b'{"split":"train","step":1,"train_loss":2.0}\n{"split":"val","step":1,"val_loss":3.0}\n'
    run.storage.write_bytes(METRICS_FILE, points)
    found = api.Run(run.storage.uri)
    assert found.metrics.query("split == 'val'").val_loss.tolist() == [3.0]
    assert [each.name for each in found.checkpoints] == [CHECKPOINT]
    assert (found.status, found.failures, found.config.model.name) == ("running", [], "test_resnet")
    with pytest.raises(ConfigError, match="holds no run"):
        _ = api.Run(run.storage.child("nothing").uri).status


@pytest.mark.parametrize("at", ["run", "checkpoint"])
def test_a_model_comes_with_what_its_pictures_went_through(run, at, tmp_path):
    uri = run.storage.uri if at == "run" else run.store.storage.child(CHECKPOINT).uri
    model, transform, names = api.load_model(uri)
    assert names == CLASSES
    weights = run.model(read_weights(run.store, run.store.by_name(CHECKPOINT), "raw")).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert not model.training
    content = encoded(picture(3, size=12))
    (tmp_path / "x.png").write_bytes(content)
    expected = ToTensors(run.info, torch.device("cpu"), channels_last=False)(as_image(content, run.info.fit)[None])[0]
    with Image.open(io.BytesIO(content)) as image:
        given = [transform(each) for each in (image, content, tmp_path / "x.png", str(tmp_path / "x.png"))]
    assert all(torch.equal(each, expected) for each in given)
    wide = Image.merge("CMYK", [Image.new("L", (9, 7), 40)] * 4)
    assert transform(wide).shape == (3, 8, 8)


def test_predictions_are_a_row_of_probabilities_for_each_picture(run):
    pictures = [encoded(picture(seed)) for seed in range(5)]
    table = api.predict(run.storage.uri, pictures, batch_size=2)
    model, transform, _ = api.load_model(run.storage.uri)
    with torch.inference_mode():
        expected = model(torch.stack([transform(each) for each in pictures])).softmax(1)
    assert list(table.columns) == CLASSES
    torch.testing.assert_close(torch.from_numpy(table.to_numpy().copy()), expected)
    assert api.predict(run.storage.uri, []).shape == (0, 3)


def test_the_average_is_loaded_by_name_and_missed_in_a_line(run):
    with pytest.raises(CheckpointError, match="had no EMA"):
        api.load_model(run.storage.uri, weights="ema")
    with pytest.raises(ConfigError, match="weights=raw must be one of model, ema"):
        api.load_model(run.storage.uri, weights="raw")
