"""The state registry: names decide what is saved; disagreement is an error that says what to do."""

import io
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ftexp.checkpoint.states
from ftexp.checkpoint import registry
from ftexp.checkpoint.build import state_context
from ftexp.checkpoint.registry import ExtraState, check_names, register_state
from ftexp.checkpoint.staging import load_part
from ftexp.config.schema import EmaConfig, ScheduleConfig
from ftexp.errors import CheckpointError, StateError, UnknownNameError
from ftexp.evaluation.meter import Meter
from ftexp.job.group import ProcessGroup
from ftexp.job.progress import Progress
from ftexp.model.schedule import build_scheduler
from ftexp.wire.events import LearningRateChanged
from ftexp.wire.messages import Happened
from tests.support.jobs import make_job

BUILT_IN = ["progress", "scheduler", "scaler", "ema", "rng", "best"]


@pytest.fixture
def job():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
    return SimpleNamespace(
        rank=0,
        channel=SimpleNamespace(send=lambda *_, **__: None),
        progress=Progress(
            Meter(torch.device("cpu")),
            3200,
            step=40,
            position=1280,
            epoch=1,
            best={"metric": "val_accuracy", "value": 0.75, "step": 20},
            num_overflows=5,
        ),
        optimizer=optimizer,
        scheduler=build_scheduler(ScheduleConfig(name="cosine", warmup_epochs=1), optimizer, 100, 10.0),
        scaler=torch.amp.GradScaler("cpu", enabled=True, init_scale=1024.0),
        ema=None,
    )


@pytest.fixture
def own_state():
    """Function that registers a state for one test; returns the dict that the state loads into."""
    names = []

    def register(name, **attributes):
        methods = {
            "version": 1,
            "__init__": lambda self, job: None,
            "state_dict": lambda self: {"count": 3},
            "load_state_dict": lambda self, state: loaded.update(state),
        }
        loaded = {}
        register_state(name)(type(name, (), {**methods, **attributes}))
        names.append(name)
        return loaded

    yield register
    for name in names:
        del registry._states._entries[name]


