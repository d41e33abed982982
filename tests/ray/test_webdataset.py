"""Tar shards: every image is read with its label from its place in its shard, and corrupt samples are named.

Without Ray Data: the tests call the readers that its tasks would call.
"""

import tarfile

import numpy as np
import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

import ftexp.data.sources.webdataset as module
from ftexp.data.build import build_data
from ftexp.data.cropping import Fit
from ftexp.data.feeds.decoding import as_image
from ftexp.data.info import SPLITS, Excluded
from ftexp.data.sources.webdataset import scan_shard, webdataset
from ftexp.errors import DataError
from tests.support.image_files import SIZE, data_config, encoded, expected_pairs, picture, put, tar_sample, write_shard

pytestmark = pytest.mark.usefixtures("data_ray")


def listed(listing, split="train"):
    """Return the sorted (pixels, class name) of all items of a listed split."""
    labels = listing.labels[split]
    images = [as_image(get(), Fit(SIZE, 3)) for _, get in listing.readers[split](np.arange(len(labels)))]
    return expected_pairs(images, [listing.class_names[label] for label in labels])


def write_shards(root, sizes):
    """Write shards with `sizes` samples; return (images, labels) of all."""
    images = [picture(number) for number in range(sum(sizes))]
    labels = [str(number % 3) for number in range(sum(sizes))]
    for shard, part in enumerate(np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])):
        entries = [entry for number in part for entry in tar_sample(f"{number:06}", images[number], labels[number])]
        write_shard(root / f"{shard:05}.tar", entries)
    return images, labels


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_images_and_text_labels_are_those_of_the_shards(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 5000)  # several stretches per shard
    names = ["ant", "bee", "cow"]
    images, labels = [picture(number) for number in range(22)], [names[number % 3] for number in range(22)]
    deep = "folder/" * 20  # longer than a USTAR header's name field
    for shard, (start, end) in enumerate([(0, 9), (9, 10), (10, 22)]):
        entries = [("__index__.json", b"{}"), ("readme", b"no sample"), ("folder/.hidden.png", b"no image")]
        for number in range(start, end):
            name = f"{deep if number % 2 else ''}{number}"
            entries += tar_sample(name, images[number], f"{labels[number]}\n", ["png", "BMP"][shard % 2])
            entries.append((f"{name}.json", b"{}"))
        write_shard(tmp_path / f"{shard:05}.tar", entries, kind)

    listing = webdataset(data_config("webdataset", tmp_path))

    assert listing.class_names == names
    assert listing.bad == []
    counts = {rule.reason: rule.count for rule in listing.excluded}
    assert counts == {"neither an image nor .cls": 22 + 3 * 2, "hidden": 3}
    assert listed(listing) == expected_pairs(images, labels)
    assert len(listing.block_sizes["train"]) > 3


def test_shards_named_after_splits_are_the_splits_and_numbers_are_labels(tmp_path):
    images = {split: [picture([number, row]) for row in range(4)] for number, split in enumerate(SPLITS)}
    for split, names in (("train", ["train-0", "train-1"]), ("val", ["val/0"]), ("test", ["test"])):
        for part, name in enumerate(names):
            rows = range(4)[part :: len(names)]
            entries = [entry for row in rows for entry in tar_sample(f"{row}", images[split][row], 10 * (row % 2))]
            write_shard(tmp_path / f"{name}.tar", entries)

    listing = webdataset(data_config("webdataset", tmp_path))

    assert listing.class_names == ["0", "10"]
    for split in SPLITS:
        assert listed(listing, split) == expected_pairs(images[split], ["0", "10", "0", "10"])


@pytest.fixture
def incomplete(tmp_path):
    """Shard with five samples; sample 1 has no label, sample 3 no image."""
    entries = [entry for number in range(5) for entry in tar_sample(f"{number}", picture(number), number % 2)]
    return write_shard(tmp_path / "a.tar", [entry for entry in entries if entry[0] not in ("1.cls", "3.png")])


def test_samples_without_label_or_image_are_named_and_counted(incomplete):
    with pytest.raises(DataError) as caught:
        build_data(data_config("webdataset", incomplete))

    message = str(caught.value)
    assert message.startswith(f"2 problems with the shards of data.root={incomplete}")
    assert "data.on_bad_sample=skip" in message
    assert f"{incomplete} 1: it has no .cls" in message
    assert f"{incomplete} 3: it has no .image" in message


def test_samples_without_label_or_image_are_left_out_where_they_may_be(incomplete):
    config = data_config("webdataset", incomplete, on_bad_sample="skip", feed="streaming", val_fraction=0)

    bundle, listing = build_data(config), webdataset(config)

    assert [bad.where for bad in bundle.info.bad_samples] == [f"{incomplete} 1", f"{incomplete} 3"]
    assert sum(bundle.info.num_samples.values()) == 3
    assert listed(listing) == expected_pairs([picture(n) for n in (0, 2, 4)], ["0"] * 3)


