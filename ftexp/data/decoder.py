"""Decoding of images to pixels and scaling of pixels, by the definitions that `data.decoder` names.

pillow       Pillow decodes and scales; pictures are Pillow images until they have their final size.
torchvision  Pillow reads the header. torchvision decodes 8-bit grey and RGB JPEGs; Pillow decodes all other images and
             those that torchvision rejects, with the same pixels. torch scales, with antialiasing, in uint8: in photos,
             0.4 % of values differ from Pillow's by 1. A JPEG that is fitted as a whole is decoded at 1/2, 1/4 or 1/8
             of its size, by libjpeg's scaling, if its shorter side is then at least twice the side after scaling.

The meaning of a name never changes, since runs resume with the decoder that they started with: a different definition
gets a new name. Only the definition torchvision imports torch.
"""

from __future__ import annotations

import contextlib
import enum
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from ftexp.config.schema import PILLOW, TORCHVISION

if TYPE_CHECKING:
    import torch

UInt8s = npt.NDArray[np.uint8]
Picture = Image.Image | UInt8s  # a Pillow image, or torchvision's pixels [height, width, channels]; any size

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_TORCHS = {resampling: name for name, resampling in RESAMPLING.items()}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_JPEG = ("JPEG", "MPO")  # Pillow's format names; phones write MPO
_DECODED_MODES = ("L", "RGB")  # Pillow modes of images that torchvision decodes
_FACTORS = (8, 4, 2)  # factors by which libjpeg can shrink
# minimum ratio of the decoded shorter side to its final size. With 2, the PSNR relative to full decoding is at least
# 48 dB; with 1, it is 25 to 47 dB, since torch's antialiasing filter has little or nothing left to do
_KEPT = 2
_DARK = 64  # if no pixel of a 16-bit image, scaled to 0..255, reaches this, the image uses 14 bits or fewer
_UNCHANGED = 0  # torchvision's ImageReadMode.UNCHANGED
# JPEG markers after 0xFF (T.81, table B.1): frames, sequential and progressive; scan; quantization tables; JFIF segment
_START = b"\xff\xd8"
_SOFS, _SOS, _DQT, _APP0 = (0xC0, 0xC2), 0xDA, 0xDB, 0xE0
_SKIPPED = (0xC4, 0xDD, 0xFE)  # Huffman tables, restart interval, comment
_JFIF_BYTES = 14  # minimum length of a JFIF segment
_TABLE_BYTES = 65  # length of an 8-bit quantization table
# EXIF orientation -> transposition that makes the image upright; orientation 1 is upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Traits(enum.IntFlag):
    """Properties of an image that users may not expect of it."""

    ROTATED = 1  # its EXIF orientation isn't upright
    TRANSPARENT = 2  # it has transparent pixels, which were put on `data.background`
    DARK = 4  # it uses few of its 16 bits: see `data.bit_depth`


