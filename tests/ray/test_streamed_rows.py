"""Streamed and cached rows have the same images and labels, for every source, order and size of requests."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest
import ray

import ftexp.data.sources.webdataset
from ftexp.config.schema import Config, DataConfig
from ftexp.data import build
from ftexp.data.build import build_data, drawn_by_class
from ftexp.data.feeds import decoding
from ftexp.data.feeds import streamed as stream
from ftexp.data.feeds.decoding import refuse_bad
from ftexp.data.feeds.feed import CachedRows, request
from ftexp.data.feeds.streamed import StreamedRows
from ftexp.data.info import SPLITS
from ftexp.data.order import SampleOrder, WindowOrder
from ftexp.data.sampling import ClassTable
from ftexp.data.sources.blocks import BlockCache
from ftexp.data.sources.registry import sources
from ftexp.errors import DataError
from tests.support.image_files import (
    data_config,
    encoded,
    expected_pairs,
    pairs,
    picture,
    put,
    read_all,
    write_layouts,
    write_parquet,
)

pytestmark = pytest.mark.usefixtures("data_ray")

NUM_IMAGES = 29
IMAGES = [picture(number) for number in range(NUM_IMAGES)]
LABELS = [number % 3 for number in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Directory with the same images in every layout."""
    directory = tmp_path_factory.mktemp("roots")
    write_layouts(directory, IMAGES, LABELS)
    return directory


@pytest.fixture
def small_units(monkeypatch):
    """Reduce sizes: several units per pipeline, pipelines per pass and stretches per shard, despite the few samples."""
    monkeypatch.setattr(stream, "_FIRST_ROWS", 4)
    monkeypatch.setattr(stream, "_UNIT_ROWS", 16)
    monkeypatch.setattr(stream, "_OVERLAP_UNITS", 2)
    monkeypatch.setattr(ftexp.data.sources.webdataset, "_BLOCK_BYTES", 9000)


def never(*_):
    raise AssertionError("nothing is bad or slow here")


def streamed(bundle, split="train", on_bad=never):
    return StreamedRows(bundle.indexed[split], bundle.info, 1, on_bad, lambda _: None)


def assert_same_rows(streams, cached, requests):
    """Assert that both return the same rows; the requests are split differently from the announced ones."""
    announced = np.array_split(np.concatenate(requests), 7)
    with streams.open(request(samples, samples) for samples in announced) as take:
        for samples in requests:
            ours, theirs = take(samples), cached.take(samples)
            np.testing.assert_array_equal(ours.images, theirs.images)
            np.testing.assert_array_equal(ours.labels, theirs.labels)
            assert ours.images.dtype == theirs.images.dtype == np.uint8
            assert ours.labels.dtype == theirs.labels.dtype == np.int64
            assert ours.readable is None


