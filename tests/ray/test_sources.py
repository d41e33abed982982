"""Sources: every image keeps its pixels and its label, from each layout, and unreadable images are always reported.

Real Ray Data pipelines on small files that the tests write; tests share one Ray and the data sets.
"""

import hashlib
import pickle
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftexp.data.build import build_data
from ftexp.data.cropping import Fit
from ftexp.data.feeds.decoding import as_image
from ftexp.data.info import SPLITS
from ftexp.data.sources import arrays as sources_module
from ftexp.data.sources.arrays import bundle_from_arrays
from ftexp.data.sources.registry import sources
from ftexp.errors import DataError
from tests.support.image_files import (
    SIZE,
    data_config,
    encoded,
    expected_pairs,
    pairs,
    picture,
    put,
    read_all,
    read_back,
    write_parquet,
)

pytestmark = pytest.mark.usefixtures("data_ray")


# digits


@pytest.fixture(scope="module")
def digits():
    bundle = build_data(data_config("digits", channels=1, val_fraction=0.1))
    return bundle.info, read_all(bundle)


def test_digits_are_those_of_sklearn_each_once_with_its_label(digits):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    info, splits = digits

    # scaling the 16 levels to 0..255 and back is exact
    found = [(np.rint(rows["image"].reshape(-1, 64) * (16 / 255)), rows["label"]) for rows in splits.values()]
    assert sorted((i.tobytes(), n) for part in found for i, n in zip(*part, strict=True)) == sorted(
        (i.tobytes(), n) for i, n in zip(images, labels, strict=True)
    )
    assert max(rows["image"].max() for rows in splits.values()) == 255
    assert info.class_names == list("0123456789")


def test_digits_splits_are_stratified(digits):
    from sklearn.datasets import load_digits

    totals = np.bincount(load_digits().target)
    _, splits = digits

    for name, fraction in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert np.abs(np.bincount(splits[name]["label"]) - fraction * totals).max() <= 1


def test_split_seed_alone_decides_which_digits_are_in_which_split(digits):
    _, splits = digits
    again = read_all(build_data(data_config("digits", channels=1, val_fraction=0.1)))
    other = read_all(build_data(data_config("digits", channels=1, val_fraction=0.1, split_seed=1)))

    for name in SPLITS:
        np.testing.assert_array_equal(again[name]["image"], splits[name]["image"])
        np.testing.assert_array_equal(again[name]["label"], splits[name]["label"])
        assert pairs(other[name]) != pairs(splits[name])
    assert pairs(*other.values()) == pairs(*splits.values())


def test_zero_fractions_leave_splits_that_are_empty_and_can_be_read():
    splits = read_all(build_data(data_config("digits", channels=1, val_fraction=0, test_fraction=0)))

    assert [len(splits[name]["label"]) for name in SPLITS] == [1797, 0, 0]


# CIFAR


def write_cifar(root, monkeypatch, name, num_classes):
    """Write files in torchvision's layout and patch its hashes; return ((images, labels) of train and of test)."""
    import torchvision.datasets

    dataset_class = getattr(torchvision.datasets, name)
    key = {"CIFAR10": "labels", "CIFAR100": "fine_labels"}[name]
    directory = root / dataset_class.base_folder

    def write(file_name, content):
        put(directory / file_name, pickle.dumps(content))
        return hashlib.md5((directory / file_name).read_bytes()).hexdigest()

    hashes, arrays = {}, {}
    for split, entries in (("train_list", dataset_class.train_list), ("test_list", dataset_class.test_list)):
        parts, hashes[split] = [], []
        for number, (file_name, _) in enumerate(entries):
            seed = [number, len(split)]
            images = np.random.default_rng(seed).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
            labels = [(7 * row + number) % num_classes for row in range(20)]
            planes = images.transpose(0, 3, 1, 2).reshape(20, 3072)
            hashes[split].append([file_name, write(file_name, {"data": planes, key: labels})])
            parts.append((images, labels))
        arrays[split] = (np.concatenate([i for i, _ in parts]), [n for _, labels in parts for n in labels])
    names = [f"thing {number}" for number in range(num_classes)]
    meta = dict(dataset_class.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: names})
    monkeypatch.setattr(dataset_class, "meta", meta)
    for split, entries in hashes.items():
        monkeypatch.setattr(dataset_class, split, entries)
    return arrays["train_list"], arrays["test_list"], names


