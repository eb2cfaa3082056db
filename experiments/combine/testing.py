"""Test images of tasks, opened once and kept ready within a limit of memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from experiments.combine.groups import Member
from experiments.combine.recipe import Evaluate
from experiments.evaluate.fast import FastModel
from experiments.evaluate.predictions import batches
from experiments.evaluate.results import EvaluationSet
from experiments.inputs.resident import load_resident
from experiments.tasks.dataset import ImageTask
from experiments.tasks.form import InputFormat
from experiments.tasks.images import Images, Subset
from theory.errors import MergeboundError

_PARTS = 2
"""A test set is kept prepared if it takes at most one of so many parts of the memory."""

Opener = Callable[[str, int], ImageTask]
"""Name of a task and seed of its split to the task."""


@dataclass(frozen=True)
class TestSet:
    """The test images of one task.

    Attributes:
        data: with the task's name and the split's digest.
        classes: of the task.
        ready: prepared images and labels, batch by batch; ``None`` where they are prepared anew every time.
        path: that ``ready`` was prepared for.
        batch_size: images per batch.
        calibration: validation images, (n, channels, height, width), where they were asked for.
        bytes: that are kept.
    """

    __test__ = False

    data: EvaluationSet
    classes: int
    ready: tuple[tuple[Tensor, Tensor], ...] | None
    path: str
    batch_size: int
    calibration: Tensor | None
    bytes: int

    def batches(self, fast: FastModel) -> Iterator[tuple[Tensor, Tensor]]:
        """Images prepared for the path of a model, and labels."""
        if self.ready is not None and fast.path == self.path:  # images in another path's type have lost digits
            yield from self.ready
        else:
            for images, labels in batches(self.data.data, self.batch_size):
                yield fast.prepare(images), labels


class TestSets:
    """Test sets by task and split; those that were not used for longest go first where memory is short."""

    __test__ = False

    def __init__(self, form: InputFormat, spec: Evaluate, open_task: Opener, fast: FastModel, memory: int) -> None:
        self._form, self._spec, self._open, self._fast, self._memory = form, spec, open_task, fast, memory
        self._kept: OrderedDict[tuple[str, int], TestSet] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Bytes of images that are kept."""
        return sum(one.bytes for one in self._kept.values())

    def of(self, member: Member) -> TestSet:
        """The test set that an expert is measured on.

        Raises:
            MergeboundError: the task cannot be opened, or its images are not those that the expert was made with.
        """
        key = (member.task, member.split_seed)
        if key not in self._kept:
            found = self._load(member)
            while self._kept and self.bytes + found.bytes > self._memory:
                self._kept.popitem(last=False)
            self._kept[key] = found
        self._kept.move_to_end(key)
        return self._kept[key]

    def _load(self, member: Member) -> TestSet:
        task = self._open(member.task, member.split_seed)
        if member.split and task.digest != member.split:
            raise MergeboundError(
                f"{member.task}: its images or split (digest {task.digest[:12]}) are not those that the grid was run "
                f"with ({member.split[:12]}); give the folder with the same data (--root)"
            )
        data = load_resident(some_of(task.test, self._spec.images, task.seed), self._form, name=task.name)
        known = EvaluationSet(member.task, data, task.digest, task.seed)
        size, ready = data.store.numel(), None
        prepared = len(data) * self._form.channels * self._form.height * self._form.width * 4
        if size + prepared <= self._memory // _PARTS:
            ready = tuple((self._fast.prepare(one), labels) for one, labels in batches(data, self._spec.batch_size))
            size += sum(images.numel() * images.element_size() for images, _ in ready)
        calibration = None
        if self._spec.batchnorm == "reestimated":
            some = load_resident(
                some_of(task.validation, self._spec.calibration, task.seed), self._form, name=task.name
            )
            calibration = some.batch(np.arange(len(some)), 0)[0]
            size += calibration.numel() * calibration.element_size()
        return TestSet(known, task.classes, ready, self._fast.path, self._spec.batch_size, calibration, size)


def some_of(images: Images, count: int | None, seed: int) -> Images:
    """``count`` of the images, drawn by the seed of the split, in their order; all of them where there are no more."""
    if count is None or count >= len(images):
        return images
    rows = np.random.default_rng([seed, 0x7E57]).permutation(len(images))[:count]
    return Subset(images, np.sort(rows))
