"""Progressive resizing: Composer's sizes, dependent only on the step, for any number of workers."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ftexp.job.mfu
from ftexp.config.checks.validate import validate
from ftexp.config.schema import AugmentConfig, ModelConfig, ResizingConfig
from ftexp.data.augment.resizing import Resizing, size_at, sizes
from ftexp.errors import ConfigError
from ftexp.job.mfu import Utilisation
from ftexp.model.sizes import check_sizes
from ftexp.worker.batches import batches
from ftexp.worker.log import log_train
from ftexp.worker.step import train_step
from tests.support.configs import composed
from tests.support.jobs import RESNET, job_of, make_job

HALF = ResizingConfig(initial_scale=0.5)
RESIZING = ("resizing=progressive", "data.image_size=224")


@pytest.mark.parametrize(
    ("elapsed", "size"),
    [(0.0, 112), (0.499, 112), (0.5, 112), (0.55, 132), (0.65, 168), (0.75, 204), (0.79, 220), (0.8, 224), (1.0, 224)],
)
def test_the_size_is_composers_at_every_share_of_training(elapsed, size):
    # 224 * (0.5 + 0.5 * (elapsed - 0.5) / 0.3), rounded to a multiple of 4
    assert size_at(HALF, 224, elapsed) == size


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (ResizingConfig(), [224]),
        (ResizingConfig(initial_scale=1.0), [224]),
        (dataclasses.replace(HALF, size_increment=32), [128, 160, 192, 224]),
        (dataclasses.replace(HALF, delay_fraction=0.8), [112, 224]),
        (dataclasses.replace(HALF, delay_fraction=0.0, finetune_fraction=1.0), [224]),
        (ResizingConfig(initial_scale=0.01, size_increment=100), [100, 200, 224]),
    ],
)
def test_a_runs_sizes_are_known_beforehand(config, found):
    assert sizes(config, 224) == found


def test_images_are_scaled_with_antialiasing_and_those_of_full_size_are_left_alone():
    images = torch.randn(3, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    resizing = Resizing(HALF, 32, total_positions=100)
    assert torch.equal(resizing(images, 0), F.interpolate(images, size=(16, 16), mode="bilinear", antialias=True))
    assert resizing(images, 80) is images


def resizing_job(**changes):
    job = make_job(model=RESNET, num_samples=24, batch=12, **changes)  # six steps; images of 8 px
    config = dataclasses.replace(job.config, resizing=dataclasses.replace(HALF, size_increment=2))
    return job_of(config, job.info, 24, job.group)


def seen_sizes(job):
    seen = []
    job.learner.wrapped.register_forward_pre_hook(lambda module, images: seen.append(tuple(images[0].shape[-2:])))
    return seen


def test_a_step_trains_on_the_size_of_its_place_in_the_run_and_logs_it():
    job = resizing_job(augment=AugmentConfig(erase_prob=1.0, mixup_alpha=0.5))
    seen, logged = seen_sizes(job), []
    for batch in batches(job):
        assert train_step(job, batch)
        job.progress.advance(batch.end, 24)
        log_train(job)
        logged.append(job.channel.points()[-1].values["image_size"])
    # at 0, 1/6, ..., 5/6 of the run
    assert logged == [4, 4, 4, 4, 6, 8]
    assert seen == [(size, size) for size in logged]


def test_without_it_points_have_no_size():
    job = make_job(model=RESNET, num_samples=24, batch=12)
    batch = next(iter(batches(job)))
    train_step(job, batch)
    job.progress.advance(batch.end, 24)
    log_train(job)
    assert "image_size" not in job.channel.points()[-1].values


def test_the_utilisation_of_a_device_counts_images_of_the_size_that_it_sees(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(ftexp.job.mfu, "flops_per_image", lambda model, shape: 121e9 * (shape[1] / 8) ** 2)
    utilisation = Utilisation(torch.device("cuda"), "bf16", 1, (3, 8, 8))
    assert [utilisation.at(500.0, nn.Identity(), size) for size in (None, 4, 8, 4)] == [0.5, 0.125, 0.5, 0.125]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("resizing.initial_scale=0",), r"resizing\.initial_scale=0\.0 is out of range"),
        (
            ("resizing.delay_fraction=0.9",),
            r"resizing\.delay_fraction=0\.9 and resizing\.finetune_fraction=0\.2 add up to more than 1",
        ),
        (("resizing.size_increment=128",), r"resizing\.size_increment=128 is larger than the first images"),
        (("resizing=none", "resizing.delay_fraction=0.1"), r"resizing\.delay_fraction=0\.1 needs resizing\.initial"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(composed(*RESIZING, "model=resnet18", *overrides))


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (("model=resnet18",), None),
        (("model=vit_tiny",), "112 px, which model.name=vit_tiny_patch16_224 refuses"),
        (("model=vit_tiny", "+model.kwargs.dynamic_img_size=true"), "116 px"),
        (("model=vit_tiny", "+model.kwargs.dynamic_img_size=true", "resizing.size_increment=16"), None),
    ],
)
def test_a_model_that_refuses_a_size_is_refused_before_anything_starts(overrides, refused):
    config = composed(*RESIZING, *overrides)
    if refused is None:
        check_sizes(config)
        return
    with pytest.raises(ConfigError, match=refused):
        check_sizes(config)


def test_a_model_that_cannot_do_with_shapes_alone_is_not_refused(monkeypatch):
    class Odd(nn.Module):
        def forward(self, images):
            return images.sum().item()

    monkeypatch.setattr("ftexp.model.sizes.without_values_of", lambda model, data: Odd())
    check_sizes(SimpleNamespace(model=ModelConfig(name="odd"), data=SimpleNamespace(channels=3, image_size=8)))