@pytest.mark.parametrize(("name", "num_classes", "num_train"), [("cifar10", 10, 100), ("cifar100", 100, 20)])
def test_cifar_is_read_from_torchvisions_files(tmp_path, monkeypatch, name, num_classes, num_train):
    train, test, names = write_cifar(tmp_path, monkeypatch, name.upper(), num_classes)

    bundle = build_data(data_config(name, tmp_path, image_size=32, test_fraction=0.9))
    splits = read_all(bundle)

    assert bundle.info.class_names == names
    assert pairs(splits["train"], splits["val"]) == expected_pairs(*train)
    assert len(splits["train"]["label"]) + len(splits["val"]["label"]) == num_train
    # CIFAR's own test split, in its own order: data.test_fraction has no effect
    np.testing.assert_array_equal(splits["test"]["image"], test[0])
    assert splits["test"]["label"].tolist() == test[1]


def test_missing_cifar_files_name_the_root_and_the_download_switch(tmp_path):
    with pytest.raises(DataError, match=r"data\.root=.*nowhere.*data\.download=true"):
        build_data(data_config("cifar10", tmp_path / "nowhere", image_size=32))


def test_damaged_cifar_file_is_refused(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "CIFAR10", 10)
    damaged = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-1])

    with pytest.raises(DataError, match=r"data\.name=cifar10: no usable files"):
        build_data(data_config("cifar10", tmp_path, image_size=32))


# decoding


GREY, COLOUR, CLEAR = picture(1, channels=1), picture(2), picture(3, channels=4)


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_lossless_colour_decodes_exactly(kind):
    np.testing.assert_array_equal(as_image(encoded(COLOUR, kind), Fit(SIZE, 3)), COLOUR)


def test_jpeg_decodes_to_the_colour_that_was_saved():
    flat = np.broadcast_to(np.uint8([200, 40, 90]), (SIZE, SIZE, 3))

    found = as_image(encoded(np.ascontiguousarray(flat), "JPEG"), Fit(SIZE, 3))

    assert np.abs(found.astype(int) - flat).max() <= 3  # JPEG's loss on a flat image


def test_grey_becomes_three_equal_channels():
    np.testing.assert_array_equal(as_image(encoded(GREY), Fit(SIZE, 3)), np.stack([GREY] * 3, axis=-1))


def test_grey_stays_itself_in_one_channel():
    np.testing.assert_array_equal(as_image(encoded(GREY), Fit(SIZE, 1)), GREY[..., None])


def test_alpha_is_left_out_of_three_channels_and_kept_in_four():
    np.testing.assert_array_equal(as_image(encoded(CLEAR), Fit(SIZE, 3)), CLEAR[..., :3])
    np.testing.assert_array_equal(as_image(encoded(CLEAR), Fit(SIZE, 4)), CLEAR)


@pytest.mark.parametrize("pixels", [COLOUR, CLEAR])
def test_colour_becomes_its_luminance_in_one_channel(pixels):
    luminance = pixels[..., :3] @ [0.299, 0.587, 0.114]  # ITU-R 601-2, as Pillow documents

    found = as_image(encoded(pixels), Fit(SIZE, 1))

    assert found.shape == (SIZE, SIZE, 1)
    assert np.abs(found[..., 0] - luminance).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_grey_keeps_its_range(channels):
    deep = GREY.astype(np.uint16) * 256 + 77

    np.testing.assert_array_equal(as_image(encoded(deep), Fit(SIZE, channels))[..., 0], GREY)


def test_float_image_is_refused_since_its_range_is_unknown():
    with pytest.raises(ValueError, match="mode F"):
        as_image(encoded(GREY.astype(np.float32), "TIFF"), Fit(SIZE, 1))


@pytest.mark.parametrize("upright", [False, True])
def test_oblong_image_is_scaled_by_its_shorter_side_and_cropped_at_the_centre(upright):
    oblong = np.full((16, 32, 3), 250, np.uint8)
    oblong[:, 8:24] = [10, 120, 60]  # the centre square

    found = as_image(encoded(np.ascontiguousarray(oblong.swapaxes(0, 1)) if upright else oblong), Fit(SIZE, 3))

    assert found.shape == (SIZE, SIZE, 3)
    centre = np.broadcast_to([10, 120, 60], found.shape)
    np.testing.assert_array_equal(found[2:-2, 2:-2], centre[2:-2, 2:-2])
    assert np.abs(found - centre).max() <= 20  # the bicubic kernel reaches slightly over the edge, where pixels are 250


