"""Baseline of bench_train.py: digits and a timm ViT in a hand-written DistributedDataParallel loop.

Processes started by torch.multiprocessing, gloo, epochs shuffled by seed, evaluation and a checkpoint at the end of
every epoch. Prints one JSON line: steps per second in the steady state, and validation accuracy.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.multiprocessing.spawn(train, (settings, tempfile.mkdtemp()), nprocs=settings["num_workers"])


def train(rank: int, settings: dict[str, Any], directory: str) -> None:
    world, epochs, batch = settings["num_workers"], settings["epochs"], settings["global_batch_size"]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
    images, labels, train_rows, val_rows = digits()
    torch.manual_seed(settings["seed"])
    model = timm.create_model(**settings["model"])
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"])
    steps_per_epoch = len(train_rows) // batch
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings["lr"], total_steps=epochs * steps_per_epoch)
    times = []
    for epoch in range(epochs):
        order = np.random.default_rng((settings["seed"], epoch)).permutation(train_rows)
        started = time.perf_counter()
        for step in range(steps_per_epoch):
            rows = order[step * batch : (step + 1) * batch][rank::world]
            loss = F.cross_entropy(ddp(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        stepped = time.perf_counter() - started
        accuracy = evaluate(model, images, labels, val_rows[rank::world])
        if rank == 0:
            torch.save(model.state_dict(), Path(directory) / "model.pt")
            torch.save(optimizer.state_dict(), Path(directory) / "optimizer.pt")
        dist.barrier()
        times.append((stepped, time.perf_counter() - started))
    if rank == 0:
        steady = times[1:] or times
        print(
            json.dumps(
                {
                    "steps_per_s": steps_per_epoch * len(steady) / sum(step for step, _ in steady),
                    "steps_per_s_with_epoch_ends": steps_per_epoch * len(steady) / sum(epoch for _, epoch in steady),
                    "val_accuracy": accuracy,
                }
            )
        )
    dist.destroy_process_group()


def digits() -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    pixels, classes = load_digits(return_X_y=True)
    images = (torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3053) / 0.3760
    labels = torch.tensor(classes)
    train_rows, held = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    return images, labels, train_rows, held[: len(held) // 3]


def evaluate(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, rows: np.ndarray) -> float:
    model.eval()
    with torch.inference_mode():
        right = (model(images[rows]).argmax(1) == labels[rows]).sum().double()
    model.train()
    counts = torch.stack([right, torch.tensor(float(len(rows)), dtype=torch.float64)])
    dist.all_reduce(counts)
    return float(counts[0] / counts[1])


if __name__ == "__main__":
    main()
