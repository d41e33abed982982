"""timm models of the config, and pretrained weights."""

import argparse
import contextlib
import dataclasses
import io
import json
import pickle
import re

import pytest
import timm
import timm.optim
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

import ftexp.model.build
from ftexp.checkpoint.compare import tree_differences
from ftexp.config.schema import DataConfig, ModelConfig, config_dir
from ftexp.config.timm_names import model_names, optimizer_names
from ftexp.data.info import DataInfo
from ftexp.errors import ConfigError, DataError
from ftexp.model.build import as_logits, build_model, check_weights, timm_arguments
from ftexp.model.preprocessing import preprocessing_of
from ftexp.model.timm_private import checkpoint_filter
from ftexp.model.weights import load_weights

GROUP_FILES = sorted((config_dir() / "model").glob("*.yaml"))
VIT = "vit_tiny_patch16_224"
SMALL = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4}


def info(image_size=32, channels=3, num_classes=5):
    names = [f"class {number}" for number in range(num_classes)]
    return DataInfo(names, image_size, channels, [0.5] * channels, [0.5] * channels, {"train": 1, "val": 1, "test": 1})


def vit(data=None, pretrained=False, **kwargs):
    """Return a ViT of 5k parameters and the report on its weights."""
    config = ModelConfig(name=VIT, kwargs={**SMALL, **kwargs}, pretrained=str(pretrained) if pretrained else False)
    return build_model(config, data or info())


def saved(model, path, wrap=lambda state: state):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if "safetensors" in path.name:  # with any extension
        save_file(wrap(state), path)
    else:
        torch.save(wrap(state), path)
    return path


def test_the_model_names_are_timms():
    assert model_names() == set(timm.list_models())


def test_the_optimiser_names_are_timms():
    assert optimizer_names() == set(timm.optim.list_optimizers())


@pytest.mark.parametrize("file", GROUP_FILES, ids=lambda file: file.stem)
def test_every_model_group_builds_for_the_data(file):
    config = ModelConfig(**OmegaConf.to_container(OmegaConf.load(file)))
    with torch.device("meta"):
        model, report = build_model(config, info(image_size=32, channels=2, num_classes=7))
        images = torch.empty(2, 2, 32, 32)
        assert model(images).shape == (2, 7)
    assert report is None
    assert model.num_classes == 7


def test_there_are_model_groups():
    assert len(GROUP_FILES) >= 10


def test_the_default_vit_has_the_size_that_its_file_names():
    config = ModelConfig(**OmegaConf.to_container(OmegaConf.load(config_dir() / "model" / "vit.yaml")))
    model, _ = build_model(config, info(image_size=8, channels=1, num_classes=10))
    told = re.search(r"(\d+)k parameters", (config_dir() / "model" / "vit.yaml").read_text())[1]
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1000) == int(told)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "takes_it"),
    [(VIT, True), ("deit_small_patch16_224", True), ("swin_tiny_patch4_window7_224", True), ("resnet18", False),
     ("convnext_atto", False), ("efficientnet_b0", False), ("vit_base_patch16_224.augreg_in21k_ft_in1k", True)],
)  # fmt: skip
def test_img_size_goes_to_architectures_of_a_fixed_size_only(name, takes_it):
    arguments = timm_arguments(ModelConfig(name=name), info(image_size=64))
    assert arguments.get("img_size") == (64 if takes_it else None)
    assert ("img_size" in arguments) is takes_it


def test_a_bare_timm_call_with_the_arguments_builds_the_same_model():
    config = ModelConfig(name=VIT, kwargs={"drop_path_rate": 0.1}, preset={VIT: SMALL, "resnet18": {"x": 1}})
    torch.manual_seed(3)
    own, _ = build_model(config, info(channels=1))
    torch.manual_seed(3)
    bare = timm.create_model(**timm_arguments(config, info(channels=1)))
    own_state, bare_state = own.state_dict(), bare.state_dict()
    assert own_state.keys() == bare_state.keys()
    assert all(torch.equal(own_state[name], bare_state[name]) for name in own_state)
    assert str(own) == str(bare)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [(VIT, {"patch_sice": 4}), ("resnet18", {"block_args": {"nope": 1}}), (VIT, {**SMALL, "num_heads": 3}),
     ("resnet18.no_such_tag", {})],
)  # fmt: skip
def test_kwargs_that_timm_refuses_are_told(name, kwargs):
    with pytest.raises(ConfigError) as raised:
        build_model(ModelConfig(name=name, kwargs=kwargs), info())
    assert str(raised.value).startswith(f"model.name={name} can't be built with {{")
    assert all(key in str(raised.value) for key in kwargs)
    assert "See model.kwargs" in str(raised.value)


