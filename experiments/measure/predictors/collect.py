"""Collecting logits, Jacobian products and second derivatives of a subject, streamed in bounded memory.

Images pass in batches, directions in chunks.  Beyond the subject itself and the result (8 bytes x rows x images x
classes per task and kind) at most ``memory`` bytes of tensors live at one time: what one image and one direction take
is measured first, and the batches are chosen accordingly (kernels' own workspaces are not tensors and not counted).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from experiments.measure.backbone import Backbone
from experiments.measure.layerwise import LayerGroup
from experiments.measure.predictors import products as passes
from experiments.measure.predictors.kinds import KINDS, STANDARD, check_kinds, layout
from experiments.measure.predictors.memory import appetite, fit_batches
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.subject import Subject
from merging.partition import is_variance
from theory.errors import MergeboundError
from theory.function_space import Array

MEMORY = 1 << 30
"""Default limit of temporary tensors, in bytes."""
DIRECTIONS = 16
"""Directions in one pass at most."""
Progress = Callable[[str, int, int], None]
Second = Literal["auto", "exact", "differences"]


@torch.no_grad()
def collect_fields(
    subject: Subject,
    *,
    images: int | None = None,
    kinds: Sequence[str] = STANDARD,
    by: str = "all",
    batch: int = 256,
    memory: int = MEMORY,
    second: Second = "auto",
    seed: int | None = None,
    progress: Progress | None = None,
) -> FieldStatistics:
    """Collect what predictions need, on every task's calibration images.

    Args:
        subject: base, experts and images.
        images: how many of each task's images (the first ones; draws are nested); default all.
        kinds: what to collect, see :data:`experiments.measure.predictors.kinds.KINDS`; the secant always.
        by: ``all``, ``layer`` or ``tensor``: which tensors move together in Jacobian products and layer secants.
        batch: images per pass at most.
        memory: bytes of temporary tensors at most; batches are made smaller where they would take more.
        second: second derivatives by forward-over-forward products (``exact``), by ``differences`` of Jacobian
            products with an error estimate, or whichever the network allows (``auto``).
        seed: that named the calibration images; recorded only.
        progress: called with the stage, the tasks done and their number.

    Raises:
        MergeboundError: an unknown kind or grouping, no images, memory too small for one image, or a layer of the
            network that has no forward-mode derivative.

    Source: theory.md section 8 (function-space prediction for every alpha).
    """
    chosen = check_kinds(kinds)
    if images is not None and images < 1:
        raise MergeboundError(f"images = {images}: give 1 or more, or leave it out for all")
    if batch < 1:
        raise MergeboundError(f"batch = {batch}: give 1 or more images per pass")
    groups = subject.layers(by)
    job = _Job(subject, groups, chosen, batch, memory, second)
    tell = progress or (lambda stage, done, total: None)
    tables = []
    for j in range(subject.size):
        tell(f"collecting {subject.names[j]}", j, subject.size)
        tables.append(job.task(j, images))
    tell("collecting", subject.size, subject.size)
    return FieldStatistics(
        names=subject.names,
        groups=groups,
        labels=tuple(split.labels[:images].cpu().numpy() for split in subject.calibration),
        data=tuple(tables),
        gram=_gram(subject, groups),
        sources=tuple(np.asarray(split.source)[:images] for split in subject.calibration),
        tasks=subject.tasks,
        seconds=dict(job.seconds),
        second_error=dict(job.errors),
        seed=seed,
    )


def point_at(subject: Subject, alpha: Array) -> Tensor:
    """x_0 + sum_i alpha_i Delta_i, (P,), with BatchNorm's variances kept nonnegative as merges keep them."""
    weights = torch.as_tensor(alpha, dtype=subject.base.dtype)
    point = weights @ subject.vectors + (1.0 - float(np.sum(alpha))) * subject.base
    for name, piece in subject.networks[0].space.segments():
        if is_variance(name):
            point[piece].clamp_(min=0.0)
    return point


def direction_of(subject: Subject, expert: int, group: LayerGroup | None) -> Tensor:
    """Delta_i, or its part in one layer and zero elsewhere, (P,)."""
    delta = subject.vectors[expert] - subject.base
    if group is None:
        return delta
    kept = torch.zeros_like(delta)
    columns = set(group.tensors)
    for name, piece in subject.networks[0].space.segments():
        if name in columns:
            kept[piece] = delta[piece]
    return kept


def _gram(subject: Subject, groups: Sequence[LayerGroup]) -> Array:
    found = []
    for group in groups:
        total = np.zeros((subject.size, subject.size))
        wanted = set(group.tensors)
        for name, piece in subject.networks[0].space.segments():
            if name in wanted:
                part = (subject.vectors[:, piece] - subject.base[piece]).double()
                total += (part @ part.T).cpu().numpy()
        found.append(total)
    return np.stack(found)


