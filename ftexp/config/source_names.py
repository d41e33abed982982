"""The built-in sources and the source-specific `data.*` fields that each reads.

Separate from the sources, so that a config can be checked without importing numpy or Ray. It is an error to set a field
that the chosen source doesn't read: no setting is silently ignored.
"""

from __future__ import annotations

OF_DECODING = ("decoder", "decode_size", "exif_orientation", "background", "bit_depth")
_OF_FILES = ("on_bad_sample", "decode_cpus", "crop_pct", "crop_mode", "interpolation", *OF_DECODING)
# fields of DataConfig that the trained weights depend on
AS_TRAINED = (
    *("task", "image_size", "channels", "mean", "std", "num_classes", "crop_pct", "crop_mode", "interpolation"),
    *(name for name in OF_DECODING if name != "decode_size"),  # decode_size is used in training only
)

SOURCE_FIELDS: dict[str, tuple[str, ...]] = {
    "digits": (),
    "cifar10": ("root", "download"),
    "cifar100": ("root", "download"),
    "image_folder": ("root", *_OF_FILES),
    "image_list": ("root", *_OF_FILES, "image_column", "label_column", "label_separator", "target_columns"),
    "parquet": (
        *("root", *_OF_FILES, "shuffle_window"),
        *("image_column", "label_column", "label_separator", "target_columns"),
    ),
    "synthetic": ("num_samples",),
    "webdataset": ("root", *_OF_FILES, "shuffle_window", "label_separator"),
}
WITH_OTHER_TASKS = ("image_list", "parquet", "synthetic", "webdataset")  # sources that support every data.task


def can_stream(name: str) -> bool:
    """Return whether a source may be larger than memory; custom sources may be."""
    return "on_bad_sample" in SOURCE_FIELDS.get(name, ("on_bad_sample",))


def reads_files(name: str) -> bool:
    """Return whether a built-in source needs files at data.root; other sources download them or use none."""
    return name in SOURCE_FIELDS and can_stream(name)