def test_a_name_that_no_plugin_registered_is_told():
    with pytest.raises(ConfigError, match=r"^model\.name='my_net' is unknown to timm, also after importing the plugin"):
        build_model(ModelConfig(name="my_net"), info())


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ((torch.zeros(2, 5), torch.zeros(2, 5)), "a tuple of 2"),
        ([torch.zeros(2, 8, 4, 4)], "a list of 1"),
        ({"logits": torch.zeros(2, 5)}, "a dict of 1"),
        (None, "a NoneType"),
        (torch.zeros(2, 65, 5), "a tensor of shape [2, 65, 5]"),
        (torch.zeros(2, 512), "a tensor of shape [2, 512]"),
    ],
)
def test_what_is_no_logits_is_told_with_the_arguments_that_may_be_why(output, found):
    with pytest.raises(ConfigError) as raised:
        as_logits(output, ModelConfig(name="resnet18", kwargs={"global_pool": ""}), 5)
    told = f"model.name=resnet18 returns {found}, not logits of shape [images, 5]: its forward must return those alone"
    assert str(raised.value) == f"{told}; see model.kwargs.global_pool="
    with pytest.raises(ConfigError, match=r"return those alone$"):
        as_logits(output, ModelConfig(name="resnet18"), 5)


def test_logits_are_returned_as_they_are():
    logits = torch.zeros(2, 5)
    assert as_logits(logits, ModelConfig(name="resnet18"), 5) is logits


@pytest.mark.parametrize(
    ("file_name", "wrap"),
    [
        ("plain.pt", lambda state: state),
        ("lightning.pth", lambda state: {"state_dict": {f"module.{name}": v for name, v in state.items()}, "epoch": 3}),
        ("deit.pth", lambda state: {"model": state}),
        ("compiled.pt", lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()}),
        ("wrapped.pt", lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()}),
        ("args.pth", lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, augment=["x"])}),
        ("ema.pth.tar", lambda state: {"meters": {"loss": torch.ones(1)}, "state_dict_ema": state}),
        ("prefix.bin", lambda state: {f"net.{name}": value for name, value in state.items()}),
        ("lightning.ckpt", lambda state: {"state_dict": {f"model.{name}": v for name, v in state.items()}, "step": 3}),
        ("unknown_key.pt", lambda state: {"mine": state, "epoch": 3}),
        ("safetensors.bin", lambda state: state),
        ("plain.safetensors", lambda state: state),
        ("ddp.safetensors", lambda state: {f"module.{name}": value for name, value in state.items()}),
    ],
)
def test_local_weights_are_loaded_whatever_wraps_them(file_name, wrap, tmp_path):
    torch.manual_seed(1)
    trained, _ = vit()
    path = saved(trained, tmp_path / file_name, wrap)
    torch.manual_seed(2)
    model, report = vit(pretrained=path)
    assert report.source == str(path)
    assert sorted(report.matched) == sorted(trained.state_dict())
    assert (report.resized, report.missing, report.unused) == ([], [], [])
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    total = len(report.matched)
    assert str(report) == f"{path}: {total} of {total} tensors loaded"


def test_of_several_state_dicts_the_one_that_is_taken_is_told(tmp_path):
    torch.manual_seed(1)
    trained, _ = vit()

    def dino(state):
        teacher = {f"backbone.{name}": value for name, value in state.items()}
        student = {f"module.backbone.{name}": value + 1 for name, value in state.items()}
        return {"student": student, "teacher": {**teacher, "head.mlp.weight": torch.zeros(1)}, "epoch": 1}

    model, report = vit(pretrained=saved(trained, tmp_path / "dino.pth", dino))
    assert report.source == f"{tmp_path / 'dino.pth'} (teacher; also there: student)"
    assert (report.missing, report.unused) == ([], ["head.mlp.weight"])
    assert torch.equal(model.head.weight, trained.head.weight)


