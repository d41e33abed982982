"""The fingerprint: the settings that define a run, and secrets that are never recorded."""

import copy
import dataclasses
import json

import pytest

from ftexp.config.fingerprint import as_begun, differences, fingerprint
from ftexp.config.masking import masked
from ftexp.config.schema import Config
from ftexp.errors import ConfigError

DEFINING = {
    "seed": 1,
    "resume_from": "/runs/other",
    "model.name": "resnet34",
    "model.kwargs": {"depth": 2},
    "model.preset": {"resnet18": {"depth": 2}},
    "model.pretrained": "weights.pt",
    "model.drop_path_rate": 0.1,
    "model.head_init_scale": 0.1,
    "model.head_init_bias": 0.1,
    "data.name": "cifar10",
    "data.image_size": 16,
    "data.channels": 1,
    "data.num_classes": 7,
    "data.mean": [0.1],
    "data.std": [0.1],
    "data.crop_pct": 0.9,
    "data.crop_mode": "squash",
    "data.interpolation": "bilinear",
    "data.decoder": "torchvision",
    "data.decode_size": 500,
    "data.exif_orientation": True,
    "data.background": "white",
    "data.bit_depth": 12,
    "data.val_fraction": 0.3,
    "data.test_fraction": 0.3,
    "data.split_seed": 1,
    "data.image_column": "jpeg",
    "data.label_column": "class",
    "data.num_samples": 5,
    "data.shuffle_window": 5,
    "data.sampling": "sqrt",
    "data.kwargs": {"a": 1},
    "augment.pad_px": 3,
    "augment.hflip": 0.3,
    "augment.brightness": 0.3,
    "augment.rand_augment": "rand-m9",
    "augment.crop": "rrc",
    "augment.scale": [0.3, 1.0],
    "augment.ratio": [0.5, 2.0],
    "augment.interpolation": "bicubic",
    "augment.vflip": 0.3,
    "augment.auto_augment": "original",
    "augment.color_jitter": 0.3,
    "augment.color_jitter_prob": 0.3,
    "augment.grayscale": 0.3,
    "augment.gaussian_blur": 0.3,
    "augment.custom": ["mine"],
    "augment.erase_prob": 0.3,
    "augment.erase_mode": "rand",
    "augment.erase_count": 3,
    "augment.mixup_alpha": 0.3,
    "augment.cutmix_alpha": 0.3,
    "augment.mix_prob": 0.3,
    "augment.mix_switch_prob": 0.3,
    "augment.mix_mode": "pair",
    "data.task": "multi_label",
    "data.label_separator": "|",
    "data.target_columns": ["age"],
    "data.standardize_targets": False,
    "loss.clip": 0.1,
    "loss.delta": 3.0,
    "loss.alpha": 3.0,
    "augment.splits": 3,
    "loss.name": "bce",
    "loss.class_weights": "inv_freq",
    "loss.effective_num_beta": 0.9,
    "loss.target_threshold": 0.2,
    "loss.sum_classes": True,
    "loss.pos_weight": 3.0,
    "loss.gamma": 3.0,
    "loss.gamma_pos": 3.0,
    "loss.gamma_neg": 3.0,
    "loss.epsilon": 3.0,
    "loss.kwargs": {"margin": 1},
    "augment.mixup_off_epoch": 3,
    "augment.repeats": 3,
    "optim.name": "lamb",
    "optim.lr": 0.3,
    "optim.weight_decay": 0.3,
    "optim.filter_bias_and_bn": False,
    "optim.layer_decay": 0.7,
    "optim.kwargs": {"momentum": 0.3},
    "ema.decay": 0.9,
    "ema.use_warmup": True,
    "ema.warmup_gamma": 3.0,
    "ema.warmup_power": 0.9,
    "ema.update_after_step": 3,
    "distill.teacher": "/runs/other",
    "distill.kind": "features",
    "distill.alpha": 0.3,
    "distill.temperature": 3.0,
    "distill.hard": True,
    "distill.checkpoint": "latest",
    "distill.weights": "ema",
    "distill.pretrained": "weights.pt",
    "distill.kwargs": {"depth": 2},
    "distill.image_size": 16,
    "distill.precision": "bf16",
    "distill.sha256": "abc",
    "distill.spec_sha256": "abc",
    "schedule.name": "poly",
    "schedule.warmup_epochs": 3.0,
    "schedule.warmup_lr": 0.3,
    "schedule.min_lr": 0.3,
    "schedule.decay_epochs": 3.0,
    "schedule.decay_rate": 0.3,
    "resizing.initial_scale": 0.3,
    "resizing.delay_fraction": 0.3,
    "resizing.finetune_fraction": 0.3,
    "resizing.size_increment": 3,
    "train.global_batch_size": 7,
    "train.precision": "bf16",
    "train.sync_bn": True,
    "train.dist_bn": "reduce",
    "train.label_smoothing": 0.3,
    "train.clip_grad_norm": 0.3,
    "train.clip_grad_value": 0.3,
    "train.clip_grad_agc": 0.3,
    "train.freeze": {"backbone": 2},
    "parallel.param_dtype": "bf16",
    "parallel.reduce_dtype": "bf16",
}
FREE = {
    "plugins": ["mine"],
    "verbose": True,
    "run.name": "other",
    "run.storage": "s3://bucket",
    "data.root": "elsewhere",
    "data.download": True,
    "data.on_bad_sample": "skip",
    "data.prefetch_batches": 4,
    "data.feed": "streaming",
    "data.decode_cpus": 4,
    "data.integer_labels": "indices",
    "model.pretrained_partial": True,
    "train.epochs": 99,
    "schedule.cooldown_epochs": 9.0,
    "optim.lr_base": 0.3,
    "optim.lr_base_size": 32,
    "optim.lr_base_scale": "sqrt",
    "train.log_every_steps": 7,
    "train.eval_every_epochs": 7,
    "train.eval_batch_size": 7,
    "train.metrics": ["auroc"],
    "stopping.metric": "val_loss",
    "stopping.patience_epochs": 3,
    "hooks": {"mine": {}},
    "scaling.num_workers": 4,
    "scaling.use_gpu": True,
    "parallel.kind": "fsdp",
    "parallel.shard_size": 2,
    "parallel.reshard_after_forward": False,
    "parallel.wrap": ["blocks.*"],
    "train.compile": "blocks",
    "train.checkpoint_activations": "blocks",
    "failure.max_failures": 9,
    "checkpoint.every_steps": 9,
    "checkpoint.every_seconds": 9.0,
    "checkpoint.max_failed_saves": 9,
    "resume": "must",
    "train.max_steps": 9,
    "train.ledger": True,
    "chaos.kind": "raise",
    "chaos.faults": ["raise"],
    "checkpoint.num_to_keep": None,
    "checkpoint.format": "full",
    "checkpoint.full_at": "best",
}


