"""Losses on a network's outputs: value, gradient and Gauss-Newton curvature, image by image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of logits; ``labels`` (n,) int64.  Curvature of one image: ``diag p - p p'``, p the softmax."""

    name: str = "cross_entropy"

    def values(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of each image, (n, C) to (n,)."""
        return torch.nn.functional.cross_entropy(outputs, labels, reduction="none")

    def slopes(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Gradient by the outputs, ``p - e_y``: (n, C)."""
        return torch.softmax(outputs, dim=-1) - torch.nn.functional.one_hot(labels, outputs.shape[-1])

    def bend(self, outputs: Tensor, change: Tensor) -> Tensor:
        """Curvature by the outputs times a change (..., n, C) of them."""
        p = torch.softmax(outputs, dim=-1)
        return p * (change - (p * change).sum(dim=-1, keepdim=True))

    def draw(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Labels from the network's own predictive distribution, (n,)."""
        return torch.multinomial(torch.softmax(outputs, dim=-1).cpu(), 1, generator=generator)[:, 0]


@dataclass(frozen=True)
class SquaredError:
    """``|o - y|^2 / 2`` with ``labels`` y (n, C): the loss of the additive-noise quadratics.  Curvature: identity."""

    name: str = "squared_error"

    def values(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of each image, (n, C) to (n,)."""
        return 0.5 * (outputs - labels).square().sum(dim=-1)

    def slopes(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Gradient by the outputs: (n, C)."""
        return outputs - labels

    def bend(self, outputs: Tensor, change: Tensor) -> Tensor:
        """Curvature by the outputs times a change (..., n, C) of them."""
        return change

    def draw(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Labels from a unit normal around the outputs, (n, C)."""
        noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
        return outputs.cpu() + noise


Loss = CrossEntropy | SquaredError
