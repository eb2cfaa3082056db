"""Forward passes over a test set, in batches and in evaluation mode; the network's mode is restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from experiments.inputs.training_data import TrainingData
from experiments.models import features, forward_backbone, head_prefix
from experiments.models.parts import head_units
from theory.errors import MergeboundError

BATCH = 256
"""Images in one forward pass."""

Function = Callable[[Tensor], Tensor]
"""A network, or anything that maps images (m, channels, height, width) to (m, outputs)."""


@contextmanager
def evaluation_mode(model: object) -> Iterator[None]:
    """Evaluation mode and no gradients for the length of a block; every module gets its mode back."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        if isinstance(model, nn.Module):
            model.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def device_of(model: object) -> torch.device:
    """Where a network's first tensor lies; the CPU for a plain function."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else torch.device("cpu")


def batches(data: TrainingData, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels in the order of the rows; the last batch may be short.

    Raises:
        MergeboundError: a batch size below one, or no images.
    """
    if size < 1:
        raise MergeboundError(f"batch_size = {size}: give a positive number")
    if not len(data):
        raise MergeboundError("no images to evaluate on; give a test set that is not empty")
    for start in range(0, len(data), size):
        yield data.batch(np.arange(start, min(start + size, len(data))), 0)


def outputs(function: Function, data: TrainingData, *, batch_size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Outputs (n, d) of every image, float32 or float64 on the CPU, and labels (n,)."""
    device = device_of(function)
    found, labels = [], []
    with evaluation_mode(function):
        for images, wanted in batches(data, batch_size):
            out = function(images.to(device, non_blocking=True))
            found.append(out.to("cpu", torch.float64 if out.dtype == torch.float64 else torch.float32))
            labels.append(wanted.cpu())
    return torch.cat(found), torch.cat(labels)


class Features(nn.Module):
    """Pooled features of a network with a separable head, (n, d): what merging shares and heads are applied to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        try:
            self.direct = bool(head_prefix(model))
        except MergeboundError:  # no single linear head: found through hooks, which is slower
            self.direct = False
        self.units = () if self.direct else head_units(model)

    def forward(self, images: Tensor) -> Tensor:
        """Features before the head."""
        return forward_backbone(self.model, images) if self.direct else features(self.model, images, units=self.units)


def backbone_of(backbone: Function) -> Function:
    """The function that gives features: a timm network without its head; any other function is taken as it is."""
    if isinstance(backbone, nn.Module) and hasattr(backbone, "forward_head"):
        return Features(backbone)
    return backbone


def extract(backbone: Function, data: TrainingData, *, batch_size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Features of a frozen backbone, (n, d), and labels (n,)."""
    return outputs(backbone_of(backbone), data, batch_size=batch_size)