# image_folder


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory):
    """Root with three classes in several formats, and the expected (pixels, class name) of all images."""
    root = tmp_path_factory.mktemp("train_and_test") / "val"  # names above the root must have no effect
    expected = []
    for number, name in enumerate(["cat", "dog", "eel"]):
        for row in range(5):
            pixels = picture([number, row])
            put(root / name / f"{row}.png", encoded(pixels))
            expected.append((pixels, name))
        colour, grey, clear = picture([number, 10]), picture([number, 11], 1), picture([number, 12], 4)
        flat = np.full((SIZE, SIZE, 3), 40 * number + 50, np.uint8)  # a grey that JPEG preserves exactly
        put(root / name / "colour.bmp", encoded(colour, "BMP"))
        put(root / name / "flat.jpg", encoded(flat, "JPEG"))
        put(root / name / "deep" / "deeper" / "grey.png", encoded(grey))
        put(root / name / "deep" / "clear.PNG", encoded(clear))
        expected += [(colour, name), (flat, name), (np.stack([grey] * 3, axis=-1), name), (clear[..., :3], name)]
        put(root / name / ".DS_Store", b"no image")
    put(root / ".git" / "config.png", b"no image")
    put(root / "cat" / ".thumbnails" / "0.png", encoded(picture(99)))
    put(root / "README.md", b"beside the class folders")
    return root, expected_pairs(*zip(*expected, strict=True))


def test_class_folders_give_each_image_its_pixels_and_its_folders_label(class_folders):
    root, expected = class_folders

    bundle = build_data(data_config("image_folder", root))
    splits = read_all(bundle)

    assert bundle.info.class_names == ["cat", "dog", "eel"]
    assert bundle.info.bad_samples == []
    assert pairs(*splits.values(), names=bundle.info.class_names) == expected
    for name, share in (("train", 5), ("val", 2), ("test", 2)):  # of the 9 images of each class
        assert np.bincount(splits[name]["label"]).tolist() == [share] * 3


def test_split_folders_are_the_splits(tmp_path):
    expected = {}
    for split, names in (("train", "ab"), ("valid", "ab"), ("test", "abc")):
        items = [(picture([len(split), row], 1), names[row % len(names)]) for row in range(6)]
        for row, (pixels, name) in enumerate(items):
            put(tmp_path / split / name / f"{row}.png", encoded(pixels))
        expected[{"valid": "val"}.get(split, split)] = expected_pairs(*zip(*items, strict=True))
    put(tmp_path / "train" / "labels.csv", b"beside the class folders")

    bundle = build_data(data_config("image_folder", tmp_path, channels=1, test_fraction=0.5))
    splits = read_all(bundle)

    assert bundle.info.class_names == ["a", "b", "c"]
    assert {name: pairs(rows, names="abc") for name, rows in splits.items()} == expected


def test_split_that_has_no_folder_is_cut_from_training(tmp_path):
    images = {(split, row): picture([len(split), row]) for split in ("train", "test") for row in range(10)}
    for (split, row), pixels in images.items():
        put(tmp_path / split / "ab"[row % 2] / f"{row}.png", encoded(pixels))

    splits = read_all(build_data(data_config("image_folder", tmp_path, val_fraction=0.4, test_fraction=0.5)))

    assert [len(splits[name]["label"]) for name in SPLITS] == [6, 4, 10]
    for found, split in ((pairs(splits["train"], splits["val"]), "train"), (pairs(splits["test"]), "test")):
        assert found == expected_pairs([images[split, row] for row in range(10)], [row % 2 for row in range(10)])


@pytest.mark.parametrize(
    ("directories", "told"),
    [
        (("train/a", "test/a", "extra/a"), "test, train, which look like splits, next to extra: move these elsewhere"),
        (("Training/a", "Testing/a"), "Testing, Training, which look like splits, under other names"),
    ],
)
def test_folders_that_look_like_splits_are_not_taken_for_classes(tmp_path, directories, told):
    for directory in directories:
        put(tmp_path / directory / "0.png", encoded(COLOUR))
    with pytest.raises(DataError, match=re.escape(told)):
        build_data(data_config("image_folder", tmp_path))


def test_classes_may_be_called_like_splits(tmp_path):
    for directory in ("train", "test", "bus"):
        for number in range(9):
            put(tmp_path / directory / f"{number}.png", encoded(COLOUR))
    listing = sources.get("image_folder")(data_config("image_folder", tmp_path))
    assert listing.class_names == ["bus", "test", "train"]


def test_two_validation_folders_are_refused(tmp_path):
    for split in ("train", "val", "valid"):
        put(tmp_path / split / "a" / "0.png", encoded(COLOUR))

    with pytest.raises(DataError, match=r"data\.root=.* more than one validation directory"):
        build_data(data_config("image_folder", tmp_path))


def test_split_folder_without_class_folders_is_refused(tmp_path):
    put(tmp_path / "train" / "a" / "0.png", encoded(COLOUR))
    put(tmp_path / "test" / "0.png", encoded(COLOUR))

    with pytest.raises(DataError, match=r"data\.root=.*: test/ holds no image in a class directory"):
        build_data(data_config("image_folder", tmp_path))