def test_a_prefix_is_kept_where_few_names_match_without_it(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"net.head.weight": torch.zeros(5, 16)}, path)  # a possible name in another architecture
    with pytest.raises(ConfigError, match=r"none match by name \(it has net\.head\.weight, the model"):
        vit(pretrained=path)


def test_a_head_of_another_class_count_stays_as_it_was_initialised(tmp_path):
    trained, _ = vit(info(num_classes=9))
    path = saved(trained, tmp_path / "w.pt", lambda state: {**state, "extra.weight": torch.zeros(2)})
    torch.manual_seed(2)
    fresh, _ = vit()
    torch.manual_seed(2)
    model, report = vit(pretrained=path)
    assert sorted(report.missing) == ["head.bias", "head.weight"]
    assert sorted(report.unused) == ["extra.weight", "head.bias", "head.weight"]
    assert torch.equal(model.head.weight, fresh.head.weight)
    assert torch.equal(model.blocks[0].attn.qkv.weight, trained.blocks[0].attn.qkv.weight)
    assert "; from scratch: head.weight, head.bias; unused: head.weight, head.bias, extra.weight" in str(report)


def test_a_position_embedding_is_resampled_for_another_image_size(tmp_path):
    trained, _ = vit(info(image_size=32))
    ramp = torch.arange(8.0).repeat(8, 1)  # each row of patches is 0..7, left to right
    with torch.no_grad():
        trained.pos_embed[0, 1:] = ramp.reshape(64, 1)
        trained.pos_embed[0, 0] = 100.0
    model, report = vit(info(image_size=64), pretrained=saved(trained, tmp_path / "w.pt"))
    assert report.resized == ["pos_embed"]
    assert (report.missing, report.unused) == ([], [])
    assert model.pos_embed.shape == (1, 1 + 16 * 16, 16)
    assert torch.equal(model.pos_embed[0, 0], torch.full((16,), 100.0))  # the class token's embedding is unchanged
    grid = model.pos_embed[0, 1:, 0].reshape(16, 16)
    assert torch.allclose(grid, grid[:1].expand(16, 16), atol=1e-5)  # rows are equal, as before
    assert torch.all(grid[0].diff() > 0)  # and rise from left to right
    assert grid.mean().item() == pytest.approx(3.5, abs=0.05)
    model(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("image_size", [32, 64])
def test_a_mean_pooling_model_takes_the_positions_of_one_with_a_class_token(image_size, tmp_path):
    trained, _ = vit()
    path = saved(trained, tmp_path / "w.pt")
    model, report = vit(info(image_size=image_size), path, class_token=False, global_pool="avg")
    assert report.resized == ["pos_embed"]
    assert "cls_token" in report.unused
    if image_size == 32:
        assert torch.equal(model.pos_embed, trained.pos_embed[:, 1:])


def test_positions_that_do_not_fit_start_from_scratch(tmp_path):
    trained, _ = vit(class_token=False, global_pool="avg")
    _, report = vit(info(image_size=64), saved(trained, tmp_path / "w.pt"))
    assert {"pos_embed", "cls_token"} <= set(report.missing)
    assert "pos_embed" in report.unused


def test_positions_of_a_model_without_a_patch_grid_start_from_scratch(tmp_path):
    """Hiera has a position embedding, but no patch_embed.grid_size."""
    kwargs = {"embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)}
    trained, _ = build_model(ModelConfig(name="hiera_tiny_224", kwargs=kwargs), info(image_size=64))
    path = saved(trained, tmp_path / "w.pt")
    _, report = build_model(
        ModelConfig(name="hiera_tiny_224", kwargs=kwargs, pretrained=str(path)), info(image_size=128)
    )
    assert "pos_embed" in report.missing


def test_an_input_convolution_is_adapted_from_three_channels_to_one(tmp_path):
    trained, _ = vit()
    model, report = vit(info(channels=1), saved(trained, tmp_path / "w.pt"))
    assert report.resized == ["patch_embed.proj.weight"]
    assert (report.missing, report.unused) == ([], [])
    summed = trained.patch_embed.proj.weight.sum(dim=1, keepdim=True)  # so a grey image gives the same as r = g = b did
    assert torch.allclose(model.patch_embed.proj.weight, summed)


def test_a_resnets_input_convolution_is_adapted_to_four_channels(tmp_path):
    trained, _ = build_model(ModelConfig(name="resnet10t"), info())
    path = saved(trained, tmp_path / "w.safetensors")
    model, report = build_model(ModelConfig(name="resnet10t", pretrained=str(path)), info(channels=4))
    assert report.resized == ["conv1.0.weight"]
    assert model.conv1[0].weight.shape[1] == 4


def test_weights_that_fit_nothing_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"other.weight": torch.zeros(3), "head.weight": torch.zeros(1)}, path)
    with pytest.raises(ConfigError) as raised:
        vit(pretrained=path)
    assert str(raised.value) == (
        f"model.pretrained={path}: 0 of the model's 20 tensors can be taken from its 2: 1 match by name, none by shape "
        "(head.weight is [1] there, [5, 16] in the model); use weights of a model of this size"
    )
    torch.save({"other.weight": torch.zeros(3), "x": torch.zeros(3)}, path)
    with pytest.raises(ConfigError) as raised:
        vit(pretrained=path)
    assert str(raised.value) == (
        f"model.pretrained={path}: 0 of the model's 20 tensors can be taken from its 2: none match by name (it has "
        "other.weight, x, the model cls_token, pos_embed, patch_embed.proj.weight and 17 more); use weights of this "
        "architecture, or rename them as in the model"
    )


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_weights_file_is_refused_and_does_not_run(zipped, tmp_path):
    path, target = tmp_path / "evil.pt", tmp_path / "ran"
    state = {"head.weight": torch.zeros(1), "x": Payload(target)}
    if zipped:
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps({"x": Payload(target)}))
    with pytest.raises(ConfigError, match="can't be loaded as plain weights") as raised:
        vit(pretrained=path)
    if zipped:
        assert "it holds io.open, which is not plain data: loading it could run code; where you trust" in str(
            raised.value
        )
    assert not target.exists()
    torch.load(path, weights_only=False) if zipped else pickle.loads(path.read_bytes())
    assert target.exists()  # without protection, the payload does run


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("page.pth", lambda good: b"<!DOCTYPE html><html>", "it is not a PyTorch or safetensors file, or it is c"),
        ("empty.ckpt", lambda good: b"", "it is empty; fetch it again"),
        ("cut.pt", lambda good: good[:-200], "it is truncated or corrupt; fetch it again"),
        ("cut.safetensors", lambda good: good[:-4], "or it is corrupt (SafetensorError: "),
    ],
)
def test_a_file_that_holds_no_weights_is_told_in_a_line(name, content, reason, device, tmp_path):
    trained, _ = vit()
    path = saved(trained, tmp_path / name)
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ConfigError) as raised:
        load_weights(path, device)
    assert str(raised.value).startswith(f"model.pretrained={path} can't be loaded as plain weights: ")
    assert reason in str(raised.value)
    assert not {"\n", "\x1b"} & set(str(raised.value))


