"""The groups under conf/ and the schema: valid compositions, their values, and rejected ones."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import get_origin, get_type_hints
from unittest import mock

import hydra
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import ftexp
from ftexp.cli.compose import open_keys, run_hydra, to_config
from ftexp.cli.explain import explain
from ftexp.config.checks.validate import validate
from ftexp.config.fingerprint import fingerprint
from ftexp.config.schema import AugmentConfig, Config, config_dir
from ftexp.config.source_names import SOURCE_FIELDS
from ftexp.errors import ConfigError
from tests.support.configs import composed

OPTIONS = sorted(
    (str(file.parent.relative_to(config_dir())), file.stem)
    for file in config_dir().glob("*/*.yaml")
    if file.parent.name != "experiment"
)
EXPERIMENTS = sorted(file.stem for file in (config_dir() / "experiment").glob("*.yaml"))

# overrides that an option requires; empty: it validates alone
OF_NUMBERS = [
    *("data=synthetic", "data.task=regression"),
    *("checkpoint.checkpoint_score_attribute=val_loss", "checkpoint.checkpoint_score_order=min"),
]
COMPANIONS = {
    ("data", "image_folder"): ["data.root=photos"],
    ("data", "image_list"): ["data.root=photos.csv"],
    ("data", "parquet"): ["data.root=tables"],
    ("data", "webdataset"): ["data.root=shards"],
    ("distill", "features"): ["distill.teacher=resnet18"],
    ("distill", "logits"): ["distill.teacher=resnet18"],
    ("distill", "token"): ["distill.teacher=resnet18"],
    ("scaling", "cluster"): ["scaling.num_workers=2"],
    ("parallel", "hsdp"): ["parallel.shard_size=2"],
    ("augment", "image_folder"): ["data=image_folder", "data.root=photos"],  # its shifts exceed a digit's width
    ("augment", "image_list"): ["data=image_list", "data.root=photos.csv"],
    ("augment", "parquet"): ["data=parquet", "data.root=tables"],
    ("augment", "webdataset"): ["data=webdataset", "data.root=shards"],
    ("loss", "jsd"): ["augment.splits=3", "augment.auto_augment=augmix-m3"],
    **{("loss", name): OF_NUMBERS for name in ("mse", "l1", "huber")},
}
# too large for the 8 px of the default data; the other data groups have more
NEEDS_SIXTEEN_PX = {"vit_base", "vit_small", "vit_tiny", "deit_small"}
NEEDS_GPU = ("single_gpu", "multi_gpu")


@pytest.fixture
def gpus(monkeypatch):
    """Function that sets the number of GPUs that this machine appears to have; initially 0."""

    def set_to(number):
        monkeypatch.setattr(ftexp.config.checks.scaling, "num_local_gpus", lambda: number)

    set_to(0)
    return set_to


def from_command_line(monkeypatch, capsys, *words):
    """Return the config that a command passes to its task."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # run_hydra sets it; this restores it afterwards
    got = []
    code = run_hydra(lambda job: got.append(to_config(job)), words)
    assert (code, len(got)) == (0, 1), capsys.readouterr().err
    return got[0]


