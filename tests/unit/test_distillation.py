"""The teacher and its loss term: values as in timm, the same gradient for any number of workers, and its state."""

import dataclasses
import json

import pytest
import timm
import timm.task
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ftexp.checkpoint.build import state_context
from ftexp.checkpoint.compare import tree_differences
from ftexp.checkpoint.reading import read_weights
from ftexp.checkpoint.registry import ExtraState
from ftexp.config.checks.validate import validate
from ftexp.config.fingerprint import differences, fingerprint
from ftexp.config.schema import AugmentConfig, DistillConfig, EmaConfig, ModelConfig, OptimConfig
from ftexp.data.info import DataInfo
from ftexp.data.plan import ShardPlan
from ftexp.driver import run
from ftexp.driver.teacher import with_teacher
from ftexp.errors import ConfigError
from ftexp.export.formats import safetensors
from ftexp.job.stopwatch import TEACHER
from ftexp.model.build import timm_arguments
from ftexp.model.distillation import Distiller, term
from ftexp.model.ema import WeightsEMA
from ftexp.model.teacher import Teacher, build_teacher, num_features
from ftexp.model.teacher_spec import TeacherSpec, require_same_classes
from ftexp.storage.directory import Storage
from ftexp.worker.loop import advance
from ftexp.worker.step import settle_gradient_order, thaw, train_step
from tests.support.configs import composed
from tests.support.jobs import CPU, SMALL_VIT, make_job, train
from tests.support.saved_runs import CHECKPOINT, CLASSES, random_weights, saved_run