def test_a_whole_model_in_a_file_is_told_with_what_to_save_instead(tmp_path):
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "w.pt")
    with pytest.raises(ConfigError) as raised:
        load_weights(tmp_path / "w.pt")
    assert str(raised.value).endswith(
        "it holds torch.nn.modules.linear.Linear, which is not plain data: loading it could run code; where you trust "
        "it, load it by torch.load(..., weights_only=False), and torch.save its state dict alone"
    )


@pytest.mark.parametrize("resized", [False, True])
def test_weights_are_checked_by_names_and_shapes_before_there_is_data(resized, tmp_path):
    trained, _ = vit(info(num_classes=9))
    path = saved(trained, tmp_path / "w.bin", lambda state: {f"net.{name}": value for name, value in state.items()})
    size, channels = (64, 1) if resized else (32, 3)
    data = DataConfig(name="x", image_size=size, channels=channels, mean=[0.5] * channels, std=[0.5] * channels)
    check_weights(ModelConfig(name=VIT, kwargs=SMALL, pretrained=str(path)), data)
    for name, kwargs in (("resnet10t", {}), (VIT, {**SMALL, "embed_dim": 8, "patch_size": 8})):
        with pytest.raises(ConfigError, match=rf"^model\.pretrained={path}: 0 of the model's \d+ tensors can be taken"):
            check_weights(ModelConfig(name=name, kwargs=kwargs, pretrained=str(path)), data)


