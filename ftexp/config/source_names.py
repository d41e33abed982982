"""The built-in sources and which source-specific `data.*` fields each reads.

Kept apart from the sources so that a config can be checked without importing numpy or Ray. A field that
the chosen source doesn't read may not be set: a setting is never silently ignored.
"""

from __future__ import annotations

OF_DECODING = ("decoder", "decode_size", "exif_orientation", "background", "bit_depth")
_OF_FILES = ("on_bad_sample", "decode_cpus", "crop_pct", "crop_mode", "interpolation", *OF_DECODING)
# fields of DataConfig on which the weights of a run depend
AS_TRAINED = (
    *("task", "image_size", "channels", "mean", "std", "num_classes", "crop_pct", "crop_mode", "interpolation"),
    *(name for name in OF_DECODING if name != "decode_size"),  # used in training alone
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
WITH_OTHER_TASKS = ("image_list", "parquet", "synthetic", "webdataset")  # sources of more than a class for each sample


def can_stream(name: str) -> bool:
    """Return whether a source may be too large for memory; sources of the user's own may."""
    return "on_bad_sample" in SOURCE_FIELDS.get(name, ("on_bad_sample",))


def reads_files(name: str) -> bool:
    """Return whether a built-in source reads the files at data.root; others may download them, or need none."""
    return name in SOURCE_FIELDS and can_stream(name)
