"""`python -m ftexp.export`: exported models predict as the original, also without ftexp; others are removed."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import ftexp.export.command
from ftexp.checkpoint.reading import read_weights
from ftexp.errors import CheckpointError, ConfigError, ExportError
from ftexp.export.checking import Difference, Samples, compare
from ftexp.export.command import _print, export, parse
from ftexp.export.formats import answers, formats
from tests.support.saved_runs import CHECKPOINT, CLASSES, pictures, saved_run

IMAGES = pictures(5)
# the examples of README, which don't use ftexp, on a given directory and pixels
READERS = {
    "safetensors": """
import timm
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
config = timm.data.resolve_data_config(model=model)
assert config["input_size"][1:] == (8, 8) and config["crop_pct"] == 1.0 and config["interpolation"] == "bicubic"
mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
logits = model((images - mean) / std).detach().numpy()
labels = model.pretrained_cfg["label_names"]
""",
    "torch_export": """
extra = {"about.json": ""}
logits = torch.export.load(f"{folder}/model.pt2", extra_files=extra).module()(torch.from_numpy(pixels)).detach().numpy()
labels = json.loads(extra["about.json"])["labels"]
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
(logits,) = session.run(None, {"pixels": pixels})
labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
""",
}
READ = """
import json, sys
import numpy as np
import torch
found, pixels = {}, np.load("pixels.npy")
""" + "".join(f"folder = {kind!r}{code}found[folder] = [labels, logits.tolist()]\n" for kind, code in READERS.items())
READ += """
assert "ftexp" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run of a convolutional network with batch norm, whose weights differ from the initial ones."""
    words = ["model=resnet18", "model.name=test_resnet", "data=image_folder", "data.root=photos", "data.image_size=8"]
    return saved_run(tmp_path_factory.mktemp("runs") / "run", *words)


@pytest.fixture(autouse=True)
def images_without_ray(monkeypatch):
    monkeypatch.setattr(ftexp.export.command, "_samples", lambda run, number: Samples(IMAGES[:number], "test"))


def test_what_is_exported_says_the_same_where_there_is_no_ftexp(run, tmp_path, capsys):
    for kind in READERS:
        out = tmp_path / kind
        about = export(parse([f"run={run.storage.uri}", f"format={kind}", f"out={out}"]))
        kept = json.loads((out / "export.json").read_text())
        assert kept == json.loads(json.dumps(about))
        assert (kept["labels"], kept["mean"], kept["std"]) == (CLASSES, run.info.mean, run.info.std)
        assert kept["checked"]["images"] == kept["checked"]["same_class"] == 5
        assert kept["checked"]["largest_difference"] <= kept["checked"]["tolerance"] == 1e-3
        largest = f"{kept['checked']['largest_difference']:.3g}"
        told = f"checked  5 images of the test split: largest difference of a logit {largest} "
        assert told in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(READERS)

    np.save(tmp_path / "pixels.npy", IMAGES)
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = answers(run.model(read_weights(run.store, run.store.by_name(CHECKPOINT), "raw")), run.info)(IMAGES)
    for kind, (labels, logits) in json.loads(done.stdout.splitlines()[-1]).items():
        assert labels == CLASSES, kind
        assert np.abs(np.array(logits, np.float32) - expected).max() <= 1e-3, kind


def test_a_model_with_positions_and_one_channel_is_loaded_by_timm_alone(tmp_path):
    run = saved_run(tmp_path / "run", "model=vit", channels=1)
    model = run.model(read_weights(run.store, run.store.by_name(CHECKPOINT), "raw"))
    arguments = json.loads(run.storage.read_bytes("run.json"))["model"]["arguments"]

    exported = formats.get("safetensors")(model, run.info, {"arguments": arguments}, tmp_path)

    assert compare(answers(model, run.info), exported, pictures(3, channels=1)).largest == 0


def test_a_model_that_says_something_else_is_not_left_behind(run, tmp_path, monkeypatch):
    export_it = formats.get("safetensors")

    def wrong(model, info, about, directory):
        answer = export_it(model, info, about, directory)
        return lambda pixels: answer(pixels) + np.float32(0.01)

    monkeypatch.setitem(formats._entries, "safetensors", wrong)
    words = [f"run={run.storage.uri}", "format=safetensors", f"out={tmp_path / 'out'}"]
    with pytest.raises(ExportError, match=r"differs from the original by 0\.01.* and tolerance=0\.001"):
        export(parse(words))
    assert list(tmp_path.iterdir()) == []
    assert export(parse([*words, "tolerance=0.02"]))["checked"]["largest_difference"] == pytest.approx(0.01, abs=1e-4)


def test_a_model_that_returns_a_list_is_refused_before_it_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run.__class__, "model", lambda *_: lambda images: [images])
    with pytest.raises(ConfigError, match=r"^model\.name=test_resnet returns a list of 1, not logits"):
        export(parse([f"run={run.storage.uri}", "format=torch_export", f"out={tmp_path / 'out'}"]))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_says_nan_is_no_agreement(run, tmp_path, monkeypatch):
    monkeypatch.setitem(
        formats._entries, "onnx", lambda *_: lambda pixels: np.full((len(pixels), 3), np.nan, np.float32)
    )

    with pytest.raises(ExportError, match="by nan"):
        export(parse([f"run={run.storage.uri}", "format=onnx", f"out={tmp_path / 'out'}"]))


def test_the_first_image_is_asked_for_by_itself():
    asked = []

    def answer(pixels):
        asked.append(len(pixels))
        return pixels[:, 0, 0].astype(np.float32)

    assert compare(answer, lambda pixels: answer(pixels) + 1, IMAGES).largest == 1
    assert asked == [1, 4, 1, 4]


def test_noise_is_told_of(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        ftexp.export.command, "_samples", lambda *_: Samples(IMAGES, "noise", "data.root=gone can't be listed")
    )
    monkeypatch.setitem(formats._entries, "onnx", lambda model, info, *_: answers(model, info))

    about = export(parse([f"run={run.storage.uri}", "format=onnx", f"out={tmp_path / 'out'}"]))

    assert "so the models are compared on noise: data.root=gone can't be listed" in capsys.readouterr().out
    assert about["checked"]["of"] == "noise"


def test_a_terminal_breaks_no_word(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    about = {"arguments": {"model_name": "vit"}, "checkpoint": "step_00000004.a1", "epoch": 1}
    _print(about, Samples(IMAGES, "test"), Difference(3.81e-06, 11.0, 5))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "checked  5 images of the test split: largest difference of a logit 3.81e-06",
        "         (largest logit 11); same class for 5 of 5",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["format=onnx"], "run is not set"),
        (["run=x"], r"format is not set: add format=safetensors\|torch_export\|onnx"),
        (["run=x", "format=onxn"], "Did you mean 'onnx'"),
        (["run=x", "format=onnx", "tolerance=0"], "tolerance=0.0 is out of range"),
    ],
)
def test_a_wrong_command_is_told(words, told):
    with pytest.raises(ConfigError, match=told):
        parse(words)


def test_onnx_without_its_packages_names_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else name)

    with pytest.raises(ConfigError, match=r"needs onnxscript: write uv run --extra onnx in front"):
        parse(["run=x", "format=onnx"])


def test_what_is_there_already_is_left_alone(run, tmp_path):
    (tmp_path / "mine").write_text("kept")

    with pytest.raises(ConfigError, match="already exists"):
        export(parse([f"run={run.storage.uri}", "format=onnx", f"out={tmp_path}"]))
    assert (tmp_path / "mine").read_text() == "kept"


def test_the_average_is_exported_where_it_is_asked_for_and_missed_where_there_is_none(run, tmp_path):
    words = ["model=resnet18", "model.name=test_resnet", "data=image_folder", "data.root=photos", "data.image_size=8"]
    manifest = run.store.by_name(CHECKPOINT)
    state = run.model(read_weights(run.store, manifest, "raw")).state_dict()
    average = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    averaged = saved_run(tmp_path / "averaged", *words, average=average)
    found = averaged.model(read_weights(averaged.store, averaged.store.by_name(CHECKPOINT), "ema")).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in average.items())
    raw = averaged.model(read_weights(averaged.store, averaged.store.by_name(CHECKPOINT), "raw")).state_dict()
    assert not any(torch.equal(raw[name], average[name]) for name in average if "num_batches" not in name)
    with pytest.raises(CheckpointError, match="weights=ema, but the run had no EMA"):
        read_weights(run.store, manifest, "ema")
