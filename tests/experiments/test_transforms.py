"""Views of full-size images against timm and torchvision, and the statistics of their draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments.inputs.reader import Reader
from experiments.inputs.streamed import stream
from experiments.inputs.transforms import (
    OPERATIONS,
    VIEWS,
    Views,
    apply_operation,
    draw_crop,
    draw_operations,
    strength,
    training_view,
    view_generator,
    views_by_name,
)
from experiments.tasks.form import InputFormat
from experiments.tasks.images import ArrayImages
from theory.errors import MergeboundError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photograph(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth shapes with some noise, uint8."""
    rng = np.random.default_rng([seed, 0xF070])
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        np.sin(x / rng.uniform(3, 40) + rng.uniform(0, 6)) * np.cos(y / rng.uniform(3, 40)) for _ in range(channels)
    ]
    noise = rng.normal(0, 10, (height, width, channels))
    return np.clip(127 + 90 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(256, 340), (501, 375), (64, 48), (224, 224), (224, 300), (33, 500)])
@pytest.mark.parametrize(
    ("size", "interpolation", "crop"),
    [
        ((224, 224), "bicubic", 0.875),
        ((224, 224), "bilinear", 0.95),
        ((32, 32), "bicubic", 1.0),
        ((48, 80), "bilinear", 0.9),
    ],
)
def test_evaluation_is_timms(shape: tuple[int, int], size: tuple[int, int], interpolation: str, crop: float) -> None:
    from timm.data import create_transform

    image = photograph(*shape)
    form = InputFormat(3, *size, MEAN, STD, interpolation, crop)
    options = dict(input_size=(3, *size), interpolation=interpolation, crop_pct=crop, mean=MEAN, std=STD)
    theirs = create_transform(**options, normalize=False)(Image.fromarray(image))
    images = ArrayImages(image[None], np.zeros(1, dtype=np.int64))
    assert np.array_equal(Reader(images, form).view(0, 0), theirs.permute(1, 2, 0).numpy())  # pixel for pixel
    normal = create_transform(**options)(Image.fromarray(image))
    assert float((stream(images, form).batch(np.arange(1), 0)[0][0] - normal).abs().max()) <= 1e-6


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_evaluation_of_a_model_is_timms(name: str) -> None:
    import timm
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    assert config["crop_mode"] == "center"
    form = InputFormat(
        *config["input_size"], config["mean"], config["std"], config["interpolation"], config["crop_pct"]
    )
    image = photograph(300, 411, seed=1)
    theirs = create_transform(**config)(Image.fromarray(image))
    images = ArrayImages(image[None], np.zeros(1, dtype=np.int64))
    assert float((stream(images, form).batch(np.arange(1), 0)[0][0] - theirs).abs().max()) <= 1e-6


@pytest.mark.parametrize("views", [None, Views(policy="trivial", jitter=0.3)])
def test_grey_is_repeated(views: Views | None) -> None:
    images = ArrayImages(photograph(40, 50, 1)[None], np.zeros(1, dtype=np.int64))
    for epoch in range(8):
        x = stream(images, InputFormat(3, 32, 32), views=views).batch(np.arange(1), epoch)[0]
        assert x.shape == (1, 3, 32, 32)
        assert torch.equal(x[:, 0], x[:, 1])
        assert torch.equal(x[:, 0], x[:, 2])
        assert torch.equal(x[:, :1], stream(images, InputFormat(1, 32, 32), views=views).batch(np.arange(1), epoch)[0])


# --- random views ----------------------------------------------------------------------------------------------------


def test_crop_and_mirror_are_torchvisions() -> None:
    from torchvision.transforms.v2 import functional as F

    image = photograph(90, 130)
    form = InputFormat(3, 32, 40, interpolation="bilinear")
    for row in range(20):
        rng = view_generator(3, 1, row)
        top, left, height, width = draw_crop(90, 130, Views(), rng)
        expected = F.resized_crop(Image.fromarray(image), top, left, height, width, [32, 40])
        expected = F.horizontal_flip(expected) if rng.random() < 0.5 else expected
        assert np.array_equal(training_view(image, form, Views(), view_generator(3, 1, row)), np.asarray(expected))


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 1000))
def test_crops_lie_inside(height: int, width: int, seed: int) -> None:
    top, left, tall, wide = draw_crop(height, width, Views(), np.random.default_rng([seed, 1]))
    assert 0 <= top <= top + tall <= height
    assert 0 <= left <= left + wide <= width
    assert min(tall, wide) >= 1


