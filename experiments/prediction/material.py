"""What a bank of logits is made from: experts, images and the network without its head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from experiments.measure.backbone import Backbone, Readout
from experiments.models import forward_backbone
from experiments.tasks.types import Split

BATCH = 64


@dataclass(frozen=True, eq=False)
class Material:
    """Experts of a pool, ready for measuring.

    Attributes:
        names, tasks: of the experts.
        backbone: features as a differentiable function of the merged coordinates.
        plain: the same function through the network's own (fused) layers, for evaluating.
        model: the network with the base's head, in evaluation mode.
        base_state: every tensor of the base.
        origin: x_0, (P,).
        vectors: x_i, (E, P).
        states: private tensors of each expert.
        readouts: each expert's head.
        calibration, test: images by task; their sources are distinct over tasks.
    """

    names: tuple[str, ...]
    tasks: tuple[str, ...]
    backbone: Backbone
    plain: Backbone
    model: nn.Module
    base_state: Mapping[str, Tensor]
    origin: Tensor
    vectors: Tensor
    states: tuple[Mapping[str, Tensor], ...]
    readouts: tuple[Readout, ...]
    calibration: Mapping[str, Split]
    test: Mapping[str, Split]

    @property
    def deltas(self) -> Tensor:
        """Task vectors, (E, P)."""
        return self.vectors - self.origin


class _Plain(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return forward_backbone(self.model, images)


@torch.no_grad()
def features(material: Material, vector: Tensor, images: Tensor) -> Tensor:
    """Features (n, d) at the coordinates ``vector``, by the network's own layers, in the layout and batches that were
    fastest on processors."""
    parts = torch.split(images, BATCH)
    laid = (part.contiguous(memory_format=torch.channels_last) for part in parts)
    return torch.cat([material.plain.call(vector, part) for part in laid])


def plain_backbone(backbone: Backbone, model: nn.Module) -> Backbone:
    """The same features through the network's own layers: no derivatives, but faster."""
    return replace(backbone, module=_Plain(model.eval()).requires_grad_(False))