def test_weights_of_a_model_that_needs_values_to_be_built_are_checked_too(tmp_path, monkeypatch):
    def build(**arguments):
        model = torch.nn.Linear(2, 2)
        model.scale = model.weight.sum().item()  # the device "meta" has no values
        return model

    monkeypatch.setattr(ftexp.model.build.timm, "create_model", build)
    data = DataConfig(name="x", image_size=8, channels=1, mean=[0.5], std=[0.5])
    for names, fits in ((("weight",), True), (("other",), False)):
        torch.save({name: torch.zeros(2, 2) for name in names}, tmp_path / "w.pt")
        with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match="none match by name"):
            check_weights(ModelConfig(name="resnet18", pretrained=str(tmp_path / "w.pt")), data)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}, torch.zeros(2), {}])
def test_a_file_without_a_state_dict_is_told(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"holds a (list|dict of epoch|Tensor|dict of nothing), not a state dict: "):
        load_weights(tmp_path / "w.pt")


def test_hub_weights_without_a_network_are_told(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("the network is unreachable")

    monkeypatch.setattr(ftexp.model.build, "load_state_dict_from_hf", offline)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(DataError) as raised:
        build_model(ModelConfig(name="resnet18", pretrained=True), info())
    assert str(raised.value) == (
        "model.pretrained=true: the weights of resnet18 can't be fetched (the network is unreachable); "
        "without a network, give the path of a weights file"
    )


def test_hub_weights_go_through_the_same_fitting(monkeypatch):
    trained = timm.create_model("resnet10t", num_classes=1000)
    buffer = io.BytesIO()
    torch.save(trained.state_dict(), buffer)
    asked = []

    def hub(name, **kwargs):
        asked.append((name, kwargs))
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    monkeypatch.setattr(ftexp.model.build, "load_state_dict_from_hf", hub)
    model, report = build_model(ModelConfig(name="resnet10t", pretrained=True), info(channels=1))
    assert asked[0][0].startswith("timm/resnet10t")
    assert asked[0][1] == {"weights_only": True}
    assert report.missing == ["fc.weight", "fc.bias"]
    assert report.resized == ["conv1.0.weight"]
    assert torch.equal(model.layer1[0].conv1.weight, trained.layer1[0].conv1.weight)


def test_a_model_that_the_hub_has_no_weights_for_is_told():
    with pytest.raises(
        ConfigError, match=r"^model\.pretrained=true, but timm's hub has no weights for model\.name=vit_"
    ):
        build_model(ModelConfig(name="vit_base_patch16_18x2_224", pretrained=True, kwargs=SMALL), info())


def facebook_convnext(state):
    """Rename the weights of timm's ConvNeXt as in the original authors' files."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"^stages\.(\d+)\.downsample\.(\d+)", r"downsample_layers.\1.\2", name)
        name = re.sub(r"^stages\.(\d+)\.blocks\.(\d+)", r"stages.\1.\2", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        renamed[name.replace("head.norm.", "norm.").replace("head.fc.", "head.")] = value
    return renamed


CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
SWIN = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 7, "patch_size": 2}


def loaded_by_timm(arguments, path):
    """Return a model whose weights timm itself loads from a file, as it loads weights of its hub."""
    return timm.create_model(
        **arguments, pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "num_classes": arguments["num_classes"], "custom_load": False},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kwargs", "sizes", "wrap"),
    [
        ("convnext_atto", CONVNEXT, (32, 32), facebook_convnext),
        ("swin_tiny_patch4_window7_224", SWIN, (32, 32), lambda state: {"model": state}),
        ("swin_tiny_patch4_window7_224", SWIN, (16, 32), lambda state: {
            "model": {**state, "layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4),
                      "layers.0.blocks.0.attn_mask": torch.zeros(4, 4)}}),
        ("beit_base_patch16_224", {**SMALL, "use_rel_pos_bias": True}, (32, 64), lambda state: {"module": state}),
        (VIT, SMALL, (32, 64), lambda state: {"state_dict": state}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # torch's warning about timm's interpolation
def test_a_file_is_loaded_as_timm_loads_it(name, kwargs, sizes, wrap, tmp_path):
    torch.manual_seed(1)
    before, after = (info(image_size=size) for size in sizes)
    trained, _ = build_model(ModelConfig(name=name, kwargs=kwargs), before)
    path = saved(trained, tmp_path / "w.pth", wrap)
    config = ModelConfig(name=name, kwargs=kwargs, pretrained=str(path))
    check_weights(config, DataConfig(name="x", image_size=sizes[1], mean=[0.5] * 3, std=[0.5] * 3))
    torch.manual_seed(2)
    model, report = build_model(config, after)
    assert (report.missing, report.unused) == ([], [])
    assert bool(report.resized) == (sizes[0] != sizes[1])
    saved(trained, path, lambda state: wrap(state).get("module", wrap(state)))  # timm doesn't know the key "module"
    theirs = loaded_by_timm(timm_arguments(config, after), path).state_dict()
    assert list(tree_differences(model.state_dict(), theirs)) == []


def test_the_original_authors_names_are_found_under_a_prefix(tmp_path):
    trained, _ = build_model(ModelConfig(name="convnext_atto", kwargs=CONVNEXT), info())

    def dino(state):
        teacher = {f"backbone.{name}": value for name, value in facebook_convnext(state).items()}
        return {"teacher": {"dino_head.mlp.weight": torch.zeros(1), **teacher}}

    path = saved(trained, tmp_path / "dino.pth", dino)
    model, report = build_model(ModelConfig(name="convnext_atto", kwargs=CONVNEXT, pretrained=str(path)), info())
    assert (report.missing, report.resized, report.unused) == ([], [], ["dino_head.mlp.weight"])
    assert list(tree_differences(model.state_dict(), trained.state_dict())) == []


def test_weights_of_another_patch_size_are_resampled_with_their_positions(tmp_path):
    trained, _ = vit(patch_size=8)
    _, report = vit(pretrained=saved(trained, tmp_path / "w.pt"))
    assert sorted(report.resized) == ["patch_embed.proj.weight", "pos_embed"]
    assert (report.missing, report.unused) == ([], [])


def test_every_architecture_of_timms_has_the_filter_that_its_module_names():
    """`checkpoint_filter` depends on names in timm that aren't public; one architecture of each kind is checked."""
    expected = {
        "vit_tiny_patch16_224": "checkpoint_filter_fn", "swin_tiny_patch4_window7_224": "checkpoint_filter_fn",
        "regnetx_002": "_filter_fn", "densenet121": "_filter_torchvision_pretrained", "resnet18": None,
        "crossvit_tiny_240": "pretrained_filter_fn", "deit3_small_patch16_224": "checkpoint_filter_fn",
    }  # fmt: skip
    before = timm.models._builder.load_pretrained
    for name, wanted in expected.items():
        found = checkpoint_filter({"model_name": name, "num_classes": 5})
        assert getattr(getattr(found, "func", found), "__name__", None) == wanted, name
    assert timm.models._builder.load_pretrained is before


def test_a_plug_ins_model_is_not_asked_to_load_anything(monkeypatch, tmp_path):
    asked = []

    @timm.models.register_model
    def net_of_a_plug_in(pretrained=False, **kwargs):
        asked.append(pretrained)
        return torch.nn.Linear(2, 2)

    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "w.pt")
    model, report = build_model(ModelConfig(name="net_of_a_plug_in", pretrained=str(tmp_path / "w.pt")), info())
    assert (asked, report.matched, report.missing) == ([False], ["weight"], ["bias"])
    assert torch.equal(model.weight, torch.ones(2, 2))


