"""What every measurement takes: a base, N experts of it, and images of each expert's task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.finetune.loop import TrainingLog
from experiments.grid.run_spec import RunSpec
from experiments.inputs.training_data import TrainingData
from experiments.measure.backbone import Backbone, Readout
from experiments.measure.layerwise import LayerGroup, by_layer, by_tensor, whole_model
from experiments.tasks.types import Split
from theory.errors import MergeboundError

CALIBRATION = 0xCA11B
"""Names the stream from which calibration images are drawn: ``default_rng([seed, CALIBRATION])``."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A base and N experts; expert j belongs to task j, and logits of task j go through expert j's private tensors.

    Attributes:
        names: of the experts, distinct.
        tasks: names of their tasks; may repeat.
        architecture: the network's name.
        model: a network of that architecture (its head may be of another size), in evaluation mode.
        networks: for each task j, logits (n, C_j) as a function of the merged coordinates x:
            ``networks[j].call(x, images)`` (differentiable, can be vmapped), ``.features(x, images)`` (no gradient),
            ``.products(x, directions, images)``.
        base: x_0, (P,) float32 (or float64, where the networks are).
        vectors: x_i, (N, P).
        heads: private tensors of each expert after fine-tuning, by name.
        start_heads: before it; ``None`` where it is not known.
        calibration: images from which predictions are made, never test images; normalised.
        train: each expert's training sample S_i, without augmentation; ``None`` where it is not known.
        test: images on which predictions are judged; ``None`` where there are none.
        runs, logs: how each expert was trained; ``None`` where it is not known.
    """

    names: tuple[str, ...]
    tasks: tuple[str, ...]
    architecture: str
    model: nn.Module
    networks: tuple[Backbone, ...]
    base: Tensor
    vectors: Tensor
    heads: tuple[Mapping[str, Tensor], ...]
    calibration: tuple[Split, ...]
    start_heads: tuple[Mapping[str, Tensor] | None, ...] = ()
    train: tuple[TrainingData | None, ...] = ()
    test: tuple[TrainingData | None, ...] = ()
    runs: tuple[RunSpec | None, ...] = ()
    logs: tuple[TrainingLog | None, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.names)
        if count < 1 or len(set(self.names)) != count:
            raise MergeboundError(
                f"experts {', '.join(self.names)}: give one distinct name per expert, and at least one"
            )
        if self.vectors.shape != (count, self.base.numel()):
            raise MergeboundError(
                f"vectors have shape {tuple(self.vectors.shape)}, expected ({count}, {self.base.numel()})"
            )
        for field in ("tasks", "networks", "heads", "calibration"):
            if len(getattr(self, field)) != count:
                raise MergeboundError(
                    f"{field}: {len(getattr(self, field))} entries for {count} experts; give one each"
                )
        for field in ("start_heads", "train", "test", "runs", "logs"):
            if not getattr(self, field):
                object.__setattr__(self, field, (None,) * count)
            elif len(getattr(self, field)) != count:
                raise MergeboundError(
                    f"{field}: {len(getattr(self, field))} entries for {count} experts; give one each"
                )

    @property
    def size(self) -> int:
        """Number of experts N."""
        return len(self.names)

    @property
    def deltas(self) -> Tensor:
        """Task vectors Delta_i = x_i - x_0, (N, P)."""
        return self.vectors - self.base

    @property
    def readouts(self) -> tuple[Readout, ...]:
        """Identity readouts: ``networks`` give logits already (for functions that take features and heads)."""
        return (Readout(),) * self.size

    def choose(self, members: Sequence[int]) -> Subject:
        """Some of the experts, in the order given."""
        rows = list(members)
        fields = (
            "names", "tasks", "networks", "heads", "calibration", "start_heads", "train", "test", "runs", "logs"
        )  # fmt: skip
        parts: dict[str, Any] = {field: tuple(getattr(self, field)[i] for i in rows) for field in fields}
        return replace(self, vectors=self.vectors[rows], **parts)

    def layers(self, by: str = "layer") -> tuple[LayerGroup, ...]:
        """Groups of tensors of the merged coordinates: ``all``, ``layer`` (repeated blocks) or ``tensor``.

        Raises:
            MergeboundError: another word.
        """
        makers = {"all": whole_model, "layer": by_layer, "tensor": by_tensor}
        if by not in makers:
            raise MergeboundError(f"by = {by!r}: choose from {', '.join(makers)}")
        return makers[by](self.networks[0].space.names)

    def columns(self, group: LayerGroup) -> Tensor:
        """Positions in x of a group's tensors, (m,) int64, ascending."""
        wanted = set(group.tensors)
        pieces = [torch.arange(s.start, s.stop) for name, s in self.networks[0].space.segments() if name in wanted]
        return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)


def draw(data: TrainingData, images: int, seed: int) -> Split:
    """A random subset of a part of a task as tensors; fewer images are the beginning of more.

    Args:
        data: one part of a task.
        images: how many at most.
        seed: names the draw.

    Returns:
        ``min(images, len(data))`` images in an order drawn by the seed; ``source`` are row numbers in ``data``.
    """
    if images < 1:
        raise MergeboundError(f"images = {images}: give 1 or more")
    rows = np.random.default_rng([seed, CALIBRATION]).permutation(len(data))[:images].astype(np.int64)
    pixels, labels = data.batch(rows, 0)
    return Split(pixels, labels, rows)
