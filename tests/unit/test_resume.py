"""Which run a command resumes, and when it refuses to, before anything is started."""

import dataclasses
import json

import pytest
from omegaconf import OmegaConf

import ftexp.cluster.ray_cluster
import ftexp.cluster.resources
import ftexp.driver.run
from ftexp.chaos.strike import damage
from ftexp.checkpoint.manifest import FILES, Manifest
from ftexp.checkpoint.store import CheckpointStore
from ftexp.config.fingerprint import fingerprint
from ftexp.config.masking import masked
from ftexp.config.schema import Config
from ftexp.data.info import DataInfo
from ftexp.driver.resume import (
    changes,
    decoding_as_begun,
    located,
    open_run,
    repeated_samples,
    require_resumable,
    require_same_data,
    require_trained_on,
)
from ftexp.errors import CheckpointError, ConfigError
from ftexp.rundir.names import CHECKPOINTS, CONFIG_FILE, RUN_FILE
from ftexp.rundir.state import RunState
from ftexp.storage.directory import Storage
from ftexp.storage.lease import Lease
from tests.support.configs import composed


@pytest.fixture
def run_dir(tmp_path):
    return Storage.at(str(tmp_path / "runs" / "first"))


def config(**changes):
    made = Config(**changes)
    made.model.name, made.data.name, made.optim.name, made.schedule.name = "resnet18", "digits", "sgd", "cosine"
    made.data.image_size, made.data.mean, made.data.std = 8, [0.5], [0.5]
    made.train.epochs, made.train.global_batch_size, made.optim.lr = 3, 32, 0.1
    return made


def save(run_dir, step, of=None):
    manifest = Manifest(
        name=f"step_{step:08d}.a1", step=step, epoch=0, position=step, attempt=1, world_size=1, metrics={},
        state_versions={}, written_by="run 'x'", written_at=0.0, versions={}, fingerprint=fingerprint(of or config()),
    )  # fmt: skip
    return CheckpointStore(run_dir.child(CHECKPOINTS)).save(
        manifest, {name: lambda stream: stream.write(b"content") for name in FILES}
    )


def note(run_dir, **state):
    fields = {"name": "first", "fingerprint": fingerprint(config()), **state}
    run_dir.write_bytes(RUN_FILE, json.dumps(vars(RunState(**fields))).encode())


def folder_of_a_checkpoint(run_dir):
    save(run_dir, 10)


@pytest.mark.parametrize("leave", [note, folder_of_a_checkpoint], ids=["run.json", "a checkpoint"])
def test_must_and_never_tell_a_run_by_its_record_or_by_its_checkpoints(run_dir, leave):
    for resume in ("auto", "never"):
        require_resumable(config(resume=resume), run_dir)
    with pytest.raises(ConfigError, match=rf"^resume=must, but {run_dir.uri} holds no run: .*run\.name.*resume=auto$"):
        require_resumable(config(resume="must"), run_dir)
    leave(run_dir)
    for resume in ("auto", "must"):
        require_resumable(config(resume=resume), run_dir)
    with pytest.raises(ConfigError, match=rf"^resume=never, but {run_dir.uri} holds a run: .*run\.name.*resume=auto$"):
        require_resumable(config(resume="never"), run_dir)


def test_what_no_run_has_left_is_no_run(run_dir):
    for name in ("notes.txt", f"{CHECKPOINTS}/.tmp-step_00000010.a1/model.pt", ".lock"):
        run_dir.write_bytes(name, b"")
    require_resumable(config(resume="never"), run_dir)
    with pytest.raises(ConfigError, match="resume=must"):
        require_resumable(config(resume="must"), run_dir)