def test_weights_that_give_less_than_half_are_refused_with_both_numbers(tmp_path):
    deep, _ = vit(depth=4)
    names = {name: value for name, value in deep.state_dict().items() if name.startswith(("blocks.0", "head"))}
    torch.save(names, tmp_path / "w.pt")
    data = DataConfig(name="x", image_size=32, mean=[0.5] * 3, std=[0.5] * 3)
    config = ModelConfig(name=VIT, kwargs={**SMALL, "depth": 4}, pretrained=str(tmp_path / "w.pt"))
    block = sum(value.numel() for name, value in names.items() if name.startswith("blocks"))
    total = sum(value.numel() for name, value in deep.named_parameters() if not name.startswith("head"))
    with pytest.raises(ConfigError) as raised:
        check_weights(config, data)
    assert str(raised.value) == (
        f"model.pretrained={tmp_path / 'w.pt'} gives 12 of the model's 54 parameter tensors, {block:,} of {total:,} "
        f"numbers ({block / total:.0%}, the classifier's not counted), less than half: use weights of this "
        "architecture, or set model.pretrained_partial=true to train the rest from scratch"
    )
    check_weights(dataclasses.replace(config, pretrained_partial=True), data)
    _, report = build_model(config, info())  # a run that has already started resumes
    assert len(report.matched) == 14


