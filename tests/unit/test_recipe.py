"""EMA, fp16 scaler, clipping, layer-wise decay and freezing: as in timm, and bitwise identical after a restart."""

import copy
import io
from types import SimpleNamespace

import pytest
import timm
import timm.optim
import timm.utils
import torch
from torch import nn

from ftexp.chaos.strike import poisoned
from ftexp.checkpoint.build import state_context
from ftexp.checkpoint.compare import tree_differences
from ftexp.checkpoint.registry import ExtraState
from ftexp.checkpoint.staging import Staging, load_part
from ftexp.config.schema import AugmentConfig, EmaConfig, ModelConfig, OptimConfig, ScheduleConfig, TrainConfig
from ftexp.config.timm_names import without_drop_path
from ftexp.data.info import DataInfo
from ftexp.errors import ConfigError, NonFiniteError
from ftexp.model.build import build_model, timm_arguments
from ftexp.model.freezing import Freezing, classifier_parameters, parameters_of
from ftexp.model.optim import build_optimizer
from ftexp.model.schedule import build_scheduler
from ftexp.wire import events
from ftexp.worker.evaluation import evaluate
from ftexp.worker.log import log_train
from ftexp.worker.loop import advance
from ftexp.worker.step import thaw, train_step
from tests.support.jobs import RESNET, SMALL_VIT, copied, make_job, same, skipping_job, train

STATES = ["progress", "scheduler", "scaler", "ema", "rng", "best"]
EMA = EmaConfig(decay=0.9, use_warmup=True, warmup_power=0.75, update_after_step=1)
FULL = {
    "augment": AugmentConfig(
        mixup_alpha=0.8, cutmix_alpha=1.0, mix_mode="elem", mixup_off_epoch=2, erase_prob=0.5, erase_mode="pixel"
    ),
    "ema": EMA,
    "precision": "fp16",
    "label_smoothing": 0.1,
    "clip_grad_norm": 1.0,
    "accumulate_steps": 2,
    "freeze": {"blocks.0": 1, "pos_embed": None},
}
DROPPING = ModelConfig(name=SMALL_VIT.name, kwargs=SMALL_VIT.kwargs, drop_path_rate=0.3)


def step(job, batches):
    batch = next(batches)
    thaw(job)
    done = train_step(job, batch)
    advance(job, batch)
    return done


def saved(job):
    """Return a checkpoint's parts, written to files and read back."""
    held = (job.learner.model, job.learner.optimizer, ExtraState(STATES, state_context(job)))
    parts = Staging(job.group.device).copy(tuple(each.state_dict() for each in held))
    loaded = []
    for part in parts:
        buffer = io.BytesIO()
        torch.save(part, buffer)
        loaded.append(load_part("x", buffer.getvalue()))
    return loaded


def restored(parts, **arguments):
    """Return the job that a restart restores from a checkpoint."""
    job = make_job(**arguments)
    model, optimizer, extra = copy.deepcopy(parts)
    job.learner.model.load_state_dict(model)
    job.learner.optimizer.load_state_dict(optimizer)
    states = ExtraState(STATES, state_context(job))
    states.load(extra, states.versions(), "run 'x'")
    return job


# --- the full recipe


@pytest.mark.parametrize("killed_after", [2, 4, 7])
def test_with_the_full_recipe_a_restart_changes_no_bit(killed_after):
    """The kill comes before, at or after the epoch that unfreezes a part."""
    clean = make_job(DROPPING, **FULL)
    clean.learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)  # some steps overflow
    batches = clean.data.feed.from_position(0)
    for _ in range(killed_after):
        step(clean, batches)
    checkpoint = saved(clean)
    other = restored(checkpoint, model=DROPPING, **FULL)
    assert list(tree_differences(checkpoint, saved(other))) == []
    torch.rand(7)  # other draws in the new process
    for job in (clean, other):
        own = job.data.feed.from_position(job.progress.position)
        while not job.progress.finished:
            step(job, own)
    assert list(tree_differences(saved(clean), saved(other))) == []
    assert 0 < clean.progress.num_overflows < clean.progress.step