@dataclass
class _Job:
    """One collection: what is wanted, the batches that were found to fit, and what it cost so far."""

    subject: Subject
    groups: Sequence[LayerGroup]
    kinds: Sequence[str]
    batch: int
    memory: int
    second: Second
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def task(self, j: int, images: int | None) -> dict[str, Array]:
        """All kinds of one task, (rows, n, C) each."""
        pixels = self.subject.calibration[j].images
        pixels = pixels if images is None else pixels[:images]
        if not len(pixels):
            raise MergeboundError(f"{self.subject.names[j]}: its task has no calibration images; give one or more")
        tables: dict[str, list[Array]] = {kind: [] for kind in self.kinds}
        for kind in self.kinds:
            started = time.perf_counter()
            size, directions = self._sizes(kind, j, pixels)
            self.seconds["probe"] = self.seconds.get("probe", 0.0) + time.perf_counter() - started
            started = time.perf_counter()
            for part in torch.split(pixels, size):
                tables[kind].append(self._pass(kind, j, part, directions))
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - started
        return {kind: np.concatenate(parts, axis=1) for kind, parts in tables.items()}

    def _sizes(self, kind: str, j: int, pixels: Tensor) -> tuple[int, int]:
        """Images and directions per pass; measured once for every sort of pass and shape of images."""
        sort = KINDS[kind].derivative
        head = sum(t.numel() for t in self.subject.heads[j].values())
        key = f"{sort} {tuple(pixels.shape[1:])} {head}"
        if key not in self.sizes:
            network, base = self.subject.networks[j], self.subject.base

            def work(n: int, d: int) -> object:
                image = pixels[:1].expand(n, *pixels.shape[1:]).contiguous()
                some = [direction_of(self.subject, 0, None) for _ in range(d)]
                if sort == 0:
                    return network.call(base + some[0], image)
                rows = torch.stack(some)
                return self._derivative(sort, network, base, rows, rows, image)[0]

            self.sizes[key] = fit_batches(
                appetite(work), self.memory, min(self.batch, len(pixels)), DIRECTIONS if sort else 1
            )
        return self.sizes[key]

    def _pass(self, kind: str, j: int, images: Tensor, directions: int) -> Array:
        """One kind on some images, (rows, n, C)."""
        network, subject = self.subject.networks[j], self.subject
        if kind == "secant_layers":
            moves = (subject.base + direction_of(subject, i, g) for i, g in self._directions())
            return np.stack([_wide(network.call(point, images)) for point in moves])
        place = layout(kind, subject.size, j)
        if not len(place):
            return np.zeros((0, *network.call(subject.base, images).shape))
        if KINDS[kind].derivative == 0:
            return np.stack([_wide(network.call(point_at(subject, a), images)) for a in place.points])
        if KINDS[kind].derivative == 1:
            point = point_at(subject, place.points[0])
            rows = []
            for chunk in _chunks(list(self._directions()), directions):
                pushed = torch.stack([direction_of(subject, i, g) for i, g in chunk])
                rows.append(_wide(self._derivative(1, network, point, pushed, pushed, images)[0]))
            return np.concatenate(rows)
        seconds, worst = [], 0.0
        for chunk in _chunks([np.repeat(np.arange(len(o)), o) for o in place.orders], directions):
            first = torch.stack([direction_of(subject, int(two[0]), None) for two in chunk])
            other = torch.stack([direction_of(subject, int(two[1]), None) for two in chunk])
            found, error = self._derivative(2, network, subject.base, first, other, images)
            seconds.append(_wide(found))
            worst = max(worst, error)
        self.errors[kind] = max(self.errors.get(kind, 0.0), worst)
        return np.concatenate(seconds)

    def _directions(self) -> Iterator[tuple[int, LayerGroup | None]]:
        for i in range(self.subject.size):
            for group in self.groups:
                yield i, group if len(self.groups) > 1 else None

    def _derivative(
        self, order: int, network: Backbone, point: Tensor, first: Tensor, other: Tensor, images: Tensor
    ) -> tuple[Tensor, float]:
        """Products of first or second order, and the error of the latter."""
        if order == 2 and self.second != "differences":
            try:
                return passes.second_products(network, point, first, other, images), 0.0
            except (RuntimeError, NotImplementedError) as error:
                if self.second == "exact":
                    reason = str(error).partition("\n")[0]
                    raise MergeboundError(
                        f"the network has no second forward-mode derivatives ({reason}): choose second = differences"
                    ) from error
                self.second = "differences"
        try:
            if order == 1:
                return passes.products(network, point, first, images), 0.0
            found, change = passes.second_differences(network, point, first, other, images)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise MergeboundError(
                f"the network has no forward-mode derivatives ({reason}): choose kinds that need forward passes only"
            ) from error
        return found, float((change.amax(-1) * 2.0).max())


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:  # type: ignore[type-arg]
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _wide(tensor: Tensor) -> Array:
    return np.array(tensor.detach().cpu().numpy(), dtype=np.float64)
