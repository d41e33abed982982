"""A model's blocks, building it in shards, and activation checkpointing of blocks."""

import copy
import dataclasses
import subprocess
import sys
import weakref
from unittest.mock import MagicMock

import pytest
import timm
import torch
from torch import nn

from ftexp.config.checks.parallel import SHARDED_OPTIMIZERS
from ftexp.config.checks.validate import validate
from ftexp.config.schema import ModelConfig, ParallelConfig
from ftexp.config.timm_names import optimizer_names
from ftexp.errors import ConfigError
from ftexp.job.mfu import flops_per_image
from ftexp.model.build import build_model, initialise_head, without_values
from ftexp.model.parallel.blocks import blocks_of
from ftexp.model.parallel.drafting import copied, draft
from ftexp.model.parallel.parts import cut
from ftexp.model.parallel.sharding import Sharding
from ftexp.model.recomputing import recompute
from tests.support.configs import composed
from tests.support.jobs import RESNET, SMALL_VIT, make_job, same, train

# {a small model of each family: (number of blocks, first block, last block)}
BLOCKS = {
    "vit_tiny_patch16_224": (12, "blocks.0", "blocks.11"),
    "deit_tiny_distilled_patch16_224": (12, "blocks.0", "blocks.11"),
    "resnet18": (8, "layer1.0", "layer4.1"),
    "convnext_atto": (12, "stages.0.blocks.0", "stages.3.blocks.1"),
    "swin_tiny_patch4_window7_224": (12, "layers.0.blocks.0", "layers.3.blocks.1"),
    "efficientnet_b0": (16, "blocks.0.0", "blocks.6.0"),
    "mobilenetv3_small_100": (12, "blocks.0.0", "blocks.5.0"),
    "regnety_002": (13, "s1.b1", "s4.b7"),
    "mixer_s32_224": (8, "blocks.0", "blocks.7"),
    "eva02_tiny_patch14_224": (12, "blocks.0", "blocks.11"),
}
NUM_SHARDS = 3


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_those_that_timm_numbers(name):
    blocks = list(blocks_of(without_values(lambda: timm.create_model(name))))
    assert (len(blocks), blocks[0], blocks[-1]) == BLOCKS[name]


class Stack(nn.Module):
    """A model of a plug-in, whose layers timm doesn't number."""

    def __init__(self, num_classes=5, **_):
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleDict({"inner": nn.Sequential(*self.pairs())}) for _ in range(2))
        self.head = nn.Linear(6, num_classes)

    @staticmethod
    def pairs():
        return [nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(3)]


def test_a_model_without_a_rule_is_refused_with_patterns_of_its_own_names():
    with pytest.raises(ConfigError, match=r"of this model \(Stack\).*'parallel\.wrap=\[stages\.\*\.inner\.\*\]'"):
        blocks_of(Stack())
    assert len(blocks_of(Stack(), ["stages.*.inner.*"])) == 6
    assert list(blocks_of(Stack(), ["stages.1.inner.[01]", "head"])) == ["stages.1.inner.0", "stages.1.inner.1", "head"]
    with pytest.raises(ConfigError, match=r"wrap: stage\.\*\.inner\.\* matches no module of the model\..*try"):
        blocks_of(Stack(), ["stage.*.inner.*"])
    assert list(blocks_of(timm.create_model("resnet18"), ["layer*"])) == ["layer1", "layer2", "layer3", "layer4"]


PLUGINS = {}  # models by name: timm's registry is shared with other tests


def of_a_plugin(build):
    PLUGINS[build.__name__] = build
    return build


@of_a_plugin
def reading_net(**kwargs):
    """Copies a row of one parameter into another one after further draws."""
    model = Stack(**kwargs)
    with torch.no_grad():
        model.head.weight[:, 0] = model.stages[0]["inner"][0][0].weight[0, :5]
    return model