# --- EMA


def test_the_average_is_timms():
    job = make_job(RESNET, ema=EMA)
    theirs = timm.utils.ModelEmaV3(
        job.learner.model, decay=0.9, use_warmup=True, warmup_power=0.75, update_after_step=1
    )
    for number, batch in enumerate(job.data.feed.from_position(0), start=1):
        train_step(job, batch)
        advance(job, batch)
        theirs.update(job.learner.model, step=number)
    assert not same(list(job.learner.ema.model.state_dict().values()), list(job.learner.model.state_dict().values()))
    assert list(tree_differences(job.learner.ema.model.state_dict(), theirs.module.state_dict())) == []


def test_the_average_is_evaluated_beside_the_weights():
    job = make_job(ema=EMA)
    train(job)
    with torch.no_grad():
        for parameter in job.learner.ema.model.parameters():
            parameter.zero_()
    evaluate(job, "val")
    (point,) = job.channel.points()
    assert point.values["val_accuracy"] > 0.95
    assert point.values["val_accuracy_ema"] == 0.5
    assert point.values["val_loss_ema"] == pytest.approx(0.6931, abs=1e-4)
    assert not job.learner.ema.model.training
    assert job.learner.model.training


def test_the_average_of_a_checkpoint_loads_into_a_model_of_timms_alone():
    job = make_job(ema=EMA)
    train(job)
    model = timm.create_model(**timm_arguments(job.config.model, job.info))
    model.load_state_dict(saved(job)[2]["ema"]["weights"])
    images = next(job.data.feed.from_position(0)).micro_batches[0].images
    assert torch.equal(model.eval()(images), job.learner.ema.model(images))


def test_a_step_that_is_left_out_does_not_move_the_average():
    job = skipping_job(ema=EMA)
    batches = job.data.feed.from_position(0)
    step(job, batches), step(job, batches)
    before = [value.clone() for value in job.learner.ema.model.state_dict().values()]
    assert not step(job, map(poisoned, batches))
    assert same(list(job.learner.ema.model.state_dict().values()), before)
    assert step(job, batches)
    assert not same(list(job.learner.ema.model.state_dict().values()), before)


def test_without_an_average_the_state_is_empty_and_a_checkpoint_may_lack_it():
    job = make_job()
    states = ExtraState(STATES, state_context(job))
    kept = states.state_dict()
    assert kept["ema"] == {}
    del kept["ema"]
    states.load(kept, states.versions(), "an older run")


# --- fp16


def overflowing_job(**arguments):
    job = make_job(precision="fp16", **arguments)
    job.learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4)
    return job


@pytest.mark.parametrize(
    "clip", [{}, {"clip_grad_norm": 1.0}, {"clip_grad_value": 0.1}, {"clip_grad_agc": 0.1}], ids=str
)
def test_a_gradient_that_overflows_changes_nothing_is_counted_and_is_no_failure(clip):
    job = overflowing_job(ema=EMA, **clip)
    batches = job.data.feed.from_position(0)
    before, average = copied(job), [value.clone() for value in job.learner.ema.model.state_dict().values()]
    assert step(job, batches)  # an overflow is no failure
    assert (job.progress.num_overflows, job.learner.scaler.get_scale()) == (1, 2.0**23)
    assert same(copied(job)[: len(before)], before)
    assert same(list(job.learner.ema.model.state_dict().values()), average)
    while job.progress.num_overflows == job.progress.step:
        step(job, batches)
    assert not same(copied(job)[: len(before)], before)
    log_train(job)
    values = job.channel.sent[-1].values
    assert values["num_overflows"] == job.progress.num_overflows == job.progress.step - 1
    assert values["loss_scale"] == 2.0 ** (24 - job.progress.num_overflows)
    average = [value.clone() for value in job.learner.ema.model.state_dict().values()]
    job.learner.scaler.update(2.0**40)
    assert step(job, batches)
    assert same(list(job.learner.ema.model.state_dict().values()), average)