def test_there_are_options_to_test():
    assert {group for group, _ in OPTIONS} == {
        *(
            "augment",
            "chaos",
            "checkpoint",
            "data",
            "distill",
            "ema",
            "stopping",
            "failure",
            "loss",
            "model",
            "optim",
            "parallel",
            "resizing",
            "scaling",
            "schedule",
            "sweep",
            "tracker",
            "train",
        )
    }
    assert "smoke" in EXPERIMENTS


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_composes_alone_and_validates(group, option, gpus):
    overrides = [f"{group}={option}"]
    config = composed(*overrides)
    if group == "scaling" and option in NEEDS_GPU:
        with pytest.raises(ConfigError, match=r"^scaling\.use_gpu=true, but this machine has no GPU: set scaling=loca"):
            validate(config)
        gpus(1)
        validate(config)
        return
    if (group, option) in COMPANIONS:
        with pytest.raises(ConfigError):
            validate(config)
        config = composed(*overrides, *COMPANIONS[group, option])
    elif group == "model" and option in NEEDS_SIXTEEN_PX:
        with pytest.raises(ConfigError, match=r"^data\.image_size=8 is not divisible by the patch size 16"):
            validate(config)
        config = composed(*overrides, "data=cifar10")
    validate(config)
    # the config has the values of the file
    written = OmegaConf.load(config_dir() / group / f"{option}.yaml")
    for key, value in written.items():
        if f"{group}.{key}" not in {word.partition("=")[0] for word in COMPANIONS.get((group, option), [])}:
            arrived = getattr(getattr(config, group), str(key))
            assert (dataclasses.asdict(arrived) if dataclasses.is_dataclass(arrived) else arrived) == value, key


def test_several_trackers_come_with_their_settings(monkeypatch, capsys):
    words = ["tracker=[tensorboard,mlflow]", "tracker.mlflow.experiment=mine", "tracker.tags.team=blue", "profile=true"]
    config = from_command_line(monkeypatch, capsys, *words)
    assert (config.tracker.names, config.tracker.mlflow.experiment) == (["tensorboard", "mlflow"], "mine")
    assert config.tracker.tags == {"team": "blue"}
    assert config.profile.enabled


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_validates(name, gpus):
    validate(composed(f"experiment={name}"))


def test_the_fault_tolerant_experiment_takes_its_own_groups_and_values():
    config = composed("experiment=fault_tolerant_cifar_vit")
    assert (config.data.name, config.augment.pad_px) == ("cifar10", 4)  # augment=cifar10 follows from data=cifar10
    assert (config.failure.max_failures, config.train.epochs) == (3, 10)
    assert config.model.all_kwargs() == {"patch_size": 4}
    assert config.run.name == "fault-tolerant-cifar-vit"


def test_a_command_line_value_wins_over_an_experiments(gpus):
    assert composed("experiment=smoke", "train.epochs=7").train.epochs == 7


@pytest.mark.parametrize("option", ["image_folder", "parquet"])
def test_file_sources_need_a_root(option, gpus):
    with pytest.raises(ConfigError, match=rf"^data\.root is not set: data\.name={option} reads files"):
        validate(composed(f"data={option}"))
    validate(composed(f"data={option}", "data.root=here"))


def test_gpu_options_count_the_gpus(gpus):
    gpus(2)
    validate(composed("scaling=multi_gpu"))
    validate(composed("scaling=multi_gpu", "scaling.num_workers=2"))
    with pytest.raises(ConfigError, match=r"^scaling\.num_workers=3 wants 1 GPU each, but this machine has 2"):
        validate(composed("scaling=multi_gpu", "scaling.num_workers=3"))
    with pytest.raises(ConfigError, match=r"^scaling\.num_workers=\[1, 3\] wants 1 GPU each"):
        validate(composed("scaling=multi_gpu", "scaling.num_workers=[1,3]"))


def test_workers_may_share_a_gpu(gpus, monkeypatch, capsys):
    gpus(1)
    words = [
        "scaling=single_gpu",
        "scaling.num_workers=2",
        "scaling.resources_per_worker={GPU:0.5}",
        "scaling.backend=gloo",
    ]
    validate(from_command_line(monkeypatch, capsys, *words))


def test_a_cluster_is_not_asked_for_local_gpus(monkeypatch):
    monkeypatch.setattr(ftexp.config.checks.scaling, "num_local_gpus", lambda: pytest.fail("this machine was asked"))
    validate(composed("scaling=cluster", "scaling.num_workers=16"))


def test_no_gpu_is_visible_where_cuda_visible_devices_hides_them(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: pytest.fail("the driver was asked"))
    for hidden in ("", "-1", " "):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert ftexp.config.machine.num_local_gpus() == 0