def test_what_is_no_image_is_counted_and_makes_neither_a_sample_nor_a_class(tmp_path):
    images = [(picture([number, row]), name) for number, name in enumerate("ab") for row in range(4)]
    for row, (pixels, name) in enumerate(images):
        put(tmp_path / name / f"{row}.png", encoded(pixels))
    put(tmp_path / "a" / "Thumbs.db", b"junk")
    put(tmp_path / "notes" / "readme.md", b"text")
    put(tmp_path / "a" / "@eaDir" / "0.png" / "THUMB.png", encoded(COLOUR))
    put(tmp_path / "overview.png", encoded(COLOUR))

    bundle = build_data(data_config("image_folder", tmp_path))

    assert bundle.info.class_names == ["a", "b"]
    assert pairs(*read_all(bundle).values(), names="ab") == expected_pairs(*zip(*images, strict=True))
    assert {rule.reason: rule.count for rule in bundle.info.excluded} == {
        "no image extension": 2,
        "system directory": 1,
        "image outside of a class directory": 1,
    }


def test_a_link_to_nothing_is_treated_like_any_image_that_cannot_be_read(tmp_path):
    for row in range(4):
        put(tmp_path / "a" / f"{row}.png", encoded(picture(row)))
    (tmp_path / "a" / "gone.png").symlink_to("/nowhere.png")

    with pytest.raises(
        DataError, match=r"^1 sample can't be read(.|\n)*gone\.png: a symbolic link to /nowhere\.png, w"
    ):
        build_data(data_config("image_folder", tmp_path))
    bundle = build_data(data_config("image_folder", tmp_path, on_bad_sample="skip", feed="streaming"))
    assert [sample.where for sample in bundle.info.bad_samples] == [f"{tmp_path}/a/gone.png"]
    assert sum(bundle.info.num_samples.values()) == 4


@pytest.fixture(scope="module")
def spoilt_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("spoilt")
    good = [(picture([number, row]), name) for number, name in enumerate("ab") for row in range(4)]
    for row, (pixels, name) in enumerate(good):
        put(root / name / f"{row}.png", encoded(pixels))
    jpeg = encoded(picture(7, size=64), "JPEG")
    put(root / "a" / "torn.jpg", jpeg[: len(jpeg) // 2])
    put(root / "b" / "text.png", b"this is no image")
    return root, expected_pairs(*zip(*good, strict=True))


def test_unreadable_images_fail_the_run_with_their_number_and_names(spoilt_folders):
    root, _ = spoilt_folders

    with pytest.raises(DataError) as caught:
        build_data(data_config("image_folder", root))

    message = str(caught.value)
    assert message.startswith("2 samples can't be read")
    assert "data.on_bad_sample=skip" in message
    assert f"{root}/a/torn.jpg: " in message
    assert f"{root}/b/text.png: " in message


def test_skipped_images_are_counted_with_file_and_reason_and_left_out(spoilt_folders):
    root, expected = spoilt_folders

    bundle = build_data(data_config("image_folder", root, on_bad_sample="skip"))

    bad = {sample.where: sample.reason for sample in bundle.info.bad_samples}
    assert set(bad) == {f"{root}/a/torn.jpg", f"{root}/b/text.png"}
    assert "truncated" in bad[f"{root}/a/torn.jpg"]
    assert "UnidentifiedImageError" in bad[f"{root}/b/text.png"]
    assert pairs(*read_all(bundle).values(), names="ab") == expected  # read_all also checks num_samples


def test_long_list_of_unreadable_images_is_cut_but_counted(tmp_path):
    for row in range(13):
        put(tmp_path / "a" / f"{row}.png", b"")

    with pytest.raises(DataError, match=r"^13 samples can't be read(.|\n)*and 3 more$") as caught:
        build_data(data_config("image_folder", tmp_path))
    assert str(caught.value).count(f"{tmp_path}/a/") == 10


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, r"data\.root=.*data does not exist$"),
        ([], r"data\.root=.*data holds no image in a class directory"),
        (["0.png"], r"holds no image in a class directory(.|\n)*excluded 1 entry: image outside of a class directory"),
        ([".hidden/a/0.png"], r"holds no image in a class directory(.|\n)*excluded 1 entry: hidden \(.*/\.hidden\)"),
    ],
    ids=["missing", "empty", "no class folder", "hidden only"],
)
def test_image_folder_without_images_is_refused(tmp_path, files, message):
    root = tmp_path / "data"
    if files is not None:
        root.mkdir()
    for name in files or []:
        put(root / name, encoded(COLOUR))

    with pytest.raises(DataError, match=message):
        build_data(data_config("image_folder", root))


# image_list