@pytest.mark.parametrize("num_bytes", [5000, 4000, 3000, 1600, 700, 300, 0])
def test_a_torn_shard_is_named_and_costs_the_samples_from_there_on(tmp_path, num_bytes):
    images, labels = write_shards(tmp_path, [3, 4, 3])
    torn = tmp_path / "00001.tar"
    assert torn.stat().st_size > 5000
    with tarfile.open(torn) as tar:
        ends = [member.offset_data + member.size for member in tar]
    num_whole = sum(max(pair) <= num_bytes for pair in zip(ends[::2], ends[1::2], strict=True))
    torn.write_bytes(torn.read_bytes()[:num_bytes])

    with pytest.raises(DataError, match=r"^1 problems with the shards of .*\n.*00001\.tar: .*"):
        webdataset(data_config("webdataset", tmp_path))
    listing = webdataset(data_config("webdataset", tmp_path, on_bad_sample="skip"))

    assert [bad.where for bad in listing.bad] == [str(torn)]
    whole = slice(0, 3 + num_whole)
    assert listed(listing) == expected_pairs(images[whole] + images[7:], labels[whole] + labels[7:])


def test_root_without_shards_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=rf"data\.root={tmp_path} is neither a tar file nor a directory with \.tar files"
    ):
        build_data(data_config("webdataset", tmp_path))


def test_every_reader_gives_the_same_bytes_for_the_same_items_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 5000)
    images, _ = write_shards(tmp_path, [5, 1, 8])
    listing = webdataset(data_config("webdataset", tmp_path))
    blocks = listing.readers["train"]
    assert listing.block_sizes["train"].sum() == 14
    assert listing.block_sizes["train"].tolist() == [3, 2, 1, 3, 3, 2]
    content = [encoded(pixels) for pixels in images]
    where = [f"{tmp_path}/{name}" for name in ["00000.tar"] * 5 + ["00001.tar"] + ["00002.tar"] * 8]

    rng = np.random.default_rng(0)
    for reader in (listing.single_readers["train"], blocks, blocks.with_cache(1)):
        for items in (np.arange(14), rng.permutation(14), rng.integers(0, 14, 40), np.array([13])):
            found = list(reader(items))
            assert [get() for _, get in found] == [content[item] for item in items]
            assert [name for name, _ in found] == [f"{where[item]} {item:06}" for item in items]


def test_a_shard_that_became_shorter_since_it_was_listed_fails_where_it_is_read(tmp_path):
    write_shards(tmp_path, [6])
    listing = webdataset(data_config("webdataset", tmp_path))
    shard = tmp_path / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])

    first, *_, last = (get for _, get in listing.single_readers["train"](np.arange(6)))
    assert first() == encoded(picture(0))
    with pytest.raises(ValueError, match=r"00000\.tar has become shorter"):
        last()


def test_a_shard_in_a_store_is_listed_as_one_on_disk(tmp_path):
    entries = [entry for number in range(5) for entry in tar_sample(f"{number}", picture(number), f"class {number}")]
    content = write_shard(tmp_path / "a.tar", entries[:-1]).read_bytes()
    store = SubTreeFileSystem(str(tmp_path), LocalFileSystem())  # not recognised as a disk, so it is read as a stream

    (on_disk, account_on_disk), (stored, account_stored) = (
        scan_shard(LocalFileSystem(), str(tmp_path / "a.tar")),
        scan_shard(store, "a.tar"),
    )

    assert stored == on_disk
    assert [entry.label for entry in stored] == [f"class {number}" for number in range(4)]
    for number, entry in enumerate(stored):
        assert content[entry.offset : entry.offset + entry.num_bytes] == encoded(picture(number))
    assert [bad.where.rpartition(" ")[2] for bad in account_on_disk.bad + account_stored.bad] == ["4", "4"]


@pytest.mark.parametrize("label_first", [False, True])
@pytest.mark.parametrize("is_stored", [False, True])
def test_a_shard_torn_within_an_image_is_one_problem_wherever_it_lies(tmp_path, label_first, is_stored):
    samples = [tar_sample(f"{number}", picture(number), number) for number in range(4)]
    order = slice(None, None, -1 if label_first else 1)
    path = write_shard(tmp_path / "a.tar", [entry for sample in samples for entry in sample[order]])
    with tarfile.open(path) as tar:
        (image,) = [member for member in tar if member.name == "2.png"]
    path.write_bytes(path.read_bytes()[: image.offset_data + 20])
    filesystem = SubTreeFileSystem(str(tmp_path), LocalFileSystem()) if is_stored else LocalFileSystem()

    found, account = scan_shard(filesystem, "a.tar" if is_stored else str(path))

    assert [entry.label for entry in found] == ["0", "1"]
    (bad,) = account.bad
    assert bad.reason.endswith("; what comes before is kept")


