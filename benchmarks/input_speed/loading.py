"""Ways of loading, and how fast they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.input_speed.tables import Plan
from experiments.inputs.cache import cached
from experiments.inputs.opening import open_inputs
from experiments.inputs.order import shuffled
from experiments.inputs.prefetch import in_order
from experiments.inputs.resident import load_resident
from experiments.inputs.streamed import stream
from experiments.tasks.form import InputFormat
from experiments.tasks.images import ArrayImages, FileImages, Images

SEED = 0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_photographs(folder: Path, count: int) -> FileImages:
    """JPEG files of quality 90, smooth shapes and grain, sides of 256 to 500 pixels."""
    from PIL import Image

    rng = np.random.default_rng([SEED, 0x0F11E5])
    names = []
    for number in range(count):
        height, width = (int(side) for side in rng.integers(256, 501, size=2))
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = rng.normal(0, 6, smooth.shape)
        names.append(f"{number}.jpg")
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(folder / names[-1], quality=90)
    return FileImages(folder, tuple(names), rng.integers(0, 10, count))


def make_arrays(count: int, size: int) -> ArrayImages:
    """Random pixels in memory."""
    rng = np.random.default_rng([SEED, size])
    return ArrayImages(rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), rng.integers(0, 10, count))


def form_of(size: int) -> InputFormat:
    """What the networks take: colour, as trained on ImageNet."""
    return InputFormat(3, size, size, MEAN, STD, "bicubic", 0.875 if size > 64 else 1.0)


def rate(data: Any, plan: Plan) -> float:
    """Images per second of a loader that nothing waits for, median of the rounds; the first batches are not counted."""
    found = []
    with closing(in_order(data, shuffled(len(data), min(plan.batch, len(data)), seed=SEED, epochs=None))) as batches:
        for _ in range(2):
            next(batches)
        for _ in range(plan.rounds):
            count, started = 0, time.perf_counter()
            while not count or time.perf_counter() - started < plan.seconds:
                count += len(next(batches)[1])
            found.append(count / (time.perf_counter() - started))
    return median(found)


def sources(
    photographs: Images, folder: Path, plan: Plan
) -> Iterator[tuple[str, int, str, str, str, Callable[[], Any]]]:
    """Inputs, size, views, type, workers, and what opens the data."""
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for size in (32, 224):
        images = make_arrays(plan.arrays if size == 32 else max(16, plan.arrays // 32), size)
        form = replace(form_of(size), crop=1.0)
        for views in ("none", "light", "flip_shift"):
            for name, dtype in types.items():
                yield (
                    *("resident", size, views, name, "0"),
                    lambda images=images, form=form, views=views, dtype=dtype: load_resident(
                        images, form, augment=views, dtype=dtype
                    ),
                )
    form = form_of(224)
    ways = [("threads", count) for count in (1, 2)]
    ways += [("processes", count) for count in (1, 2)] if plan.processes else []
    for kind, count in ways:
        for views in ("none", "crop_flip", "rand"):
            yield (
                *("streamed", 224, views, "float32", f"{count} {kind}"),
                lambda kind=kind, count=count, views=views: stream(
                    photographs, form, views=views, workers=count, kind=kind
                ),
            )
    for decode in ("fast", "draft"):
        for views in ("none", "crop_flip"):
            yield (
                *(f"streamed, {decode}", 224, views, "float32", "1 threads"),
                lambda decode=decode, views=views: stream(photographs, form, views=views, workers=1, decode=decode),
            )
    cached(photographs, form, folder)
    for views in ("none", "flip_shift"):
        yield (
            *("cached", 224, views, "float32", "0"),
            lambda views=views: open_inputs(photographs, form, memory_limit=0, cache=folder, augment=views),
        )