@pytest.mark.parametrize(
    ("name", "window"), [("image_folder", None), ("parquet", 2), ("webdataset", None), ("webdataset", 2)]
)
def test_streamed_rows_are_those_that_are_cached(roots, small_units, name, window):
    values = {"shuffle_window": window, "val_fraction": 0.2, "test_fraction": 0.1}
    cached, streams = (
        build_data(data_config(name, roots / name, feed=feed, **values)) for feed in ("cached", "streaming")
    )

    assert (cached.feed, streams.feed) == ("cached", "streaming")
    assert cached.info == streams.info
    assert cached.info.digest == sources.get(name)(data_config(name, roots / name, **values)).digest
    assert (list(cached.datasets), streams.datasets) == (list(SPLITS), {})
    found = pairs(*read_all(cached).values(), names=cached.info.class_names)
    assert found == expected_pairs(IMAGES, [str(label) for label in LABELS])
    rows = {split: CachedRows(cached.datasets[split].iterator()) for split in SPLITS}
    num_train, num_test = len(rows["train"]), len(rows["test"])
    by_class = Config(data=DataConfig(sampling="balanced"))
    for bundle in (cached, streams):
        drawn = drawn_by_class(by_class, bundle)
        expected = ClassTable.of(rows["train"].take(np.arange(num_train)).labels, cached.info.num_classes)
        assert drawn.classes.members.tolist() == expected.members.tolist()
        assert drawn.info.class_counts == expected.counts.tolist()
        assert sum(drawn.info.class_counts) == num_train
    assert {split: len(streamed(streams, split)) for split in SPLITS} == cached.info.num_samples
    order = SampleOrder(5, num_train)
    if name != "image_folder":
        assert streams.blocks.tolist() == cached.blocks.tolist()
        assert streams.blocks.sum() == num_train
        order = WindowOrder(5, streams.blocks, 2)
    rng = np.random.default_rng(0)
    # in the order of an epoch and a half, then in random order; one request is longer than the split
    requests = [*np.array_split(order.samples(np.arange(num_train * 3 // 2)), 4)]
    requests += [rng.integers(0, num_train, size) for size in (1, 3 * num_train, 2)]
    assert_same_rows(streamed(streams), rows["train"], requests)
    assert num_test < 4  # smaller than the first unit
    assert_same_rows(streamed(streams, "test"), rows["test"], [np.arange(num_test), np.arange(num_test)[::-1]])


def test_a_pass_that_is_left_early_leaves_the_next_one_whole(roots, small_units):
    bundle = build_data(data_config("image_folder", roots / "image_folder", feed="streaming", val_fraction=0))
    rows, asked = streamed(bundle), np.arange(len(bundle.indexed["train"]))
    with rows.open(iter([request(asked, asked)] * 9)) as take:
        first = take(asked[:3])
    with rows.open(iter([request(asked, asked)])) as take:
        again = take(asked)

    np.testing.assert_array_equal(again.images[:3], first.images)
    assert len(again.labels) == len(asked)


def test_an_image_that_vanished_is_named_and_the_others_stay(tmp_path):
    for number in range(6):
        put(tmp_path / "ab"[number % 2] / f"{number}.png", encoded(IMAGES[number]))
    config = data_config("image_folder", tmp_path, feed="streaming", val_fraction=0, test_fraction=0)
    bundle = build_data(config)
    (tmp_path / "b" / "3.png").unlink()
    files = [0, 2, 4, 1, 3, 5]  # in the order of the listing, by class

    told, samples = [], np.array([0, 4, 5, 4, 1])
    with streamed(bundle, on_bad=told.extend).open(iter([request(samples, samples)])) as take:
        taken = take(samples)

    assert taken.readable.tolist() == [True, False, True, False, True]
    for row in (0, 2, 4):
        np.testing.assert_array_equal(taken.images[row], IMAGES[files[samples[row]]])
    assert taken.labels.tolist() == [0, 1, 1, 1, 0]
    assert {bad.where for bad in told} == {f"{tmp_path}/b/3.png"}
    assert "FileNotFoundError" in told[0].reason

    refusing = streamed(bundle, on_bad=lambda bad: refuse_bad(config, bad))
    with (
        refusing.open(iter([request(samples, samples)])) as take,
        pytest.raises(DataError, match=rf"{tmp_path}/b/3\.png: FileNotFound"),
    ):
        take(samples)


@pytest.mark.parametrize(("name", "window"), [("webdataset", None), ("webdataset", 2), ("parquet", 2)])
def test_a_shard_that_vanished_costs_its_own_samples_alone_and_each_is_named(tmp_path, name, window):
    write_layouts(tmp_path, IMAGES, LABELS)
    fractions = {"val_fraction": 0, "test_fraction": 0}
    bundle = build_data(data_config(name, tmp_path / name, feed="streaming", shuffle_window=window, **fractions))
    (shard,) = (tmp_path / name).glob("0.*")
    shard.unlink()

    told, samples = [], np.array([28, 0, 17, 16, 3, 18])
    with streamed(bundle, on_bad=told.extend).open(iter([request(samples, samples)])) as take:
        taken = take(samples)

    assert taken.readable.tolist() == [True, False, True, False, False, True]
    for row in (0, 2, 5):
        np.testing.assert_array_equal(taken.images[row], IMAGES[samples[row]])
    assert taken.labels.tolist() == [LABELS[sample] for sample in samples]
    assert len({bad.where for bad in told}) == 3
    assert all(bad.where.startswith(f"{shard} ") and "FileNotFoundError" in bad.reason for bad in told)


# the choice of the feed


@pytest.mark.parametrize(
    ("spare", "feed", "why"),
    [
        (0, "cached", "decoded, it takes 87 MiB, and a node's object store has 174 MiB"),
        (-1, "streaming", "decoded, it takes 87 MiB, and a node's object store has 174 MiB"),
    ],
    ids=["fits", "a byte too much"],
)
def test_auto_caches_what_fits_into_half_of_an_object_store(roots, monkeypatch, spare, feed, why):
    chosen = []
    monkeypatch.setattr(build, "decoded_bundle", lambda config, *_: chosen.append("cached") or _empty(config))
    monkeypatch.setattr(build, "_streamed", lambda config, *_: chosen.append("streaming") or _empty(config))
    monkeypatch.setattr(build, "_object_store_bytes", lambda: 2 * NUM_IMAGES * 3 * 2**20 + spare)

    bundle = build_data(data_config("image_folder", roots / "image_folder", image_size=1024))

    assert (bundle.feed, bundle.why, chosen) == (feed, why, [feed])


def _empty(config):
    return build.DataBundle({}, build.make_info(config, ["a", "b"], {"train": 1}))


def test_the_smallest_object_store_of_the_nodes_that_live_counts(monkeypatch):
    def node(alive, **resources):
        return {"Alive": alive, "Resources": resources}

    nodes = [
        node(True, object_store_memory=3e9), node(True, object_store_memory=2e9), node(False, object_store_memory=1e9)
    ]  # fmt: skip
    monkeypatch.setattr(build.ray, "nodes", lambda: nodes)
    assert build._object_store_bytes() == 2e9


@pytest.mark.parametrize("feed", ["streaming", "auto"])
def test_rows_of_parquet_are_not_streamed_without_a_window(roots, monkeypatch, feed):
    monkeypatch.setattr(build, "_object_store_bytes", lambda: 3.5 * 2**30 if feed == "streaming" else 100)

    with pytest.raises(
        DataError, match=r"data\.shuffle_window is not set, .* data\.name=parquet .* data\.shuffle_window=8"
    ):
        build_data(data_config("parquet", roots / "parquet", feed=feed))


def test_rows_of_parquet_are_evaluated_in_their_order_without_a_window(roots):
    config = data_config("parquet", roots / "parquet")
    bundles = [build_data(replace(config, feed=feed), only_evaluates=True) for feed in ("streaming", "cached")]
    taken = []
    for bundle in bundles:
        samples = np.arange(bundle.info.num_samples["train"])
        with stream.bundle_rows(bundle, "train", 1, pytest.fail).open(iter([request(samples, samples)])) as take:
            taken.append(take(samples))
    assert np.array_equal(taken[0].images, taken[1].images)
    assert np.array_equal(taken[0].labels, taken[1].labels)


def test_the_feed_that_is_named_is_taken_whatever_the_sizes(roots, monkeypatch):
    monkeypatch.setattr(build, "_object_store_bytes", lambda: 3.5 * 2**30)
    bundle = build_data(data_config("image_folder", roots / "image_folder", feed="streaming"))
    assert bundle.feed == "streaming"
    assert bundle.why == "as data.feed says; decoded, it takes 0 MiB, and a node's object store has 3.5 GiB"


def test_what_is_in_memory_as_a_whole_is_not_streamed():
    config = data_config("synthetic", num_samples=4, num_classes=2)
    assert build_data(config).why == "data.name=synthetic is held in memory"
    config.feed = "streaming"
    with pytest.raises(DataError, match=r"data\.feed=streaming, but data\.name=synthetic is held in memory"):
        build_data(config)


def test_blocks_count_what_is_left_of_them_after_bad_rows_are_skipped(tmp_path):
    content = [encoded(pixels) for pixels in IMAGES[:12]]
    for bad in (0, 3, 5, 11):
        content[bad] = b"no image"
    write_parquet(tmp_path / "a.parquet", content, LABELS[:12], row_group_size=4)
    config = data_config("parquet", tmp_path, on_bad_sample="skip", val_fraction=0, test_fraction=0)

    bundle = build_data(config)

    assert bundle.blocks.tolist() == [2, 3, 3]
    assert bundle.blocks.sum() == bundle.info.num_samples["train"] == 8
    assert len(bundle.info.bad_samples) == 4


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_window_needs_a_source_that_is_read_in_blocks(roots, monkeypatch, in_memory):
    found = build_data(data_config("synthetic", num_samples=4, num_classes=2))
    if not in_memory:
        found = sources.get("image_folder")(data_config("image_folder", roots / "image_folder"))
    monkeypatch.setattr(build.sources, "get", lambda name: lambda config: found)
    with pytest.raises(DataError, match=r"data\.shuffle_window=4, but data\.name=own is not read in blocks"):
        build_data(data_config("own", shuffle_window=4))


def test_few_processes_read_however_many_blocks_are_asked_for():
    def fetch(block):  # slow, so that other blocks are requested meanwhile
        time.sleep(1)
        return os.getpid()

    cache = ray.remote(num_cpus=0)(BlockCache).remote(fetch, 12)
    readers = ray.get(ray.get(cache.refs.remote(list(range(12)))))
    assert 1 <= len(set(readers)) <= 4  # two per CPU of this Ray, which has two


@pytest.mark.parametrize("num_cpus", [None, 1])
def test_decode_cpus_count_while_data_is_cached_too(roots, monkeypatch, num_cpus):
    sizes = []
    made = decoding.TaskPoolStrategy

    def pool(size):
        sizes.append(size)
        return made(size)

    monkeypatch.setattr(decoding, "TaskPoolStrategy", pool)
    build_data(data_config("image_folder", roots / "image_folder", feed="cached", decode_cpus=num_cpus))
    assert set(sizes) == {num_cpus}


@pytest.mark.parametrize("name", ["image_folder", "image_list", "parquet", "webdataset"])
def test_other_names_or_labels_give_another_digest_and_another_place_the_same(tmp_path, name):
    def digest(directory):
        return sources.get(name)(data_config(name, tmp_path / directory / name)).digest

    for directory, labels in (("first", [0, 1] * 3), ("second", [0, 1] * 3), ("third", [1, 0, 0, 1, 0, 1])):
        write_layouts(tmp_path / directory, [picture(number) for number in range(6)], labels)
    first = digest("first")
    assert len(first) == 64
    assert digest("second") == first
    assert digest("third") != first
    if name == "image_folder":
        (tmp_path / "second" / name / "0" / "02.png").rename(tmp_path / "second" / name / "0" / "06.png")
        assert digest("second") != first
