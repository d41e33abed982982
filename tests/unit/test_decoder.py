"""Decoding: torchvision and Pillow give the same upright, opaque images of 8 bits."""

import hashlib
import io
import itertools
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import sklearn.datasets
import torch
from PIL import Image, ImageOps

from ftexp.config.schema import CROP_MODES, INTERPOLATIONS, AugmentConfig
from ftexp.data import decoder
from ftexp.data.augment.picture import PictureAugment
from ftexp.data.cropping import Fit, RandomCrop, fitted
from ftexp.data.decoder import (
    RESAMPLING,
    Decoding,
    Traits,
    as_pillow,
    on_one_thread,
    plain_jpeg_size,
    scaled,
    size_of,
)
from ftexp.data.feeds import cached
from ftexp.data.feeds.cached import DecodePictures
from ftexp.data.feeds.decoding import Decode, Stored, as_image, as_sample, decode_samples
from ftexp.data.info import IndexedSplit

PILLOW, TORCH = Decoding(), Decoding("torchvision")
BOTH = pytest.mark.parametrize("name", ["pillow", "torchvision"])
SIZES = [(1, 1), (3, 2), (17, 9), (40, 64), (101, 77)]  # width, height


def photo(width, height, channels=3, seed=0):
    """Return a smooth image, as photographs are."""
    small = np.random.default_rng([seed, width, height]).integers(0, 256, (5, 5, channels), np.uint8)
    return Image.fromarray(small[..., 0] if channels == 1 else small).resize((width, height), Image.Resampling.BICUBIC)


