"""Networks, numbers of experts and batch sizes that are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from experiments.models import build_model
from experiments.models.cifar_resnet import CifarResNet


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        name: of the case.
        build: makes it, with ten outputs.
        size, channels: of its images.
        experts, batch, steps: on a processor; ``gpu_experts`` on an accelerator.
        target: what the issue asks for on one thread of a processor, over the plain float32 loop, and in which
            precision; 0 for nothing.
        target_precision: of the target.
    """

    name: str
    build: Callable[[], nn.Module]
    size: int
    channels: int
    experts: int
    batch: int
    steps: int
    target: float = 1.0
    target_precision: str = "float32"
    gpu_experts: int = 64
    gpu_target: float = 10.0

    @property
    def images(self) -> int:
        """Images that stay in memory."""
        return max(4 * self.batch, 512 if self.size <= 8 else 256)


def _resnet18() -> nn.Module:
    """timm's ResNet-18 as it is customary for 32 x 32 images: a 3x3 stem of stride 1, no pooling after it."""
    model = build_model("resnet18", 10)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def _vit_tiny() -> nn.Module:
    return build_model("vit_tiny_patch16_224", 10, img_size=32, patch_size=8)


CASES = {
    case.name: case
    for case in (
        Case("logistic", lambda: build_model("logistic", 10), 8, 1, 64, 32, 500, 4.0),
        Case("mlp", lambda: build_model("mlp_64", 10), 8, 1, 64, 32, 500, 10.0),
        Case("mlp-batch16", lambda: build_model("mlp_64", 10), 8, 1, 64, 16, 500, 10.0),
        Case("resnet8-bn", lambda: CifarResNet(8, 10), 32, 3, 8, 64, 20, 2.0, "bfloat16"),
        Case("resnet8-bn-batch8", lambda: CifarResNet(8, 10), 32, 3, 16, 8, 60, 2.0, "bfloat16"),
        Case("resnet8-gn", lambda: CifarResNet(8, 10, norm="gn"), 32, 3, 8, 64, 20),
        Case("resnet20-bn", lambda: CifarResNet(20, 10), 32, 3, 8, 64, 10, 2.0, "bfloat16"),
        Case("resnet18", _resnet18, 32, 3, 4, 32, 5, 2.0, "bfloat16", gpu_experts=16, gpu_target=3.0),
        Case("vit-tiny", _vit_tiny, 32, 3, 4, 32, 10, 1.6, "bfloat16", gpu_experts=16, gpu_target=3.0),
    )
}


def seeded(case: Case, seed: int) -> nn.Module:
    """The network of one expert."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return case.build()