def test_a_label_that_is_no_text_is_a_bad_sample_and_one_that_only_looks_like_a_number_is_text(tmp_path):
    entries = [
        *tar_sample("0", picture(0), "ant"), *tar_sample("1", picture(1), 0)[:1], ("1.cls", b"\xff"),
        *tar_sample("2", picture(2), "²"),
    ]  # fmt: skip
    write_shard(tmp_path / "a.tar", entries)
    listing = webdataset(data_config("webdataset", tmp_path, on_bad_sample="skip"))
    assert listing.class_names == ["ant", "²"]
    assert [(bad.where, bad.reason) for bad in listing.bad] == [(f"{tmp_path}/a.tar 1", "its .cls is no text")]


def test_a_sample_with_two_images_is_a_bad_one_and_its_neighbours_are_read(tmp_path):
    entries = [entry for number in range(4) for entry in tar_sample(f"{number}", picture(number), number % 2)]
    entries += [("1.jpg", encoded(picture(9))), ("2.png", encoded(picture(9)))]
    shard = write_shard(tmp_path / "a.tar", entries)

    listing = webdataset(data_config("webdataset", tmp_path, on_bad_sample="skip"))

    assert [(bad.where, bad.reason) for bad in listing.bad] == [
        (f"{shard} {name}", "it has more than one image") for name in ("1", "2")
    ]
    assert listed(listing) == expected_pairs([picture(0), picture(3)], ["0", "1"])


def test_a_label_that_is_no_number_makes_all_of_them_text(tmp_path):
    write_shard(tmp_path / "a.tar", [*tar_sample("0", picture(0), 3), *tar_sample("1", picture(1), "ant")])
    assert webdataset(data_config("webdataset", tmp_path / "a.tar")).class_names == ["3", "ant"]


def test_an_empty_label_is_refused_with_shard_and_name(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [*tar_sample("0", picture(0), "ant"), *tar_sample("b/1", picture(1), "")])
    with pytest.raises(DataError, match=rf"\.cls holds no label at {shard} b/1: labels are all text, or all whole"):
        webdataset(data_config("webdataset", tmp_path))


def test_names_may_hold_dots_and_endings_are_known_in_any_case(tmp_path):
    images = [picture(number) for number in range(6)]
    names = ["scan4.05", "scan4.06", "v1.2/scan", "v1.2/scan.b.c", "7", "7.1"]
    entries = [entry for name, image in zip(names, images, strict=True) for entry in tar_sample(name, image, name)]
    entries = [
        (name.replace(".cls", ".CLS") if number % 4 > 1 else name, c) for number, (name, c) in enumerate(entries)
    ]
    write_shard(tmp_path / "a.TAR", entries)
    put(tmp_path / "b.tar.gz", b"")

    listing = webdataset(data_config("webdataset", tmp_path))

    assert listing.bad == []
    assert [(rule.reason, rule.count) for rule in listing.excluded] == [("no .tar file", 1)]
    assert listed(listing) == expected_pairs(images, names)


@pytest.mark.parametrize("labelled", [True, False])
def test_further_fields_of_a_sample_are_counted_and_make_no_sample(tmp_path, labelled):
    more = [("0.left.png", encoded(picture(8))), ("0.mask.PNG", encoded(picture(9))), ("0.coarse.cls", b"animal")]
    path = write_shard(tmp_path / "a.tar", [*tar_sample("0", picture(0), "ant"), *more])

    found, account = scan_shard(LocalFileSystem(), str(path), labelled)

    assert [(entry.name, entry.label) for entry in found] == [("0", "ant")]
    assert account.bad == []
    assert account.excluded == [Excluded("further field of a sample", 3, f"{path} 0.coarse")]


def test_a_link_and_two_labels_that_differ_spoil_their_samples_and_no_others(tmp_path):
    path = tmp_path / "a.tar"
    entries = [entry for number in range(3) for entry in tar_sample(f"{number}", picture(number), number)]
    write_shard(path, [*entries, ("1.CLS", b"2"), ("2.CLS", b"2")])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("3.png", tarfile.SYMTYPE), ("4.cls", tarfile.LNKTYPE), ("5.json", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "0.png"
            tar.addfile(link)

    found, account = scan_shard(LocalFileSystem(), str(path))

    assert [entry.name for entry in found] == ["0", "2"]
    packed = "is a link: pack it with tar --dereference --hard-dereference"
    assert [(bad.where, bad.reason) for bad in account.bad] == [
        (f"{path} 1", "it has more than one .cls"),
        (f"{path} 3", f"its .png {packed}"),
        (f"{path} 4", f"its .cls {packed}"),
    ]
    assert [(rule.reason, rule.count) for rule in account.excluded] == [("neither an image nor .cls", 1)]


def test_shards_without_a_sample_say_what_is_in_them(tmp_path):
    entries = [("0.gif", b"GIF"), ("0.txt", b"a cat"), *tar_sample("1", picture(1), 0)[:1]]
    path = write_shard(tmp_path / "a.tar", entries)

    with pytest.raises(DataError, match="the training split has no samples") as caught:
        build_data(data_config("webdataset", tmp_path, on_bad_sample="skip", feed="streaming"))

    assert f"\nexcluded 2 entries: neither an image nor .cls (such as {path} 0.gif)" in str(caught.value)
    assert f"\n{path} 1: it has no .cls" in str(caught.value)