@of_a_plugin
def swallowing_net(**kwargs):
    model = Stack(**kwargs)
    try:
        total = model.stages[0]["inner"][0][0].weight.sum().item()
    except Exception:
        total = 0.0
    nn.init.constant_(model.head.bias, total)
    return model


@of_a_plugin
def odd_net(**kwargs):
    """Draws in all the ways of real models that a draft supports."""
    model = Stack(**kwargs)
    weight = nn.Parameter(torch.empty(7, 3))
    model.early = weight
    nn.init.trunc_normal_(weight)
    model.late = nn.Parameter(torch.randn(1, 4, 6) * 0.1, requires_grad=False)
    model.tied = model.late
    nn.init.xavier_normal_(model.head.weight.data)
    model.early.data.mul_(0.5).clamp_(min=-0.2)
    model.early.data = torch.rand(7, 3)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            module.bias.data.fill_(0.1)
            assert module.weight.device.type == "cpu"
            assert module.weight.data.shape[1] == module.in_features
    model.register_buffer("table", torch.rand(3))
    return model


def built(name, **kwargs):
    def build():
        torch.manual_seed(7)
        return PLUGINS[name]() if name in PLUGINS else timm.create_model(name, **kwargs)

    return build


def parts_of(build):
    """Return the drafts of NUM_SHARDS ranks."""
    return [draft(build, lambda whole, index=index: cut(whole, NUM_SHARDS, index)) for index in range(NUM_SHARDS)]


DRAFTED = (
    *("vit_tiny_patch16_224", "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"),
    *("efficientnet_b0", "mixer_s32_224", "test_vit", "test_convnext", "beit_base_patch16_224"),
)


@of_a_plugin
def sharing_net(**kwargs):
    """Makes a parameter that shares another one's values."""
    model = Stack(**kwargs)
    model.other = nn.Parameter(model.stages[0]["inner"][0][0].weight.data)
    nn.init.normal_(model.other)
    return model


WHOLE = ("reading_net", "swallowing_net", "sharing_net")


@pytest.mark.parametrize(
    "name",
    [*WHOLE, "odd_net", *DRAFTED],
)
def test_a_model_built_in_parts_has_the_initial_values_of_the_whole_one(name):
    kwargs = {"depth": 2, "embed_dim": 96, "num_heads": 3} if name.startswith("beit") else {}
    parts = parts_of(built(name, **kwargs))
    after = torch.get_rng_state()
    whole = built(name, **kwargs)()
    assert torch.equal(after, torch.get_rng_state())
    assert {part.was_whole for part in parts} == {name in WHOLE}
    for key, parameter in whole.named_parameters():
        assert torch.equal(torch.cat([part.kept[key] for part in parts]), parameter), key
        assert dict(parts[0].model.named_parameters())[key].requires_grad == parameter.requires_grad
    assert parts[0].kept.keys() == dict(whole.named_parameters()).keys()
    for part in parts:
        assert all(parameter.is_meta for parameter in part.model.parameters())
        assert dict(part.model.named_buffers()).keys() == dict(whole.named_buffers()).keys()
        assert same(list(part.model.buffers()), list(whole.buffers()))


def test_one_parameter_is_whole_at_a_time():
    wholes, alive = [], []

    def keep_first_row(whole):
        wholes.append(weakref.ref(whole.untyped_storage()))
        alive.append(sum(each() is not None for each in wholes))
        return whole[:1]

    assert not draft(built("vit_tiny_patch16_224"), keep_first_row).was_whole
    assert len(wholes) > 150
    assert max(alive) == 1


