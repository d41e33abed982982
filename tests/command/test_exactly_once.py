"""Kills, corruption and resizing: the same samples drive the same updates, and the drill detects when they don't."""

import functools
import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ftexp.checkpoint.compare import load
from ftexp.checkpoint.staging import writer
from ftexp.checkpoint.store import CheckpointStore, locate
from ftexp.cli.trained_run import load_run_config
from ftexp.drill.report import compare
from ftexp.rundir.sample_ledger import problems, read_updates
from ftexp.storage.directory import Storage
from ftexp.storage.lease import LOCK_FILE
from tests.support.command import RunFolder
from tests.support.reference import BATCH, OPTIONS, STATES, STEPS

DRILL_STEPS, DRILL_BATCH = 16, 62  # 4.95 steps per epoch; 31 samples per rank, in micro-batches of 16 and 15
RECIPE = [
    "data=synthetic", "data.num_samples=396", "data.image_size=8", "data.val_fraction=0.1", "data.test_fraction=0.13",
    "model.kwargs.depth=2", "model.drop_path_rate=0.1", "augment.rand_augment=rand-m5-mstd0.5-inc1",
    "augment.erase_prob=0.5",
    "augment.erase_mode=pixel", "augment.mixup_alpha=0.2", "augment.cutmix_alpha=1.0", "augment.mix_mode=elem",
    "augment.mixup_off_epoch=2", "augment.repeats=3", "data.sampling=balanced",
    "train.label_smoothing=0.1", "train.clip_grad_norm=1.0", "train.precision=fp16", "train.accumulate_steps=2",
    "train.freeze={blocks.0: 1, patch_embed: 2, pos_embed: null}", "optim.layer_decay=0.8",
    "ema.decay=0.9", "ema.use_warmup=true", f"train.global_batch_size={DRILL_BATCH}",
]  # fmt: skip


@contextmanager
def changed(path, change):
    """Replace a file's lines by `change(lines)`; restore them on exit."""
    before = path.read_text()
    path.write_text("".join(f"{line}\n" for line in change(before.splitlines())))
    yield
    path.write_text(before)


@pytest.mark.timeout(600)
def test_a_drill_with_the_full_recipe_on_tells_a_run_that_survived_its_faults_from_one_that_did_not(ftexp, tmp_path):
    faults = ["kill_worker", "truncate_checkpoint", "kill_driver"]  # at the first thawing, between both, after both
    words = [*faults[:2], f"{{kind: kill_driver, step: {DRILL_STEPS - 1}}}"]  # leaves time for a slow checkpoint
    command = ftexp(
        *RECIPE, "plugins=[obedient]", f"checkpoint.extra_state=[ema,{STATES}]", f"drill.steps={DRILL_STEPS}",
        f"drill.faults=[{','.join(words)}]", f"run.storage={tmp_path / 'runs'}", module="drill",
    )  # fmt: skip
    command.wait_for("clean ")  # every wait has its own deadline, and the drill runs three commands
    (tmp_path / "slow").touch()  # before the next command's first step, so that checkpoints keep up with steps
    command.wait_for("running the same command again")
    assert command.wait() == 0, command.output
    (directory,) = (tmp_path / "runs").iterdir()
    table = [line.split() for line in command.lines if line.split()[-1:] == ["yes"]]
    assert [row[0] for row in table] == faults
    assert "the command was killed and run again" in command.output
    assert command.lines[-1].startswith("bitwise identical: model.pt, optimizer.pt, extra_state.pt")
    assert f"{DRILL_STEPS * DRILL_BATCH:,} samples that drove the updates" in command.lines[-1]
    log = (directory / "clean.log").read_text()
    assert re.search(r"^epoch    \d+ draws, each in 3 versions .* \(data.sampling=balanced\): ", log, re.MULTILINE)
    report = json.loads((directory / "drill.json").read_text())
    assert report["differences"] == []
    steps = [row["step"] for row in report["rows"]]
    assert [row["identical"] for row in report["rows"]] == [True, True, True]
    assert_the_recipe_was_on(RunFolder(directory / "clean"), RunFolder(directory / "broken"))

    # a drill that never finds a difference would print the same, so it must find these
    first, second = Storage.at(str(directory), "clean"), Storage.at(str(directory), "broken")
    compared = functools.partial(compare, config=load_run_config(first))
    assert compared(first, second, DRILL_BATCH, 0).identical
    at = steps[1] + 2  # after the second fault and before the third

    def one_loss_is_another(lines):
        points = [json.loads(line) for line in lines]
        for point in points:
            if (point["split"], point["step"]) == ("train", at):
                point["train_loss"] += 1e-12
        return map(json.dumps, points)

    with changed(directory / "broken" / "metrics.jsonl", one_loss_is_another):
        report = compared(first, second, DRILL_BATCH, 0)
    assert report.differences[0].startswith(f"step {at}: train_loss is ")
    assert len(report.differences) == 1
    assert [row.identical for row in report.rows] == [True, False, False]
    assert report.verdict.startswith("NOT identical; the first differences:\nstep")

    attempt = next(update.attempt for update in read_updates(second) if update.step == at)
    ledger = directory / "broken" / "ledger" / f"a{attempt:04d}.r1.jsonl"
    with changed(ledger, lambda lines: [line for line in lines if json.loads(line)["step"] != at]):
        report = compared(first, second, DRILL_BATCH, 0)
    assert f"step {at}: driven by other samples than in the clean run" in report.differences
    assert not report.rows[1].identical

    store, manifest = locate(second.uri)
    parts = load(store, manifest)
    name, tensor = next((name, tensor) for name, tensor in parts["model.pt"].items() if tensor.dtype == torch.float32)
    tensor.view(-1)[0] += 1e-3
    forged = type(manifest)(**{**vars(manifest), "name": f"step_{manifest.step:08d}.a9", "attempt": 9})
    store.save(forged, {file: writer(part) for file, part in parts.items()})
    report = compared(first, second, DRILL_BATCH, 0)
    assert [text.partition(",")[0] for text in report.differences] == [
        f"model.pt/{name}: 1 of {tensor.numel()} values differ"
    ]
    assert [row.identical for row in report.rows] == [True, True, False]
    store.storage.child(forged.name).delete()

    report = compared(first, second, DRILL_BATCH, 1)
    assert report.differences[0].startswith("the run with faults ended with exit code 1")
    assert compared(first, second, DRILL_BATCH, 0).identical