def listed(tmp_path, text):
    put(tmp_path / "lists" / "all.csv", text.encode())
    return sources.get("image_list")(data_config("image_list", tmp_path / "lists" / "all.csv"))


def found(listing, split="train"):
    """Return the (path, class name) of each item of a split, in order."""
    items = np.arange(len(listing.labels[split]))
    names = [listing.class_names[label] for label in listing.labels[split]]
    return [(where, name) for (where, _), name in zip(listing.readers[split](items), names, strict=True)]


def test_a_list_gives_each_image_its_label_in_the_order_of_the_list_wherever_the_files_lie(tmp_path):
    other = tmp_path / "other folder" / "2.png"
    for number, path in enumerate(["lists/1.png", "images/0.png", "other folder/2.png"]):
        put(tmp_path / path, encoded(picture(number)))
    text = f'path,note,label\n../images/0.png,"a, b",eel\n1.png,,cat\n"{other}",x,eel\n'
    listing = listed(tmp_path, text)

    assert listing.class_names == ["cat", "eel"]
    assert [name for _, name in found(listing)] == ["eel", "cat", "eel"]
    paths = [tmp_path / "images" / "0.png", tmp_path / "lists" / "1.png", other]
    for (_, get), path in zip(listing.readers["train"](np.arange(3)), paths, strict=True):
        assert get() == path.read_bytes()


def test_a_lists_own_splits_are_kept_and_numbers_are_labels(tmp_path):
    text = "file\tsplit\tclass\na.png\ttrain\t2\nb.png\ttest\t0\nc.png\ttrain\t0\n"
    put(tmp_path / "all.tsv", text.encode())
    config = data_config("image_list", tmp_path / "all.tsv", image_column="file", label_column="class")
    listing = sources.get("image_list")(config)

    assert listing.class_names == ["0", "2"]
    assert found(listing) == [(f"{tmp_path}/a.png", "2"), (f"{tmp_path}/c.png", "0")]
    assert found(listing, "test") == [(f"{tmp_path}/b.png", "0")]
    assert "val" not in listing.labels  # it is split off train later


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\na.png,0\n", r"all\.csv has no column 'path', but \['image', 'label'\]: set data\.image_column"),
        ("path,label\n", r"data\.root=.* lists no image"),
        ("", r"data\.root=.* can't be read as a list of images: Empty CSV file"),
        ("path,label\na.png,0,1\n", r"data\.root=.* can't be read as a list of images: .*Expected 2 columns, got 3"),
        ("path,label,split\na.png,0,dev\n", r"its column 'split' holds 'dev'; allowed: train, val, test"),
        ("path,label\ns3://b/a.png,0\n", r"all\.csv lists s3://b/a\.png: paths are relative to the list"),
        (
            "path,label\na.png,0\nb.png,\n",
            r"label_column=label holds no label at row 2 of data\.root=.*all\.csv: ",
        ),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        listed(tmp_path, text)


def test_a_list_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.root=.*nowhere\.csv can't be read as a list of images: .*No such file"):
        sources.get("image_list")(data_config("image_list", tmp_path / "nowhere.csv"))


# parquet


