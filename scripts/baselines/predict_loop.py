"""Baseline of bench_predict.py: a user's loop in one process, with the same files, decoding and model.

    python predict_loop.py <run directory> <checkpoint> <directory of images> <CSV file>

Prints images per second, excluding imports and the building of the model.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch

from ftexp.data.cropping import Fit
from ftexp.data.decoder import Decoding
from ftexp.data.feeds.decoding import as_image

BATCH, TOP_K = 64, 5


def main() -> None:
    run, checkpoint, root, out = sys.argv[1:]
    record = json.loads(Path(run, "run.json").read_text())
    data = record["data"]
    model = timm.create_model(**record["model"]["arguments"]).eval()
    model.load_state_dict(torch.load(Path(run, "checkpoints", checkpoint, "model.pt"), weights_only=True))
    mean, std = (torch.tensor(data[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    fit = Fit(data["image_size"], data["channels"], decoding=Decoding(data["decoder"]))
    paths = sorted(path for path in Path(root).rglob("*") if path.is_file())

    started = time.perf_counter()
    with open(out, "w", newline="") as file, torch.inference_mode():  # noqa: PTH123 - as a user would
        writer = csv.writer(file)
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            pixels = np.stack([as_image(path.read_bytes(), fit) for path in batch])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
            probabilities, classes = model(images).softmax(1).topk(TOP_K)
            for path, row, chosen in zip(batch, probabilities.tolist(), classes.tolist(), strict=True):
                names = [data["class_names"][number] for number in chosen]
                writer.writerow([path, *(value for pair in zip(names, row, strict=True) for value in pair)])
    print(len(paths) / (time.perf_counter() - started))


if __name__ == "__main__":
    main()
