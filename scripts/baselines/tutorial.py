"""Baseline of bench_train.py and bench_recovery.py: digits and a timm ViT, written like Ray Train's tutorials.

A Ray Dataset split over the workers, iter_torch_batches, a blocking checkpoint and report at the end of every
epoch, FailureConfig(max_failures=3). Prints one JSON line: steps per second in the steady state, and the time of the
first step.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import ray.train
import timm
import torch
import torch.nn.functional as F
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def train_func(settings: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(settings["seed"])
    model = prepare_model(timm.create_model(**settings["model"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"])
    start_epoch = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as directory:
            model.module.load_state_dict(torch.load(Path(directory) / "model.pt"))
            optimizer.load_state_dict(torch.load(Path(directory) / "optimizer.pt"))
            start_epoch = torch.load(Path(directory) / "extra_state.pt")["epoch"] + 1
    world = ray.train.get_context().get_world_size()
    train_shard, val_shard = ray.train.get_dataset_shard("train"), ray.train.get_dataset_shard("val")
    times, first_step = [], None
    for epoch in range(start_epoch, settings["epochs"]):
        started, steps, stepping = time.perf_counter(), 0, 0.0
        for batch in train_shard.iter_torch_batches(
            batch_size=settings["global_batch_size"] // world, local_shuffle_buffer_size=512
        ):
            loss = F.cross_entropy(model(batch["image"].float()), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            stepping = time.perf_counter() - started
            if first_step is None:
                first_step = time.time()
            note(settings, epoch, steps)
        right = count = 0
        model.eval()
        with torch.inference_mode():
            for batch in val_shard.iter_torch_batches(batch_size=256):
                right += int((model.module(batch["image"].float()).argmax(1) == batch["label"]).sum())
                count += len(batch["label"])
        model.train()
        metrics = {"epoch": epoch, "val_accuracy": right / max(count, 1)}
        with tempfile.TemporaryDirectory() as directory:
            saved = None
            if ray.train.get_context().get_world_rank() == 0:
                torch.save(model.module.state_dict(), Path(directory) / "model.pt")
                torch.save(optimizer.state_dict(), Path(directory) / "optimizer.pt")
                torch.save({"epoch": epoch}, Path(directory) / "extra_state.pt")
                saved = Checkpoint.from_directory(directory)
            ray.train.report(metrics, checkpoint=saved)
        times.append((steps, stepping, time.perf_counter() - started))
    steady = times[1:] or times
    total_steps = sum(steps for steps, _, _ in steady)
    return {
        "steps_per_s": total_steps / sum(stepping for _, stepping, _ in steady),
        "steps_per_s_with_epoch_ends": total_steps / sum(epoch for _, _, epoch in steady),
        "first_step": first_step,
    }


def note(settings: dict[str, Any], epoch: int, step: int) -> None:
    """Write the time, rank, pid, epoch and step of each completed step, for bench_recovery.py."""
    if "notes" in settings:
        rank = ray.train.get_context().get_world_rank()
        with Path(settings["notes"]).open("a") as file:
            file.write(json.dumps([time.time(), rank, os.getpid(), epoch, step]) + "\n")


def dataset(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> ray.data.Dataset:
    return ray.data.from_items([{"image": images[row], "label": int(labels[row])} for row in rows])


def main() -> None:
    settings = json.loads(sys.argv[1])
    pixels, labels = load_digits(return_X_y=True)
    images = ((pixels.reshape(-1, 1, 8, 8) / 16 - 0.3053) / 0.3760).astype(np.float32)
    rows, held = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    val = held[: len(held) // 3]
    ray.init(address="local", num_cpus=4)  # two for the workers, two for Ray Data's reads
    trainer = TorchTrainer(
        train_func,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=settings["num_workers"]),
        run_config=RunConfig(
            name="tutorial", storage_path=tempfile.mkdtemp(), failure_config=FailureConfig(max_failures=3)
        ),
        datasets={"train": dataset(images, labels, rows), "val": dataset(images, labels, val)},
    )
    result = trainer.fit()
    print(json.dumps(result.return_value))


if __name__ == "__main__":
    main()
