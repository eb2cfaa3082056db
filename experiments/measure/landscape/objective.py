"""The loss around a point as a function of the parameters: values per image, gradients and curvature products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from experiments.measure.landscape.lines import shared_size
from experiments.measure.landscape.running import clamped
from experiments.measure.landscape.scores import Floats, Panel
from experiments.measure.subject import Subject

BATCH = 128


class Loss(Protocol):
    """F(x) = sum_j p_j mean_z f_j(x; z), p_j = 1/T, on fixed images of T tasks."""

    @property
    def moving(self) -> int:
        """How many of the first coordinates may move; gradients and products are zero in the others."""

    @property
    def sources(self) -> Sequence[NDArray[np.int64] | None]:
        """Which images are in several tasks, see :class:`~experiments.measure.landscape.scores.Panel`."""

    def losses(self, x: Tensor) -> tuple[Floats, ...]:
        """Losses of each task's images, (n_j,) each, at x (P,)."""

    def gradient(self, x: Tensor) -> Tensor:
        """Gradient of F at x, (P,)."""

    def product(self, x: Tensor, v: Tensor) -> Tensor:
        """Hessian of F at x times v, (P,)."""


def value(loss: Loss, x: Tensor) -> float:
    """F(x)."""
    return float(np.mean([table.mean() for table in loss.losses(x)]))


@dataclass(frozen=True, eq=False)
class NetworkLoss:
    """Mean cross-entropy of some tasks of a subject, in evaluation mode.

    Parameters move; running statistics stay as they are at the point, heads are the experts' own.

    Attributes:
        subject: networks and heads.
        panel: images.
        tasks: numbers of the tasks, weighted equally.
        batch: images at a time, which bounds the memory of gradients and products.
    """

    subject: Subject
    panel: Panel
    tasks: tuple[int, ...]
    batch: int = BATCH

    @property
    def moving(self) -> int:
        """Number of parameters."""
        return shared_size(self.subject)

    @property
    def sources(self) -> tuple[NDArray[np.int64] | None, ...]:
        """Of the chosen tasks."""
        return tuple(self.panel.sources[j] for j in self.tasks)

    @property
    def images(self) -> int:
        """Over all tasks."""
        return sum(self.panel.sizes[j] for j in self.tasks)

    @torch.no_grad()
    def losses(self, x: Tensor) -> tuple[Floats, ...]:
        """Cross-entropy in nats of each image, computed in float64 from the logits."""
        point = clamped(self.subject, x)
        out = []
        for j in self.tasks:
            parts = [
                functional.cross_entropy(self.subject.networks[j].call(point, images).double(), labels,
                                         reduction="none")
                for images, labels in self._batches(j)
            ]  # fmt: skip
            out.append(np.asarray(torch.cat(parts).cpu().numpy()))
        return tuple(out)

    def gradient(self, x: Tensor) -> Tensor:
        """Gradient in the parameters, batch by batch."""
        total = torch.zeros_like(x)
        point = clamped(self.subject, x)
        for j in self.tasks:
            for images, labels in self._batches(j):
                leaf = point.detach().clone().requires_grad_(True)
                (found,) = torch.autograd.grad(self._sum(j, leaf, images, labels), leaf)
                total += found / (len(self.tasks) * self.panel.sizes[j])
        total[self.moving :] = 0.0
        return total

    def product(self, x: Tensor, v: Tensor) -> Tensor:
        """Hessian times v by differentiating the gradient's product with v, batch by batch."""
        total = torch.zeros_like(x)
        point = clamped(self.subject, x)
        direction = v.clone()
        direction[self.moving :] = 0.0
        for j in self.tasks:
            for images, labels in self._batches(j):
                leaf = point.detach().clone().requires_grad_(True)
                (first,) = torch.autograd.grad(self._sum(j, leaf, images, labels), leaf, create_graph=True)
                (found,) = torch.autograd.grad(first @ direction, leaf)
                total += found / (len(self.tasks) * self.panel.sizes[j])
        total[self.moving :] = 0.0
        return total

    def _sum(self, j: int, x: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.subject.networks[j].call(x, images), labels, reduction="sum")

    def _batches(self, j: int) -> list[tuple[Tensor, Tensor]]:
        split = self.panel.splits[j]
        places = range(0, len(split), self.batch)
        return [(split.images[s : s + self.batch], split.labels[s : s + self.batch]) for s in places]
