"""Decode rate of this machine."""

from __future__ import annotations

import io
import time

from ftexp.config.machine import usable_cpus
from ftexp.config.schema import Config
from ftexp.config.source_names import can_stream
from ftexp.doctor.finding import Finding, fails, not_here, ok

_SIZE = (500, 375)  # pixels of an average image of ImageNet
_SECONDS = 1.0
_QUALITY = 90


def decode_rate(config: Config, seconds: float = _SECONDS) -> Finding:
    """Measure decoding a JPEG of usual size to data.image_size on one core, with the config's decoder."""
    check = "decode rate"
    if not can_stream(config.data.name):
        return not_here(check, f"data={config.data.name} is held in memory: nothing is decoded")
    from ftexp.data.cropping import Fit, fitted
    from ftexp.data.decoder import Decoding, on_one_thread

    data = config.data
    decoding = Decoding(data.decoder_name, data.decode_size)
    fit = Fit(data.image_size, data.channels, data.crop_pct, data.crop_mode, data.interpolation, tuple(data.mean))
    encoded, count = _jpeg(), 0
    try:
        with on_one_thread(decoding.decoder):
            fitted(decoding(encoded, fit.channels, fit.side).picture, fit)  # the first call also imports
            began = time.perf_counter()
            while (spent := time.perf_counter() - began) < seconds:
                fitted(decoding(encoded, fit.channels, fit.side).picture, fit)
                count += 1
    except Exception as error:  # the kind of error depends on the codec
        return fails(check, f"{type(error).__name__}: {error}", "data.decoder=pillow, or reinstall torchvision")
    width, height = _SIZE
    rate, cpus = count / spent, usable_cpus()
    return ok(check, f"{rate:,.0f} JPEGs of {width}×{height} a second on a core by {decoding.decoder}, of {cpus} cores")


def _jpeg() -> bytes:
    """Return a JPEG that compresses like a photo: gradients with some noise."""
    import numpy as np
    from PIL import Image

    width, height = _SIZE
    noise = np.random.default_rng(0).integers(0, 32, (height, width, 3))
    pixels = np.linspace(0, 200, width)[None, :, None] + noise
    content = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(content, "JPEG", quality=_QUALITY)
    return content.getvalue()