def file_of(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(encoded, decoding, channels=3, fitted_to=None):
    return np.asarray(decoding(encoded, channels, fitted_to).picture).squeeze()


JPEGS = {
    "full colour": {"subsampling": 0},
    "half colour": {"subsampling": 1},
    "quarter colour": {"subsampling": 2, "quality": 30},
    "progressive": {"progressive": True},
    "grey": {},
    "of a telephone": {"kind": "MPO", "save_all": True, "append_images": [photo(8, 8)]},
}


@pytest.fixture
def by_torchvision(monkeypatch):
    """List of the images that torchvision decoded, in order; None for each that it didn't."""
    found = []

    def noted(own):
        return lambda *given: found.append(own(*given)) or found[-1]

    for name in ("_by_torchvision", "_torchvision_pixels"):
        monkeypatch.setattr(decoder, name, noted(getattr(decoder, name)))
    return found


# decoding


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_torchvisions_pixels_of_a_jpeg_are_pillows(kind, size, channels, by_torchvision):
    encoded = file_of(photo(*size, 1 if kind == "grey" else 3), **JPEGS[kind])
    np.testing.assert_array_equal(decoded(encoded, TORCH, channels), decoded(encoded, PILLOW, channels))
    assert by_torchvision[0] is not None


OTHERS = {
    "png": file_of(photo(40, 30), "PNG"),
    "png of 16 bits": file_of(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
    "gif": file_of(photo(40, 30).convert("P"), "GIF"),
    "bmp": file_of(photo(40, 30, 1), "BMP"),
    "webp": file_of(photo(40, 30), "WEBP", lossless=True),
    "cmyk jpeg": file_of(photo(40, 30).convert("CMYK")),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_torchvision_does_not_decode_is_pillows(kind, by_torchvision):
    np.testing.assert_array_equal(decoded(OTHERS[kind], TORCH), decoded(OTHERS[kind], PILLOW))
    assert by_torchvision == [None]


def segment(marker, content):
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


HEADS = {
    "full colour": (file_of(photo(40, 30), subsampling=0), True),
    "quarter colour, with a comment": (file_of(photo(40, 30), comment=b"a comment"), True),
    "progressive": (file_of(photo(30, 40), progressive=True), True),
    "grey, with restarts": (file_of(photo(40, 30, 1), restart_marker_rows=1), True),
    "no JFIF": (file_of(photo(40, 30))[:2] + file_of(photo(40, 30))[20:], True),
    "rotated": (file_of(photo(40, 30), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"), False),
    "with a profile": (file_of(photo(40, 30), icc_profile=b"p" * 200), False),
    "of a telephone": (file_of(photo(40, 30), "MPO", save_all=True, append_images=[photo(8, 8)]), False),
    "cut-off JFIF": (file_of(photo(40, 30))[:2] + segment(0xE0, b"JFIF\0") + file_of(photo(40, 30))[20:], False),
    "cmyk": (OTHERS["cmyk jpeg"], False),
    "png": (OTHERS["png"], False),
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_of_a_plain_jpeg_says_what_pillow_says(kind):
    encoded, is_plain = HEADS[kind]
    assert plain_jpeg_size(encoded) == (Image.open(io.BytesIO(encoded)).size if is_plain else None)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_with_any_byte_changed_or_cut_off_is_plain_only_if_pillow_reads_the_same_in_it(kind):
    encoded, _ = HEADS[kind]
    head = encoded[: encoded.find(b"\xff\xda") + 20] if encoded[:2] == b"\xff\xd8" else encoded[:100]
    rng, changed = np.random.default_rng(0), []
    for place in range(len(head)):
        changed += [head[:place], head[:place] + bytes([rng.integers(256)]) + head[place + 1 :]]
        changed.append(
            head[:place] + segment(int(rng.integers(0xC0, 0xFF)), bytes(rng.integers(0, 256, 7))) + head[place:]
        )
    num_plain = 0
    for other in changed:
        if (size := plain_jpeg_size(other)) is not None:
            image = Image.open(io.BytesIO(other))
            assert (image.format, image.size, image.mode in ("L", "RGB")) == ("JPEG", size, True)
            assert not image.getexif()
            assert not image.has_transparency_data
            num_plain += 1
    assert num_plain or plain_jpeg_size(encoded) is None


def test_a_jpeg_of_more_pixels_than_pillow_opens_without_a_warning_is_not_plain(monkeypatch):
    encoded = file_of(photo(40, 30))
    for most, size in ((1200, (40, 30)), (1199, None)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        assert plain_jpeg_size(encoded) == size


def test_a_jpeg_that_torchvision_rejects_is_pillows(monkeypatch):
    encoded = file_of(photo(40, 30))

    def reject(*_):
        raise RuntimeError("Bogus marker length")

    monkeypatch.setattr(torch.ops.image, "decode_jpeg", reject)
    np.testing.assert_array_equal(decoded(encoded, TORCH), decoded(encoded, PILLOW))


def test_a_torchvision_without_its_decoder_changes_nothing(monkeypatch):
    encoded = file_of(photo(40, 30))
    monkeypatch.setattr(torch, "ops", SimpleNamespace(image=SimpleNamespace()))
    np.testing.assert_array_equal(decoded(encoded, TORCH), decoded(encoded, PILLOW))


def test_files_that_are_torn_are_refused_in_the_same_words():
    whole = file_of(photo(64, 48), quality=95)
    for length in (*range(0, len(whole) - 2, 97), len(whole) - 2):
        told = []
        for decoding in (PILLOW, TORCH):
            try:
                decoding(whole[:length], 3)
                told.append(None)
            except Exception as error:
                told.append((type(error), str(error)))
        assert told[0] == told[1]
        assert told[0] is not None or length == len(whole) - 2  # Pillow accepts a file without the last marker


# scaling


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_torchs_scaling_is_pillows_but_for_a_value_in_a_hundred_that_differs_by_one(interpolation):
    crop, draws = RandomCrop("rrc", 24, (0.08, 1.0), (3 / 4, 4 / 3), interpolation), random.Random(0)
    apart = []
    for number in range(60):
        image = photo(160, 120, (1, 3)[number % 2], number)
        box = crop.box(image.size, draws)
        ours, theirs = (
            scaled(picture, (24, 24), RESAMPLING[interpolation], box).astype(int)
            for picture in (TORCH.picture(image), image)
        )
        apart.append(np.abs(ours - theirs).ravel())
    assert np.concatenate(apart).max() == 1
    assert np.concatenate(apart).mean() < 0.01


@pytest.mark.parametrize("crop_pct", [0.5, 0.875, 1.0])
@pytest.mark.parametrize("mode", CROP_MODES)
def test_a_whole_picture_of_any_size_is_fitted_as_by_pillow_but_for_the_last_bits(crop_pct, mode):
    fit = Fit(24, 3, crop_pct, mode, mean=(0.2, 0.4, 0.6))
    for size in SIZES:
        image = photo(*size)
        assert np.abs(fitted(TORCH.picture(image), fit).astype(int) - fitted(image, fit)).max() <= 2


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (41, 24), (24, 24), (100, 50)])
def test_the_largest_square_begins_at_a_whole_pixel(size):
    image, fit = photo(*size), Fit(24)
    left, top = ((length - min(size)) // 2 for length in size)
    square = image.crop((left, top, left + min(size), top + min(size)))
    apart = np.abs(fitted(TORCH.picture(image), fit).astype(int) - np.asarray(square.resize((24, 24))))
    assert apart.max() <= 1


@pytest.mark.parametrize(
    ("size", "fitted_to", "factor"),
    [((400, 199), 50, 1), ((400, 200), 50, 2), ((900, 399), 50, 2), ((400, 400), 50, 4), ((640, 160), 10, 8)],
)
def test_a_jpeg_that_is_fitted_is_decoded_at_the_smallest_scale_that_leaves_twice_its_size(size, fitted_to, factor):
    image = photo(*size)
    encoded = file_of(image)
    found = decoded(encoded, TORCH, fitted_to=fitted_to)
    assert found.shape[:2] == tuple(-(-length // factor) for length in size[::-1])
    drafted = Image.open(io.BytesIO(encoded))
    drafted.draft("RGB", (size[0] // factor, size[1] // factor))
    np.testing.assert_array_equal(found, np.asarray(drafted))
    for whole in (decoded(encoded, TORCH), decoded(encoded, PILLOW, fitted_to=fitted_to)):
        # torchvision without fitted_to, for a part that is cut out, and Pillow, for older runs, decode the full size
        assert whole.shape[:2] == size[::-1]
    assert decoded(file_of(image, "PNG"), TORCH, fitted_to=fitted_to).shape[:2] == size[::-1]


@BOTH
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("decode_size", "factor"), [(None, 1), (152, 1), (151, 2), (60, 4), (4, 8)])
def test_decode_size_bounds_what_parts_are_cut_out_of(name, kind, decode_size, factor):
    decoding, encoded = Decoding(name, decode_size), file_of(photo(401, 303), kind)
    size = size_of(decoding(encoded, 3).picture)
    assert size == (-(-401 // factor), -(-303 // factor))
    assert decoding.num_pixels(encoded) == size[0] * size[1]


# upright


def with_exif(content, kind="JPEG", size=(40, 30)):
    return file_of(photo(*size), kind, exif=content)


def orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes()


@BOTH
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("number", range(1, 9))
def test_an_image_is_turned_upright_as_pillow_turns_it(name, kind, number):
    encoded = with_exif(orientation(number), kind)
    picture, traits = Decoding(name, exif_orientation=True)(encoded, 3)
    np.testing.assert_array_equal(
        np.asarray(picture), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))
    )
    assert (Traits.ROTATED in traits) == (number != 1 and kind != "TIFF")  # Pillow itself rotates TIFFs
    stored, traits = Decoding(name)(encoded, 3)
    np.testing.assert_array_equal(np.asarray(stored), np.asarray(Image.open(io.BytesIO(encoded))))
    assert (Traits.ROTATED in traits) == (number != 1 and kind != "TIFF")


@BOTH
def test_a_photo_that_is_turned_and_scaled_is_both(name):
    encoded = with_exif(orientation(6), size=(400, 300))
    picture = Decoding(name, 50, exif_orientation=True)(encoded, 3).picture
    assert size_of(picture) == (75, 100)


NOTHING = [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", orientation(6)[:-9], orientation(77), b"Exif\0\0no TIFF"]


@BOTH
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])  # Pillow reads JPEG's EXIF data when it opens the file, PNG's later
@pytest.mark.parametrize("content", NOTHING)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_data_that_say_nothing_leave_an_image_as_it_is(name, kind, content):
    encoded = with_exif(content, kind)
    picture, traits = Decoding(name, exif_orientation=True)(encoded, 3)
    np.testing.assert_array_equal(np.asarray(picture), decoded(encoded, PILLOW))
    assert traits == Traits(0)


# transparency

ALPHA = np.broadcast_to(np.linspace(0, 255, 16).astype(np.uint8), (16, 16))
CLEAR = Image.fromarray(np.dstack([np.asarray(photo(16, 16)), ALPHA]))


@BOTH
@pytest.mark.parametrize(("colour", "value"), [("white", 255), ("#204060", (32, 64, 96))])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_transparent_image_is_put_on_the_background(name, colour, value, mode):
    image = CLEAR.convert(mode)
    picture, traits = Decoding(name, background=colour)(file_of(image, "PNG"), 3)
    shown, share = np.asarray(image.convert("RGBA"))[..., :3].astype(float), ALPHA[..., None] / 255
    assert np.abs(np.asarray(picture) - (share * shown + (1 - share) * value)).max() <= 1
    assert traits == Traits.TRANSPARENT


@BOTH
def test_a_transparent_colour_is_the_background(name):
    image = Image.fromarray(np.tile(np.uint8([[10, 200]]), (4, 4)))
    encoded = file_of(image, "PNG", transparency=10)
    np.testing.assert_array_equal(decoded(encoded, Decoding(name, background="white"), 1), np.tile([255, 200], (4, 4)))
    palette = file_of(image.convert("RGB").quantize(2), "GIF", transparency=1)
    assert Decoding(name, background="white")(palette, 3).traits == Traits.TRANSPARENT


@BOTH
def test_transparency_stays_in_four_channels_and_is_dropped_without_a_background(name):
    encoded = file_of(CLEAR, "PNG")
    np.testing.assert_array_equal(decoded(encoded, Decoding(name, background="white"), 4), np.asarray(CLEAR))
    np.testing.assert_array_equal(decoded(encoded, Decoding(name)), np.asarray(CLEAR)[..., :3])


@BOTH
def test_an_opaque_image_with_alpha_is_not_transparent(name):
    opaque = photo(9, 9).convert("RGBA")
    picture, traits = Decoding(name, background="white")(file_of(opaque, "PNG"), 3)
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(opaque)[..., :3])
    assert traits == Traits(0)


# 16 bits


@BOTH
@pytest.mark.parametrize(
    ("bit_depth", "values", "expected"),
    [
        (16, [0, 255, 256, 65535], [0, 0, 1, 255]),
        (12, [0, 15, 16, 4095], [0, 0, 1, 255]),
        (12, [4096, 40000, 100, 1600], [255, 255, 6, 100]),  # values above 12 bits become white
        (8, [0, 7, 255, 256], [0, 7, 255, 255]),
    ],
)
def test_16_bit_grey_is_scaled_by_the_bits_that_are_used(name, bit_depth, values, expected):
    encoded = file_of(Image.fromarray(np.uint16([values, values])), "PNG")
    assert decoded(encoded, Decoding(name, bit_depth=bit_depth), 1).tolist() == [expected, expected]


@pytest.mark.parametrize(("largest", "is_dark"), [(4095, True), (16383, True), (16384, False), (65535, False)])
def test_a_16_bit_image_that_uses_few_of_them_is_dark(largest, is_dark):
    encoded = file_of(Image.fromarray(np.full((5, 5), largest, np.uint16)), "PNG")
    assert (Traits.DARK in TORCH(encoded, 3).traits) == is_dark


# samples


def split_of(values):
    """Return a split as tasks receive it, without Ray."""
    numbers = np.arange(len(values))
    table = SimpleNamespace(get=lambda: (numbers, numbers % 2))
    return IndexedSplit(
        len(values), lambda items: ((f"file {n}", lambda n=n: values[n]) for n in items.tolist()), table, None
    )


FILES = [file_of(photo(60 + 7 * n, 90 - 5 * n, seed=n), ["JPEG", "PNG"][n % 2]) for n in range(6)]


@pytest.mark.parametrize("decoding", [PILLOW, TORCH, Decoding("torchvision", 30)], ids=["pillow", "torchvision", "30"])
@pytest.mark.parametrize("crop_pct", [None, 0.8])
@pytest.mark.parametrize("crop", ["none", "rrc", "rkrr"])
def test_a_picture_that_was_stored_becomes_what_its_file_becomes(decoding, crop_pct, crop):
    fit, split, samples = Fit(24, 3, crop_pct, decoding=decoding), split_of(FILES), np.arange(6)
    augment = PictureAugment(AugmentConfig(crop=crop, vflip=0.5, auto_augment="rand-m9"), 0, fit)
    streamed = Decode(split, fit, augment)({"sample": samples, "position": samples + 50})
    assert streamed["image"].flags.c_contiguous  # otherwise Ray Data copies it, image by image
    table = DecodePictures(split, fit, keep_size=crop != "none")({"sample": samples})
    stored = [
        Stored(np.frombuffer(pixels, np.uint8).reshape(height, -1, 3), crop == "none")
        for pixels, height in zip(table["pixels"].to_pylist(), table["height"].to_pylist(), strict=True)
    ]
    images, _ = decode_samples(split_of(stored), samples, fit, augment, samples + 50)
    np.testing.assert_array_equal(images, streamed["image"].transpose(0, 2, 3, 1))
    assert len({image.tobytes() for image in images}) == 6


@pytest.mark.parametrize("is_final", [False, True])
def test_a_blocks_pictures_are_read_where_they_lie_however_arrow_holds_them(is_final, monkeypatch):
    pictures = [np.asarray(photo(*size, seed=number)) for number, size in enumerate([*SIZES, (9, 9)])]
    pixels, heights = [picture.tobytes() for picture in pictures], [len(picture) for picture in pictures]
    pixels[2], heights[2] = b"", 0  # it couldn't be decoded
    table = cached._table(pixels, heights, np.arange(6), np.arange(6), [""] * 6)
    blocks = [table, table.slice(3), pa.concat_tables([table.slice(0, 4), table.slice(4)])]
    monkeypatch.setattr("ray.get", list)
    reader = cached.StoredPictures(SimpleNamespace(get=lambda: (np.array([0, 6, 9]), blocks)), 3, is_final)
    wanted = {0: 0, 5: 5, 6: 3, 8: 5, 9: 0, 13: 4, 14: 5}  # {item: number of its picture}
    for (where, get), (item, number) in zip(reader(np.array(list(wanted))), wanted.items(), strict=True):
        stored = get()
        np.testing.assert_array_equal(stored.pixels, pictures[number])
        assert (where, stored.is_final) == (f"cached image {item}", is_final)


def test_the_traits_of_samples_come_with_them():
    files = [FILES[0], b"torn", with_exif(orientation(6)), file_of(CLEAR, "PNG")]
    fit = Fit(8, decoding=Decoding("torchvision", exif_orientation=True, background="white"))
    block = Decode(split_of(files), fit)({"sample": np.arange(4)})
    assert block["traits"].tolist() == [0, 0, Traits.ROTATED, Traits.TRANSPARENT]
    assert [bool(error) for error in block["error"]] == [False, True, False, False]


@pytest.mark.parametrize("crop", ["none", "rrc"])
def test_what_each_part_of_a_sample_took_comes_with_it(crop, monkeypatch):
    clock = itertools.count()  # advances by one second at each call
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    augment = PictureAugment(AugmentConfig(crop=crop, vflip=0.5), 0, Fit(8))
    blocks = [
        Decode(split_of([FILES[0], b"torn"]), Fit(8), chosen)({"sample": np.arange(2), "position": np.arange(2)})
        for chosen in (None, augment)
    ]
    assert [block["cost"][0].tolist() for block in blocks] == [[1000, 1000, 1000, 0], [1000] * 4]
    assert [block["cost"][1].tolist() for block in blocks] == [[0] * 4] * 2


def test_an_error_while_augmenting_names_the_sample(monkeypatch):
    augment = PictureAugment(AugmentConfig(crop="rrc"), 0, Fit(8))

    def fail(*_):
        raise ZeroDivisionError("of timm's")

    monkeypatch.setattr(augment, "changed", fail)
    with pytest.raises(RuntimeError) as raised:
        decode_samples(split_of(FILES), np.array([4]), Fit(8), augment, np.array([9]))
    assert str(raised.value) == "file 4: augmenting it for position 9 failed: ZeroDivisionError: of timm's"


def test_an_array_of_a_source_is_what_models_see_whatever_the_crop():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for decoding in (PILLOW, TORCH):
        np.testing.assert_array_equal(as_image(pixels, Fit(8, 3, 0.5, decoding=decoding)), pixels)


@pytest.mark.parametrize("fails", [False, True])
def test_torch_has_one_thread_while_it_decodes_and_as_many_as_before_then(fails, monkeypatch):
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        try:
            with on_one_thread("torchvision"):
                seen.append(torch.get_num_threads())
                assert not fails
        except AssertionError:
            pass
        assert [*seen, torch.get_num_threads()] == [1, 3]
    finally:
        torch.set_num_threads(before)


def test_100_pictures_by_torchvision_have_the_pixels_that_they_had():
    """If a new version of torch changes them, resumed runs continue with other pixels than they started with."""
    directory = Path(sklearn.datasets.__file__).parent / "images"
    photos = [(directory / name).read_bytes() for name in ("china.jpg", "flower.jpg")]
    fit, digest = Fit(24, 3, mean=(0.2, 0.4, 0.6), decoding=TORCH), hashlib.sha256()
    augment = PictureAugment(AugmentConfig(crop="rrc", hflip=0.5), 1, fit)
    for position in range(100):
        digest.update(augment(as_sample(photos[position % 2], fit, is_whole=False).picture, position).tobytes())
    for encoded in photos:
        digest.update(as_image(encoded, fit).tobytes())
    assert digest.hexdigest() == "71f75f7fd48ba70b5b434621b00459bf6e48b30b2ffd16057d4c379a97535a4d"


def test_pillow_and_back_changes_no_pixel():
    for channels in (1, 3):
        pixels = np.asarray(photo(7, 5, channels)).reshape(5, 7, channels)
        np.testing.assert_array_equal(decoder.pixels_of(as_pillow(pixels)), pixels)
