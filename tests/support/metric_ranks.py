"""Program of tests/unit/test_metrics.py: three ranks count their parts of one list of predictions."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing

from ftexp.config.metric_names import METRICS, SINGLE_LABEL
from ftexp.data.plan import even_part
from ftexp.worker.evaluation import evaluate
from tests.support.jobs import make_job

WORLD, NUM_CLASSES, NUM_SAMPLES = 3, 70, 301  # more classes than a rank processes at a time
NAMES = [name for name, kind in METRICS.items() if SINGLE_LABEL in kind.tasks]


def made(num_classes=NUM_CLASSES, num_samples=NUM_SAMPLES):
    """Return logits and targets; some samples have tied scores, and the last class has no samples."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, num_classes - 1, (num_samples,), generator=generator)
    logits = torch.randn(num_samples, num_classes, generator=generator).mul(4).round() / 2
    logits[torch.arange(num_samples), targets] += 1.5
    return logits, targets


def counted(logits, targets, batch_size, names=NAMES):
    from ftexp.evaluation.metric_set import MetricSet

    metrics = MetricSet(names, SINGLE_LABEL, [str(label) for label in range(logits.shape[1])], logits.device)
    for start in range(0, len(targets), batch_size):
        metrics.update(logits[start : start + batch_size], targets[start : start + batch_size])
    return metrics.compute()


def count(rank, logits, targets, expected):
    torch.set_num_threads(1)  # in each rank: threads that start at once break the thread pool inherited by a fork
    dist.init_process_group(
        "gloo", rank=rank, world_size=WORLD, init_method=f"file://{os.environ['MEETING']}{len(targets)}"
    )
    first, last = even_part(0, len(targets), rank, WORLD)
    shared = counted(logits[first:last], targets[first:last], 17)
    dist.destroy_process_group()
    assert shared == expected, "another number of workers, and of samples at a time"


if __name__ == "__main__":
    torch.set_num_threads(1)
    evaluate(make_job(), "val")
    if "torchmetrics" not in sys.modules:
        print("torchmetrics is not imported", flush=True)
    for num_samples in (NUM_SAMPLES, 2):  # with two samples, one rank has none
        logits, targets = made(num_samples=num_samples)
        expected = counted(logits, targets, 64)  # before the forks, so that they inherit the import of torchmetrics
        torch.multiprocessing.start_processes(count, (logits, targets, expected), nprocs=WORLD, start_method="fork")
    print("as one process")