def assert_the_recipe_was_on(clean, broken):
    assert [event["epoch"] for event in clean.events("thawed")] == [1, 2]
    restored = [event["step"] for event in broken.events("restored")]
    assert len(restored) >= 2, "the first fault may have come before the first save"
    assert restored[-1] >= 10, "after the second part was unfrozen"
    newest = broken.path / "checkpoints" / broken.checkpoints[-1]
    states, weights = (torch.load(newest / name, weights_only=True) for name in ("extra_state.pt", "model.pt"))
    assert states["scaler"]["scale"] > 1
    assert states["ema"]["weights"].keys() == weights.keys()
    assert {"test_accuracy", "test_accuracy_ema", "val_loss_ema"} <= broken.record["metrics"]["last"].keys()


DAMAGE = [  # (kind, number of newest checkpoints, start of the reported reason)
    (kind, count, reason)
    for kind, reason in (
        ("truncate_checkpoint", "model.pt has"),
        ("flip_byte", "optimizer.pt differs from its BLAKE3"),
        ("delete_manifest", "it has no manifest"),
        ("delete_checkpoint", "it is gone"),
    )
    for count in ((1, 2) if kind == "flip_byte" else (1,))
]


@pytest.mark.timeout(900)
def test_each_damage_to_checkpoints_and_each_fault_of_a_worker_changes_nothing(ftexp, run_folder, clean_run, pictures):
    kinds = [(kind, count) for kind, count, _ in DAMAGE] + [(kind, 1) for kind in ("hang", "raise", "nonfinite")]
    faults = [f"{{kind: {kind}, count: {count}, step: {9 * number + 9}}}" for number, (kind, count) in enumerate(kinds)]
    command = ftexp(
        *OPTIONS, *pictures, "data.feed=streaming",
        f"chaos.faults=[{', '.join(faults)}]", "checkpoint.every_epochs=null",
        "checkpoint.every_steps=1", "checkpoint.num_to_keep=4", "failure.max_failures=-1", "failure.hang_timeout_s=15",
        "run.name=damaged",
    )  # fmt: skip
    command.wait_until(lambda: len(run_folder("damaged").events("failure")) >= 4)
    assert command.wait() == 0, command.output
    run = run_folder("damaged")
    report = compare(clean_run.storage, run.storage, BATCH, 0)
    assert report.differences == []
    assert [row.fault for row in report.rows] == [kind for kind, _ in kinds]

    events = run.events()
    struck = [number for number, event in enumerate(events) if event["event"] == "chaos"]
    standing = [event["checkpoint"] for event in events[: struck[0]] if event["event"] == "checkpoint_saved"]
    for (kind, count, reason), start, end in zip(DAMAGE, struck, struck[1:], strict=False):
        after = events[start + 1 : end]
        damaged = events[start]["damaged"]
        assert damaged == standing[-count:][::-1], kind
        rejected = {event["checkpoint"]: event["reason"] for event in after if event["event"] == "checkpoint_rejected"}
        # of deleted checkpoints, only the newest one is known to have existed
        assert sorted(rejected) == sorted(damaged[:1] if kind == "delete_checkpoint" else damaged)
        assert all(text.startswith(reason) for text in rejected.values()), rejected
        assert all(f"! checkpoint {name} rejected: {reason}" in command.output for name in rejected)
        # on a slow disk there may be no older checkpoint yet; then the run restarts from the beginning
        restored = [event["checkpoint"] for event in after if event["event"] == "restored"]
        assert restored == standing[-count - 1 :][: len(standing) > count], kind
        standing = standing[:-count] + [event["checkpoint"] for event in after if event["event"] == "checkpoint_saved"]
    causes = [failure["cause"] for failure in run.record["failures"]]
    assert causes == ["crash"] * len(DAMAGE) + ["hang", "crash", "non_finite"]


