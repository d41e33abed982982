"""Optimisers and schedules, which timm builds."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.scheduler import create_scheduler_v2
from torch import nn

from ftexp.config.checks.recipe import fitted
from ftexp.config.checks.validate import validate
from ftexp.config.schema import SCHEDULES, SGD_NAMES, ModelConfig, OptimConfig, ScheduleConfig, TrainConfig
from ftexp.data.info import DataInfo
from ftexp.driver.printer import Printer
from ftexp.driver.resume import require_shared_statistics
from ftexp.errors import ConfigError
from ftexp.job.build import scheduler_of
from ftexp.model.build import initialise_head
from ftexp.model.optim import build_optimizer
from ftexp.model.schedule import build_scheduler
from ftexp.wire.events import LearningRateChanged
from ftexp.worker import evaluation
from ftexp.worker.evaluation import share_statistics
from tests.support.configs import composed

TOTAL, PER_EPOCH = 100, 10.0


def small_model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2))


def optimizer_of(model=None, train=None, **settings):
    optim = OptimConfig(**{"name": "adamw", "lr": 0.1, **settings})
    return build_optimizer(optim, TrainConfig(**(train or {})), model or small_model())


def rates(config, steps):
    """Return the learning rate at each of `steps`, requested in that order."""
    optimizer = optimizer_of(name="sgd")
    falling_steps = TOTAL - round(config.cooldown_epochs * PER_EPOCH)
    scheduler = build_scheduler(config, optimizer, falling_steps, PER_EPOCH)
    got = []
    for step in steps:
        scheduler.step_update(step)
        got.append(optimizer.param_groups[0]["lr"])
    return got


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_biases_and_norms_get_no_weight_decay(name):
    model = small_model()
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer_of(model, name=name, weight_decay=0.05).param_groups
        for parameter in group["params"]
    }
    assert decay == {
        "0.weight": 0.05, "4.weight": 0.05,
        "0.bias": 0, "1.weight": 0, "1.bias": 0, "3.weight": 0, "3.bias": 0, "4.bias": 0,
    }  # fmt: skip


def test_a_vits_position_embedding_and_class_token_get_no_weight_decay():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)
    free = {
        id(p) for g in optimizer_of(model, weight_decay=0.05).param_groups if not g["weight_decay"] for p in g["params"]
    }
    assert {id(model.pos_embed), id(model.cls_token), id(model.norm.weight)} <= free
    assert id(model.blocks[0].mlp.fc1.weight) not in free


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "momentum", "nesterov"])
def test_torchs_own_optimisers_are_fused_unless_told_otherwise(name):
    assert optimizer_of(name=name).defaults["fused"] is True
    assert optimizer_of(name=name, kwargs={"fused": False}).defaults["fused"] is False
    assert not optimizer_of(name=name, kwargs={"foreach": True}).defaults.get("fused")  # torch allows one of the two


@pytest.mark.parametrize("name", SGD_NAMES)
@pytest.mark.parametrize("train", [{"precision": "fp16"}, {"freeze": {"0": 1}}], ids=str)
def test_torchs_sgd_is_not_fused_where_a_first_step_may_be_left_out(name, train):
    assert not optimizer_of(name=name, train=train).defaults.get("fused")
    assert optimizer_of(name="adamw", train=train).defaults["fused"] is True


def test_kwargs_reach_the_optimiser():
    assert tuple(optimizer_of(kwargs={"betas": [0.8, 0.9]}).defaults["betas"]) == (0.8, 0.9)
    assert optimizer_of(name="sgd", kwargs={"momentum": 0.7}).defaults["momentum"] == 0.7


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion"])
def test_an_optimiser_makes_a_step_that_changes_every_weight(name):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = optimizer_of(model, name=name)
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "kwargs", "told"),
    [
        ("adamw", {"momentun": 0.9}, "momentun"),
        ("lamb", {"fused": True}, "fused"),
        ("adamw", {"fused": True, "foreach": True}, "foreach"),
        ("adamw", {"betas": [2.0, 0.9]}, "2.0"),
        ("no_such", {}, "no_such"),
    ],
)
def test_arguments_that_the_optimiser_refuses_are_told(name, kwargs, told):
    with pytest.raises(ConfigError) as raised:
        optimizer_of(name=name, kwargs=kwargs)
    assert str(raised.value).startswith(f"optim.name={name} can't be built: ")
    assert told in str(raised.value)
    assert str(raised.value).endswith("See optim.kwargs")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup_epochs", [0, 2, 2.5])
def test_every_schedule_starts_at_its_warm_up_rate_and_stays_within_bounds(name, warmup_epochs):
    config = ScheduleConfig(name=name, warmup_epochs=warmup_epochs, warmup_lr=0.001, min_lr=0.01, decay_epochs=3)
    all_rates = rates(config, range(TOTAL + 1))
    if warmup_epochs:
        assert all_rates[0] == 0.001
    else:
        assert all_rates[0] == pytest.approx(0.1, rel=1e-6)
    assert max(all_rates) <= 0.1
    assert min(all_rates) >= 0.0001  # schedule=step after three drops; the others end at min_lr


def test_the_rate_is_set_before_the_first_step():
    optimizer = optimizer_of(name="sgd")
    build_scheduler(ScheduleConfig(name="cosine", warmup_epochs=2, warmup_lr=0.001), optimizer, TOTAL, PER_EPOCH)
    assert optimizer.param_groups[0]["lr"] == 0.001


def test_warm_up_is_linear_and_meets_the_cosine():
    config = ScheduleConfig(name="cosine", warmup_epochs=2, warmup_lr=0.001, min_lr=0.01)
    got = rates(config, range(TOTAL + 1))
    for step in range(20):
        assert got[step] == pytest.approx(0.001 + (0.1 - 0.001) * step / 20, rel=1e-12)
    for step in range(20, TOTAL + 1):
        assert got[step] == pytest.approx(0.01 + 0.09 * (1 + math.cos(math.pi * step / TOTAL)) / 2, rel=1e-12)


@pytest.mark.parametrize("name", ["cosine", "poly", "tanh"])
def test_a_schedule_that_ends_ends_at_min_lr_and_stays_there(name):
    config = ScheduleConfig(name=name, warmup_epochs=1, min_lr=0.01, decay_rate=1.0)
    assert rates(config, [TOTAL, TOTAL + 1, 10 * TOTAL]) == [0.01] * 3


def test_poly_with_exponent_one_is_a_straight_line():
    config = ScheduleConfig(name="poly", min_lr=0.0, decay_rate=1.0)
    assert rates(config, [0, 25, 50, 75]) == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_step_drops_by_decay_rate_every_decay_epochs():
    config = ScheduleConfig(name="step", decay_epochs=3, decay_rate=0.5)
    assert rates(config, [0, 29, 30, 59, 60, 90]) == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.0125])


def test_constant_holds_the_rate_after_warm_up():
    config = ScheduleConfig(name="constant", warmup_epochs=2, warmup_lr=0.0, decay_epochs=1, decay_rate=0.1)
    assert rates(config, [0, 10, 20, 50, 100]) == pytest.approx([0.0, 0.05, 0.1, 0.1, 0.1])


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_depends_on_the_step_alone(name):
    """A resumed run, which jumps to its step, must have the rates of an uninterrupted run."""
    config = ScheduleConfig(name=name, warmup_epochs=2, warmup_lr=0.001, min_lr=0.01, decay_epochs=3)
    in_order = rates(config, range(TOTAL + 1))
    jumps = [57, 3, 100, 0, 20, 19, 57]
    assert rates(config, jumps) == [in_order[step] for step in jumps]


def test_a_run_shorter_than_its_warm_up_is_built():
    optimizer = optimizer_of(name="sgd")
    scheduler = build_scheduler(
        ScheduleConfig(name="cosine", warmup_epochs=5, warmup_lr=0.001), optimizer, 3, PER_EPOCH
    )
    scheduler.step_update(3)
    assert optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize("name", ["cosine", "poly", "tanh"])
def test_the_last_epochs_hold_the_lowest_rate_as_timms_cooldown(name):
    config = ScheduleConfig(name=name, warmup_epochs=1, min_lr=0.01, cooldown_epochs=3)
    optimizer = optimizer_of(name="sgd")
    theirs, num_epochs = create_scheduler_v2(
        optimizer, sched=name, num_epochs=70, warmup_epochs=10, warmup_lr=1e-6, min_lr=0.01, cooldown_epochs=30,
        step_on_epochs=False, updates_per_epoch=1,
    )  # fmt: skip
    assert num_epochs == TOTAL
    expected = []
    for step in range(TOTAL):
        theirs.step_update(step)
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(config, range(TOTAL)) == expected
    assert expected[70:] == [0.01] * 30


@pytest.mark.parametrize("added", [1, 2, 3])
def test_epochs_that_are_added_with_a_cooldown_leave_the_rates_before_as_they_were(added):
    """An epoch here has 22.45 steps."""
    curves = []
    for cooldown in (0, added):
        words = (f"train.epochs={4 + cooldown}", f"schedule.cooldown_epochs={cooldown}", "schedule.min_lr=1e-3")
        made = composed("optim=sgd", "train.global_batch_size=64", *words)
        scheduler = scheduler_of(made, optimizer := optimizer_of(name="sgd"), 1437)
        rates_now = []
        for step in range(math.ceil(1437 * (4 + cooldown) / 64)):
            scheduler.step_update(step)
            rates_now.append(optimizer.param_groups[0]["lr"])
        curves.append(rates_now)
    assert curves[1][: len(curves[0])] == curves[0]
    assert set(curves[1][len(curves[0]) :]) == {1e-3}


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        (
            {"min_lr": 0.01},
            "; to keep the rates as they were, set schedule.cooldown_epochs=<the epochs added>: trained ",
        ),
        ({"min_lr": 0.01, "cooldown_epochs": 2.0}, "set schedule.cooldown_epochs=2 + <the epochs added>"),
        ({}, "spans train.epochs=30"),
    ],
)
def test_more_epochs_are_told_with_what_keeps_the_rates_where_something_does(schedule, told):
    said = []
    terminal, config = SimpleNamespace(say=lambda text, _: said.append(text)), composed("train.epochs=30")
    config.schedule = ScheduleConfig(name="cosine", **schedule)
    Printer(terminal, None, None, config).event(LearningRateChanged(40, 0.1, 0.2))
    assert told in said[0]
    assert ("cooldown_epochs" in said[0]) == bool(schedule)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("optim=sgd optim.lr_base=0.1 train.global_batch_size=512", 0.2),
        ("optim=adamw optim.lr_base=1e-3 train.global_batch_size=1024", 2e-3),
        ("optim=lamb optim.lr_base=1e-3 train.global_batch_size=64", 5e-4),
        ("optim=adamw optim.lr_base=1e-3 optim.lr_base_size=64 optim.lr_base_scale=linear", 5e-4),
        ("optim=sgd optim.lr_base=0.1 optim.lr_base_size=128 optim.lr_base_scale=sqrt", 0.05),
    ],
)
def test_a_base_rate_is_scaled_to_the_batch_as_timms_train_script_does(words, expected):
    config, _ = fitted(composed(*words.split()), words.split())
    assert config.optim.lr == pytest.approx(expected)
    validate(config)
    typed = [*words.split(), "optim.lr=0.7"]
    both, _ = fitted(composed(*typed), typed)
    with pytest.raises(ConfigError, match=r"optim\.lr=0\.7 conflicts with optim\.lr_base=.*set only one of them"):
        validate(both)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("optim.lr_base_size=64", r"^optim\.lr_base_size=64 needs optim\.lr_base"),
        ("schedule.cooldown_epochs=28", r"cooldown_epochs=28.* and schedule\.warmup_epochs=2.* must be below"),
        (
            "schedule.min_lr=0 schedule.cooldown_epochs=1",
            r"^schedule\.cooldown_epochs=1.* with schedule\.min_lr=0: the learning rate would be 0",
        ),
        ("schedule=constant schedule.cooldown_epochs=1", r"cooldown_epochs=1.* needs schedule=cosine or poly or tanh"),
        ("train.sync_bn=true", r"^train\.sync_bn=true: torch synchronises batch norm only on GPUs"),
        ("train.eval=beside train.dist_bn=reduce", r"^train\.dist_bn=reduce needs train\.eval=inline"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(words, told, monkeypatch):
    monkeypatch.setattr("ftexp.config.checks.recipe.num_local_gpus", lambda: 0)
    with pytest.raises(ConfigError, match=told):
        validate(composed(*words.split()))


def test_a_classifier_begins_as_timms_train_script_has_it():
    def model():
        torch.manual_seed(0)
        return timm.create_model("test_resnet", num_classes=3)

    plain, made = model(), model()
    torch.nn.init.constant_(plain.fc.bias, 0.5)
    made.load_state_dict(plain.state_dict())
    initialise_head(made, ModelConfig(name="test_resnet", head_init_scale=0.1))
    assert torch.equal(made.fc.weight, plain.fc.weight * 0.1)
    assert torch.equal(made.fc.bias, plain.fc.bias * 0.1)
    initialise_head(made, ModelConfig(name="test_resnet", head_init_bias=-4.0))
    assert made.fc.bias.tolist() == [-4.0] * 3
    initialise_head(made, ModelConfig(name="test_resnet", head_init_scale=0.5), loaded=["fc.bias", "conv1.weight"])
    assert torch.equal(made.fc.weight, plain.fc.weight * 0.1)  # it was scaled before
    assert made.fc.bias.tolist() == [-2.0] * 3
    own, others = made.state_dict(), plain.state_dict()
    assert all(torch.equal(own[name], others[name]) for name in own if not name.startswith("fc."))
    with pytest.raises(ConfigError, match=r"has no classifier with biases: remove model\.head_init_\*"):
        initialise_head(small_model(), ModelConfig(name="mine", head_init_bias=0.0))


def test_synchronised_batch_norm_has_the_weights_of_the_plain_one():
    model = timm.create_model("test_resnet", num_classes=3)
    converted = convert_sync_batchnorm(timm.create_model("test_resnet", num_classes=3))
    assert list(converted.state_dict()) == list(model.state_dict())
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())


def test_a_lowest_rate_is_for_tanh_too():
    validate(composed("schedule.name=tanh", "schedule.min_lr=1e-4", "schedule.cooldown_epochs=1"))


def _share_all(rank, dist_bn, split, directory):
    where = f"file://{directory}/{dist_bn}.{split}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    model, average = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
    for norm, least in ((model, 1.0), (average, 10.0)):
        norm.running_mean.fill_(least + 2 * rank)
    learner = SimpleNamespace(model=model, ema=SimpleNamespace(model=average))
    config = SimpleNamespace(train=SimpleNamespace(dist_bn=dist_bn))
    evaluation._share_statistics(
        SimpleNamespace(learner=learner, config=config, group=SimpleNamespace(world_size=2)), split
    )
    torch.save((model.running_mean.item(), average.running_mean.item()), f"{directory}/{dist_bn}.{split}.{rank}")
    torch.distributed.barrier()  # another rank may still be connecting
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("dist_bn", "split", "expected"),
    [
        ("none", "val", [(1, 10), (3, 10)]),
        ("reduce", "val", [(2, 10), (2, 10)]),
        ("none", "test", [(1, 10), (1, 10)]),
    ],
)
def test_an_average_and_the_test_have_the_statistics_that_a_checkpoint_holds(dist_bn, split, expected, tmp_path):
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=_share_all, args=(rank, dist_bn, split, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [torch.load(tmp_path / f"{dist_bn}.{split}.{rank}") for rank in range(2)] == expected


def test_means_over_ranks_need_a_validation_split():
    config, info = composed("train.dist_bn=reduce"), DataInfo([], 8, 3, [], [], {"train": 9, "val": 0, "test": 2})
    with pytest.raises(
        ConfigError, match=r"^train\.dist_bn=reduce takes means .* no validation split: raise data\.val_"
    ):
        require_shared_statistics(config, info)
    require_shared_statistics(composed(), info)
    require_shared_statistics(config, dataclasses.replace(info, num_samples={"train": 9, "val": 1, "test": 2}))


def _share(rank, dist_bn, directory):
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/{dist_bn}", rank=rank, world_size=2)
    norm = nn.BatchNorm2d(1)
    norm.running_mean.fill_(1.0 + 2 * rank)
    norm.running_var.fill_(4.0 + 4 * rank)
    share_statistics(norm, dist_bn, 2)
    torch.save((norm.running_mean.item(), norm.running_var.item()), f"{directory}/{dist_bn}.{rank}")
    torch.distributed.barrier()  # another rank may still be connecting
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("dist_bn", "expected"),
    [("none", [(1, 4), (3, 8)]), ("broadcast", [(1, 4), (1, 4)]), ("reduce", [(2, 6), (2, 6)])],
)
def test_statistics_come_together_before_an_evaluation_as_is_asked(dist_bn, expected, tmp_path):
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=_share, args=(rank, dist_bn, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [torch.load(tmp_path / f"{dist_bn}.{rank}") for rank in range(2)] == expected