TEACHER_MODEL = ModelConfig(name="test_resnet")  # 96 features; the small ViT has 32
DEIT = ModelConfig(
    name="deit_tiny_distilled_patch16_224", kwargs={"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
)
INFO = DataInfo(["dark", "light"], 8, 1, [0.5], [0.25], {})
KINDS = {
    "logits": {"kind": "logits", "temperature": 3.0},
    "features": {"kind": "features"},
    "token": {"kind": "token", "temperature": 2.0},
    "hard": {"kind": "token", "hard": True},
}
NO_AUTOCAST = torch.autocast("cpu", enabled=False)


def spec_of(model=TEACHER_MODEL, **changes):
    given = {"class_names": None, "num_classes": 2, "image_size": 8, "channels": 1, "mean": [0.3], "std": [0.4]}
    return TeacherSpec(model=model, source="a test", **{**given, **changes})


def teacher_of(info=INFO, **changes):
    torch.manual_seed(3)
    names = changes.get("class_names") or info.class_names
    model = timm.create_model(TEACHER_MODEL.name, in_chans=info.channels, num_classes=len(names))
    return Teacher(random_weights(model), spec_of(**changes), info, NO_AUTOCAST)


def student_of(kind):
    return DEIT if kind in ("token", "hard") else SMALL_VIT


def taught_job(kind, alpha=0.3, **switches):
    distill = DistillConfig(teacher="x", alpha=alpha, **KINDS[kind])
    return make_job(student_of(kind), distill=distill, teacher=teacher_of(), **switches)


# --- the loss term


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_samples_and_its_gradient_are_those_of_timms_task(kind):
    job = taught_job(kind)
    (micro,) = next(job.data.feed.from_position(0)).micro_batches
    model, teacher = job.learner.model, teacher_of().model
    model.pretrained_cfg = {"mean": (0.5,), "std": (0.25,)}
    teacher.pretrained_cfg = {"mean": (0.3,), "std": (0.4,)}
    task = {"logits": "LogitDistillationTask", "features": "FeatureDistillationTask"}.get(kind, "TokenDistillationTask")
    given = {"temperature": KINDS[kind].get("temperature", 1.0)} if kind != "features" else {}
    given |= {"distill_type": "hard" if kind == "hard" else "soft"} if task.startswith("Token") else {}
    theirs = getattr(timm.task, task)(
        model, timm.task.DistillationTeacher(teacher), torch.nn.CrossEntropyLoss(),
        distill_loss_weight=0.3, task_loss_weight=0.7, verbose=False, **given,
    )  # fmt: skip
    if kind == "features":
        theirs.trainable_module.projection.load_state_dict(job.learner.distiller.projection.state_dict())
    theirs.train()
    expected = theirs(micro.images, micro.labels)["loss"]
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    answers = job.learner.distiller.answers(micro.images)
    logits, compared = job.learner.forward(micro.images)
    losses = job.learner.distiller.losses(job.learner.loss(logits, micro.labels), compared, answers)
    assert losses.shape == (24,)
    torch.testing.assert_close(losses.mean(), expected)
    for ours, gradient in zip(torch.autograd.grad(losses.mean(), list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_global_mean_for_any_number_of_workers_and_micro_batches(kind):
    config = DistillConfig(teacher="x", alpha=0.6, **KINDS[kind])
    generator = torch.Generator().manual_seed(1)
    images, answers = (torch.randn(23, width, generator=generator).double() for width in (7, 5))
    labels = torch.arange(23) % 5
    head = torch.randn(7, 5, generator=generator).double().requires_grad_()

    def losses(rows):
        compared = images[rows] @ head
        own = F.cross_entropy(compared, labels[rows], reduction="none")
        return (1 - config.alpha) * own + config.alpha * term(config, compared, answers[rows])

    (alone,) = torch.autograd.grad(losses(torch.arange(23)).mean(), head)
    for accumulate, world in ((3, 1), (1, 2), (2, 5)):
        total = torch.zeros_like(head)
        for rank in range(world):
            for share in ShardPlan(23, accumulate, 23, rank, world).micro_shares(0, 23):
                rows = torch.from_numpy(share.positions)
                weights = (torch.arange(len(rows)) < share.num_counted).double() * (world / 23)
                total += torch.autograd.grad((losses(rows) * weights).sum(), head)[0] / world  # as DDP averages
        torch.testing.assert_close(total, alone, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_are_those_of_the_whole_batch(kind):
    gradients = []
    for accumulate_steps in (1, 4):
        job = taught_job(kind, optim=OptimConfig(name="sgd", lr=1e-9), accumulate_steps=accumulate_steps)
        train_step(job, next(job.data.feed.from_position(0)))
        gradients.append([parameter.grad for parameter in job.learner.trainable.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_of_a_teacher_alone_comes_closer_to_it(kind):
    job = taught_job(kind, alpha=1.0)
    distiller = job.learner.distiller
    (micro,) = next(job.data.feed.from_position(0)).micro_batches

    def distance():
        with torch.no_grad():
            compared = job.learner.forward(micro.images)[1]
            return term(job.config.distill, compared, distiller.answers(micro.images)).mean().item()

    before, frozen = distance(), [value.clone() for value in distiller._teacher.model.state_dict().values()]
    train(job)
    assert distance() < 0.9 * before
    assert all(torch.equal(*pair) for pair in zip(frozen, distiller._teacher.model.state_dict().values(), strict=True))


# --- the teacher's input


def test_a_teacher_sees_images_normalised_and_scaled_as_its_own_were():
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = timm.task.DistillationTeacher(teacher_of().model)
    theirs.mean_kd, theirs.std_kd = torch.tensor(0.3).view(1, 1, 1, 1), torch.tensor(0.4).view(1, 1, 1, 1)
    constants = torch.tensor(0.5).view(1, 1, 1, 1), torch.tensor(0.25).view(1, 1, 1, 1)
    expected = theirs.normalize_input(images, *constants)
    assert torch.equal(teacher_of().prepared(images), expected)
    assert teacher_of(mean=INFO.mean, std=INFO.std).prepared(images) is images
    ramp = torch.arange(8.0).repeat(1, 1, 8, 1)
    larger = teacher_of(image_size=32, mean=INFO.mean, std=INFO.std).prepared(ramp)
    assert larger.shape == (1, 1, 32, 32)
    torch.testing.assert_close(larger[0, 0, 5, 8:24], (torch.arange(8, 24) + 0.5) / 4 - 0.5)


def test_a_teachers_logits_come_in_the_students_order_of_classes():
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    same, swapped = teacher_of(class_names=["dark", "light"]), teacher_of(class_names=["light", "dark"])
    assert torch.equal(swapped(images), same(images).flip(1))
    assert not same(images).requires_grad


def test_a_teachers_time_is_told_apart_and_only_where_there_is_one():
    for job, told in ((taught_job("logits"), True), (make_job(), False)):
        fed = job.stopwatch.feeding(job.data.feed.from_position(0), lambda job=job: job.progress.position)
        for batch in fed:
            train_step(job, batch)
            advance(job, batch)
        assert (job.stopwatch.take(job.progress.position).get(f"{TEACHER}_ms", 0) > 0) is told


# --- state


STATES = ["progress", "scheduler", "scaler", "ema", "distill", "rng", "best"]
FULL = {
    "ema": EmaConfig(decay=0.9),
    "augment": AugmentConfig(mixup_alpha=0.8, erase_prob=0.5, erase_mode="pixel"),
    "precision": "bf16",
    "clip_grad_norm": 1.0,
    "accumulate_steps": 2,
    "freeze": {"blocks.0": 1},
}


def parts_of(job):
    held = (job.learner.model, job.learner.optimizer, ExtraState(STATES, state_context(job)))
    return torch.utils._pytree.tree_map(
        lambda value: value.clone() if isinstance(value, torch.Tensor) else value,
        [each.state_dict() for each in held],
    )


def finish(job):
    for batch in job.data.feed.from_position(job.progress.position):
        thaw(job)
        train_step(job, batch)
        advance(job, batch)
    return parts_of(job)


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_changes_no_bit_of_a_run_that_distils(kind):
    clean = taught_job(kind, **FULL)
    batches = clean.data.feed.from_position(0)
    for _ in range(5):
        batch = next(batches)
        thaw(clean)
        train_step(clean, batch)
        advance(clean, batch)
    checkpoint = parts_of(clean)
    other = taught_job(kind, **FULL)
    settle_gradient_order(dataclasses.replace(other, group=dataclasses.replace(other.group, world_size=3)))
    model, optimizer, extra = torch.utils._pytree.tree_map(
        lambda value: value.clone() if isinstance(value, torch.Tensor) else value, checkpoint
    )
    other.learner.model.load_state_dict(model)
    other.learner.optimizer.load_state_dict(optimizer)
    states = ExtraState(STATES, state_context(other))
    states.load(extra, states.versions(), "run 'x'")
    torch.rand(7)
    ours, theirs = finish(clean), finish(other)
    assert list(tree_differences(ours, theirs)) == []
    assert bool(ours[2]["distill"]) is (kind == "features")
    assert set(ours[0]) == set(timm.create_model(**timm_arguments(student_of(kind), INFO)).state_dict())


def test_a_projection_is_drawn_from_its_seed_alone_and_left_out_where_widths_are_the_same():
    config, model = DistillConfig(teacher="x", kind="features"), make_job().learner.model
    drawn, teacher = [], teacher_of()
    for seed in (5, 5, 6):
        torch.rand(3)
        before = torch.get_rng_state()
        drawn.append(Distiller(config, model, teacher, seed).projection.weight)
        assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0].shape == (96, 32)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    alike = Teacher(make_job().learner.model, spec_of(), INFO, NO_AUTOCAST)
    assert Distiller(config, model, alike, 5).projection is None
    assert num_features(model) == 32


# --- the source of a teacher


def taught(*overrides):
    small = ["data=synthetic", "data.image_size=8", "data.mean=[0.4,0.4,0.4]", "data.std=[0.25,0.25,0.25]"]
    return composed("augment=none", "model.name=test_vit2", *small, *overrides)


def found(run_dir, *overrides):
    return with_teacher(taught(*overrides), Storage.at(str(run_dir)))


def teacher_run(directory, *overrides, **changes):
    return saved_run(directory, "model.name=test_resnet", "data=synthetic", *overrides, **changes)


def test_the_teacher_is_the_runs_checkpoint_with_its_preprocessing(tmp_path):
    run = teacher_run(tmp_path / "teacher", size=16)
    config, spec = found(tmp_path / "student", f"distill.teacher={tmp_path / 'teacher'}")
    assert (config.distill.teacher, config.distill.checkpoint) == (run.storage.uri, CHECKPOINT)
    assert (spec.image_size, spec.mean, spec.class_names) == (16, [0.4] * 3, CLASSES)
    built = build_teacher(spec, run.info, "logits", CPU)
    weights = run.model(read_weights(run.store, run.store.by_name(CHECKPOINT), "raw")).state_dict()
    assert list(tree_differences(built.state_dict(), weights)) == []


def test_the_average_of_a_runs_weights_may_teach(tmp_path):
    average = random_weights(timm.create_model("test_resnet", num_classes=3)).state_dict()
    average = {name: value * 2 for name, value in average.items()}
    run = teacher_run(tmp_path / "teacher", "ema.decay=0.9", average=average)
    _, spec = found(tmp_path / "student", f"distill.teacher={tmp_path / 'teacher'}", "distill.weights=ema")
    assert list(tree_differences(build_teacher(spec, run.info, "logits", CPU).state_dict(), average)) == []


def test_best_is_the_checkpoint_that_a_run_began_with_and_another_one_is_refused(tmp_path):
    run = teacher_run(tmp_path / "teacher")
    given = f"distill.teacher={tmp_path / 'teacher'}"
    begun, _ = found(tmp_path / "student", given)
    storage = Storage.at(str(tmp_path / "student"))
    storage.write_bytes("run.json", json.dumps({"name": "x", "fingerprint": fingerprint(begun)}).encode())
    first = run.store.by_name(CHECKPOINT)
    parts = run.store.read(first)
    better = dataclasses.replace(first, name="step_00000009.a1", step=9, metrics={"val_accuracy": 0.9}, files={})
    changed = {**parts, "model.pt": parts["model.pt"] + b"x"}
    run.store.save(better, {name: lambda stream, part=part: stream.write(part) for name, part in changed.items()})
    again, _ = found(tmp_path / "student", given)
    assert again.distill.checkpoint == CHECKPOINT
    differences(fingerprint(begun), fingerprint(again), "here")
    named, _ = found(tmp_path / "student", given, f"distill.checkpoint={better.name}")
    with pytest.raises(ConfigError, match=r"distill\.sha256 was"):
        differences(fingerprint(begun), fingerprint(named), "here")
    Storage.at(str(tmp_path / "teacher")).move_to(Storage.at(str(tmp_path / "moved")))
    moved, _ = found(tmp_path / "student", f"distill.teacher={tmp_path / 'moved'}")
    differences(fingerprint(begun), fingerprint(moved), "here")


def test_a_teacher_of_the_same_weights_that_is_prepared_otherwise_is_refused_but_for_older_runs(tmp_path):
    run = teacher_run(tmp_path / "teacher")
    given, storage = f"distill.teacher={tmp_path / 'teacher'}", Storage.at(str(tmp_path / "student"))
    begun = fingerprint(found(tmp_path / "student", given)[0])
    storage.write_bytes("run.json", json.dumps({"name": "x", "fingerprint": begun}).encode())
    record = json.loads(run.storage.read_bytes("run.json"))
    for field, value in (("mean", [0.5] * 3), ("image_size", 16), ("class_names", ["ant", "cow", "bee"])):
        changed = {**record, "data": {**record["data"], field: value}}
        run.storage.write_bytes("run.json", json.dumps(changed).encode())
        with pytest.raises(ConfigError, match=r"distill\.spec_sha256 was"):
            differences(begun, fingerprint(found(tmp_path / "student", given)[0]), "here")
    with pytest.raises(ConfigError, match=r"^distill\.spec_sha256=abc, and that of distill\.teacher="):
        found(tmp_path / "other", given, "distill.spec_sha256=abc")
    older = {key: value for key, value in begun.items() if key != "distill.spec_sha256"}
    storage.write_bytes("run.json", json.dumps({"name": "x", "fingerprint": older}).encode())
    differences(older, fingerprint(found(tmp_path / "student", given)[0]), "here")


def test_a_finished_run_is_printed_again_without_its_teacher_and_trains_on_with_it_only(tmp_path, capsys):
    teacher_run(tmp_path / "teacher")
    where = ["run.name=student", f"run.storage={tmp_path}", "train.epochs=3"]
    given = [f"distill.teacher={tmp_path / 'teacher'}", *where]
    content = {"name": "student", "fingerprint": fingerprint(found(tmp_path / "student", *given)[0]), "epoch": 3}
    content |= {"status": "finished", "step": 9, "metrics": {"last": {"val_loss": 0.5}, "best": {}}}
    Storage.at(str(tmp_path / "student")).write_bytes("run.json", json.dumps(content).encode())
    Storage.at(str(tmp_path / "teacher")).move_to(Storage.at(str(tmp_path / "moved")))
    assert run.train(taught(*given)) == {"val_loss": 0.5}
    assert "finished" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"^distill\.teacher=.*teacher: "):
        run.train(taught(*given, "train.epochs=4"))
    with pytest.raises(ConfigError, match=r"^distill\.pretrained=.*/no\.pt: no such file"):
        found(tmp_path / "other", "distill.teacher=resnet18", "distill.pretrained=no.pt")


def weights_file(directory, name="test_resnet", num_classes=3, size=16):
    directory.mkdir()
    info = DataInfo(CLASSES[:num_classes], size, 3, [0.1] * 3, [0.2] * 3, {})
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes)
    safetensors(model, info, {"arguments": {"model_name": name, "num_classes": num_classes}}, directory)
    return directory / "model.safetensors", model


def test_a_file_teaches_with_the_config_beside_it_or_with_a_timm_name(tmp_path):
    path, model = weights_file(tmp_path / "exported")
    config, spec = found(tmp_path / "student", f"distill.teacher={path}")
    assert (spec.image_size, spec.mean, spec.std, spec.class_names) == (16, [0.1] * 3, [0.2] * 3, CLASSES)
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    _, other = found(
        tmp_path / "student", "distill.teacher=test_resnet", f"distill.pretrained={tmp_path / 'bare.safetensors'}"
    )
    assert (other.num_classes, other.class_names) == (3, None)
    info = DataInfo(CLASSES, 8, 3, [0.4] * 3, [0.25] * 3, {})
    for each in (spec, other):
        built = build_teacher(each, info, "logits", CPU)
        assert list(tree_differences(built.state_dict(), model.state_dict())) == []
    assert fingerprint(config)["distill.sha256"] == config.distill.sha256 is not None
    save_file({name: value + 1 for name, value in model.state_dict().items()}, tmp_path / "bare.safetensors")
    with pytest.raises(ConfigError, match=r"has changed since the run began"):
        build_teacher(other, info, "logits", CPU)


def test_a_hubs_teacher_is_known_by_its_name_and_not_fetched(tmp_path):
    config, spec = found(tmp_path, "distill.teacher=resnet18.a1_in1k", "distill.kind=features", "model.name=test_vit2")
    assert (config.distill.sha256, spec.num_classes) == (None, 1000)
    assert spec.mean == list(timm.get_pretrained_cfg("resnet18.a1_in1k").mean)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            "distill.kind=token",
            "distill.kind=token: model.name=test_vit2 has no distillation token; choose one with it",
        ),
        ("data.channels=1 data.mean=[0.5] data.std=[0.5]", "takes 3 channels, but data.channels=1: choose a teacher"),
        ("distill.checkpoint=step_1", "has no checkpoint 'step_1' with a readable manifest. Available: step_00000007"),
        ("distill.weights=ema", "distill.weights=ema, but the run had no EMA"),
        ("distill.sha256=abc", "distill.sha256=abc, and that of distill.teacher="),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_a_line(tmp_path, overrides, told):
    teacher_run(tmp_path / "teacher")
    with pytest.raises(ConfigError) as caught:
        found(tmp_path / "student", f"distill.teacher={tmp_path / 'teacher'}", *overrides.split())
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_make_a_whole_teacher_are_refused(tmp_path):
    path, model = weights_file(tmp_path / "exported")
    part = {name: value for name, value in model.state_dict().items() if not name.startswith("layer2")}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(ConfigError, match=r"^distill\.teacher=.*part.safetensors: \d+ of its tensors are missing"):
        found(tmp_path, "distill.teacher=test_resnet", f"distill.pretrained={tmp_path / 'part.safetensors'}")
    (path.parent / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json of timm's next to it.*distill\.teacher=<timm name>"):
        found(tmp_path, f"distill.teacher={path}")


def test_a_teacher_of_other_classes_is_refused_but_for_its_features():
    info = DataInfo(["ant", "bee", "dog"], 8, 3, [0.4], [0.2], {})
    with pytest.raises(ConfigError, match=r"has other classes than the data: it lacks dog; the data lack cow; choo"):
        require_same_classes(spec_of(class_names=CLASSES), info, "logits")
    with pytest.raises(ConfigError, match=r"has 1,000 classes, but the data have 3: choose a teacher of these"):
        require_same_classes(spec_of(num_classes=1000), info, "token")
    require_same_classes(spec_of(class_names=CLASSES), info, "features")
    require_same_classes(spec_of(class_names=["dog", "bee", "ant"], num_classes=3), info, "logits")


def test_the_average_of_a_student_is_of_the_model_alone():
    job = taught_job("features", ema=EmaConfig(decay=0.9))
    assert isinstance(job.learner.ema, WeightsEMA)
    assert set(job.learner.ema.model.state_dict()) == set(job.learner.model.state_dict())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("distill.alpha=0.3", r"^distill\.alpha=0\.3 needs distill\.teacher: remove it"),
        ("distill.teacher=resnt18", r"^distill\.teacher=resnt18 is not a run, a weights file.*'resnet18'"),
        (
            "distill.teacher=resnet18 distill.checkpoint=latest",
            r"^distill\.checkpoint=latest is only for a teacher tha",
        ),
        ("distill.teacher=resnet18 distill.hard=true", r"^distill\.hard=True needs distill\.kind=token"),
        ("distill=features distill.teacher=resnet18 distill.temperature=2", r"^distill\.temperature=2.0 needs"),
        ("distill.teacher=resnet18 augment.splits=3 loss=jsd", r"augment\.splits=3: distillation does not support"),
        (
            "distill.teacher=resnet18 data.task=multi_label loss=bce",
            r"distill\.kind=logits compares distributions",
        ),
        ("distill.teacher=resnet18 ++distill.kwargs.in_chans=1", r"^distill\.kwargs\.in_chans=1 follows the data"),
    ],
)
def test_what_contradicts_a_teacher_is_refused_before_anything_is_imported(words, told):
    with pytest.raises(ConfigError, match=told):
        validate(composed(*words.split()))
