"""`python -m ftexp.data`: its counts, measures, names and drawings are compared with values computed here."""

import re

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ftexp.data.order import SampleOrder, derive_seed
from ftexp.data.stratify import stratified_split

SEED = 3
ORDER = 1  # random stream of the run's seed for the order; see ftexp.job.build
TILE, LEFT, TOP, STEP_X, STEP_Y, MARGIN = 64, 16, 65, 72, 89, 16  # layout of the picture for tiny images


@pytest.fixture
def look(ftexp):
    """Function that runs the command and returns (exit code, output)."""

    def run(*words, **options):
        command = ftexp(f"seed={SEED}", "augment=none", *words, module="data", **options)
        return command.wait(), command.output

    return run


def cells(output, name):
    """Return the numbers in a row of the table."""
    (row,) = [line for line in output.splitlines() if re.match(rf"{re.escape(name)} +[\d.]+ ", line)]
    return row.removeprefix(name).split()


def rounded(values):
    return [f"{value:.4f}" for value in values]


def first_sample(num_samples):
    return int(SampleOrder(derive_seed(SEED, ORDER), num_samples).samples(np.array([0]))[0])


def tile(path, number):
    column, row = number % 8, number // 8
    x, y = LEFT + column * STEP_X, TOP + row * STEP_Y
    return np.asarray(Image.open(path))[y : y + TILE, x : x + TILE]


def enlarged(image):
    """Return an image [size, size, channels] as a tile shows it."""
    times = TILE // len(image)
    return np.broadcast_to(image.repeat(times, axis=0).repeat(times, axis=1), (TILE, TILE, 3))


def sheet_size(rows):
    return (2 * MARGIN + 8 * STEP_X - 8, TOP + rows * STEP_Y - 8 + MARGIN)


def test_digits_are_counted_measured_and_drawn_as_they_are(look, tmp_path):
    code, output = look()

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    train, val, test = stratified_split(labels, (0.1, 0.2), 0)
    assert code == 0, output
    assert f"samples  {len(train):,} train · {len(val)} val · {len(test)} test · 10 classes" in output
    for digit in range(10):
        assert cells(output, str(digit)) == [str((labels[part] == digit).sum()) for part in (train, val, test)]
    scaled = pixels[train] / 255
    (mean,), (std,) = rounded([scaled.mean()]), rounded([scaled.std()])
    assert cells(output, "grey") == [mean, "0.3053", std, "0.3760"]
    assert "differ by more" not in output
    assert "feed     cached: data.name=digits is held in memory" in output
    assert "decoding nothing to decode" in output
    assert "bad      none" in output
    picture = tmp_path / "digits_samples.png"
    assert Image.open(picture).size == sheet_size(rows=8)
    assert np.array_equal(tile(picture, 0), enlarged(pixels[train][first_sample(len(train))]))


def test_a_torn_file_is_named_and_left_out_of_all_that_is_measured_and_drawn(look, tmp_path):
    rng = np.random.default_rng(0)
    names, labels = ("ant", "bee[s]"), np.repeat([0, 1], [12, 8])
    images = rng.integers(0, 120, (20, 16, 16, 3), np.uint8)
    paths = [tmp_path / "photos" / names[label] / f"{number:02}.png" for number, label in enumerate(labels)]
    for path, image in zip(paths, images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    train, val, test = stratified_split(labels, (0.2, 0.2), 0)
    torn, good = train[3], np.delete(train, 3)
    paths[torn].write_bytes(paths[torn].read_bytes()[:200])
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    Image.fromarray(images[good[0]][::-1, ::-1]).save(paths[good[0]], exif=exif)
    clear = np.dstack([images[good[1]], np.full((16, 16), 0, np.uint8)])
    Image.fromarray(clear).save(paths[good[1]])
    images[good[1]] = 255
    (paths[0].parent / "Thumbs.db").touch()

    overrides = ["data=image_folder", f"data.root={tmp_path / 'photos'}", "data.image_size=16", "model=resnet18"]
    code, output = look(*overrides, "data.val_fraction=0.2", "data.test_fraction=0.2", "out=sheet.png", own_ray=False)

    assert code == 0, output
    assert f"excluded 1 entry: no image extension ({paths[0].parent / 'Thumbs.db'})" in output
    assert "bad      1 sample can't be read:" in output
    assert f"{paths[torn]}: " in output
    assert "training would refuse to start: fix them, or exclude them with data.on_bad_sample=skip" in output
    for label, name in enumerate(names):
        expected = [str((labels[part] == label).sum()) for part in (good, val, test)]
        assert cells(output, name) == expected
    scaled = images[good] / 255
    mean, std = rounded(scaled.mean((0, 1, 2))), rounded(scaled.std((0, 1, 2)))
    for channel, color in enumerate(("red", "green", "blue")):
        assert cells(output, color)[::2] == [mean[channel], std[channel]]
    assert f"add: data.mean=[{','.join(mean)}] data.std=[{','.join(std)}]" in output
    assert re.search(r"decoding [\d,]+ images/s on \d+ CPUs? \(measured on 11 images\)", output)
    assert re.search(
        r"cost     read [\d.]+ ms · decode [\d.]+ ms · crop [\d.]+ ms · augment 0.00 ms, of an image on one CPU", output
    )
    told = "1 rotated by their EXIF data, turned upright · 1 transparent, put on white (of 19 that were read)"
    assert f"images   {told}" in output
    picture = tmp_path / "sheet.png"
    assert Image.open(picture).size == sheet_size(rows=2)
    assert np.array_equal(tile(picture, 0), enlarged(images[good][first_sample(len(good))]))
    assert not list(tmp_path.glob("*_samples.png"))


def test_a_wrong_key_is_told_and_nothing_is_drawn(look, tmp_path):
    code, output = look("data.rot=photos", "out=sheet.png")

    assert code == 2
    assert output.startswith("ftexp: data.rot is not a key. Did you mean 'data.root'?")
    assert not list(tmp_path.glob("*.png"))