@pytest.mark.parametrize("resume", ["must", "never"])
def test_a_refusal_touches_nothing(tmp_path, monkeypatch, resume):
    run_dir = Storage.at(str(tmp_path), "first")
    if resume == "never":
        save(run_dir, 10)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(ftexp.cluster.resources, "decide_workers", lambda *_, **__: None)
    monkeypatch.setattr(Lease, "take", lambda *_: pytest.fail("a claim was laid"))
    made = composed(f"resume={resume}", "run.name=first", f"run.storage={tmp_path}")
    with pytest.raises(ConfigError, match=f"^resume={resume}, but"):
        ftexp.driver.run.train(made)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_data_is_kept_from_the_root_on_wherever_the_command_was_given(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    seen = []

    def check(made, *_):
        seen.append(made.data.root)
        raise ConfigError("that is enough")

    monkeypatch.setattr(ftexp.driver.run, "_checked", check)
    for root in ("photos", "./photos/", "s3://bucket/photos/", str(tmp_path / "photos")):
        with pytest.raises(ConfigError, match="that is enough"):
            ftexp.driver.run.train(composed("data=image_folder", f"data.root={root}"))
    assert seen == [f"{tmp_path}/photos", f"{tmp_path}/photos", "s3://bucket/photos/", f"{tmp_path}/photos"]


def test_an_empty_folder_opens_as_a_new_run(run_dir):
    state = open_run(config(), run_dir, "first")
    assert (state.name, state.status, state.step, state.fingerprint) == ("first", "running", 0, fingerprint(config()))


@pytest.mark.parametrize("begun", [{}, {"step": 3}, {"farthest_step": 3}, "checkpoint"])
def test_a_run_that_ended_before_its_first_step_may_be_defined_otherwise(run_dir, begun):
    if begun == "checkpoint":
        save(run_dir, 10)
    note(run_dir, status="failed", attempts=2, **({} if begun == "checkpoint" else {"step": 0} | begun))
    other = config(seed=3)
    if begun:
        with pytest.raises(ConfigError, match="holds a run with a different configuration"):
            open_run(other, run_dir, "first")
    else:
        state = open_run(other, run_dir, "first")
        assert (state.status, state.attempts, state.fingerprint) == ("running", 2, fingerprint(other))
        assert (state.failures, state.data) == ([], {})


def test_a_run_that_is_defined_otherwise_is_refused_with_the_differences(run_dir):
    note(run_dir, step=30)
    assert open_run(config(), run_dir, "first").fingerprint == fingerprint(config())
    other = config(seed=3)
    other.optim.lr = 0.2
    with pytest.raises(ConfigError) as refused:
        open_run(other, run_dir, "first")
    first, *changed = str(refused.value).splitlines()
    assert first.startswith(f"{run_dir.uri} holds a run with a different configuration; choose another run.name")
    assert changed == ["optim.lr was 0.1, and is 0.2 now", "seed was 0, and is 3 now"]


FILES_NOW = ("data=image_folder", "data.root=photos", "model=resnet18", "optim=sgd")


def decoding(made):
    return made.data.decoder, made.data.exif_orientation, made.data.background


def test_a_run_from_before_there_were_decoders_goes_on_with_pillow_and_says_so(run_dir, capsys):
    new = composed(*FILES_NOW)
    younger = ("data.decoder", "data.exif_orientation", "data.background")
    recorded = {key: value for key, value in fingerprint(new).items() if key not in younger}
    note(run_dir, fingerprint=recorded, step=3)
    made = decoding_as_begun(new, run_dir, FILES_NOW)
    assert decoding(made) == ("pillow", False, None)
    assert open_run(made, run_dir, "first").step == 3
    keys = "data.decoder, data.exif_orientation, data.background"
    assert capsys.readouterr().err == f"ftexp: the run is older than {keys}: images are decoded as before\n"


@pytest.mark.parametrize("leave", [note, lambda run_dir, **_: save(run_dir, 3)])
def test_auto_is_what_a_run_recorded_in_run_json_or_a_checkpoint(run_dir, leave, capsys):
    leave(run_dir, step=3)
    made = dataclasses.replace(config(), data=dataclasses.replace(config().data, decoder="auto"))
    assert decoding_as_begun(made, run_dir, ["data.decoder=auto"]).data.decoder == "pillow"
    assert capsys.readouterr().err == ""


def test_auto_is_torchvision_for_a_new_run(run_dir, capsys):
    assert decoding(decoding_as_begun(composed(*FILES_NOW), run_dir, FILES_NOW)) == ("torchvision", True, "white")
    assert capsys.readouterr().err == ""


def test_where_run_json_is_lost_the_newest_checkpoint_tells_what_the_run_is(run_dir):
    save(run_dir, 10, of=config(seed=9))
    save(run_dir, 20)
    state = open_run(config(), run_dir, "first")
    assert (state.name, state.status, state.step) == ("first", "running", 0)
    with pytest.raises(ConfigError) as refused:
        open_run(config(seed=9), run_dir, "first")
    assert str(refused.value).splitlines()[1:] == ["seed was 0, and is 9 now"]


def test_where_all_is_lost_but_damaged_checkpoints_the_run_begins_anew(run_dir):
    saved = save(run_dir, 10, of=config(seed=9))
    damage(run_dir.child(CHECKPOINTS, saved.name), "delete_manifest")
    assert open_run(config(), run_dir, "first").step == 0


@pytest.mark.parametrize(
    ("was", "epoch", "step", "max_steps", "now"),
    [
        ("finished", 3, 90, None, "finished"),
        ("finished", 2, 60, None, "running"),  # train.epochs was raised
        ("finished", 1, 30, 30, "finished"),
        ("finished", 1, 30, 31, "running"),  # train.max_steps was raised
        ("finished", 1, 30, None, "running"),  # train.max_steps was removed
        ("finished", 3, 90, 200, "finished"),
        ("failed", 3, 90, None, "running"),
        ("interrupted", 1, 30, 30, "running"),
    ],
)
def test_a_run_is_finished_when_it_said_so_and_nothing_is_left_to_do(run_dir, was, epoch, step, max_steps, now):
    note(run_dir, status=was, epoch=epoch, step=step)
    made = config()
    made.train.max_steps = max_steps
    assert open_run(made, run_dir, "first").status == now


def test_the_start_from_another_run_is_told_as_a_whole_path(tmp_path, run_dir, monkeypatch):
    saved = save(run_dir, 10)
    monkeypatch.chdir(tmp_path)
    new = Storage.at(str(tmp_path), "new")
    assert located("runs/first", new) == run_dir.uri
    assert located(f"runs/first/{CHECKPOINTS}/{saved.name}/", new) == run_dir.child(CHECKPOINTS, saved.name).uri
    with pytest.raises(ConfigError, match=rf"^resume_from=runs: {tmp_path}/runs holds no checkpoint that verifies"):
        located("runs", new)


def test_a_start_from_a_damaged_run_is_refused_with_the_damage(tmp_path, run_dir):
    saved = save(run_dir, 10)
    damage(run_dir.child(CHECKPOINTS, saved.name), "flip_byte")
    with pytest.raises(ConfigError, match=r"step_00000010\.a1: optimizer\.pt differs from its BLAKE3"):
        located(run_dir.uri, Storage.at(str(tmp_path), "new"))


def test_a_start_from_a_damaged_checkpoint_is_refused_before_anything_starts(tmp_path, run_dir):
    saved = save(run_dir, 10)
    damage(run_dir.child(CHECKPOINTS, saved.name), "truncate_checkpoint")
    with pytest.raises((ConfigError, CheckpointError)):
        located(run_dir.child(CHECKPOINTS, saved.name).uri, Storage.at(str(tmp_path), "new"))


def test_a_run_goes_on_though_the_one_it_started_from_is_gone(tmp_path, run_dir, monkeypatch):
    source = Storage.at(str(tmp_path), "source")
    made = composed(f"resume_from={source.uri}", "run.name=first", f"run.storage={run_dir.parent.uri}")
    save(run_dir, 10, of=made)
    note(run_dir, fingerprint=fingerprint(made))
    monkeypatch.setattr(ftexp.cluster.resources, "decide_workers", lambda *_, **__: None)
    monkeypatch.setattr(
        ftexp.cluster.ray_cluster, "prepare_environment", lambda config: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):  # up to the start of Ray
        ftexp.driver.run.train(made)


def test_attempts_are_counted_on_when_run_json_is_lost(run_dir):
    save(run_dir, 10)
    run_dir.child("ledger").write_bytes("a0007.r1.jsonl", b"")
    assert open_run(config(), run_dir, "first").attempts == 7


@pytest.mark.parametrize(("now", "told"), [(99, "99"), (1001, "1,001")])
def test_a_run_goes_on_with_as_many_samples_as_it_began_with(now, told):
    def info(num_train):
        return DataInfo(["a", "b"], 8, 1, [0.5], [0.5], {"train": num_train, "val": 3, "test": 0})

    state = RunState(name="first")
    require_same_data(config(), state, info(now))  # the run starts
    state.data = {"num_samples": {"train": 100, "val": 5}}
    require_same_data(config(), state, info(100))
    with pytest.raises(
        ConfigError, match=f"^data.name=digits has {told} training samples now, and had 100 when the run"
    ):
        require_same_data(config(), state, info(now))


def test_what_a_run_was_not_trained_on_is_not_evaluated_as_its_own():
    for before, now in (("aa", "aa"), ("aa", None), (None, "ab"), (None, None)):
        require_trained_on("data.root=x", {"digest": before}, now)
    with pytest.raises(
        ConfigError, match=r"^data\.root=x doesn't hold the samples any more that the run was trained on"
    ):
        require_trained_on("data.root=x", {"digest": "aa"}, "ab")


@pytest.mark.parametrize("excluded", [{}, {"excluded": None}, {"excluded": []}], ids=str)
def test_a_run_from_before_entries_were_excluded_says_that_its_listing_was_another(excluded):
    data = {"num_samples": {"train": 100}, "digest": "aa", **excluded}
    info = DataInfo(["a", "b"], 8, 1, [0.5], [0.5], {"train": 100}, digest="ab", excluded=[])
    fewer = dataclasses.replace(info, num_samples={"train": 98})
    for check in (
        lambda: require_same_data(config(), RunState(name="first", data=data), info),
        lambda: require_same_data(config(), RunState(name="first", data=data), fewer),
        lambda: require_trained_on("data.root=x", data, "ab"),
    ):
        with pytest.raises(ConfigError) as caught:
            check()
        assert ("an earlier ftexp began the run" in str(caught.value)) == (excluded.get("excluded") is None)


def test_a_run_goes_on_with_the_samples_that_it_began_with_and_not_with_others_as_many():
    def info(digest):
        return DataInfo(["a", "b"], 8, 1, [0.5], [0.5], {"train": 100, "val": 3, "test": 0}, digest=digest)

    state = RunState(name="first", data={"num_samples": {"train": 100}, "digest": "aa"})
    require_same_data(config(), state, info("aa"))
    require_same_data(config(), state, info(None))
    with pytest.raises(ConfigError, match="as many training samples as when the run began, but not the same ones"):
        require_same_data(config(), state, info("ab"))
    state.data["digest"] = None  # as recorded by an older ftexp
    require_same_data(config(), state, info("ab"))


def test_a_resumed_run_says_which_free_settings_changed_and_nothing_of_the_others(run_dir):
    was = config()
    run_dir.write_bytes(CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(masked(was))).encode())
    now = config()
    now.schedule.cooldown_epochs = 57.0
    now.train.epochs, now.scaling.num_workers, now.chaos.kind, now.report.enabled = 60, 1, "kill_worker", False
    assert changes(was, RunState(name="first", epoch=2), run_dir) == []
    assert changes(now, RunState(name="first", epoch=2), run_dir) == [
        "scaling.num_workers was auto, is 1",
        "schedule.cooldown_epochs was 0.0, is 57.0",
        "train.epochs was 3, is 60",
    ]