@pytest.mark.timeout(600)
def test_a_run_that_goes_on_with_other_numbers_of_workers_sees_the_same_batches(
    ftexp, run_folder, tmp_path, clean_run, pictures
):
    run = run_folder("elastic")
    one_worker = "scaling.num_workers=1"
    three_workers = ["scaling.num_workers=3", "scaling.resources_per_worker={CPU: 0.5}"]
    streamed = [*OPTIONS, *pictures, "data.feed=streaming", "run.name=elastic"]
    first = ftexp(*streamed, "train.max_steps=40")
    first.wait_until(lambda: (run.path / LOCK_FILE).exists())
    # meanwhile a second driver is rejected, and the first run still ends as the clean run does
    second = ftexp(*streamed, "train.max_steps=40")
    assert second.wait() == 1, second.output
    (pid,) = re.findall(r"in use by process (\d+) on ", second.output)
    assert Path(f"/proc/{pid}/cwd").resolve() == tmp_path
    assert first.wait() == 0, first.output
    for words in ([one_worker, "train.max_steps=60"], three_workers):
        command = ftexp(*streamed, *words)
        assert command.wait() == 0, command.output

    assert run.record["world_sizes"] == [2, 1, 3]
    assert [event["step"] for event in run.events("restored")] == [40, 60]
    ours, theirs = ([(u.step, u.positions, u.samples) for u in read_updates(r.storage)] for r in (run, clean_run))
    assert len(ours) == STEPS
    assert ours == theirs
    num_samples = run.record["data"]["num_samples"]["train"]
    assert list(problems(read_updates(run.storage), num_samples, BATCH)) == []
    # gradients are summed in another order: equal except for rounding, 1e-6 after 40 steps as measured
    ours, theirs = (
        [point["train_loss"] for point in r.metrics() if point["split"] == "train"] for r in (run, clean_run)
    )
    assert ours[:40] == theirs[:40]
    assert ours[40:] == pytest.approx(theirs[40:], rel=1e-5)


def test_a_new_run_starts_from_exactly_the_weights_of_another(ftexp, run_folder, clean_run, pictures):
    words = [
        *pictures, "model.kwargs.depth=1", f"resume_from={clean_run.path}", "run.name=new", "train.max_steps=2",
        "scaling.num_workers=1",
        "resume=never", "checkpoint.num_to_keep=null", "report.enabled=false",
    ]  # fmt: skip
    command = ftexp(*words)
    assert command.wait() == 0, command.output
    run = run_folder("new")
    saved = [(event["step"], event["checkpoint"]) for event in run.events("checkpoint_saved")]
    assert saved == [(0, "step_00000000.a1"), (2, "step_00000002.a1")]
    store = CheckpointStore(run.storage.child("checkpoints"))
    source = load(*locate(str(clean_run.path)))["model.pt"]
    start, end = (load(store, store.by_name(name))["model.pt"] for _, name in saved)
    assert list(start) == list(source)
    assert all(torch.equal(start[name], source[name]) for name in source)
    assert not all(torch.equal(end[name], source[name]) for name in source)
    assert "weights" in command.output
    assert f"{clean_run.record['checkpoint']} (step {STEPS})" in command.output
    assert not {"report.html", "charts", "evaluation_test.json"} & {path.name for path in run.path.iterdir()}