@pytest.mark.parametrize("policy", ["skip_step", "rollback"])
def test_in_fp16_an_overflow_is_the_scalers_affair_and_a_bad_loss_the_policys(policy):
    job = overflowing_job(ema=EMA)
    job.config.failure.on_nonfinite = policy
    batches = job.data.feed.from_position(0)
    assert step(job, batches)
    assert job.progress.num_overflows == 1
    kept = copied(job), saved(job)[2]
    batch = next(batches)
    assert not train_step(job, poisoned(batch))
    assert same(copied(job), kept[0])
    assert list(tree_differences(saved(job)[2]["scaler"], kept[1]["scaler"])) == []
    assert train_step(job, batch)  # the scaler is unchanged: a step is possible


def test_sgds_momentum_is_zero_after_a_first_step_that_overflowed():
    """torch's fused SGD would leave it uninitialised."""
    job = overflowing_job(optim=OptimConfig(name="sgd", lr=0.01, kwargs={"momentum": 0.9}))
    step(job, job.data.feed.from_position(0))
    assert job.progress.num_overflows == 1
    buffers = [state.get("momentum_buffer") for state in job.learner.optimizer.state.values()]
    assert all(buffer is None or not buffer.any() for buffer in buffers)


def test_a_scale_that_mends_nothing_ends_the_run():
    job = make_job(precision="fp16")
    step(job, job.data.feed.from_position(0))
    log_train(job)
    job.learner.scaler.update(0.5)
    job.progress.train.add(torch.ones(1), torch.ones(1, dtype=torch.bool), torch.ones(1, dtype=torch.bool))
    with pytest.raises(NonFiniteError, match=r"fp16 whatever the loss scale, which has come down to 0\.5 by step 1"):
        log_train(job)


def test_a_scaler_saved_by_an_older_version_is_read():
    job = make_job(precision="fp16")
    state = {
        key: value
        for key, value in ExtraState(["scaler"], state_context(job)).state_dict()["scaler"].items()
        if key != "num_overflows"
    }
    job.progress.num_overflows = 3
    ExtraState(["scaler"], state_context(job)).load({"scaler": {**state, "scale": 8.0}}, {"scaler": 1}, "an older run")
    assert (job.learner.scaler.get_scale(), job.progress.num_overflows) == (8.0, 0)


# --- clipping, decay, depth


@pytest.mark.parametrize(("mode", "bound"), [("norm", 0.01), ("value", 0.001), ("agc", 0.01)])
def test_gradients_are_clipped_as_timm_clips_them(mode, bound):
    plain, clipped = make_job(), make_job(**{f"clip_grad_{mode}": bound})
    for job in (plain, clipped):
        train_step(job, next(job.data.feed.from_position(0)))
    reference = make_job()
    reference.learner.model.load_state_dict(make_job().learner.model.state_dict())
    for parameter, other in zip(reference.learner.model.parameters(), plain.learner.model.parameters(), strict=True):
        parameter.grad = other.grad.clone()
    # for adaptive clipping, timm's training script excludes the head, too
    names = [
        name for name, _ in reference.learner.model.named_parameters() if mode != "agc" or not name.startswith("head.")
    ]
    timm.utils.dispatch_clip_grad([reference.learner.model.get_parameter(name) for name in names], bound, mode)
    for name, parameter in clipped.learner.model.named_parameters():
        assert torch.equal(parameter.grad, reference.learner.model.get_parameter(name).grad), name
    assert any(
        not torch.equal(parameter.grad, plain.learner.model.get_parameter(name).grad)
        for name, parameter in clipped.learner.model.named_parameters()
    )


