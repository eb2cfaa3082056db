"""Scores of points in parameter space: held-in tasks through the experts' heads, held-out tasks by frozen features."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from experiments.evaluate.transfer import TransferFeatures, transfer
from experiments.inputs.resident import residents
from experiments.inputs.training_data import TrainingData
from experiments.measure.backbone import Readout
from experiments.measure.subject import Subject, draw
from experiments.models import forward_backbone, head_prefix
from experiments.models.form import input_format
from experiments.studies.scale.spec import ScaleSpec
from experiments.tasks.dataset import ImageTask
from experiments.tasks.named import open_task
from experiments.tasks.types import Split
from theory.errors import MergeboundError

TEST = 0x7E57
"""Added to the study's seed where test images are drawn."""
BATCH = 256


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Images of a task that nobody was trained on."""

    task: str
    classes: int
    fit: Split
    validation: Split
    test: Split


@dataclass(frozen=True, eq=False)
class Score:
    """One point's score on one task: per test image, (n,) each.

    ``loss`` in nats is there for heads only (``scored_by == "head"``), else ``None``.
    """

    task: str
    scored_by: str
    correct: NDArray[np.bool_]
    loss: NDArray[np.float64] | None
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Scorer:
    """A cell's network with the images that all its points are scored on.

    Attributes:
        subject: base and experts of one seed; expert j belongs to held-in task j.
        model: a copy whose weights are overwritten.
        heads: of the experts.
        tests: test images of every held-in task.
        held_out: images of every held-out task.
        spec: transfers and their settings.
    """

    subject: Subject
    model: nn.Module
    heads: tuple[Readout, ...]
    tests: tuple[Split, ...]
    held_out: tuple[HeldOut, ...]
    spec: ScaleSpec

    @torch.no_grad()
    def load(self, vector: Tensor) -> None:
        """Put a point of the merged coordinates into the network."""
        own = self.model.state_dict()
        for name, tensor in self.subject.networks[0].space.unflatten(vector).items():
            own[name].copy_(tensor.reshape(own[name].shape))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features of the point that is loaded, (n, d)."""
        self.model.eval()
        return torch.cat([forward_backbone(self.model, part) for part in torch.split(images, BATCH)])

    def score(
        self, vector: Tensor, *, tasks: Sequence[int] | None = None, heads: Sequence[Readout] | None = None
    ) -> list[Score]:
        """Scores of a point on held-in tasks (default: all) and on every held-out task.

        Args:
            vector: (P,).
            tasks: numbers of held-in tasks.
            heads: of all held-in tasks, instead of the experts'.
        """
        self.load(vector)
        chosen = range(len(self.tests)) if tasks is None else tasks
        return [self._through(j, (heads or self.heads)[j]) for j in chosen] + self._transfers()

    @torch.no_grad()
    def _through(self, j: int, head: Readout) -> Score:
        split = self.tests[j]
        logits = head.logits(self.features(split.images)).double()
        loss = functional.cross_entropy(logits, split.labels, reduction="none")
        right = (logits.argmax(1) == split.labels).numpy()
        return Score(self.subject.tasks[j], "head", right, np.asarray(loss.numpy()), {})

    def _transfers(self) -> list[Score]:
        out = []
        for task in self.held_out:
            parts = (task.fit, task.validation, task.test)
            found = torch.split(self.features(torch.cat([p.images for p in parts])), [len(p) for p in parts])
            fit, validation, test = [(values, part.labels) for values, part in zip(found, parts, strict=True)]
            scored = transfer(
                TransferFeatures(task.task, task.classes, fit, validation, test),
                self.spec.transfers,
                neighbours=(self.spec.neighbours,),
                grid=(self.spec.probe_l2,),
                resamples=0,
            )
            out += [Score(task.task, name, one.correct, None, one.settings) for name, one in scored.items()]
        return out


def make_scorer(subject: Subject, spec: ScaleSpec, root: str | None = None) -> Scorer:
    """A scorer for a subject whose experts are those of the held-in tasks, in order.

    Raises:
        MergeboundError: a network whose head is not one linear layer, or tasks that cannot be opened.
    """
    prefix = head_prefix(subject.model)
    if any(prefix + "weight" not in head for head in subject.heads):
        raise MergeboundError(
            f"{subject.architecture}: its head is not one linear layer; the study needs such a network"
        )
    heads = tuple(Readout(head[prefix + "weight"].detach(), head.get(prefix + "bias")) for head in subject.heads)
    tests = []
    for task, data in zip(subject.tasks, subject.test, strict=True):
        if data is None:
            raise MergeboundError(f"{task}: no test images; the study measures merges on them")
        tests.append(draw(data, spec.test_images, spec.seed + TEST))
    model = copy.deepcopy(subject.model).requires_grad_(False)
    return Scorer(subject, model, heads, tuple(tests), held_out_images(spec, model, root), spec)


def held_out_images(spec: ScaleSpec, model: nn.Module, root: str | None) -> tuple[HeldOut, ...]:
    """Images of the held-out tasks as the network takes them, drawn by the study's seed."""
    form = input_format(model)
    out = []
    for name in spec.held_out:
        task = open_task(name, root, seed=0)
        fit, validation, test = residents(task, form)
        out.append(
            HeldOut(
                name,
                task.classes,
                _some(task, fit, spec.fit_images, spec.seed + 1),
                _some(task, validation, spec.validation_images, spec.seed + 2),
                draw(test, spec.test_images, spec.seed + TEST),
            )
        )
    return tuple(out)


def _some(task: ImageTask, data: TrainingData, images: int, seed: int) -> Split:
    """Images class by class as evenly as they come, so that a small draw has every class where the data have it."""
    labels = data.labels.cpu().numpy()
    rng = np.random.default_rng([seed, TEST])
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)
    for kind in range(task.classes):
        own = order[labels[order] == kind]
        rank[own] = np.arange(len(own))
    rows = order[np.argsort(rank[order], kind="stable")][:images].astype(np.int64)
    pixels, found = data.batch(rows, 0)
    return Split(pixels, found, rows)