@dataclass(frozen=True)
class Decoding:
    """`data.decoder` and the other decoding settings; the defaults are the behaviour of runs older than the settings.

    A call raises whatever a codec raises on bytes that it can't read.
    """

    decoder: str = PILLOW
    decode_size: int | None = None
    exif_orientation: bool = False
    background: str | None = None
    bit_depth: int = 16

    def __call__(self, encoded: bytes, channels: int, fitted_to: int | None = None) -> Decoded:
        """Decode an image in any format that Pillow reads.

        fitted_to: length to which the shorter side of a whole image will be scaled; None: the image will be cropped, so
        it keeps its size, unless `decode_size` is set.
        """
        if self.decoder == TORCHVISION and (size := plain_jpeg_size(encoded)) is not None:
            is_full = self._factor(size, True, fitted_to) == 1
            if is_full and (pixels := _torchvision_pixels(encoded)) is not None:
                return Decoded(_with_channels(pixels, channels), Traits(0))
        with opened(encoded) as image:
            factor, traits = self._factor(image.size, image.format in _JPEG, fitted_to), Traits(0)
            if self.decoder == TORCHVISION and factor == 1 and (pixels := _by_torchvision(image, encoded)) is not None:
                picture: Picture = _with_channels(pixels, channels)
            else:
                picture, traits = self._by_pillow(image, channels, factor)
            turn = _turn(image)  # after decoding, since Pillow makes a TIFF upright itself
        if turn is not None:
            traits |= Traits.ROTATED
            picture = _turned(picture, turn) if self.exif_orientation else picture
        return Decoded(self.picture(picture), traits)

    def picture(self, picture: Picture) -> Picture:
        """Convert a picture to this decoder's type: a Pillow image, or pixels."""
        if self.decoder == TORCHVISION:
            return pixels_of(picture)
        return picture if isinstance(picture, Image.Image) else as_pillow(picture)

    def num_pixels(self, encoded: bytes) -> int:
        """Return the number of pixels of an image decoded for cropping; reads only its header."""
        with opened(encoded) as image:
            factor = self._factor(image.size, image.format in _JPEG, None)
            return -(-image.width // factor) * -(-image.height // factor)

    def _factor(self, size: tuple[int, int], is_jpeg: bool, fitted_to: int | None) -> int:
        """Return the factor by which an image of this size is shrunk during decoding."""
        min_size = self.decode_size
        if fitted_to is not None:
            if self.decoder != TORCHVISION or not is_jpeg:
                return 1
            min_size = _KEPT * fitted_to
        return next((factor for factor in _FACTORS if min_size is not None and min(size) >= factor * min_size), 1)

    def _by_pillow(self, image: Image.Image, channels: int, factor: int) -> tuple[Image.Image, Traits]:
        traits = Traits(0)
        if factor > 1 and image.format in _JPEG:
            image.draft(image.mode, (image.width // factor, image.height // factor))
            factor = 1
        if image.mode[0] in "IF":
            image = Image.fromarray(_high_bits(image, self.bit_depth))
            if image.getextrema()[1] < _DARK:  # type: ignore[operator]  # of one channel
                traits |= Traits.DARK
        if self.background is not None and channels != 4 and (clear := _transparent(image)) is not None:
            traits |= Traits.TRANSPARENT
            image = Image.alpha_composite(Image.new("RGBA", image.size, self.background), clear)
        image = image.convert(_MODES[channels])
        return (image.reduce(factor) if factor > 1 else image), traits


class Decoded(NamedTuple):
    """A decoded image."""

    picture: Picture
    traits: Traits


def opened(encoded: bytes) -> Image.Image:
    """Open an image with Pillow, which reads only its header."""
    try:
        return Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError:  # Pillow's message contains a memory address, which differs each time
        raise UnidentifiedImageError("no format that Pillow reads") from None


def _transparent(image: Image.Image) -> Image.Image | None:
    """Return the image as RGBA; None if it has no transparent pixel."""
    if not image.has_transparency_data:
        return None
    clear = image.convert("RGBA")
    return clear if clear.getchannel("A").getextrema()[0] < 255 else None  # type: ignore[operator]


def _by_torchvision(image: Image.Image, encoded: bytes) -> UInt8s | None:
    """Return the pixels of an 8-bit grey or RGB JPEG; None for other images, or if torchvision rejects it."""
    if image.format not in _JPEG or image.mode not in _DECODED_MODES:
        return None
    return _torchvision_pixels(encoded)


def _torchvision_pixels(encoded: bytes) -> UInt8s | None:
    import torch
    import torchvision  # noqa: F401 - registers the operator

    try:
        # the operator, since torchvision 0.29 deprecates the function; without the operator, Pillow decodes the same
        found = torch.ops.image.decode_jpeg(_tensor(np.frombuffer(encoded, np.uint8)), _UNCHANGED, False)
        return pixels_of(found.permute(1, 2, 0).numpy())
    except (AttributeError, RuntimeError):
        return None


def plain_jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Return (width, height) of an upright 8-bit grey or RGB JPEG; None if this function can't determine it.

    It takes a tenth of Pillow's time. It knows only the segments that most files have, and requires them to be complete
    and contiguous. Pillow handles all other headers, for example with EXIF data, and reports errors in them.
    """
    if not encoded.startswith(_START):
        return None
    size: tuple[int, int] | None = None
    place, end = len(_START), len(encoded)
    while place + 4 <= end and encoded[place] == 0xFF:
        marker, body = encoded[place + 1], place + 4
        place += 2 + (encoded[place + 2] << 8 | encoded[place + 3])
        if place < body or place > end:
            return None
        if marker in _SOFS and size is None and place >= body + 6 and encoded[body] == 8:
            components = encoded[body + 5]
            if components not in (1, 3) or place != body + 6 + 3 * components:
                return None
            height, width = encoded[body + 1] << 8 | encoded[body + 2], encoded[body + 3] << 8 | encoded[body + 4]
            size = width, height
        elif marker == _SOS:
            is_known = size is not None and 0 < size[0] * size[1] <= (Image.MAX_IMAGE_PIXELS or 0)
            return size if is_known else None
        elif marker == _APP0:
            if encoded[body : body + 5] != b"JFIF\0" or place < body + _JFIF_BYTES:
                return None
        elif marker == _DQT:
            if (place - body) % _TABLE_BYTES or max(encoded[body:place:_TABLE_BYTES], default=0) > 3:
                return None
        elif marker not in _SKIPPED:
            return None
    return None


def _tensor(values: UInt8s) -> torch.Tensor:
    """Return a tensor that shares memory with `values`; read-only values are copied, since torch would warn."""
    import torch

    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _with_channels(pixels: UInt8s, channels: int) -> UInt8s:
    """Convert between grey and colour as Pillow does."""
    if pixels.shape[2] == channels:
        return pixels
    if (pixels.shape[2], channels) == (1, 3):
        return np.repeat(pixels, 3, axis=2)
    return pixels_of(as_pillow(pixels).convert(_MODES[channels]))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that makes an image upright; None if it is upright or its EXIF data can't be read."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever Pillow raises on corrupt EXIF data; the pixels may be intact
        return None


def _turned(picture: Picture, turn: Image.Transpose) -> Picture:
    if isinstance(picture, Image.Image):
        return picture.transpose(turn)
    match turn:
        case Image.Transpose.FLIP_LEFT_RIGHT:
            picture = picture[:, ::-1]
        case Image.Transpose.FLIP_TOP_BOTTOM:
            picture = picture[::-1]
        case Image.Transpose.ROTATE_180:
            picture = picture[::-1, ::-1]
        case Image.Transpose.TRANSPOSE:
            picture = picture.swapaxes(0, 1)
        case Image.Transpose.TRANSVERSE:
            picture = picture[::-1, ::-1].swapaxes(0, 1)
        case Image.Transpose.ROTATE_90:
            picture = picture.swapaxes(0, 1)[::-1]
        case Image.Transpose.ROTATE_270:
            picture = picture[::-1].swapaxes(0, 1)
    return np.ascontiguousarray(picture)


def _high_bits(image: Any, bit_depth: int) -> UInt8s:
    """Convert 16-bit grey to the high 8 of `bit_depth` bits; Pillow's own conversion clips all values above 255."""
    if not image.mode.startswith("I;16"):
        raise ValueError(f"pixels of Pillow's mode {image.mode}, whose range isn't known")
    pixels: UInt8s = np.minimum(np.asarray(image).astype(np.uint16) >> (bit_depth - 8), 255).astype(np.uint8)
    return pixels


def size_of(picture: Picture) -> tuple[int, int]:
    """Return (width, height)."""
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[1], picture.shape[0])


def pixels_of(picture: Picture) -> UInt8s:
    """Return a picture's pixels, [height, width, channels]."""
    pixels: UInt8s = np.asarray(picture, np.uint8)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def as_pillow(pixels: UInt8s) -> Image.Image:
    """Return pixels [height, width, channels] as a Pillow image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def scaled(
    picture: Picture,
    size: tuple[int, int],
    resampling: Image.Resampling,
    box: tuple[int, int, int, int] | None = None,
) -> UInt8s:
    """Scale a picture, or a box of it, to (width, height) `size`; returns [height, width, channels].

    box: (left, top, right, bottom), within the picture.
    """
    if isinstance(picture, Image.Image):
        return pixels_of((picture if box is None else picture.crop(box)).resize(size, resampling))
    if box is not None:
        left, top, right, bottom = box
        picture = picture[top:bottom, left:right]
    if size_of(picture) == size:
        return picture
    from torch.nn.functional import interpolate

    # the memory layout is channels last, which torch keeps: this saves a copy of input and output
    planes = _tensor(np.ascontiguousarray(picture))[None].permute(0, 3, 1, 2)
    width, height = size
    found = interpolate(planes, (height, width), mode=_TORCHS[resampling], antialias=True)
    return np.ascontiguousarray(found[0].permute(1, 2, 0).numpy())


@contextlib.contextmanager
def on_one_thread(decoder: str) -> Iterator[None]:
    """Limit torch to one thread in the context: a task has one CPU, but its process may have many threads."""
    if decoder != TORCHVISION:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)  # Ray may reuse this process for a training worker