def test_fewer_epochs_than_were_trained_are_named_whatever_was_stored(run_dir):
    now = config()
    now.train.epochs = 2
    told = "train.epochs=2: the run has trained 3 epochs already, so no more is trained"
    assert changes(now, RunState(name="first", epoch=3), run_dir) == [told]
    run_dir.write_bytes(CONFIG_FILE, b"train: [")
    assert changes(now, RunState(name="first", epoch=3), run_dir) == [told]


def test_a_setting_that_is_younger_than_the_stored_config_has_not_changed(run_dir):
    run_dir.write_bytes(CONFIG_FILE, b"train: {epochs: 5}")
    assert changes(config(), RunState(name="first"), run_dir) == ["train.epochs was 5, is 3"]


@pytest.mark.parametrize(("samples", "told"), [(32, None), (31, "31 training samples"), (10, "up to 4 times")])
def test_a_batch_larger_than_the_training_split_is_named(samples, told):
    info = DataInfo([], 8, 1, [0.5], [0.5], {"train": samples, "val": 1, "test": 1})
    found = repeated_samples(config(), info)
    assert found is None if told is None else told in found


def recorded(made):
    """Return a config's fingerprint as a run's record and its manifests hold it."""
    return json.loads(json.dumps(fingerprint(made)))


PHOTOS = ["data=image_folder", "data.root=photos", "data.image_size=32"]
BROUGHT = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "squash"}


