"""A made data set in the files of CIFAR-10."""

import pickle

import numpy as np

SMALL_CIFAR = """
# CIFAR-10's files are known to torchvision by their MD5; those of the made set have their own
import hashlib, pathlib
from torchvision.datasets import CIFAR10

folder = pathlib.Path({root!r}) / CIFAR10.base_folder

def listed(names):
    return [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name in names]

CIFAR10.train_list, CIFAR10.test_list = listed(["data_batch_1"]), listed(["test_batch"])
CIFAR10.meta = {{**CIFAR10.meta, "md5": listed(["batches.meta"])[0][1]}}
"""


def write_small_cifar(root, num_train, num_test):
    """Files of torchvision's layout with images whose class shows in their colour."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("data_batch_1", num_train), ("test_batch", num_test)):
        labels = np.arange(count) % 10
        pixels = np.clip(labels[:, None] * 25 + rng.integers(-20, 20, (count, 3072)), 0, 255).astype(np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels.tolist()}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
