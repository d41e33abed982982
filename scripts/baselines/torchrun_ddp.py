"""Baseline of bench_recovery.py: the hand-written DDP loop under torchrun, with a checkpoint per epoch to resume from.

torchrun --standalone --nproc-per-node 2 --max-restarts 3 torchrun_ddp.py '<settings>'
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_ddp import digits, evaluate
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    settings = json.loads(sys.argv[1])
    epochs, batch, path = settings["epochs"], settings["global_batch_size"], Path(settings["checkpoint"])
    torch.set_num_threads(1)
    store, rank, world = next(dist.rendezvous("env://"))
    # torchrun's store outlives its workers: without its own prefix, a restart may read the addresses of the previous
    # attempt and wait for them forever (torch 2.15 on one node)
    store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    images, labels, train_rows, val_rows = digits()
    torch.manual_seed(settings["seed"])
    model = timm.create_model(**settings["model"])
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"])
    start_epoch = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start_epoch = saved["epoch"] + 1
    for epoch in range(start_epoch, epochs):
        order = np.random.default_rng((settings["seed"], epoch)).permutation(train_rows)
        for step in range(len(train_rows) // batch):
            rows = order[step * batch : (step + 1) * batch][rank::world]
            loss = F.cross_entropy(ddp(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with Path(settings["notes"]).open("a") as file:
                file.write(json.dumps([time.time(), rank, os.getpid(), epoch, step + 1]) + "\n")
        evaluate(model, images, labels, val_rows[rank::world])
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
            torch.save(state, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