def groups_of(optimizer, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["weight_decay"], group.get("lr_scale", 1.0))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def expected_groups(groups, model):
    return groups_of(SimpleNamespace(param_groups=groups), model)


@pytest.mark.parametrize("model", [SMALL_VIT, RESNET], ids=["vit", "resnet"])
def test_rates_that_fall_layer_by_layer_are_timms_and_the_schedule_respects_them(model):
    built = make_job(model).learner.model
    config = OptimConfig(name="adamw", lr=0.1, weight_decay=0.05, layer_decay=0.7)
    optimizer = build_optimizer(config, TrainConfig(), built)
    free = getattr(built, "no_weight_decay", set)()
    theirs = timm.optim.param_groups_layer_decay(built, 0.05, free, layer_decay=0.7)
    assert groups_of(optimizer, built) == expected_groups(theirs, built)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) > 3
    assert max(scales) == 1.0
    scheduler = build_scheduler(ScheduleConfig(name="cosine", warmup_epochs=1), optimizer, 100, 10.0)
    for number in (0, 7, 50):
        scheduler.step_update(number)
        head = next(group["lr"] for group in optimizer.param_groups if group["lr_scale"] == 1.0)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(head * group["lr_scale"])


@pytest.mark.parametrize("exclude", [True, False])
def test_what_gets_no_weight_decay_is_timms(exclude):
    built = make_job().learner.model
    config = OptimConfig(name="adamw", lr=0.1, weight_decay=0.05, filter_bias_and_bn=exclude)
    theirs = timm.optim.param_groups_weight_decay(built, 0.05, exclude, built.no_weight_decay())
    assert groups_of(build_optimizer(config, TrainConfig(), built), built) == expected_groups(theirs, built)


def test_the_rate_that_is_logged_is_the_heads():
    job = make_job(optim=OptimConfig(name="adamw", lr=3e-3, layer_decay=0.5))
    step(job, job.data.feed.from_position(0))
    log_train(job)
    assert job.channel.sent[-1].values["lr"] == 3e-3


def test_stochastic_depth_reaches_the_model_and_what_timm_alone_builds_of_it():
    info = DataInfo(["a", "b"], 8, 1, [0.0], [1.0], {})
    arguments = timm_arguments(DROPPING, info)
    assert arguments["drop_path_rate"] == 0.3
    rates = [
        module.drop_prob for module in make_job(DROPPING).learner.model.modules() if type(module).__name__ == "DropPath"
    ]
    assert max(rates) == pytest.approx(0.3)
    with pytest.raises(ConfigError, match="drop_path_rate"):
        build_model(ModelConfig(name="vit_tiny_patch16_224", kwargs={"no_such": 1}, drop_path_rate=0.3), info)


@pytest.mark.parametrize("name", ["vgg11", "densenet121", "inception_v3", "legacy_xception"])
def test_a_model_without_stochastic_depth_is_known_before_timm_is_imported(name):
    assert name in without_drop_path()
    with pytest.raises(TypeError, match="drop_path_rate"):
        timm.create_model(name, drop_path_rate=0.1)


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "resnet18", "convnext_atto", "deit_small_patch16_224"])
def test_a_model_that_may_have_it_is_left_to_timm(name):
    assert name not in without_drop_path()
    with torch.device("meta"):
        timm.create_model(name, drop_path_rate=0.1)


# --- freezing


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("backbone", lambda name: not name.startswith("head.")),
        ("blocks.0", lambda name: name.startswith("blocks.0.")),
        ("blocks.*", lambda name: name.startswith("blocks.")),
        ("layers.0-1", lambda name: not name.startswith(("blocks.1.", "norm.", "head."))),
        ("*.bias", lambda name: name.endswith(".bias")),
        ("pos_embed", lambda name: name == "pos_embed"),
    ],
)
def test_a_part_is_named_by_pattern_by_timms_numbers_or_as_the_backbone(part, found):
    model = make_job().learner.model
    assert parameters_of(part, model) == [name for name, _ in model.named_parameters() if found(name)]


