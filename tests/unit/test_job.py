"""The job spec that workers receive, and errors while a model is built."""

from types import SimpleNamespace

import pytest
import torch

import ftexp.job.build
from ftexp.checkpoint import restore
from ftexp.config.schema import Config
from ftexp.data.info import DataInfo
from ftexp.driver.trainer import _anywhere
from ftexp.errors import ConfigError
from ftexp.wire.messages import Begin, Raised
from tests.support.configs import composed


def test_workers_in_another_folder_find_the_weights(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = Config()
    for given, sent in (("w.pt", f"{tmp_path}/w.pt"), ("/data/w.pt", "/data/w.pt"), (True, True), (False, False)):
        config.model.pretrained = given
        assert _anywhere(config).model.pretrained == sent
        assert config.model.pretrained == given  # the run's definition keeps the typed value


def test_what_fails_while_a_model_is_built_is_on_record(monkeypatch):
    sent, closed = [], []
    line = SimpleNamespace(
        answer=Begin(attempt=2),
        close=lambda: closed.append(True),
        send=sent.append,
    )
    context = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(ftexp.job.build.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ftexp.job.build, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ftexp.job.build, "_connect", lambda *_: line)
    config = Config()
    config.model.name = "no_such_model"
    spec = SimpleNamespace(config=config, info=DataInfo(["a"], 8, 1, [0.5], [0.5], {}))
    with pytest.raises(ConfigError, match="no_such_model"):
        ftexp.job.build.build_job(spec, {})
    (raised,) = sent
    assert (type(raised), raised.rank, closed) == (Raised, 1, [True])
    assert "no_such_model" in raised.traceback


def test_of_a_run_that_trains_on_every_rank_takes_the_checkpoint_that_rank_0_found(monkeypatch):
    """Rank 1 doesn't locate the checkpoint itself."""
    monkeypatch.setattr(restore, "locate", lambda uri: pytest.fail("rank 1 looked for itself"))
    read, loaded = [], []
    monkeypatch.setattr(restore, "CheckpointStore", lambda storage: SimpleNamespace(
        storage=storage,
        by_name=lambda name: SimpleNamespace(name=name, step=7),
    ))  # fmt: skip
    monkeypatch.setattr(
        restore,
        "read_weights",
        lambda store, manifest, weights: read.append((store.storage.uri, manifest.name, weights)) or {},
    )
    scaled = []
    monkeypatch.setattr(
        restore,
        "load_matching",
        lambda model, weights, source, *_: loaded.append(source) or SimpleNamespace(matched=["head.weight"]),
    )
    monkeypatch.setattr(restore, "initialise_head", lambda _, __, names: scaled.append(names))
    group = SimpleNamespace(rank=1, agree_on=lambda mine: ("/runs/other/checkpoints", "step_7.a1"))
    learner = SimpleNamespace(model=None, ema=None)
    info = SimpleNamespace(num_classes=2, channels=3, image_size=32)
    job = SimpleNamespace(group=group, learner=learner, info=info, config=composed("model=vit"))
    restore._start_from(job, "/runs/other")
    assert read == [("/runs/other/checkpoints", "step_7.a1", "raw")]
    assert loaded == ["/runs/other/checkpoints/step_7.a1 (step 7)"]
    assert scaled == [["head.weight"]]
