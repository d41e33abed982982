"""A run that streams images, some of which can't be read."""

import shutil

import numpy as np
import pytest
from PIL import Image


@pytest.mark.timeout(300)
def test_a_run_names_counts_and_leaves_out_what_cannot_be_read(ftexp, run_folder, tmp_path):
    for number in range(64):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (8, 8), np.uint8)).save(path)
    torn = tmp_path / "pictures" / "a" / "10.png"
    torn.write_bytes(torn.read_bytes()[:40])
    junk = tmp_path / "pictures" / "a" / "Thumbs.db"
    junk.touch()
    words = [
        "data=image_folder", f"data.root={tmp_path / 'pictures'}", "data.image_size=8", "data.channels=1",
        "data.mean=[0.5]", "data.std=[0.25]", "data.val_fraction=0", "data.test_fraction=0", "augment=none",
        "data.feed=streaming", "train.global_batch_size=16", "train.epochs=2", "schedule.warmup_epochs=0",
        "scaling.num_workers=1",
    ]  # fmt: skip
    failing = ftexp(*words, "run.name=fails")
    assert failing.wait() == 1, failing.output
    assert "1 sample can't be read; fix" in failing.output
    assert f"{torn}: " in failing.output
    # the order depends on the number of samples: the run must not resume with a different one
    shutil.copy(tmp_path / "pictures" / "a" / "12.png", tmp_path / "pictures" / "b" / "new.png")
    grown = ftexp(*words, "run.name=fails")
    assert grown.wait() == 2, grown.output
    assert "data.name=image_folder has 65 training samples now, and had 64 when the run began: restore" in grown.output
    (tmp_path / "pictures" / "b" / "new.png").unlink()
    command = ftexp(*words, "run.name=skips", "data.on_bad_sample=skip")
    assert command.wait() == 0, command.output
    run = run_folder("skips")
    (event,) = run.events("bad_samples")
    assert event["count"] == 1
    assert [sample["where"] for sample in event["samples"]] == [str(torn)]
    assert f"! excluded, can't be read: {torn}: " in command.output
    rules = [{"reason": "no image extension", "count": 1, "example": str(junk)}]
    assert [event["entries"] for event in run.events("entries_excluded")] == [rules]
    assert run.record["data"]["excluded"] == rules
    assert f"excluded 1 entry: no image extension ({junk})" in command.output
    assert run.record["step"] == 8
    (point,) = run.metrics()
    assert point["step"] == 8
    assert np.isfinite(point["train_loss"])
