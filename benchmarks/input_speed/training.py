"""Networks above a million parameters, trained on one batch and fed by a loader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.input_speed.loading import SEED
from benchmarks.input_speed.tables import Plan, Training
from experiments.inputs.order import shuffled
from experiments.inputs.prefetch import in_order


def networks() -> dict[str, tuple[int, Callable[[], nn.Module]]]:
    """Image size and constructor of each network."""
    import timm
    from timm.models.resnet import BasicBlock, ResNet

    def small_stem(model: Any, channels: int) -> nn.Module:
        """3 x 3 without a stride instead of 7 x 7 and pooling, as is usual at 32 x 32."""
        model.conv1, model.maxpool = nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.Identity()
        found: nn.Module = model
        return found

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 10))

    return {
        "mlp": (32, mlp),
        "resnet-1M": (32, lambda: small_stem(ResNet(BasicBlock, [1] * 4, 10, channels=(32, 64, 128, 256)), 64)),
        "resnet18": (32, lambda: small_stem(timm.create_model("resnet18", num_classes=10), 64)),
        "vit-tiny, patch 4": (
            32,
            lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=4),
        ),
        "resnet18 at 224": (224, lambda: timm.create_model("resnet18", num_classes=10)),
        "vit-tiny at 224": (224, lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10)),
    }


def train(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int, precision: str) -> float:
    """Seconds of some steps of SGD with momentum."""
    model.train()
    parameters = list(model.parameters())
    buffers = [torch.zeros_like(parameter) for parameter in parameters]
    started = time.perf_counter()
    for _ in range(steps):
        x, labels = next(batches)
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(x)
        F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter, buffer in zip(parameters, buffers, strict=True):
                parameter.sub_(buffer.mul_(0.9).add_(parameter.grad), alpha=1e-3)
    return time.perf_counter() - started


def training(
    name: str, size: int, model: nn.Module, precision: str, inputs: str, data: Any, loader_rate: float, plan: Plan
) -> Training:
    """Training on a repeated batch and fed by the loader, in turns."""
    batch = min(plan.batch, len(data))
    fixed = data.batch(np.arange(batch), 0)

    def repeated() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield fixed

    train(model, repeated(), 1, precision)
    once = train(model, repeated(), 1, precision)
    steps = max(1, round(3 * plan.seconds / once))
    still, ratios = [], []
    for _ in range(plan.rounds):
        still.append(train(model, repeated(), steps, precision))
        # a new loader each time: one left open would have run ahead during the other turn
        with closing(in_order(data, shuffled(len(data), batch, seed=SEED, epochs=None))) as batches:
            next(batches)
            full = (pair for pair in batches if len(pair[1]) == batch)
            ratios.append(train(model, full, steps, precision) / still[-1])
    speed = batch * steps / median(still)
    count = sum(p.numel() for p in model.parameters())
    return Training(name, count, size, precision, inputs, loader_rate, speed, loader_rate / speed, median(ratios))