def config(**changes):
    made = Config()
    made.model.name, made.data.name, made.optim.name, made.schedule.name = "resnet18", "digits", "sgd", "cosine"
    made.data.image_size, made.data.mean, made.data.std = 8, [0.5], [0.5]
    made.train.epochs, made.train.global_batch_size, made.optim.lr = 3, 32, 0.1
    for key, value in changes.items():
        *groups, name = key.split(".")
        node = made
        for group in groups:
            node = getattr(node, group)
        assert getattr(node, name) != value, f"{key} must be another than the usual"
        setattr(node, name, value)
    return made


@pytest.mark.parametrize("key", DEFINING)
def test_a_key_that_defines_the_run_may_not_change(key):
    recorded, own = fingerprint(config()), fingerprint(config(**{key: DEFINING[key]}))
    with pytest.raises(ConfigError) as raised:
        differences(recorded, own, "/runs/first")
    first, *changed = str(raised.value).splitlines()
    assert first.startswith("/runs/first holds a run with a different configuration; choose another run.name")
    assert [line.split(" was ")[0].startswith(key) for line in changed] == [True] * len(changed)
    assert changed


@pytest.mark.parametrize("key", FREE)
def test_a_key_that_does_not_define_the_run_may_change(key):
    differences(fingerprint(config()), fingerprint(config(**{key: FREE[key]})), "/runs/first")


def test_every_key_of_model_data_augment_optim_ema_and_schedule_is_sorted_into_one_kind():
    """A field that is added to one of these groups must be added to a table above."""
    made = config()
    keys = {
        f"{group}.{field.name}"
        for group in ("model", "data", "augment", "optim", "ema", "schedule", "parallel")
        for field in dataclasses.fields(getattr(made, group))
    }
    assert keys <= DEFINING.keys() | FREE.keys()
    assert DEFINING.keys().isdisjoint(FREE)


def test_differences_names_every_key_with_both_values():
    own = fingerprint(config(**{"optim.lr": 0.3, "seed": 4}))
    with pytest.raises(ConfigError) as raised:
        differences(fingerprint(config()), own, "here")
    assert str(raised.value).splitlines()[1:] == ["optim.lr was 0.1, and is 0.3 now", "seed was 0, and is 4 now"]


def test_differences_tells_of_a_kwarg_that_came_or_went():
    bare, more = fingerprint(config()), fingerprint(config(**{"model.kwargs": {"depth": 2}}))
    for recorded, own, line in (
        (bare, more, "model.kwargs.depth was None, and is 2 now"),
        (more, bare, "model.kwargs.depth was 2, and is None now"),
    ):
        with pytest.raises(ConfigError) as raised:
            differences(recorded, own, "here")
        assert line in str(raised.value)


def test_a_run_from_before_there_was_a_key_has_its_default():
    own = fingerprint(config())
    younger = ("ema.", "train.freeze", "augment.mix", "parallel.")
    older = {key: value for key, value in own.items() if not key.startswith(younger)}
    differences(older, own, "here")
    with pytest.raises(ConfigError) as raised:
        differences(older, fingerprint(config(**{"augment.mixup_alpha": 0.8, "train.freeze": {"head": 2}})), "here")
    changed = str(raised.value).splitlines()[1:]
    assert changed == [
        "augment.mixup_alpha was 0.0, and is 0.8 now",
        "train.freeze.head was None, and is 2 now",
    ]


