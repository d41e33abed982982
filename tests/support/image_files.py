"""Small image files for the tests of sources and feeds, and functions that read them back."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ftexp.config.schema import DataConfig
from ftexp.data.info import SPLITS

SIZE = 8


def data_config(name, root=None, channels=3, image_size=SIZE, **values):
    values = {"val_fraction": 0.2, "test_fraction": 0.2} | values
    if name == "image_list":  # the default of conf/data/image_list.yaml
        values = {"image_column": "path"} | values
    return DataConfig(
        name=name,
        root=None if root is None else str(root),
        image_size=image_size,
        channels=channels,
        mean=[0.5] * channels,
        std=[0.25] * channels,
        **values,
    )


def read_back(dataset):
    """Return all rows of a split, ordered by `sample`."""
    batches = list(dataset.iter_batches(batch_size=None, batch_format="numpy"))
    if not batches:
        return {"image": np.empty((0, 0)), "label": np.empty(0, np.int64), "sample": np.empty(0, np.int64)}
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in ("image", "label", "sample")}
    order = np.argsort(rows["sample"])
    return {name: values[order] for name, values in rows.items()}


def read_all(bundle):
    """Return {split: rows}, after checks that apply to every source."""
    assert tuple(bundle.datasets) == SPLITS
    splits = {name: read_back(dataset) for name, dataset in bundle.datasets.items()}
    info = bundle.info
    assert {name: len(rows["label"]) for name, rows in splits.items()} == info.num_samples
    for rows in splits.values():
        assert len(set(rows["sample"].tolist())) == len(rows["sample"])
        assert rows["label"].dtype == rows["sample"].dtype == np.int64
        if len(rows["label"]):
            assert rows["image"].dtype == np.uint8
            assert rows["image"].shape[1:] == (info.image_size, info.image_size, info.channels)
            assert rows["label"].min() >= 0
            assert rows["label"].max() < info.num_classes
    return splits


def pairs(*row_sets, names=None):
    """Return the sorted (pixels, label) of all rows, for comparisons that ignore the order."""
    found = []
    for rows in row_sets:
        for image, label in zip(rows["image"], rows["label"], strict=True):
            found.append((image.tobytes(), names[label] if names else int(label)))
    return sorted(found)


def expected_pairs(images, labels):
    return sorted((np.ascontiguousarray(image).tobytes(), label) for image, label in zip(images, labels, strict=True))


def picture(seed, channels=3, size=SIZE):
    """Return random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, channels), dtype=np.uint8)
    return pixels if channels > 1 else pixels[..., 0]


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_parquet(path, images, labels, row_group_size=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": images, "label": labels, **columns})
    pq.write_table(table, path, row_group_size=row_group_size or len(labels))


def write_shard(path, entries, kind=tarfile.USTAR_FORMAT):
    """Write a tar file; `entries`: (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def tar_sample(name, pixels, label, extension="png", content=None):
    """Return the two entries of a sample in a shard: image and label."""
    kind = {"png": "PNG", "bmp": "BMP"}[extension.lower()]
    return [(f"{name}.{extension}", content or encoded(pixels, kind)), (f"{name}.cls", str(label).encode())]


def write_layouts(directory, images, labels, as_file=encoded):
    """Write the same images in every layout, each under its name; shards and row groups have different sizes."""
    content, num_images = [as_file(pixels) for pixels in images], len(images)
    for number, png in enumerate(content):
        put(directory / "image_folder" / str(labels[number]) / f"{number:02}.png", png)
    lines = [f"image_folder/{label}/{number:02}.png,{label}" for number, label in enumerate(labels)]
    put(directory / "image_list", "\n".join(["path,label", *lines]).encode())
    first = num_images * 3 // 5
    for part, (start, end) in enumerate([(0, first), (first, first + 1), (first + 1, num_images)]):
        write_parquet(
            directory / "parquet" / f"{part}.parquet", content[start:end], labels[start:end], row_group_size=5
        )
        entries = [
            entry
            for n in range(start, end)
            for entry in tar_sample(f"{n:02}", images[n], labels[n], content=content[n])
        ]
        write_shard(directory / "webdataset" / f"{part}.tar", entries)
