"""Write photograph-like JPEGs in classes, made from data in ftexp's dependencies: a glyph anywhere on a photograph.

    uv run python scripts/photo_like.py DIRECTORY [--pictures 5000] [--classes 20] [--size 500 375] [--seed 0]

A class is a glyph, drawn in any weight of Roboto (from Ray's dashboard) or in Pillow's own typeface, in any colour,
slightly rotated and slanted, 0.35 to 0.9 of the picture's height, anywhere in it. The background is a part of one of
scikit-learn's two photographs, at a random scale, flipped and tinted. As in a photograph, position and size of the
object say nothing about its class, and a model that memorises pictures fails on others. No glyph is the mirror image of
another. With the same versions of these packages, a seed always gives the same pixels; picture n of a seed doesn't
depend on the number of pictures. 5,000 of 500x375 take 45 s on 2 cores.
"""

from __future__ import annotations

import argparse
import functools
import io
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGENET = (500, 375)  # width and height of most of ImageNet's photographs
GLYPHS = "AKMRTXHWYGQV4785&@$%#CFJLPOUZ?"  # in the order of the classes
GLYPH_SHARE = (0.35, 0.9)  # share of the picture's height
QUALITY = 95
GRAIN = 10.0  # standard deviation of the camera noise; with it, 500x375 take 110 kB, the average of ImageNet
_CHUNK = 64  # pictures per task of a process


def main() -> None:
    """Write a directory of photographs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--size", type=int, nargs=2, default=IMAGENET, metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    paths = write_photos(options.directory, options.pictures, options.classes, options.size, options.seed)
    print(f"written  {len(paths):,} pictures in {options.classes} classes: {options.directory}")


def write_photos(
    root: Path, count: int, num_classes: int = 20, size: Sequence[int] = IMAGENET, seed: int = 0
) -> list[Path]:
    """Write `count` pictures below `root`, a directory per class; return their paths. One in four is upright."""
    if not 1 < num_classes <= len(GLYPHS):
        raise ValueError(f"{num_classes} classes; there are 2 to {len(GLYPHS)}")
    paths = [root / class_name(number % num_classes) / f"{number:06d}.jpg" for number in range(count)]
    for directory in {path.parent for path in paths}:
        directory.mkdir(parents=True, exist_ok=True)
    numbers = range(count)
    chunks = [numbers[first : first + _CHUNK] for first in numbers[::_CHUNK]]
    write = functools.partial(_write, [str(path) for path in paths], num_classes, tuple(size), seed)
    with ProcessPoolExecutor() as pool:
        list(pool.map(write, chunks))
    return paths


def class_name(number: int) -> str:
    """Return the name of a class's directory."""
    return f"glyph_{number:02d}"


def _write(paths: list[str], num_classes: int, size: tuple[int, int], seed: int, numbers: Sequence[int]) -> None:
    for number in numbers:
        buffer = io.BytesIO()
        photo(number % num_classes, size, seed, number).save(buffer, "JPEG", quality=QUALITY)
        Path(paths[number]).write_bytes(buffer.getvalue())


def photo(label: int, size: tuple[int, int], seed: int, number: int) -> Image.Image:
    """Return picture `number` of this seed, of class `label`; every fourth has width and height swapped."""
    rng = np.random.default_rng([seed, number])
    width, height = size if number % 4 else size[::-1]
    picture = _background(rng, width, height)
    glyph = _glyph(rng, GLYPHS[label], round(height * rng.uniform(*GLYPH_SHARE)))
    scale = min(1.0, 0.95 * width / glyph.width)
    glyph = glyph.resize((max(1, int(glyph.width * scale)), max(1, int(glyph.height * scale))))
    left, top = (int(rng.integers(0, margin + 1)) for margin in (width - glyph.width, height - glyph.height))
    below = np.asarray(picture.crop((left, top, left + glyph.width, top + glyph.height)).resize((1, 1)))[0, 0]
    picture.paste(_colour(rng, below), (left, top), glyph)
    return picture


def _background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Return a random part of a photograph, at a random scale, so that most pixels have a photograph's frequencies."""
    source = _photographs()[int(rng.integers(2))]
    largest = min(source.width / width, source.height / height)
    across = int(width * largest * rng.uniform(0.35, 1.0))
    down = int(across * height / width)
    left, top = int(rng.integers(0, source.width - across + 1)), int(rng.integers(0, source.height - down + 1))
    found = source.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + across, top + down))
    if rng.random() < 0.5:
        found = found.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.25:
        found = found.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    gains = rng.uniform(0.6, 1.2, 3)
    return _with_grain(rng, found.point([min(255, int(value * gain)) for gain in gains for value in range(256)]))


def _with_grain(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Add camera noise, which takes most bytes of a photograph's JPEG: both sources are smooth when enlarged."""
    grain = _grain()
    top, left = (int(rng.integers(0, len(grain) - length)) for length in (picture.height, picture.width))
    pixels = np.asarray(picture).astype(np.int16)
    pixels += grain[top : top + picture.height, left : left + picture.width, None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _glyph(rng: np.random.Generator, glyph: str, height: int) -> Image.Image:
    """Return the glyph's coverage of each pixel, cropped to the glyph: about `height` pixels high."""
    fonts = _fonts()
    font = fonts[int(rng.integers(len(fonts)))]
    left, top, right, bottom = (int(value) for value in font.getbbox(glyph))
    drawn = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(drawn).text((-left, -top), glyph, 255, font)
    slant, turn = rng.uniform(-0.25, 0.25), rng.uniform(-20, 20)
    wider = drawn.width + int(abs(slant) * drawn.height)
    shift = -max(0.0, slant) * drawn.height
    slanted = drawn.transform(
        (wider, drawn.height), Image.Transform.AFFINE, (1, slant, shift, 0, 1, 0), Image.Resampling.BILINEAR
    )
    turned = slanted.rotate(turn, Image.Resampling.BILINEAR, expand=True)
    turned = turned.crop(turned.getbbox())
    shape = max(1, round(turned.width * height / turned.height)), max(1, height)
    return turned.resize(shape, Image.Resampling.BICUBIC)


def _colour(rng: np.random.Generator, below: Any) -> tuple[int, ...]:
    """Return a random colour that contrasts with `below`, an RGB colour."""
    while True:
        colour = rng.integers(0, 256, 3)
        if np.abs(colour - below.astype(int)).sum() > 180:
            return tuple(int(value) for value in colour)


@functools.cache
def _grain() -> Any:
    return np.random.default_rng(0).normal(0, GRAIN, (1024, 1024)).round().astype(np.int16)


@functools.cache
def _photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


@functools.cache
def _fonts() -> list[Any]:
    """Return Ray's and Pillow's typefaces at 256 px; sorted, because the order of the files isn't stable."""
    import ray

    directory = Path(ray.__file__).parent / "dashboard" / "client" / "build"
    files = [str(file) for file in directory.rglob("roboto-latin-*.woff")]
    faces = [ImageFont.truetype(file, 256) for file in files]
    return [*sorted(faces, key=lambda face: face.getname()), ImageFont.load_default(256)]


if __name__ == "__main__":
    main()