@pytest.mark.parametrize(
    ("freeze", "told"),
    [
        (
            {"bloks": 1},
            r"train\.freeze\.bloks matches no parameter of the model\. Did you mean 'blocks'\? Its parts: cls",
        ),
        ({"layers.7-9": 1}, r"train\.freeze\.layers\.7-9: the model has layers 0 to 3"),
        ({"*": 1}, r"freezes all parameters in epoch 0"),
    ],
)
def test_a_part_that_is_not_there_is_told(freeze, told):
    with pytest.raises(ConfigError, match=told):
        Freezing(freeze, make_job().learner.model)


def test_the_classifier_is_timms():
    assert classifier_parameters(make_job().learner.model) == {"head.weight", "head.bias"}
    assert classifier_parameters(nn.Linear(2, 2)) == set()


def test_parts_are_unfrozen_epoch_by_epoch_and_one_in_two_parts_with_the_later():
    model = make_job().learner.model
    freezing = Freezing({"backbone": 1, "layers.0-1": 2, "pos_embed": None}, model)
    everything = {name for name, _ in model.named_parameters()}
    early = set(parameters_of("layers.0-1", model))
    for epoch, expected, changed in (
        (0, {"head.weight", "head.bias"}, True),
        (0, {"head.weight", "head.bias"}, False),
        (1, everything - early, True),
        (2, everything - {"pos_embed"}, True),
        (9, everything - {"pos_embed"}, False),
        (1, everything - early, True),  # a rollback
    ):
        assert freezing.settle(epoch) == changed
        assert trained(model) == expected


def test_a_frozen_part_stands_still_without_an_optimisers_state_and_then_trains():
    job = make_job(freeze={"backbone": 1})
    before = {name: value.clone() for name, value in job.learner.model.state_dict().items()}
    batches = job.data.feed.from_position(0)
    for _ in range(4):  # the first epoch
        step(job, batches)
    moved = {name for name, value in job.learner.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"head.weight", "head.bias"}
    assert len(job.learner.optimizer.state) == 2
    step(job, batches)
    moved = {name for name, value in job.learner.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"pos_embed", "blocks.0.attn.qkv.weight"} <= moved
    assert len(job.learner.optimizer.state) == len(before)
    assert [event.num_frozen for event in job.channel.events(events.Thawed)] == [0]


def test_ddp_is_made_anew_when_a_part_is_unfrozen_and_only_then():
    job, made = make_job(freeze={"blocks.0": 1}), []
    job.learner.wrap = lambda model: made.append(job.progress.step) or model
    batches = job.data.feed.from_position(0)
    while not job.progress.finished:
        step(job, batches)
    assert made == [4]


def test_ranks_average_what_was_unfrozen_and_a_restart_between_changes_no_bit(preloaded, tmp_path):
    printed = preloaded.run("thawing_ranks", MEETING=str(tmp_path / "meeting"))
    assert printed == "as one process, and as without a stop\n"


def test_batch_norm_of_a_frozen_part_uses_and_keeps_its_statistics_also_after_an_evaluation():
    job = make_job(RESNET, optim=OptimConfig(name="sgd", lr=0.01), freeze={"layer1": 1})
    before = {name: value.clone() for name, value in job.learner.model.named_buffers()}
    batches = job.data.feed.from_position(0)
    step(job, batches)
    evaluate(job, "val")
    step(job, batches)
    still = {name for name, value in job.learner.model.named_buffers() if torch.equal(value, before[name])}
    assert still == {name for name in before if name.startswith("layer1.")}
    while job.progress.epoch < 1:
        step(job, batches)
    step(job, batches)
    assert not torch.equal(
        dict(job.learner.model.named_buffers())["layer1.0.bn1.running_mean"], before["layer1.0.bn1.running_mean"]
    )
