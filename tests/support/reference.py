"""The undisturbed reference run, trained once for all tests: disturbed runs must end with its state.

OPTIONS are the overrides of the reference and of every run compared with it. The plug-in slows or holds a run if a file
`slow` or `hold` exists in the directory where the command was started; it does nothing else.
"""

import fcntl
import os

from tests.support.command import Command

BATCH = 32
STEPS = 79  # two epochs of 39.5 steps
SAVE_EVERY = 7
HELD_AT = 60  # between two checkpoints
SLOWED_S = 0.3  # per step

PLUGIN = f"""
import time
from pathlib import Path

from ftexp.checkpoint.registry import register_state

SLOW, HOLD, HELD = (Path(__file__).with_name(name) for name in ("slow", "hold", "held"))

@register_state("obedient")
class Obedient:
    version = 1

    def __init__(self, job):
        advance = job.scheduler.step_update

        def step_update(step):
            advance(step)
            if SLOW.exists():
                time.sleep({SLOWED_S})
            if step == {HELD_AT} and job.rank == 0 and HOLD.exists():
                HOLD.rename(HELD)
                while HELD.exists():
                    time.sleep(0.05)

        job.scheduler.step_update = step_update

    def state_dict(self):
        return {{}}

    def load_state_dict(self, state):
        pass
"""

STATES = "progress,scheduler,scaler,rng,best,obedient"
OPTIONS = [
    "plugins=[obedient]", f"checkpoint.extra_state=[{STATES}]", "model.kwargs.depth=1", "train.epochs=2",
    "train.ledger=true", "train.log_every_steps=1",
]  # fmt: skip
EVERY_FEW_STEPS = ["checkpoint.every_epochs=null", f"checkpoint.every_steps={SAVE_EVERY}"]


def shared_folder(tmp_path_factory):
    """Return the directory that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(directory, make):
    """Call `make(directory)` in the first process to arrive, while the others wait for it."""
    directory.mkdir(exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "made").exists():
            make(directory)
            (directory / "made").touch()
    return directory


def write_pictures(root):
    """Write scikit-learn's digits as a directory of images."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    for number, (pixels, label) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
        path = root / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(pixels.reshape(8, 8) * (255 / 16)).astype(np.uint8)).save(path)


def overrides_of(root):
    """Return the overrides that train on the pictures, for either feed."""
    shape = ["data.image_size=8", "data.channels=1", "data.mean=[0.3053]", "data.std=[0.3760]"]
    return ["data=image_folder", f"data.root={root}", "augment=digits", *shape, "data.test_fraction=0.2"]


def train_reference(directory, pictures, preloaded):
    """Train the reference run `clean` in the directory, with cached data."""
    (directory / "obedient.py").write_text(PLUGIN)
    words = [*OPTIONS, *pictures, f"run.storage={directory}", "run.name=clean", "scaling.num_workers=2"]
    command = Command("train", words, directory, preloaded, joins=True)
    assert command.wait() == 0, command.output
