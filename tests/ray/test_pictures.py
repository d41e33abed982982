"""Augmentation of single pictures, in both feeds: a pure function of (seed, position) and the picture."""

import numpy as np
import pytest
import torch

import ftexp.data.feeds.cached
from ftexp.config.schema import AugmentConfig
from ftexp.data import build
from ftexp.data.augment.picture import PictureAugment
from ftexp.data.augment.pixels import Augment
from ftexp.data.build import build_data
from ftexp.data.feeds import streamed as stream
from ftexp.data.feeds.decoding import as_sample
from ftexp.data.feeds.feed import CachedRows, IndexedFeed, ToTensors
from ftexp.data.feeds.streamed import StreamedRows
from ftexp.data.order import SampleOrder
from ftexp.data.plan import ShardPlan
from tests.support.image_files import SIZE, data_config, encoded, put, read_back, write_layouts

pytestmark = pytest.mark.usefixtures("data_ray")

SEED, NUM_IMAGES = 3, 23
EVERYTHING = AugmentConfig(
    crop="rrc",
    hflip=0.5,
    auto_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.4,
    grayscale=0.2,
    gaussian_blur=0.3,
    mixup_alpha=0.2,
)
UNCROPPED = AugmentConfig(hflip=0.5, auto_augment="augmix")


def image(number):
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (int(rng.integers(5, 40)), int(rng.integers(5, 40)), 3), np.uint8)


def as_file(pixels):
    """Encode about every second image as a JPEG, whatever its name says."""
    return encoded(pixels, "JPEG" if pixels[0, 0, 0] % 2 else "PNG")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Directory with the same images, of different sizes, in every layout."""
    directory = tmp_path_factory.mktemp("roots")
    write_layouts(
        directory, [image(number) for number in range(NUM_IMAGES)], [n % 3 for n in range(NUM_IMAGES)], as_file
    )
    return directory


def bundle_of(name, root, feed, augment, **values):
    config = data_config(name, root, feed=feed, **{"val_fraction": 0, "test_fraction": 0} | values)
    return build_data(config, augment)


def never(*_):
    raise AssertionError("nothing is bad or slow here")


def feed_of(bundle, augment, world=1, rank=0, on_bad=never):
    """Return a rank's feed, built as in a worker."""
    pictures = PictureAugment(augment, SEED, bundle.info.fit)
    rows = StreamedRows(bundle.streams["train"], bundle.info, 1, on_bad, never, pictures)
    plan = ShardPlan(6, 1, 50, rank, world, augment.mixes)
    to_tensors = ToTensors(bundle.info, torch.device("cpu"), channels_last=False)
    order = SampleOrder(SEED, len(rows))
    return IndexedFeed(rows, order, plan, to_tensors, Augment(augment, SEED)), to_tensors


def by_position(bundle, augment, world, begin=0):
    """Return {position: pixels, as normalised floats} over all ranks."""
    found = {}
    for rank in range(world):
        feed, _ = feed_of(bundle, augment, world, rank)
        for batch in feed.from_position(begin):
            for micro in batch.micro_batches:
                for pixels, position in zip(micro.images, micro.positions.tolist(), strict=True):
                    assert torch.equal(found.setdefault(position, pixels), pixels)
    return found


def expected(bundle, augment, begin=0):
    """Return the same as `by_position`, by the pure function alone; both feeds number samples equally."""
    split, pictures = bundle.indexed["train"], PictureAugment(augment, SEED, bundle.info.fit)
    items, _ = split.table.get()
    _, to_tensors = feed_of(bundle, augment)
    positions = np.arange(begin, 50)
    samples = SampleOrder(SEED, len(split)).samples(positions)
    entries = split.read(items[samples])
    pixels = [
        pictures(as_sample(get(), bundle.info.fit, not pictures.crops).picture, position)
        for (_, get), position in zip(entries, positions.tolist(), strict=True)
    ]
    return dict(zip(positions.tolist(), to_tensors(np.stack(pixels)), strict=True))


def assert_same(found, other):
    assert found.keys() == other.keys()
    assert all(torch.equal(found[position], other[position]) for position in found)


DECODINGS = {
    "image_folder": {"decoder": "torchvision", "crop_pct": 0.8},
    "parquet": {"crop_pct": 0.8},
    "webdataset": {"decoder": "auto", "decode_size": SIZE},
}