def round_trip(state):
    """Return the state after writing and reading a file, as in a restart."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return load_part("extra_state.pt", buffer.getvalue())


def test_every_built_in_state_survives_the_file_and_comes_back(job):
    extra = ExtraState(BUILT_IN, job)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    saved, versions = round_trip(extra.state_dict()), extra.versions()
    expected = (random.random(), np.random.random(), torch.rand(1).item())
    rate = job.optimizer.param_groups[0]["lr"]
    job.scheduler.step_update(40)
    assert job.optimizer.param_groups[0]["lr"] != rate
    rate = job.optimizer.param_groups[0]["lr"]

    job.progress = Progress(Meter(torch.device("cpu")), 3200)
    job.scaler._scale = None
    job.scheduler.step_update(0)
    ExtraState(BUILT_IN, job).load(saved, versions, "run 'x'")
    assert (job.progress.step, job.progress.position, job.progress.epoch) == (40, 1280, 1)
    assert job.progress.best == {"metric": "val_accuracy", "value": 0.75, "step": 20}
    assert (job.scaler.get_scale(), job.progress.num_overflows) == (1024.0, 5)
    assert job.optimizer.param_groups[0]["lr"] == rate
    assert (random.random(), np.random.random(), torch.rand(1).item()) == expected


def test_a_schedule_that_goes_on_otherwise_than_the_checkpoint_says_so_and_only_then(job):
    sent = []
    job.channel = SimpleNamespace(send=sent.append)
    job.scheduler.step_update(40)
    before, extra = job.optimizer.param_groups[0]["lr"], ExtraState(["scheduler"], job)
    saved, versions = round_trip(extra.state_dict()), extra.versions()
    extra.load(saved, versions, "run 'x'")
    assert sent == []
    longer = build_scheduler(ScheduleConfig(name="cosine", warmup_epochs=1), job.optimizer, 300, 10.0)
    longer.step_update(40)
    after, job.scheduler = job.optimizer.param_groups[0]["lr"], longer
    job.optimizer.param_groups[0]["lr"] = before  # the value restored from optimizer.pt
    extra.load(saved, versions, "run 'x'")
    assert before != after
    assert sent == [Happened(LearningRateChanged(40, before, after))]


def test_extra_state_has_the_tutorials_epoch(job):
    assert ExtraState(["progress"], job).state_dict()["progress"]["epoch"] == 1


def test_other_ranks_keep_their_own_generators(job):
    saved = ExtraState(["rng"], job).state_dict()
    job.rank = 1
    torch.manual_seed(9)
    ExtraState(["rng"], job).load(saved, {"rng": 1}, "run 'x'")
    after = torch.rand(1)
    torch.manual_seed(9)
    assert torch.equal(after, torch.rand(1))


def test_a_state_of_the_users_own_is_saved_and_restored(job, own_state):
    loaded = own_state("counter")
    extra = ExtraState(["progress", "counter"], job)
    saved = round_trip(extra.state_dict())
    assert saved["counter"] == {"count": 3}
    extra.load(saved, extra.versions(), "run 'x'")
    assert loaded == {"count": 3}


def test_a_state_is_given_the_very_objects_that_train():
    job = make_job(ema=EmaConfig(decay=0.9), group=ProcessGroup(1, 2, torch.device("cpu")))
    context = state_context(job)
    learner = job.learner
    given = (context.config, context.progress, context.channel, context.model, context.optimizer, context.scheduler)
    held = (job.config, job.progress, job.channel, learner.model, learner.optimizer, learner.scheduler)
    assert all(one is other for one, other in zip(given, held, strict=True))
    assert context.scaler is learner.scaler
    assert context.ema is learner.ema
    assert (context.rank, context.world_size, context.device) == (1, 2, torch.device("cpu"))


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"extra_state='progres' is unknown\. Did you mean 'progress'"):
        check_names(["progres"])


def test_a_name_can_be_registered_once_only(own_state):
    own_state("counter")
    with pytest.raises(ValueError, match="'counter' is already registered"):
        own_state("counter")


def test_a_class_without_a_version_is_refused():
    with pytest.raises(ValueError, match=r"'nameless'.*version"):
        register_state("nameless")(type("Nameless", (), {}))


def test_a_saved_state_that_would_be_dropped_is_an_error_that_says_who_wrote_it(job):
    saved = ExtraState(["progress", "best"], job).state_dict()
    with pytest.raises(StateError, match=r"'best'.*run 'old'.*extra_state=\[progress,best\]"):
        ExtraState(["progress"], job).load(saved, {"progress": 1, "best": 1}, "run 'old'")


def test_a_saved_state_of_a_missing_plugin_says_so(job):
    saved = {**ExtraState(["progress"], job).state_dict(), "lost": {}}
    with pytest.raises(StateError, match=r"'lost'.*plugins"):
        ExtraState(["progress"], job).load(saved, {"progress": 1, "lost": 1}, "run 'old'")


def test_a_configured_state_that_was_not_saved_is_an_error(job):
    saved = ExtraState(["progress"], job).state_dict()
    with pytest.raises(StateError, match=r"names 'best'.*run 'old'.*\[progress\]"):
        ExtraState(["progress", "best"], job).load(saved, {"progress": 1}, "run 'old'")


def test_an_optional_state_may_be_missing_on_either_side(job, own_state):
    loaded = own_state("extra", optional=True)
    without, within = ExtraState(["progress"], job), ExtraState(["progress", "extra"], job)
    within.load(without.state_dict(), without.versions(), "run 'x'")
    assert loaded == {}
    without.load(within.state_dict(), within.versions(), "run 'x'")


def test_an_older_version_goes_through_migrate(job, own_state):
    loaded = own_state(
        "counter", version=2, migrate=staticmethod(lambda state, version: {"count": state["n"] + version})
    )
    saved = {**ExtraState(["progress"], job).state_dict(), "counter": {"n": 4}}
    ExtraState(["progress", "counter"], job).load(saved, {"progress": 1, "counter": 1}, "run 'x'")
    assert loaded == {"count": 5}


@pytest.mark.parametrize(("saved_version", "hint"), [(1, "migrate"), (3, "update ftexp")])
def test_a_version_that_can_not_be_read_is_an_error(job, own_state, saved_version, hint):
    own_state("counter", version=2)
    extra = ExtraState(["progress", "counter"], job)
    with pytest.raises(StateError, match=rf"'counter'.*version {saved_version}.*{hint}"):
        extra.load(extra.state_dict(), {"progress": 1, "counter": saved_version}, "run 'x'")


class Payload:
    """An object that runs code when it is unpickled, as in a hostile checkpoint."""

    def __reduce__(self):
        return (exec, (f"import pathlib; pathlib.Path(r'{Payload.trace}').touch()",))


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path):
    Payload.trace = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save({"progress": Payload()}, buffer)
    with pytest.raises(CheckpointError, match="can't be loaded as plain data"):
        load_part("extra_state.pt", buffer.getvalue())
    assert not Payload.trace.exists()


def test_an_fp16_scale_comes_back_while_other_precisions_have_none(job):
    job.scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert ExtraState(["scaler"], job).state_dict() == {"scaler": {}}
    assert math.isclose(job.scaler.get_scale(), 1.0)
    assert ftexp.checkpoint.states.ScalerState.version == 2