def test_weights_of_a_sibling_that_share_little_are_refused(tmp_path):
    """By name and shape, norms and some convolutions of a ResNet-18 fit a ResNet-50."""
    with torch.device("meta"):
        state = timm.create_model("resnet18").state_dict()
    torch.save({name: torch.zeros(value.shape) for name, value in state.items()}, tmp_path / "w.pt")
    data = DataConfig(name="x", image_size=32, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(ConfigError, match=r"gives 43 of the model's 159 parameter tensors, .* \(27%, the classifier"):
        check_weights(ModelConfig(name="resnet50", pretrained=str(tmp_path / "w.pt")), data)
    check_weights(ModelConfig(name="resnet18", pretrained=str(tmp_path / "w.pt")), data)  # whatever the classes are


@pytest.mark.parametrize(("kwargs", "fits"), [({}, True), ({"embed_dim": 32, "num_heads": 2}, False)])
def test_weights_of_timms_hub_are_checked_without_fetching_them(kwargs, fits, monkeypatch):
    for module, name in ((ftexp.model.build, "load_state_dict_from_hf"), (torch.hub, "load_state_dict_from_url")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("they were fetched"))
    data = DataConfig(name="x", image_size=64, channels=1, mean=[0.5], std=[0.5])
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match=r"^model\.pretrained=timm hub, vit_"):
        check_weights(ModelConfig(name=VIT, kwargs=kwargs, pretrained=True), data)


def test_of_a_moving_average_and_weights_the_average_is_taken_as_timm_does(tmp_path):
    trained, _ = vit()
    path = saved(trained, tmp_path / "last.pth.tar", lambda state: {
        "state_dict": {name: value + 1 for name, value in state.items()}, "state_dict_ema": state})  # fmt: skip
    model, report = vit(pretrained=path)
    assert torch.equal(model.head.weight, trained.head.weight)
    assert report.source == f"{path} (state_dict_ema; also there: state_dict)"


AUGREG = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}


@pytest.mark.parametrize(
    ("name", "channels", "wanted"),
    [
        (VIT, 3, AUGREG),
        (VIT, 1, {**AUGREG, "mean": [0.5], "std": [0.5]}),
        (VIT, 4, {key: AUGREG[key] for key in ("interpolation", "crop_pct", "crop_mode")}),
        ("deit_small_patch16_224", 1, {**AUGREG, "mean": [0.449], "std": [0.226]}),
        ("resnet18.tv_in1k", 3, {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
                                 "interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"}),
        ("net_of_another_plug_in", 3, {}),
    ],
)  # fmt: skip
def test_the_preprocessing_is_that_of_timms_config(name, channels, wanted):
    values, origin = preprocessing_of(ModelConfig(name=name, pretrained=True), channels)
    assert values == wanted
    assert origin == f"timm's config of {name}"


@pytest.mark.parametrize("is_timms", [True, False])
def test_a_config_of_timms_beside_the_weights_comes_first(is_timms, tmp_path):
    content = {"pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 1.0, "interpolation": "bilinear"}}
    (tmp_path / "config.json").write_text(json.dumps({**content, **({"architecture": VIT} if is_timms else {})}))
    config = ModelConfig(name=VIT, pretrained=str(tmp_path / "model.safetensors"))
    values, origin = preprocessing_of(config, 3)
    wanted = {**content["pretrained_cfg"], "crop_mode": "center"} if is_timms else AUGREG
    assert (values, origin.startswith("config.json")) == (wanted, is_timms)