def test_gpus_are_counted_from_the_drivers_list(monkeypatch, tmp_path):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf 'GPU 0: A\\n  MIG 1g: no GPU of its own\\nGPU 1: A\\nGPU 2: A\\n'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert ftexp.config.machine.num_local_gpus() == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert ftexp.config.machine.num_local_gpus() == 2


def test_max_failures_lands_in_the_failure_group():
    assert composed("failure.max_failures=3").failure.max_failures == 3
    assert composed("failure=fail_fast").failure.max_failures == 0
    assert composed("failure=fail_fast", "failure.max_failures=5").failure.max_failures == 5


def test_every_preset_of_failure_is_more_than_a_name(gpus):
    presets = [option for group, option in OPTIONS if group == "failure"]
    assert presets == ["endless", "fail_fast", "retry", "spot"]
    for preset in presets:
        validate(composed(f"failure={preset}"))
    assert composed("failure=spot").failure.max_by_cause == {"hang": 3, "storage": 5}
    assert composed("failure=spot", "failure.max_by_cause.hang=1").failure.max_by_cause == {"hang": 1, "storage": 5}
    endless = composed("failure=endless").failure
    assert (endless.max_failures, endless.max_preemption_failures, endless.max_failures_without_progress) == (-1,) * 3


@pytest.mark.parametrize("data", sorted(SOURCE_FIELDS))
def test_augmentation_follows_the_data(data):
    written = OmegaConf.to_container(OmegaConf.load(config_dir() / "augment" / f"{data}.yaml"))
    assert composed(f"data={data}").augment == AugmentConfig(**written)


def test_cpus_that_change_images_of_a_source_in_memory_may_be_counted():
    validate(composed("data=digits", "augment.vflip=0.5", "data.decode_cpus=2"))


def test_augment_none_wins_over_the_datas_own():
    for words in (["data=cifar10", "augment=none"], ["augment=none", "data=cifar10"]):
        assert composed(*words).augment == AugmentConfig()


def test_another_architecture_does_not_inherit_the_vits_sizes():
    assert composed().model.all_kwargs()["embed_dim"] == 128
    assert composed("model.name=resnet18").model.all_kwargs() == {}
    assert composed("model=resnet18").model.preset == {}


def test_kwargs_replace_a_presets_values_one_by_one(monkeypatch, capsys):
    kwargs = from_command_line(monkeypatch, capsys, "model.kwargs.depth=2", "model.kwargs.qkv_bias=false").model
    assert kwargs.kwargs == {"depth": 2, "qkv_bias": False}
    assert kwargs.all_kwargs()["depth"] == 2
    assert kwargs.all_kwargs()["embed_dim"] == 128


@pytest.mark.parametrize(
    ("word", "group", "field", "expected"),
    [
        ("model.kwargs.drop_rate=0.1", "model", "kwargs", {"drop_rate": 0.1}),
        ("model.kwargs={drop_rate:0.1}", "model", "kwargs", {"drop_rate": 0.1}),
        ("model.kwargs.nested.key=x", "model", "kwargs", {"nested": {"key": "x"}}),
        ("optim.kwargs.betas=[0.9,0.95]", "optim", "kwargs", {"betas": [0.9, 0.95]}),
        ("data.kwargs.shards=4", "data", "kwargs", {"shards": 4}),
        ("scaling.resources_per_worker.CPU=0.5", "scaling", "resources_per_worker", {"CPU": 0.5}),
        ("scaling.resources_per_worker={CPU: 0.5}", "scaling", "resources_per_worker", {"CPU": 0.5}),
        ("train.freeze.backbone=2", "train", "freeze", {"backbone": 2}),
        ("train.freeze={blocks.0: 1, *.bias: null}", "train", "freeze", {"blocks.0": 1, "*.bias": None}),
        ("scaling.label_selector={zone: a}", "scaling", "label_selector", {"zone": "a"}),
        ("scaling.num_workers=[1,2]", "scaling", "num_workers", [1, 2]),
        ("plugins=[mine]", None, "plugins", ["mine"]),
        ("checkpoint.num_to_keep=null", "checkpoint", "num_to_keep", None),
    ],
)
def test_open_keys_and_lists_need_no_plus(word, group, field, expected, monkeypatch, capsys):
    config = from_command_line(monkeypatch, capsys, word)
    assert getattr(getattr(config, group) if group else config, field) == expected


