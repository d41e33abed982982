"""Checks of augmentation: mixing, repeats, views, and changes of single images.

Each check yields one message per mistake; `validate` runs them.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from typing import Any

from ftexp.config.checks.wording import unused
from ftexp.config.schema import CROPS, AugmentConfig, Config
from ftexp.registry import did_you_mean

# timm's syntax of each policy, by the policy's name
_SPREAD = r"mstd\d+(\.\d+)?"
_AUTO_AUGMENT = {
    "rand": re.compile(rf"rand(-(m\d+|n[1-9]\d*|p(0|1|0\.\d+|1\.0+)|{_SPREAD}|mmax\d+|inc[01]|t\w+))*"),
    "augmix": re.compile(rf"augmix(-(m\d+|w[1-9]\d*|d\d+|a([1-9]\d*(\.\d+)?|0\.0*[1-9]\d*)|b[01]|{_SPREAD}))*"),
    **{name: re.compile(rf"{name}(-{_SPREAD})?") for name in ("original", "originalr", "v0", "v0r", "3a")},
}
_ADVICE = {
    "rand": (
        "write rand-m9-n2-mstd0.5-inc1, where m is the magnitude, n the operations, mstd its spread, p the probability "
        "of each, inc1 for operations that grow stronger with m"
    ),
    "augmix": (
        "write augmix-m3-w3, where m is the magnitude, w the chains, d the operations of each, a the alpha of their "
        "weights, b1 to blend, mstd the magnitude's spread"
    ),
    "others": "only mstd may follow the policy: for example original-mstd0.5",
}
_RAND_AUGMENT_SETS = ("weights", "3a", "3aw")
_USUAL_LIMITS = {"scale": "[0.08,1]", "ratio": "[0.75,1.33]"}
_MAX_HUE = 0.5  # half the colour circle
# fields that can make the views of a sample differ
_BY_VIEW = ("auto_augment", "color_jitter", "grayscale", "gaussian_blur", "custom", "erase_prob")
_WITHOUT_VIEWS = {
    "mixup_alpha": "samples of several views aren't mixed, as in timm; set it to 0",
    "cutmix_alpha": "samples of several views aren't mixed, as in timm; set it to 0",
    "brightness": "it is the same for all views; set it to 0, and augment.color_jitter",
    "rand_augment": "it is the same for all views; set it to null, and augment.auto_augment",
}


def check_augment(config: Config) -> Iterator[str]:
    """Check mixing, erasing and RandAugment."""
    augment = config.augment
    if augment.mixes:
        if config.train.global_batch_size < 2:
            yield (
                "augment.mixup_alpha and augment.cutmix_alpha mix two samples, but train.global_batch_size=1: raise it"
            )
        if not (augment.mixup_alpha and augment.cutmix_alpha):
            yield from unused(augment, "augment", ("mix_switch_prob",), "needs both mixup_alpha and cutmix_alpha")
    else:
        names = ("mix_prob", "mix_switch_prob", "mix_mode", "mixup_off_epoch")
        yield from unused(augment, "augment", names, "needs augment.mixup_alpha or augment.cutmix_alpha above 0")
    if augment.mixup_off_epoch and augment.mixup_off_epoch >= config.train.epochs:
        yield (
            f"augment.mixup_off_epoch={augment.mixup_off_epoch} is after the last epoch, "
            f"{config.train.epochs - 1} (train.epochs={config.train.epochs}): lower it, or set null to mix to the end"
        )
    if not augment.erase_prob:
        yield from unused(augment, "augment", ("erase_mode", "erase_count"), "needs augment.erase_prob above 0")
    if augment.rand_augment is not None:
        yield from _auto_augment_problems("augment.rand_augment", augment.rand_augment, ("rand",))
        if config.data.channels not in (1, 3):
            yield (
                f"augment.rand_augment={augment.rand_augment} needs grey or RGB images, but data.channels="
                f"{config.data.channels}: remove it"
            )


def check_repeats(config: Config) -> Iterator[str]:
    """Check repeated augmentation."""
    augment, batch = config.augment, config.train.global_batch_size
    repeats = augment.repeats
    if repeats == 1:
        return
    if not augment.is_random:
        yield f"augment.repeats={repeats} repeats samples that no augmentation changes: set augment.repeats=1"
    minimum = 2 * repeats if augment.mixes else repeats
    if batch < minimum:
        why = "a sample would be mixed with itself" if augment.mixes else "a global batch has fewer samples"
        yield f"augment.repeats={repeats} with train.global_batch_size={batch}: {why}; raise it to {minimum} at least"


def check_splits(config: Config) -> Iterator[str]:
    """Check the views of a sample and the loss that compares them."""
    augment, loss, splits = config.augment, config.loss.name, config.augment.splits
    if loss == "jsd" and splits == 1:
        yield "loss.name=jsd compares views of each sample, but augment.splits=1: set, for example, augment.splits=3"
    if splits == 1:
        return
    given = f"augment.splits={splits}"
    if loss != "jsd":
        yield (
            f"{given} makes views of each sample, but loss.name={loss} does not compare them: set loss=jsd, or "
            "augment.splits=1"
        )
    if not any(_is_set(augment, name) for name in _BY_VIEW):
        yield f"{given}: no augmentation makes the views differ; set, for example, augment.auto_augment=augmix-m3"
    for name, advice in _WITHOUT_VIEWS.items():
        if _is_set(augment, name):
            yield f"augment.{name}={getattr(augment, name)} with {given}: {advice}"


def check_pictures(config: Config) -> Iterator[str]:
    """Check the augmentation of single images."""
    augment = config.augment
    if augment.auto_augment is not None:
        yield from _auto_augment_problems("augment.auto_augment", augment.auto_augment, tuple(_AUTO_AUGMENT))
    if augment.crop == "none":
        yield from unused(augment, "augment", ("scale", "ratio"), f"needs augment.crop={' or '.join(CROPS[1:])}")
        if augment.auto_augment is None:
            yield from unused(augment, "augment", ("interpolation",), "needs augment.crop or augment.auto_augment")
    elif augment.pad_px:
        yield f"augment.pad_px={augment.pad_px} conflicts with augment.crop={augment.crop}: set augment.pad_px=0"
    for name, maximum in (("scale", 1.0), ("ratio", sys.float_info.max)):
        limits = getattr(augment, name)
        if limits is not None and not (len(limits) == 2 and 0 < limits[0] <= limits[1] <= maximum):
            at_most = " and at most 1" if name == "scale" else ""
            yield (
                f"augment.{name}={limits} must be [min, max], both above 0{at_most}, the smaller first: for example "
                f"augment.{name}={_USUAL_LIMITS[name]}"
            )
    yield from _jitter_problems(augment)
    if augment.custom and not config.plugins:
        yield f"augment.custom names {', '.join(augment.custom)}, but no plug-in is imported: add plugins=[...]"
    if not augment.changes_pictures:
        return
    if augment.rand_augment is not None:
        yield (
            f"augment.rand_augment={augment.rand_augment} conflicts with augmentation during decoding: set "
            f"augment.rand_augment=null augment.auto_augment={augment.rand_augment}"
        )
    if config.data.channels not in (1, 3):
        names = ("crop", "vflip", "auto_augment", "color_jitter", "grayscale", "gaussian_blur", "custom")
        given = [f"augment.{name}={getattr(augment, name)}" for name in names if _is_set(augment, name)]
        yield f"{' and '.join(given)} needs grey or RGB images, but data.channels={config.data.channels}: remove it"


def _auto_augment_problems(key: str, words: str, policies: tuple[str, ...]) -> Iterator[str]:
    """Yield a message for each part of `words` that timm can't parse."""
    policy = words.partition("-")[0]
    if policy not in policies:
        begins = f"it begins with none of {', '.join(policies)}.{did_you_mean(policy, policies)}"
        yield f"{key}={words} can't be read: {begins if len(policies) > 1 else _ADVICE['rand']}"
        return
    if not _AUTO_AUGMENT[policy].fullmatch(words):
        yield f"{key}={words} can't be read: {_ADVICE.get(policy, _ADVICE['others'])}"
    for name in re.findall(r"-t(\w+)", words) if policy == "rand" else ():
        if name not in _RAND_AUGMENT_SETS:
            yield f"{key}={words}: t{name} is not one of timm's sets: t" + ", t".join(_RAND_AUGMENT_SETS)


def _jitter_problems(augment: AugmentConfig) -> Iterator[str]:
    given = augment.color_jitter
    if given is None:
        yield from unused(augment, "augment", ("color_jitter_prob",), "needs augment.color_jitter")
        return
    values = given if isinstance(given, list) else [given] * 3
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if not (numbers and len(values) in (3, 4) and all(0 <= value < math.inf for value in values)):
        yield (
            f"augment.color_jitter={given} must be a number, or [brightness, contrast, saturation] and perhaps hue, "
            "none below 0: for example augment.color_jitter=0.4"
        )
    elif len(values) == 4 and values[3] > _MAX_HUE:
        yield f"augment.color_jitter={given}: hue, the fourth value, must be at most {_MAX_HUE}: lower it"


def _is_set(node: Any, name: str) -> bool:
    return bool(getattr(node, name) != getattr(type(node)(), name))
