"""A task's empirical risk as a function of one flat point, with its derivatives, streamed over images.

Jacobian products in both directions come from one recorded graph per batch: ``u -> J'u`` is linear in u, so its own
derivative is ``v -> J v``.  No forward-mode rule is needed, and further directions cost one backward pass each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

from experiments.measure.backbone import Backbone
from experiments.measure.curvature.losses import CrossEntropy, Loss
from experiments.measure.subject import Subject, draw
from merging.flat import FlatSpace
from theory.errors import MergeboundError

Network = Callable[[Tensor, Tensor], Tensor]
Part = Literal["calibration", "train", "test"]
BATCH = 64
"""Images whose graphs are held at once."""


@dataclass(frozen=True, eq=False)
class EmpiricalRisk:
    """``F(x) = (1/n) sum_z ell(h(x; z), y)``.

    Attributes:
        call: outputs h (m, C) of m images at a point (P,); differentiable in the point.
        images: (n, ...), of the point's type.
        labels: (n,) classes; (n, C) for the squared error.
        size: P.
        loss: on the outputs.
        batch: images at a time; memory grows with it, results do not depend on it beyond rounding.
        images_seed: names the draw of the images.
        name: of the task.
    """

    call: Network
    images: Tensor
    labels: Tensor
    size: int
    loss: Loss = field(default_factory=CrossEntropy)
    batch: int = BATCH
    images_seed: int = 0
    name: str = "task"

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or not len(self.labels):
            raise MergeboundError(
                f"{self.name}: {len(self.images)} images and {len(self.labels)} labels; give one label per image"
            )
        if self.batch < 1 or self.size < 1:
            raise MergeboundError(f"{self.name}: batch = {self.batch}, size = {self.size}; give 1 or more")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def dtype(self) -> torch.dtype:
        """Type in which derivatives are taken."""
        return self.images.dtype

    def batches(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, images and labels, ``batch`` at a time."""
        for start in range(0, len(self), self.batch):
            rows = slice(start, min(start + self.batch, len(self)))
            yield rows, self.images[rows], self.labels[rows]

    def take(self, rows: np.ndarray) -> EmpiricalRisk:
        """The risk on some of the images."""
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        return replace(self, images=self.images[index], labels=self.labels[index])

    @torch.no_grad()
    def outputs(self, point: Tensor) -> Tensor:
        """h(x; z) of every image, (n, C).

        Raises:
            MergeboundError: outputs that are no finite rows.
        """
        x = self._point(point)
        found = torch.cat([self.call(x, images) for _, images, _ in self.batches()])
        if found.ndim != 2 or not bool(torch.isfinite(found).all()):
            raise MergeboundError(
                f"{self.name}: outputs of shape {tuple(found.shape)} that are not finite rows of logits at this point; "
                "leave out experts that diverged"
            )
        return found

    def losses(self, point: Tensor) -> np.ndarray:
        """Loss of each image, (n,) float64."""
        return self.loss.values(self.outputs(point), self.labels).double().cpu().numpy()

    def gradient(self, point: Tensor) -> Tensor:
        """Gradient of the mean loss, (P,) float64."""
        total = torch.zeros(self.size, dtype=torch.float64)
        for _, images, labels in self.batches():
            x = self._point(point).requires_grad_()
            (found,) = torch.autograd.grad(self.loss.values(self.call(x, images), labels).sum(), x)
            total += found.double()
        return total / len(self)

    def hessian_blocks(self, point: Tensor, directions: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """For each batch of images, its rows and (mean Hessian of the batch) d for every d of directions (D, P)."""
        rows_of = directions.to(self.dtype)
        for rows, images, labels in self.batches():
            x = self._point(point).requires_grad_()
            value = self.loss.values(self.call(x, images), labels).mean()
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
            if not slope.requires_grad:  # the loss is linear in the point
                yield rows, torch.zeros_like(rows_of)
                continue
            found = [torch.autograd.grad(slope, x, d, retain_graph=True, allow_unused=True)[0] for d in rows_of]
            yield rows, torch.stack([torch.zeros_like(x) if f is None else f for f in found]).detach()

    def hessian_products(self, point: Tensor, directions: Tensor) -> Tensor:
        """Hessian of the risk times each row of directions (D, P): (D, P) float64."""
        total = torch.zeros(directions.shape, dtype=torch.float64)
        for rows, found in self.hessian_blocks(point, directions):
            total += found.double() * ((rows.stop - rows.start) / len(self))
        return total

    def jacobians(self, point: Tensor) -> Iterator[tuple[slice, Jacobian]]:
        """For each batch of images its rows and the Jacobian of their outputs."""
        x = self._point(point)
        for rows, images, _ in self.batches():
            yield rows, Jacobian.at(self.call, x, images)

    def along(self, start: Tensor, direction: Tensor, time: float) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs at ``start + time direction`` and their first two derivatives by time: (n, C) each.

        Raises:
            MergeboundError: a layer of the network has no forward-mode derivative.
        """
        x, d = self._point(start), direction.detach().to(self.dtype)
        moment = torch.tensor(float(time), dtype=self.dtype)
        one = torch.ones((), dtype=self.dtype)
        parts = []
        for _, images, _ in self.batches():

            def curve(t: Tensor, images: Tensor = images) -> Tensor:
                return self.call(x + t * d, images)

            def speed(t: Tensor, curve: Callable[[Tensor], Tensor] = curve) -> tuple[Tensor, Tensor]:
                height, rate = jvp(curve, (t,), (one,))[:2]
                return height, rate

            try:
                with torch.no_grad():
                    (value, first), (_, second) = jvp(speed, (moment,), (one,))[:2]
            except (RuntimeError, NotImplementedError) as error:
                reason = str(error).partition("\n")[0]
                raise MergeboundError(
                    f"{self.name}: the network has no second forward-mode derivatives ({reason}); measure Gram "
                    "matrices in place of directional curvature"
                ) from error
            parts.append((value, first, second))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]

    def _point(self, point: Tensor) -> Tensor:
        if point.shape != (self.size,):
            raise MergeboundError(f"{self.name}: a point of shape {tuple(point.shape)}, expected ({self.size},)")
        return point.detach().to(self.dtype)


@dataclass(frozen=True, eq=False)
class Jacobian:
    """The Jacobian of a batch's outputs at one point, as two linear maps on one recorded graph."""

    outputs: Tensor
    _point: Tensor
    _recorded: Tensor
    _dual: Tensor
    _pulled: Tensor

    @classmethod
    def at(cls, call: Network, point: Tensor, images: Tensor) -> Jacobian:
        """Record the graph of (m, C) outputs."""
        x = point.detach().requires_grad_()
        outputs = call(x, images)
        dual = torch.zeros_like(outputs, requires_grad=True)
        (pulled,) = torch.autograd.grad(outputs, x, dual, create_graph=True)
        return cls(outputs.detach(), x, outputs, dual, pulled)

    def push(self, directions: Tensor) -> Tensor:
        """J d for every row of directions: (D, P) to (D, m, C)."""
        rows = directions.to(self.outputs.dtype)
        found = [torch.autograd.grad(self._pulled, self._dual, d, retain_graph=True)[0] for d in rows]
        return torch.stack(found).detach()

    def pull(self, change: Tensor) -> Tensor:
        """J' u: (m, C) to (P,)."""
        (found,) = torch.autograd.grad(self._recorded, self._point, change, retain_graph=True)
        return found.detach()


# --- risks of a subject ----------------------------------------------------------------------------------------------


def task_risk(
    subject: Subject,
    task: int,
    *,
    part: Part = "calibration",
    images: int | None = None,
    seed: int = 0,
    head: bool = False,
    batch: int = BATCH,
    dtype: torch.dtype | None = None,
) -> EmpiricalRisk:
    """F_j of a subject in the merged coordinates, through expert j's head.

    Args:
        subject: base and experts.
        task: j.
        part: which images: ``calibration``, ``train`` (S_j) or ``test``.
        images: how many at most; default all of them for ``calibration``, 256 otherwise.
        seed: names their draw (``train`` and ``test``).
        head: expert j's private tensors are coordinates too, after the merged ones: see :func:`full_point`.
        batch: images at a time.
        dtype: default the subject's; ``torch.float64`` for checks.

    Raises:
        MergeboundError: images that the subject does not have.
    """
    if not 0 <= task < subject.size:
        raise MergeboundError(f"task = {task}: the subject has tasks 0 to {subject.size - 1}")
    network = subject.networks[task]
    if part == "calibration":
        split = subject.calibration[task]
        split = split if images is None else split.take(np.arange(min(images, len(split))))
    else:
        data = (subject.train if part == "train" else subject.test)[task]
        if data is None:
            raise MergeboundError(f"task {subject.names[task]}: its {part} images are not known; take calibration")
        split = draw(data, images or 256, seed)
    wanted = subject.base.dtype if dtype is None else dtype
    network = network if wanted == subject.base.dtype else cast(network, wanted)
    call: Network = network.call
    size = subject.base.numel()
    if head:
        space = head_space(subject, task)
        call = _headed(network, size, space)
        size += space.size
    return EmpiricalRisk(
        call, split.images.to(wanted), split.labels, size, batch=batch, images_seed=seed, name=subject.names[task]
    )


def head_space(subject: Subject, task: int) -> FlatSpace:
    """Layout of expert j's private tensors behind the merged coordinates.

    Raises:
        MergeboundError: there are none (the head is merged).
    """
    private: Mapping[str, Tensor] = {n: t for n, t in subject.heads[task].items() if t.is_floating_point()}
    if not private:
        raise MergeboundError(f"{subject.names[task]}: no private tensors; leave head out, it is merged already")
    return FlatSpace.of(dict(private))


def full_point(subject: Subject, task: int, point: Tensor, *, start: bool = False) -> Tensor:
    """A point of the merged coordinates with expert j's private tensors behind it, (P + head,).

    Args:
        start: the private tensors before fine-tuning.

    Raises:
        MergeboundError: private tensors that are not there or not known.
    """
    space = head_space(subject, task)
    tensors = subject.start_heads[task] if start else subject.heads[task]
    if tensors is None:
        raise MergeboundError(f"{subject.names[task]}: the head before fine-tuning is not known")
    return torch.cat([point, space.flatten(dict(tensors)).to(point.dtype)])


def cast(network: Backbone, dtype: torch.dtype) -> Backbone:
    """The same network in another floating type."""
    module = copy.deepcopy(network.module).to(dtype)
    constants = {n: t.to(dtype) if t.is_floating_point() else t for n, t in network.constants.items()}
    return replace(network, module=module, constants=constants, space=replace(network.space, dtype=dtype))


def _headed(network: Backbone, size: int, space: FlatSpace) -> Network:
    def call(point: Tensor, images: Tensor) -> Tensor:
        own = {f"model.{name}": tensor for name, tensor in space.unflatten(point[size:]).items()}
        return replace(network, constants={**network.constants, **own}).call(point[:size], images)

    return call