def prepared(monkeypatch, run_dir, *words, data=PHOTOS):
    """Return the data config after the checks before Ray, for pretrained weights that bring BROUGHT."""
    monkeypatch.setattr(ftexp.driver.run, "_check_weights", lambda made: (BROUGHT, "timm's config of x"))
    overrides = ["model=vit", "model.pretrained=true", *data, *words]
    return ftexp.driver.run._checked(composed(*overrides), overrides, run_dir).data


def test_pretrained_weights_set_the_preprocessing_that_is_not_typed(run_dir, monkeypatch, capsys):
    data = prepared(monkeypatch, run_dir, "data.mean=[0.2,0.2,0.2]", "data.interpolation=bicubic")
    assert (data.mean, data.std, data.interpolation) == ([0.2] * 3, [0.5] * 3, "bicubic")
    assert (data.crop_pct, data.crop_mode) == (0.9, "squash")
    assert capsys.readouterr().err == (
        "ftexp: data.std=[0.5, 0.5, 0.5] instead of [0.229, 0.224, 0.225], data.crop_pct=0.9 instead of None, "
        "data.crop_mode=squash instead of center: timm's config of x\n"
    )


def test_images_in_memory_take_no_more_than_mean_and_std_of_the_weights(run_dir, monkeypatch):
    monkeypatch.setitem(BROUGHT, "mean", [0.7])
    made = prepared(monkeypatch, run_dir, data=["data=digits"])
    kept = composed("model=vit", "data=digits").data
    assert made == dataclasses.replace(kept, mean=[0.7], std=BROUGHT["std"])