NEW = {"data.decoder": "auto", "data.exif_orientation": True, "data.background": "white"}  # as in the group files
OLD = {"decoder": "pillow", "exif_orientation": False, "background": None}


def decoding(made):
    return {name: getattr(made.data, name) for name in OLD}


def test_a_new_run_records_the_decoder_that_auto_stands_for():
    made, older = as_begun(config(**NEW), None, [])
    assert (made.data.decoder, older) == ("torchvision", [])
    assert fingerprint(config(**NEW)) == fingerprint(made)
    assert fingerprint(made)["data.decoder"] == "torchvision"


def test_a_run_from_before_images_were_decoded_otherwise_resumes_by_the_same_overrides():
    recorded = {key: value for key, value in fingerprint(config()).items() if key not in NEW}
    made, older = as_begun(config(**NEW), recorded, ["data.root=photos"])
    assert decoding(made) == OLD
    assert older == list(NEW)
    differences(recorded, fingerprint(made), "here")


def test_a_run_that_recorded_how_it_decodes_is_compared_by_that():
    recorded = fingerprint(config(**{**NEW, "data.background": "black"}))
    made, older = as_begun(config(**NEW), recorded, [])
    assert decoding(made) == {"decoder": "torchvision", "exif_orientation": True, "background": "white"}
    assert older == []
    with pytest.raises(ConfigError, match=r"data\.background was 'black', and is 'white' now"):
        differences(recorded, fingerprint(made), "here")


def test_auto_stays_the_decoder_that_a_run_began_with():
    recorded = fingerprint(config())
    made, older = as_begun(config(**{"data.decoder": "auto"}), recorded, ["data.decoder=auto"])
    assert (made.data.decoder, older) == ("pillow", [])


def test_what_is_typed_of_decoding_is_never_replaced():
    recorded = {key: value for key, value in fingerprint(config()).items() if key not in NEW}
    made, _ = as_begun(config(**{"data.decoder": "torchvision"}), recorded, ["++data.decoder=torchvision"])
    with pytest.raises(ConfigError, match=r"data\.decoder was 'pillow', and is 'torchvision' now"):
        differences(recorded, fingerprint(made), "here")


def test_a_fingerprint_survives_json():
    own = fingerprint(config(**{"optim.kwargs": {"betas": [0.9, 0.95], "nested": {"a": None}}}))
    assert json.loads(json.dumps(own)) == own
    assert own["optim.kwargs.nested.a"] is None
    differences(json.loads(json.dumps(own)), own, "here")


def test_a_run_directory_without_a_fingerprint_takes_any():
    differences({}, fingerprint(config()), "here")


def test_secrets_do_not_enter_a_fingerprint():
    own = fingerprint(config(**{"data.kwargs": {"api_key": "hush", "url": "s3://me:hush@host/x"}}))
    assert "hush" not in json.dumps(own)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"password": "hush"}, {"password": "***"}),
        ({"a": [{"b": {"API_KEY": "hush"}}]}, {"a": [{"b": {"API_KEY": "***"}}]}),
        ({"aws_secret_access_key": "hush", "region": "eu"}, {"aws_secret_access_key": "***", "region": "eu"}),
        ({"credentials": {"user": "me", "pins": ["1"]}}, {"credentials": {"user": "***", "pins": ["***"]}}),
        (
            {"class_token": False, "reg_tokens": 4, "token": None},
            {"class_token": False, "reg_tokens": 4, "token": None},
        ),
        ("s3://me:hush@host:9000/bucket", "s3://***@host:9000/bucket"),
        ("s3://me:hu@sh@host/bucket", "s3://***@host/bucket"),
        ("s3://b/p?secret_key=hush&region=eu", "s3://b/p?secret_key=***&region=eu"),
        ("s3://b/p?region=eu&access_key=hush", "s3://b/p?region=eu&access_key=***"),
        ("s3://b/p?session_token=hush", "s3://b/p?session_token=***"),
        ("run.storage=s3://me:hush@host/b", "run.storage=s3://***@host/b"),
        ("s3://bucket/mail@example.org", "s3://bucket/mail@example.org"),
        ("/home/me@work/runs", "/home/me@work/runs"),
        (("a", 1, None), ["a", 1, None]),
    ],
)
def test_masked_hides_secrets_and_nothing_else(value, expected):
    before = copy.deepcopy(value)
    assert masked(value) == expected
    assert value == before


def test_masked_takes_a_whole_config():
    made = config(**{"run.storage": "s3://me:hush@host/b", "model.kwargs": {"auth": {"token": "hush"}}})
    safe = masked(made)
    assert "hush" not in json.dumps(safe)
    assert safe["run"]["storage"] == "s3://***@host/b"
    assert made.run.storage == "s3://me:hush@host/b"