def test_pretrained_weights_and_a_scaled_head_come_to_a_draft_in_parts(tmp_path):
    info, reports, file = make_job().info, [], tmp_path / "weights.pt"
    other, _ = build_model(SMALL_VIT, dataclasses.replace(info, class_names=list("abc"), image_size=16))
    torch.save(other.state_dict(), file)
    config = dataclasses.replace(SMALL_VIT, pretrained=str(file), head_init_scale=0.5, head_init_bias=-1.0)

    def build():
        torch.manual_seed(3)
        model, report = build_model(config, info)
        initialise_head(model, config)
        reports.append(report)
        return model

    parts = parts_of(build)
    assert not parts[0].was_whole
    whole = build()
    assert set(map(str, reports)) == {str(reports[-1])}
    for key, parameter in whole.named_parameters():
        assert torch.equal(torch.cat([part.kept[key] for part in parts]), parameter), key


def test_a_copy_of_a_draft_shares_nothing_with_it():
    first = parts_of(built("test_vit"))[0]
    second = copied(first)
    assert second.model is not first.model
    for name, rows in first.kept.items():
        assert torch.equal(rows, second.kept[name])
        assert not rows.numel() or rows.data_ptr() != second.kept[name].data_ptr()


@pytest.mark.parametrize("setting", ["blocks", "every_2"])
@pytest.mark.parametrize("model", [SMALL_VIT, RESNET], ids=["vit", "resnet"])
def test_blocks_that_compute_twice_change_no_bit(model, setting):
    kwargs = {**model.kwargs, **({"drop_path_rate": 0.3, "proj_drop_rate": 0.2} if model is SMALL_VIT else {})}
    config = ModelConfig(name=model.name, kwargs=kwargs)
    kept, twice = make_job(config), make_job(config, checkpoint_activations=setting)
    for job in (kept, twice):
        train(job)
    assert same(*(list(job.learner.model.state_dict().values()) for job in (kept, twice)))
    assert list(kept.learner.model.state_dict()) == list(twice.learner.model.state_dict())
    assert kept.progress.train.totals() == twice.progress.train.totals()


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


def test_every_second_block_computes_twice_and_a_copy_with_its_own_weights():
    blocks = [Counting() for _ in range(5)]
    model = nn.Sequential(*blocks)
    recompute(blocks, "every_2")
    model(torch.ones(2, 3)).sum().backward()
    assert [block.calls for block in blocks] == [2, 1, 2, 1, 2]
    with torch.no_grad():
        model(torch.ones(2, 3))
    assert [block.calls for block in blocks] == [3, 2, 3, 2, 3]
    assert type(blocks[0]) is type(blocks[2])
    other = copy.deepcopy(model)
    nn.init.zeros_(other[0].linear.weight)
    nn.init.zeros_(other[0].linear.bias)
    assert torch.equal(other[0](torch.ones(2, 3)), torch.zeros(2, 3))
    assert not torch.equal(model[0](torch.ones(2, 3)), torch.zeros(2, 3))


def test_what_is_computed_twice_is_counted_once():
    once, twice = (make_job(checkpoint_activations=setting).learner.model for setting in ("none", "blocks"))
    assert flops_per_image(once, (1, 8, 8)) == flops_per_image(twice, (1, 8, 8))