def test_encoded_parquet_keeps_rows_and_text_labels_together_over_files_and_row_groups(tmp_path):
    names = ["ant", "bee", "cow"]
    images = [picture(row) for row in range(30)]
    labels = [names[row * 7 // 2 % 3] for row in range(30)]
    for number, (start, end) in enumerate([(0, 11), (11, 13), (13, 30)]):
        path = tmp_path / ("more" if number else "") / f"part-{number}.parquet"
        write_parquet(path, [encoded(i) for i in images[start:end]], labels[start:end], row_group_size=4)
    put(tmp_path / "_SUCCESS", b"")
    put(tmp_path / "._part-0.parquet", b"macOS writes such")
    (tmp_path / "empty.parquet").mkdir()  # Spark gives directories such names

    bundle = build_data(data_config("parquet", tmp_path))
    splits = read_all(bundle)

    assert bundle.info.class_names == names
    assert pairs(*splits.values(), names=names) == expected_pairs(images, labels)
    assert all(len(splits[name]["label"]) for name in SPLITS)
    # each row group is a unit of work, even if there are few
    assert bundle.datasets["train"].num_blocks() > 1


def test_files_and_folders_named_after_splits_are_the_splits_and_a_uri_is_a_root(tmp_path):
    images = {split: [picture([number, row]) for row in range(6)] for number, split in enumerate(SPLITS)}
    labels = {split: [(row + number) % 4 for row in range(6)] for number, split in enumerate(SPLITS)}
    structs = {split: [{"bytes": encoded(i), "path": "x.png"} for i in images[split]] for split in SPLITS}
    root = tmp_path / "root"
    write_parquet(root / "data" / "train-00000-of-00002.parquet", structs["train"][:4], labels["train"][:4], 3)
    write_parquet(root / "data" / "train-00001-of-00002.parquet", structs["train"][4:], labels["train"][4:])
    write_parquet(root / "data" / "validation-00000-of-00001.parquet", structs["val"], labels["val"])
    write_parquet(root / "test" / "trained-eyes-only.parquet", structs["test"], labels["test"])  # its directory decides

    bundle = build_data(data_config("parquet", root.as_uri()))
    splits = read_all(bundle)

    assert bundle.info.class_names == ["0", "1", "2", "3"]
    for split in SPLITS:
        np.testing.assert_array_equal(splits[split]["image"], images[split])
        assert splits[split]["label"].tolist() == labels[split]
        assert splits[split]["sample"].tolist() == list(range(6))


@pytest.mark.parametrize("file_name", ["train.parquet", "test.parquet"])
def test_single_file_of_arrays_is_cut_into_splits_whatever_its_name(tmp_path, file_name):
    images = [picture(row, 1, size=2) for row in range(10)]
    path = tmp_path / "train" / file_name
    write_parquet(path, [i.tolist() for i in images], [row % 2 for row in range(10)], 4)

    splits = read_all(build_data(data_config("parquet", path, channels=1, image_size=2)))

    assert [len(splits[name]["label"]) for name in SPLITS] == [6, 2, 2]
    assert pairs(*splits.values()) == expected_pairs(images, [row % 2 for row in range(10)])


def test_names_above_the_root_do_not_make_splits(tmp_path):
    root = tmp_path / "train" / "test"
    for number in range(2):
        write_parquet(
            root / f"part-{number}.parquet", [picture([number, r], size=2).tolist() for r in range(5)], [0] * 5
        )

    bundle = build_data(data_config("parquet", root, image_size=2, feed="streaming", shuffle_window=1))

    assert bundle.info.num_samples == {"train": 6, "val": 2, "test": 2}


def test_missing_parquet_column_names_those_there_are(tmp_path):
    write_parquet(tmp_path / "a.parquet", [encoded(COLOUR)], [0], caption=["x"])

    with pytest.raises(DataError) as caught:
        build_data(data_config("parquet", tmp_path, image_column="img"))

    message = str(caught.value)
    assert "a.parquet has no column 'img'" in message
    assert "['image', 'label', 'caption']" in message
    assert "data.image_column" in message


def test_columns_of_other_names_are_read(tmp_path):
    pq.write_table(pa.table({"img": [encoded(COLOUR)] * 2, "fine_label": [1, 1]}), tmp_path / "a.parquet")
    config = data_config(
        "parquet", tmp_path, image_column="img", label_column="fine_label", val_fraction=0, test_fraction=0
    )

    rows = read_all(build_data(config))["train"]

    assert rows["label"].tolist() == [0, 0]
    np.testing.assert_array_equal(rows["image"], [COLOUR] * 2)


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ([0, 1, -2], "-2 at {} row 2 of group 0"),
        ([0, 1, None], "no label at {} row 2 of group 0"),
        ([0.0, 1.5], "0.0 at {} row 0 of group 0, and 1 more like it"),
        ([[0], [1]], r"\[0\] at {} row 0 of group 0, and 1 more like it"),
    ],
    ids=["negative", "null", "fraction", "list"],
)
def test_labels_that_are_no_class_are_refused(tmp_path, labels, shown):
    write_parquet(tmp_path / "a.parquet", [encoded(COLOUR)] * len(labels), labels)

    shown = shown.format(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"data\.label_column=label holds {shown}: labels are all text, or all whole"):
        build_data(data_config("parquet", tmp_path))


def test_text_labels_in_one_file_and_numbers_in_another_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", [encoded(COLOUR)], ["ant"])
    write_parquet(tmp_path / "b.parquet", [encoded(COLOUR)], [0])

    with pytest.raises(DataError, match=r"data\.label_column=label holds 0 at .*/b\.parquet row 0 of group 0"):
        build_data(data_config("parquet", tmp_path))


@pytest.fixture(scope="module")
def spoilt_parquet(tmp_path_factory):
    """Parquet file with three row groups; rows 3 and 5 have no image, so the second (rows 4 to 7) lacks only row 5."""
    root = tmp_path_factory.mktemp("spoilt")
    images = [encoded(picture(row)) for row in range(12)]
    images[3], images[5] = b"no image", None
    write_parquet(root / "a.parquet", images, [row % 2 for row in range(12)], row_group_size=4)
    return root