def test_a_config_from_elsewhere_keeps_its_preprocessing(run_dir, monkeypatch):
    monkeypatch.setattr(ftexp.driver.run, "_check_weights", lambda made: (BROUGHT, "timm's config of x"))
    made = composed("model=vit", "model.pretrained=true")
    assert ftexp.driver.run._checked(made, None, run_dir) == made


def test_weights_are_not_looked_at_without_pretrained(run_dir, monkeypatch):
    monkeypatch.setattr(ftexp.driver.run, "_check_weights", lambda made: pytest.fail("they were"))
    made = composed("model=vit")
    assert ftexp.driver.run._checked(made, [], run_dir) == made


@pytest.mark.parametrize("leave", ["run.json", "a checkpoint"])
def test_a_run_begun_before_weights_brought_their_preprocessing_resumes_with_its_own(run_dir, monkeypatch, leave):
    """Such a run recorded the data's mean and std, but neither crop nor interpolation."""
    made = composed("model=vit", "model.pretrained=true", *PHOTOS)
    before = recorded(made)
    for name in ("crop_pct", "crop_mode", "interpolation"):
        del before[f"data.{name}"]
    if leave == "run.json":
        note(run_dir, fingerprint=before, step=3)
    else:
        save(run_dir, 10, of=made)
    data = prepared(monkeypatch, run_dir)
    assert data == made.data
    again = dataclasses.replace(made, data=data)
    assert open_run(again, run_dir, "first").name == "first"
    with pytest.raises(ConfigError, match=r"data\.mean was \[0\.485, .*\], and is \[0\.5, 0\.5, 0\.5\] now"):
        open_run(
            dataclasses.replace(made, data=prepared(monkeypatch, run_dir, "data.mean=[0.5,0.5,0.5]")), run_dir, "first"
        )


def test_a_run_of_pretrained_weights_resumes_with_the_preprocessing_they_brought(run_dir, monkeypatch):
    data = prepared(monkeypatch, run_dir)
    begun = dataclasses.replace(composed("model=vit", "model.pretrained=true", *PHOTOS), data=data)
    note(run_dir, fingerprint=recorded(begun), step=3)
    monkeypatch.setitem(BROUGHT, "mean", [0.7] * 3)  # as if a later timm had other values
    assert prepared(monkeypatch, run_dir) == data
    note(run_dir, fingerprint=recorded(begun))  # the run ended before its first step
    assert prepared(monkeypatch, run_dir).mean == [0.7] * 3