FSDP = ["parallel=fsdp"]
PROBLEMS = {
    "fields of fsdp": (["parallel.param_dtype=bf16"], "parallel.param_dtype=bf16 needs parallel=fsdp or hsdp"),
    "wrap": (["parallel.wrap=[a.*]"], "parallel.wrap=['a.*'] needs parallel=fsdp or hsdp, or train.compile=blocks"),
    "no pattern": ([*FSDP, "parallel.wrap=['']"], "parallel.wrap[0]='' names no module"),
    "size of fsdp": ([*FSDP, "parallel.shard_size=2"], "parallel.shard_size=2 needs parallel=hsdp"),
    "no size": (["parallel=hsdp"], "parallel=hsdp needs parallel.shard_size"),
    "size": (
        ["parallel=hsdp", "parallel.shard_size=2", "scaling.num_workers=3"],
        "scaling.num_workers=3 is not a multiple of parallel.shard_size=2",
    ),
    "elastic": (
        ["parallel=hsdp", "parallel.shard_size=2", "scaling.num_workers=[2,4]"],
        "parallel=hsdp with scaling.num_workers=[2, 4]",
    ),
    "fp16 without a scale": ([*FSDP, "parallel.param_dtype=fp16"], "parallel.param_dtype=fp16 needs a loss scale"),
    "agc": ([*FSDP, "train.clip_grad_agc=0.1"], "train.clip_grad_agc=0.1 needs whole tensors"),
    "sync_bn": ([*FSDP, "train.sync_bn=true"], "train.sync_bn=true is for parallel=ddp"),
    "channels_last": ([*FSDP, "train.channels_last=true"], "train.channels_last=true: shards are contiguous rows"),
    "compiled whole": ([*FSDP, "train.compile=true"], "train.compile=true: parallel=fsdp gathers one"),
    "features": (
        [*FSDP, "distill=features", "distill.teacher=resnet18"],
        "distill.kind=features calls parts of the model",
    ),
    "optimiser": ([*FSDP, "optim.name=adafactor"], "optim.name=adafactor updates shards differently"),
    "every": (["train.checkpoint_activations=every_1"], "train.checkpoint_activations=every_1 is not one of none"),
    "compile": (["train.compile=block"], "train.compile=block is not one of none, model, blocks. Did you mean"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_goes_with_no_shards_is_refused_in_one_line(problem):
    overrides, message = PROBLEMS[problem]
    with pytest.raises(ConfigError) as raised:
        validate(composed(*overrides))
    assert any(line.startswith(message) for line in str(raised.value).splitlines()), raised.value


def test_what_goes_with_shards_is_taken():
    validate(composed(*FSDP, "train.clip_grad_norm=1", "ema=warmup", "failure.on_nonfinite=skip_step"))
    validate(composed(*FSDP, "train.precision=fp16", "parallel.param_dtype=fp16", "train.compile=blocks"))
    validate(composed("parallel=hsdp", "parallel.shard_size=2", "scaling.num_workers=4", "optim=sgd"))
    validate(composed("train.checkpoint_activations=every_12", "parallel.wrap=[blocks.*]"))
    assert optimizer_names() >= SHARDED_OPTIMIZERS


@pytest.mark.parametrize(
    ("given", "meant"),
    [("true", "model"), ("false", "none"), ("none", "none"), ("model", "model"), ("blocks", "blocks")],
)
def test_compile_is_what_it_was_when_it_was_true_or_false(given, meant):
    assert composed(f"train.compile={given}").train.compiled == meant


FREES_BLOCKS = """
import ctypes, sys
from ftexp.model.parallel.memory import return_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.free(libc.malloc(30 * 2**20))  # from now on, glibc takes smaller blocks from its heap
if sys.argv[1] == "returned":
    return_freed_memory()
blocks = []
for _ in range(50):
    blocks.append(libc.malloc(4 * 2**20))
    ctypes.memset(blocks[-1], 1, 4 * 2**20)
    libc.malloc(2**10)  # what stays, and keeps the heap from shrinking
for block in blocks:
    libc.free(block)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS:")) // 1024)
"""


def test_blocks_that_a_sharded_model_frees_on_cpus_go_back_to_the_system():
    kept, returned = (
        int(subprocess.check_output([sys.executable, "-c", FREES_BLOCKS, how], text=True))
        for how in ("kept", "returned")
    )
    assert kept > 200 > 50 > returned, "MiB resident, of 200 that were freed"


def test_a_sharded_model_on_cpus_returns_what_it_frees(monkeypatch):
    called = []
    monkeypatch.setattr("ftexp.model.parallel.sharding.return_freed_memory", lambda: called.append(True))
    monkeypatch.setattr("ftexp.model.parallel.sharding.init_device_mesh", lambda *_, **__: MagicMock())
    Sharding(ParallelConfig(kind="fsdp"), torch.device("cpu"), 2)
    assert called == [True]