def test_a_plus_still_works_for_those_who_write_it(monkeypatch, capsys):
    assert from_command_line(monkeypatch, capsys, "+model.kwargs.depth=2").model.kwargs == {"depth": 2}


def test_resolved_values_are_plain_python(monkeypatch, capsys):
    words = ["run.name=epochs-${train.epochs}", "optim.kwargs.betas=[0.9,0.95]"]
    config = from_command_line(monkeypatch, capsys, *words)
    assert config.run.name == "epochs-30"
    assert type(config.optim.kwargs) is dict
    assert type(config.optim.kwargs["betas"]) is list
    assert type(config.data.mean) is list


def schema_keys(schema, prefix=""):
    for field in dataclasses.fields(schema):
        value = getattr(schema, field.name)
        yield from (
            schema_keys(value, f"{prefix}{field.name}.")
            if dataclasses.is_dataclass(value)
            else (f"{prefix}{field.name}",)
        )


WRONG_VALUES = st.one_of(
    st.sampled_from(
        ["null", "true", "3", "-1", "1.5", "nan", "inf", "word", "''", "[]", "{}", "[[1],[2]]", "{a:{b:1}}"]
    ),
    st.sampled_from(["${run.storage}", "${model}", "${data.mean}", "${nothing}", "[${model}]", "{a:${data.mean}}"]),
    st.recursive(
        st.sampled_from(["null", "true", "0", "2.5", "a"]),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
            st.dictionaries(st.sampled_from(["a", "kind", "1"]), inner, max_size=2).map(
                lambda items: "{" + ",".join(f"{name}:{value}" for name, value in items.items()) + "}"
            ),
        ),
        max_leaves=5,
    ),
)


def overridden(base, word):
    """Return `base` with an override, without composing again; errors are the same as from `run_hydra`."""
    key = word.partition("=")[0]
    word = f"++{word}" if key in set(open_keys(Config)) else word
    cfg = copy.deepcopy(base)
    try:
        ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides([word]), cfg)
    except Exception as error:
        raise ConfigError(explain(error)) from error
    return to_config(cfg)


def wrong(check):
    """Return the text of the ConfigError that `check` raises, or None; other errors propagate."""
    try:
        check()
    except ConfigError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def base():
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        return hydra.compose("config")


@settings(max_examples=200)
@given(key=st.sampled_from(sorted(schema_keys(Config()))), value=WRONG_VALUES)
def test_no_value_of_any_field_gives_another_error_than_a_wrong_config(base, key, value):
    with mock.patch("ftexp.config.checks.scaling.num_local_gpus", return_value=0):
        text = wrong(lambda: validate(overridden(base, f"{key}={value}")))
    assert text is None or key.partition(".")[0] in text
    assert "Cannot" not in (text or "")  # the start of OmegaConf's own messages