@pytest.mark.parametrize("augment", [EVERYTHING, UNCROPPED], ids=["everything", "uncropped"])
@pytest.mark.parametrize("name", ["image_folder", "parquet", "webdataset"])
def test_both_feeds_give_what_the_function_makes_of_each_position(roots, monkeypatch, name, augment):
    monkeypatch.setattr(stream, "_FIRST_ROWS", 4)
    monkeypatch.setattr(ftexp.data.feeds.cached, "_FILES", 5)
    layouts = roots / name
    window = {"shuffle_window": 2} if name == "parquet" else {}
    streaming = bundle_of(name, layouts, "streaming", augment, **window, **DECODINGS[name])
    cached = bundle_of(name, layouts, "cached", augment, **DECODINGS[name])
    assert (streaming.feed, cached.feed, list(cached.datasets)) == ("streaming", "cached", ["val", "test"])
    wanted = expected(cached, augment)
    assert_same(by_position(streaming, augment, 1), wanted)
    assert_same(by_position(cached, augment, 1), wanted)
    assert_same(by_position(cached, augment, 3), wanted)
    assert_same(by_position(streaming, augment, 2, begin=24), {n: wanted[n] for n in range(24, 50)})


def test_pictures_of_a_source_in_memory_are_cropped_too():
    bundle = build_data(data_config("digits", channels=1, val_fraction=0.5), AugmentConfig(crop="rrc"))
    whole = read_back(build_data(data_config("digits", channels=1, val_fraction=0.5)).datasets["train"])
    samples, augment = SampleOrder(SEED, len(bundle.streams["train"])).samples(np.arange(50)), AugmentConfig(crop="rrc")
    pictures, found = PictureAugment(augment, SEED, bundle.info.fit), by_position(bundle, augment, 1)
    _, to_tensors = feed_of(bundle, augment)
    for position, sample in enumerate(samples.tolist()):
        pixels = pictures(as_sample(whole["image"][sample], bundle.info.fit).picture, position)
        assert torch.equal(to_tensors(np.stack([pixels]))[0], found[position])
    assert len(bundle.streams["train"]) == len(whole["label"])


def test_labels_stay_with_their_pictures(roots):
    cached, plain = (
        bundle_of("image_folder", roots / "image_folder", "cached", augment) for augment in (UNCROPPED, AugmentConfig())
    )
    rows = CachedRows(plain.datasets["train"].iterator())
    feed, _ = feed_of(cached, UNCROPPED)
    for batch in feed.from_position(0):
        for micro in batch.micro_batches:
            assert micro.labels.tolist() == rows.take(batch.samples).labels.tolist()


def test_a_bad_picture_is_skipped_by_a_cached_run_as_ever(tmp_path):
    for number in range(12):
        put(tmp_path / f"{number % 2}" / f"{number:02d}.png", b"torn" if number == 4 else encoded(image(number)))
    told = [
        bundle_of("image_folder", tmp_path, "cached", augment, on_bad_sample="skip")
        for augment in (EVERYTHING, AugmentConfig())
    ]
    assert [len(told[0].pictures), told[1].info.num_samples["train"]] == [11, 11]
    assert told[0].info == told[1].info
    assert len(told[0].info.bad_samples) == 1
    _, labels = told[0].pictures.table.get()
    assert labels.tolist() == read_back(told[1].datasets["train"])["label"].tolist()


def test_auto_counts_the_memory_that_pictures_of_their_own_size_take(tmp_path, monkeypatch):
    for number in range(10):
        put(tmp_path / f"{number % 2}" / f"{number}.png", encoded(np.zeros((64, 32, 3), np.uint8)))
    needed = 10 * 64 * 32 * 3
    monkeypatch.setattr(build, "_object_store_bytes", lambda: 2 * needed)
    assert bundle_of("image_folder", tmp_path, "auto", EVERYTHING).feed == "cached"
    monkeypatch.setattr(build, "_object_store_bytes", lambda: 2 * needed - 1)
    assert bundle_of("image_folder", tmp_path, "auto", EVERYTHING).feed == "streaming"
    assert bundle_of("image_folder", tmp_path, "auto", UNCROPPED).feed == "cached"
    assert SIZE < 32