def test_unreadable_parquet_rows_fail_the_run_with_their_place(spoilt_parquet):
    with pytest.raises(DataError) as caught:
        build_data(data_config("parquet", spoilt_parquet))

    message = str(caught.value)
    assert message.startswith("2 samples can't be read")
    assert f"{spoilt_parquet}/a.parquet row 3 of group 0: UnidentifiedImageError" in message
    assert f"{spoilt_parquet}/a.parquet row 1 of group 1: ValueError: no image" in message


def test_skipped_parquet_rows_are_left_out_and_the_others_keep_their_labels(spoilt_parquet):
    bundle = build_data(data_config("parquet", spoilt_parquet, on_bad_sample="skip"))

    good = [row for row in range(12) if row not in (3, 5)]
    assert sorted(sample.where.split("/")[-1] for sample in bundle.info.bad_samples) == [
        "a.parquet row 1 of group 1",
        "a.parquet row 3 of group 0",
    ]
    found = pairs(*read_all(bundle).values())
    assert found == expected_pairs([picture(row) for row in good], [row % 2 for row in good])


def test_damaged_row_group_loses_its_own_rows_and_no_others(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [encoded(picture(row)) for row in range(12)], [row % 2 for row in range(12)], 4)
    column = pq.read_metadata(path).row_group(1).column(0)
    assert column.path_in_schema == "image"
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)

    bundle = build_data(data_config("parquet", path, on_bad_sample="skip"))

    where = sorted(sample.where for sample in bundle.info.bad_samples)
    assert where == [f"{path} row {row} of group 1" for row in range(4)]
    good = [0, 1, 2, 3, 8, 9, 10, 11]
    found = pairs(*read_all(bundle).values())
    assert found == expected_pairs([picture(row) for row in good], [row % 2 for row in good])


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        ([[0, 300], [1, 2]], "pixel values outside 0..255"),
        ([[0, -1], [1, 2]], "pixel values outside 0..255"),
        ([[0.1, 0.9], [1.0, 0.2]], "pixels of type float64, not whole numbers from 0 to 255"),
        ([[1, 2, 3], [1, 2, 3]], r"an array of shape \(2, 3\), not \(2, 2, 1\)"),
    ],
    ids=["too high", "negative", "fractions", "shape"],
)
def test_arrays_that_are_no_image_of_that_size_are_refused(pixels, reason):
    with pytest.raises(ValueError, match=reason):
        as_image(pixels, Fit(2, 1))


def test_file_that_is_no_parquet_is_named(tmp_path):
    put(tmp_path / "a.parquet", b"this is no parquet")

    with pytest.raises(DataError, match=r"a\.parquet can't be read as parquet: .*; fix it"):
        build_data(data_config("parquet", tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is neither a parquet file nor a directory with .parquet files in it"),
        ("nowhere", "does not exist$"),
    ],
)
def test_root_without_parquet_files_is_refused(tmp_path, name, message):
    root = tmp_path / name

    with pytest.raises(DataError, match=rf"data\.root={root} {message}"):
        build_data(data_config("parquet", root))


def test_parquet_without_rows_leaves_nothing_to_train_on(tmp_path):
    schema = pa.schema({"image": pa.binary(), "label": pa.string()})
    pq.ParquetWriter(tmp_path / "a.parquet", schema).close()  # not even a row group

    with pytest.raises(DataError, match="the training split has no samples"):
        build_data(data_config("parquet", tmp_path))


# synthetic


def test_synthetic_is_deterministic_balanced_and_learnable():
    config = data_config("synthetic", num_samples=100, num_classes=4)
    bundle = build_data(config)
    splits, again = read_all(bundle), read_all(build_data(config))

    assert bundle.info.num_samples == {"train": 60, "val": 20, "test": 20}
    for name in SPLITS:
        np.testing.assert_array_equal(splits[name]["image"], again[name]["image"])
        np.testing.assert_array_equal(splits[name]["label"], again[name]["label"])
        assert np.ptp(np.bincount(splits[name]["label"], minlength=4)) <= 1
    assert sorted(np.concatenate([rows["sample"] for rows in splits.values()]).tolist()) == list(range(100))
    assert len(pairs(*splits.values())) == len(set(pairs(*splits.values())))  # each image has its own noise
    # the docstring's promise: classes can be distinguished by their mean images
    train, test = splits["train"], splits["test"]
    means = np.stack([train["image"][train["label"] == label].mean(axis=0) for label in range(4)])
    distances = ((test["image"][:, None] - means) ** 2).mean(axis=(2, 3, 4))
    assert distances.argmin(axis=1).tolist() == test["label"].tolist()


def test_synthetic_images_differ_between_split_seeds():
    first, other = (
        read_back(
            build_data(data_config("synthetic", num_samples=10, num_classes=2, split_seed=seed)).datasets["train"]
        )
        for seed in (0, 1)
    )

    assert not set(pairs(first)) & set(pairs(other))