def containers(schema, prefix=""):
    """Yield (key, dict or list) of every field of these types."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from containers(hint, f"{prefix}{field.name}.")
        elif get_origin(hint) in (dict, list):
            yield f"{prefix}{field.name}", get_origin(hint)


def test_a_mapping_and_a_list_take_nothing_else(base):
    found = dict(containers(Config))
    assert len(found) > 12
    for key, kind in found.items():
        other = "[1]" if kind is dict else "{a:1}"
        for value in (other, "3", "text", "${run.storage}", "${data.mean}" if kind is dict else "${model}"):
            with pytest.raises(ConfigError, match=re.escape(f"{key}=")):
                overridden(base, f"{key}={value}")


def test_cfg_job_shows_every_field_of_the_schema(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert run_hydra(lambda _: pytest.fail("--cfg runs nothing"), ["--cfg", "job"]) == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    keys = list(schema_keys(Config()))
    assert len(keys) > 60
    for key in keys:
        *parents, name = key.split(".")
        node = shown
        for parent in parents:
            node = node[parent]
        assert name in node, key
    assert to_config(shown) == composed()  # and no other keys: to_config rejects keys that aren't in the schema


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "data"])
def test_a_data_group_sets_only_fields_that_its_source_reads(option, gpus):
    config = (
        composed(f"data={option}", "data.root=here") if "root" in SOURCE_FIELDS[option] else composed(f"data={option}")
    )
    validate(config)
    assert config.data.name == option


def test_a_missing_value_is_asked_for():
    with pytest.raises(ConfigError, match=r"^optim\.lr is not set, and has no default: add optim\.lr=\.\.\.$"):
        validate(dataclasses.replace(composed(), optim=dataclasses.replace(composed().optim, lr="???")))


def test_the_config_folder_exists_wherever_ftexp_lies():
    assert (config_dir() / "config.yaml").is_file()
    assert config_dir().is_absolute()
    assert Path(ftexp.__file__).parent in {config_dir().parent, config_dir().parent / "ftexp"}


def test_recipe_values_that_do_not_fit_what_was_typed_are_fitted_and_named(capsys):
    typed = ["train.epochs=1", "optim.lr=1e-6", "augment.crop=rrc"]
    recipe = ["schedule.warmup_epochs=2", "+train.freeze.backbone=1"]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        config = to_config(hydra.compose("config", [*recipe, *typed]), typed)
    validate(config)
    assert (config.schedule.warmup_epochs, config.schedule.min_lr) == (0.1, 1e-8)
    assert (config.train.freeze, config.augment.pad_px) == ({"backbone": None}, 0)
    assert capsys.readouterr().err == (
        "ftexp: augment.pad_px=0 instead of 1: augment.crop=rrc\n"
        "ftexp: schedule.warmup_epochs=0.1 instead of 2: train.epochs=1\n"
        "ftexp: schedule.min_lr=1e-08 instead of 1e-05: optim.lr=1e-06\n"
        "ftexp: train.freeze.backbone=null instead of 1: train.epochs=1\n"
    )


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("augment.crop=rrc augment.pad_px=1", "augment.pad_px=1 conflicts with augment.crop=rrc"),
        ("schedule.warmup_epochs=2", "schedule.warmup_epochs=2.0 must be below train.epochs=1"),
        ("schedule.min_lr=1", "schedule.min_lr=1.0 must not be above"),
        ("++train.freeze={backbone:1}", "train.freeze.backbone=1 is after the last epoch"),
    ],
)
def test_what_was_typed_is_never_fitted(typed, told):
    overrides = ["train.epochs=1", *typed.split()]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        config = to_config(hydra.compose("config", overrides), overrides)
    with pytest.raises(ConfigError, match=re.escape(told)):
        validate(config)


def test_a_run_with_a_crop_resumes_whether_or_not_its_shift_is_typed():
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        before, now = (
            to_config(hydra.compose("config", typed), typed)
            for typed in (["augment.crop=rrc", "augment.pad_px=0"], ["augment.crop=rrc"])
        )
    assert fingerprint(now) == fingerprint(before)


def test_a_stored_config_and_one_that_fits_stay_as_they_are(capsys):
    assert composed("train.epochs=1").schedule.warmup_epochs == 2
    stored = composed("train.epochs=3")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        assert to_config(hydra.compose("config", ["train.epochs=3"]), ["train.epochs=3"]) == stored
    assert capsys.readouterr().err == ""


def test_a_stored_config_from_before_a_field_has_the_fields_default():
    stored = OmegaConf.structured(composed("distill=none"))
    text = OmegaConf.create(OmegaConf.to_yaml(stored))
    del text["distill"], text["train"]["clip_grad_agc"]
    assert to_config(text) == composed("distill=none")
