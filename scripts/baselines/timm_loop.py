"""Baseline of bench_accuracy.py: a loop around `timm.data.create_loader`, in one process.

    python timm_loop.py '{"root": ..., "model": ..., ...}'

Prints one JSON line: the accuracy on the test split after the last epoch.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed


def main() -> None:
    settings = json.loads(sys.argv[1])
    random_seed(settings["seed"])
    torch.set_num_threads(settings["num_threads"])
    train, test = (loader(settings, split) for split in ("train", "test"))
    model = timm.create_model(settings["model"], num_classes=settings["num_classes"])
    optimizer = create_optimizer_v2(model, opt="adamw", lr=settings["lr"], weight_decay=settings["weight_decay"])
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=settings["epochs"],
        warmup_epochs=settings["warmup_epochs"],
        warmup_lr=settings["warmup_lr"],
        min_lr=settings["min_lr"],
        step_on_epochs=False,
        updates_per_epoch=len(train),
    )
    step = 0
    scheduler.step_update(step)
    for _ in range(settings["epochs"]):
        model.train()
        for images, labels in train:
            loss = F.cross_entropy(model(images), labels, label_smoothing=settings["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            scheduler.step_update(step)
    print(json.dumps({"test_accuracy": accuracy(model, test)}))


def loader(settings: dict[str, Any], split: str) -> Any:
    size = settings["image_size"]
    is_training = split == "train"
    return create_loader(
        create_dataset("", root=settings["root"], split=split),
        input_size=(3, size, size),
        batch_size=settings["batch_size"],
        is_training=is_training,
        hflip=settings["hflip"],
        # the settings for "without the crop" select the largest square in the centre
        **(settings["crop"] if is_training else {}),
        color_jitter=None,
        interpolation="bicubic",
        crop_pct=settings["crop_pct"],
        num_workers=settings["num_workers"],
        use_prefetcher=False,
    )


@torch.inference_mode()
def accuracy(model: torch.nn.Module, batches: Any) -> float:
    model.eval()
    right = count = 0
    for images, labels in batches:
        right += int((model(images).argmax(1) == labels).sum())
        count += len(labels)
    return right / count


if __name__ == "__main__":
    main()