# all sources


def test_fewer_classes_than_found_are_refused():
    with pytest.raises(DataError, match=r"data\.num_classes=5, but data\.name=digits has 10 classes"):
        build_data(data_config("digits", channels=1, num_classes=5))


def test_more_classes_than_found_are_spare():
    info = build_data(data_config("digits", channels=1, num_classes=12)).info

    assert info.num_classes == 12
    assert info.class_names == [*"0123456789", "class_10", "class_11"]


def test_images_of_another_size_name_the_key():
    with pytest.raises(DataError, match=r"shape \(8, 8, 1\), but data\.image_size and data\.channels say \(8, 8, 3\)"):
        build_data(data_config("digits", channels=3))


def test_digits_can_be_scaled(digits):
    _, splits = digits
    larger = build_data(data_config("digits", channels=1, val_fraction=0.1, image_size=32))
    assert larger.info.image_size == 32
    images, small = read_all(larger)["train"]["image"], splits["train"]["image"]
    assert images.shape == (len(small), 32, 32, 1)
    # bicubic weights sum to 1: the mean of a 4x4 block is close to the original pixel
    blocks = images.reshape(-1, 8, 4, 8, 4).mean((2, 4))
    assert np.corrcoef(blocks.ravel(), small.ravel())[0, 1] > 0.95


@pytest.fixture
def own_source():
    """Function that registers a source for the duration of a test."""
    names = []

    def register(name, source):
        sources.register(name)(source)
        names.append(name)

    yield register
    for name in names:
        del sources._entries[name]


@pytest.mark.parametrize("images_per_block", [1, 4, 1000])
def test_own_source_needs_only_arrays_however_many_blocks_they_fill(own_source, monkeypatch, images_per_block):
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", images_per_block * SIZE * SIZE * 3)
    images = np.stack([picture(row) for row in range(20)])
    labels = np.arange(20) % 3

    def shapes(config):
        count = config.kwargs["count"]
        return bundle_from_arrays(config, images[:count], labels[:count], ["disc", "square", "star"])

    own_source("shapes", shapes)
    bundle = build_data(data_config("shapes", kwargs={"count": 18}, val_fraction=0))
    splits = read_all(bundle)

    assert bundle.info.num_samples == {"train": 15, "val": 0, "test": 3}
    assert bundle.info.mean == [0.5] * 3
    assert pairs(*splits.values()) == expected_pairs(images[:18], labels[:18])
    assert splits["train"]["sample"].tolist() == list(range(15))
    assert bundle.datasets["train"].num_blocks() == -(-15 // images_per_block)


def test_own_test_arrays_are_the_test_split():
    images, labels = np.stack([picture(row) for row in range(10)]), np.zeros(10, np.int64)
    own = (np.stack([picture(50 + row) for row in range(3)]), np.array([0, 1, 0]))

    splits = read_all(bundle_from_arrays(data_config("mine"), images, labels, ["a", "b"], own))

    assert [len(splits[name]["label"]) for name in SPLITS] == [8, 2, 3]
    np.testing.assert_array_equal(splits["test"]["image"], own[0])
    assert splits["test"]["label"].tolist() == [0, 1, 0]


GOOD_IMAGES, GOOD_LABELS = np.zeros((4, SIZE, SIZE, 3), np.uint8), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (GOOD_IMAGES[:, :4], GOOD_LABELS, r"images of shape \(4, 8, 3\), but data\.image_size and data\.channels"),
        (GOOD_IMAGES[..., :1], GOOD_LABELS, r"images of shape \(8, 8, 1\), but data\.image_size and data\.channels"),
        (GOOD_IMAGES / 255, GOOD_LABELS, "images of type float64: give pixels from 0 to 255 as uint8"),
        (GOOD_IMAGES, GOOD_LABELS[:3], r"4 images, but labels of shape \(3,\)"),
        (GOOD_IMAGES, GOOD_LABELS + 1, "labels from 1 to 2, but 2 class names"),
        (GOOD_IMAGES, GOOD_LABELS - 1, "labels from -1 to 0, but 2 class names"),
    ],
    ids=["size", "channels", "type", "number", "label too high", "label negative"],
)
@pytest.mark.parametrize("where", ["images", "test"])
def test_wrong_arrays_are_refused_wherever_they_are(images, labels, message, where):
    good = (GOOD_IMAGES, GOOD_LABELS)
    first, test = ((images, labels), None) if where == "images" else (good, (images, labels))

    with pytest.raises(DataError, match=rf"data\.name=mine has {message}"):
        bundle_from_arrays(data_config("mine"), *first, ["a", "b"], test)