def test_crops_are_drawn_as_stated() -> None:
    """Areas uniform in 0.08 .. 1 where nothing is rejected: a square of 0.08 .. 0.5 and ratios near one."""
    views = Views(scale=(0.08, 0.5), ratio=(0.9, 1 / 0.9))
    drawn = np.asarray([draw_crop(1000, 1000, views, np.random.default_rng([seed, 2])) for seed in range(3000)])
    share = drawn[:, 2] * drawn[:, 3] / 1e6
    assert share.mean() == pytest.approx(0.29, abs=4 * 0.42 / math.sqrt(12 * 3000))
    assert 0.079 < share.min() < 0.09
    assert 0.49 < share.max() < 0.501
    log_ratio = np.log(drawn[:, 3] / drawn[:, 2])
    assert abs(log_ratio.mean()) < 4 * log_ratio.std() / math.sqrt(3000)
    place = drawn[:, 0] / (1000 - drawn[:, 2])
    assert place.mean() == pytest.approx(0.5, abs=4 / math.sqrt(12 * 3000))


def test_policies_draw_every_operation_equally_often() -> None:
    counts = dict.fromkeys(OPERATIONS, 0)
    for seed in range(7000):
        for name, amount in draw_operations(VIEWS["rand"], 224, 224, np.random.default_rng([seed, 3])):
            counts[name] += 1
            assert abs(amount) <= 224
    expected, sd = 1000, math.sqrt(14000 / 14 * 13 / 14)
    assert all(abs(count - expected) < 4.5 * sd for count in counts.values())
    assert len(draw_operations(VIEWS["trivial"], 224, 224, np.random.default_rng([0, 4]))) == 1


@pytest.mark.parametrize("trivial", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_torchvisions(name: str, trivial: bool) -> None:
    """The tables of strengths and the operations themselves, against the library's own classes."""
    from torchvision.transforms.v2 import RandAugment, TrivialAugmentWide

    theirs = TrivialAugmentWide() if trivial else RandAugment()
    table, signed = theirs._AUGMENTATION_SPACE[name]
    values = table(31, 48, 64)
    picture = Image.fromarray(photograph(48, 64))
    for magnitude in (0, 9, 30):
        for sign in (1.0, -1.0):
            amount = strength(name, magnitude / 30, sign, 48, 64, trivial=trivial)
            expected = 0.0 if values is None else float(values[magnitude]) * (sign if signed else 1.0)
            assert amount == pytest.approx(expected, abs=2e-5)
            changed = theirs._apply_image_or_video_transform(picture, name, amount, theirs.interpolation, theirs._fill)
            assert np.array_equal(np.asarray(apply_operation(picture, name, amount)), np.asarray(changed))


def test_draws_belong_to_seed_epoch_and_row() -> None:
    image, form = photograph(70, 90), InputFormat(3, 32, 32, MEAN, STD)
    views = Views(policy="trivial", jitter=0.4, erase=0.5)
    state = torch.get_rng_state()
    keys = [(seed, epoch, row) for seed in (0, 1) for epoch in (0, 1) for row in (0, 1)]
    seen = {key: training_view(image, form, views, view_generator(*key)).tobytes() for key in keys}
    assert len(set(seen.values())) == len(keys)
    torch.manual_seed(5)
    assert all(training_view(image, form, views, view_generator(*key)).tobytes() == seen[key] for key in keys)
    torch.set_rng_state(state)
    training_view(image, form, views, view_generator(0, 0, 0))
    assert torch.equal(torch.get_rng_state(), state)  # torch's generator stays where it was


def test_erased_rectangles_are_the_mean() -> None:
    form = InputFormat(3, 32, 32, MEAN, STD)
    image = np.full((64, 64, 3), 255, dtype=np.uint8)
    views = Views(flip=0.0, erase=1.0)
    mean = np.rint(255 * np.asarray(MEAN)).astype(np.uint8)
    shares = []
    for row in range(100):
        view = training_view(image, form, views, view_generator(0, 0, row))
        erased = (view == mean).all(-1)
        assert ((view == 255).all(-1) | erased).all()
        shares.append(erased.mean())
    assert 0.01 < min(shares) < 0.1
    assert 0.2 < max(shares) < 0.36


def test_flips_are_fair() -> None:
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    image[:, 12:] = 255
    views = Views(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    form = InputFormat(3, 16, 16)
    flips = sum(bool(training_view(image, form, views, view_generator(0, 0, row))[0, 0, 0]) for row in range(1000))
    assert abs(flips - 500) < 4.5 * math.sqrt(250)


def test_names_and_ranges_of_views() -> None:
    assert views_by_name(None) is None
    assert views_by_name("none") is None
    assert views_by_name("rand") == Views(policy="rand")
    with pytest.raises(MergeboundError, match="crop_flip"):
        views_by_name("crop_flop")
    for options in ({"scale": (0.0, 1.0)}, {"ratio": (2.0, 1.0)}, {"flip": 2.0}, {"magnitude": 31}, {"jitter": 1.0}):
        with pytest.raises(MergeboundError, match=next(iter(options))):
            Views(**options)  # type: ignore[arg-type]
