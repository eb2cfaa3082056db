"""What one process needs to train runs of a store: bases, tasks and images, opened once, kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bases.base import Base
from experiments.engines.errors import EngineError
from experiments.finetune.task_expert import start_from
from experiments.grid.run_spec import RunSpec
from experiments.inputs.augment import augmentation
from experiments.inputs.memory import available_bytes
from experiments.inputs.opening import open_inputs
from experiments.inputs.resident import residents
from experiments.inputs.resident_data import Resident
from experiments.inputs.training_data import TrainingData
from experiments.models import head_tensors
from experiments.models.form import input_format
from experiments.tasks.dataset import ImageTask
from experiments.tasks.form import InputFormat
from experiments.tasks.named import open_task

KEPT_SHARE = 0.5
"""Share of the available memory that the images of all tasks may take."""
_FEW_BASES, _MANY_STARTS = 4, 512


@dataclass(frozen=True)
class Job:
    """One run, ready to be trained.

    Attributes:
        run: its specification.
        network: of its architecture with a head for its task, on the device; shared with other jobs of one head shape.
        start: x_0, head included.
        train, validation, test: images; ``train`` is augmented as the run says.
        task: its task.
    """

    run: RunSpec
    network: nn.Module
    start: dict[str, Tensor]
    train: TrainingData
    validation: TrainingData
    test: TrainingData
    task: ImageTask


class Workplace:
    """Opens what runs need.  Not for several threads.

    Args:
        base_of: base by digest (:meth:`experiments.store.store.Store.base`).
        root: folder of the data sets; default: what ``MERGEBOUND_DATA`` names.
        device: where networks and images live.
        memory: bytes of images that are kept; default: half of what is available at first use.
        cache: folder for resized images that do not fit in memory.
    """

    def __init__(
        self,
        base_of: Callable[[str], Base],
        root: str | Path | None = None,
        *,
        device: str = "cpu",
        memory: int | None = None,
        cache: Path | None = None,
    ) -> None:
        self._base_of, self._root, self._device, self._cache = base_of, root, device, cache
        self._memory = memory
        self._bases: OrderedDict[str, Base] = OrderedDict()
        self._networks: OrderedDict[tuple[str, int], nn.Module] = OrderedDict()
        self._starts: OrderedDict[tuple[str, int, int], dict[str, Tensor]] = OrderedDict()
        self._tasks: dict[tuple[str, int], ImageTask] = {}
        self._images: OrderedDict[tuple[Any, ...], tuple[TrainingData, TrainingData, TrainingData]] = OrderedDict()
        self._views: dict[tuple[Any, ...], TrainingData] = {}

    def job(self, run: RunSpec, base_digest: str, split_digest: str) -> Job:
        """One run with all that it needs.

        Raises:
            MergeboundError: data that are missing, damaged, or not those that the run is named by.
        """
        task = self.task(run, split_digest)
        network, start = self._start(base_digest, task.classes, run.seed)
        form = input_format(network)
        _, validation, test = self._parts(task, form)
        return Job(run, network, start, self._training(task, form, run), validation, test, task)

    def _start(self, digest: str, classes: int, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
        """The network, and x_0 with the head of the seed; starts share the base's tensors."""
        key = (digest, classes)
        if key in self._networks and (*key, seed) in self._starts:
            return self._networks[key], self._starts[(*key, seed)]
        base = self.base(digest)
        built, full = start_from(base, classes, seed)
        head = head_tensors(built)
        start = {name: tensor if name in head else base.state[name] for name, tensor in full.items()}
        if key not in self._networks:
            _make_room(self._networks, _FEW_BASES)
            self._networks[key] = built.to(self._device)
        _make_room(self._starts, _MANY_STARTS)
        self._starts[(*key, seed)] = start
        return self._networks[key], start

    def base(self, digest: str) -> Base:
        """x_0 by its digest."""
        if digest not in self._bases:
            _make_room(self._bases, _FEW_BASES)
            self._bases[digest] = self._base_of(digest)
        return self._bases[digest]

    def task(self, run: RunSpec, split_digest: str) -> ImageTask:
        """The task of a run, which must have the split that the run is named by."""
        key = (run.task, run.split_seed)
        if key not in self._tasks:
            self._tasks[key] = open_task(run.task, self._root, seed=run.split_seed)
        found = self._tasks[key]
        if found.digest != split_digest:
            raise EngineError(
                f"task {run.task}: its images or their split are not those that the grid began with (split "
                f"{found.digest[:12]} instead of {split_digest[:12]}); give the --root that it began with, or start in "
                "an empty store"
            )
        return found

    def _training(self, task: ImageTask, form: InputFormat, run: RunSpec) -> TrainingData:
        """The training part under the run's seed and augmentation; runs that agree share one object."""
        dtype = torch.float64 if run.precision == "float64" else torch.float32
        key = (task.digest, form, run.seed, run.augment, dtype)
        if key not in self._views:
            plain = self._parts(task, form)[0]
            if not isinstance(plain, Resident):
                return open_inputs(
                    task.train, form, cache=self._cache, augment=run.augment, seed=run.seed, name=task.name,
                    device=self._device, dtype=dtype,
                )  # fmt: skip
            seen = augmentation(run.augment)
            self._views[key] = replace(plain, seed=run.seed, augmentation=seen, dtype=dtype)
        return self._views[key]

    def _parts(self, task: ImageTask, form: InputFormat) -> tuple[TrainingData, TrainingData, TrainingData]:
        key = (task.digest, form)
        if key in self._images:
            self._images.move_to_end(key)
            return self._images[key]
        parts = (task.train, task.validation, task.test)
        needed = sum(len(part) for part in parts) * form.channels * form.height * form.width
        if self._memory is None:
            free = available_bytes(torch.device(self._device))
            self._memory = int(KEPT_SHARE * free) if free is not None else 1 << 40
        while self._images and sum(_bytes(one) for one in self._images.values()) + needed > self._memory:
            dropped, _ = self._images.popitem(last=False)
            self._views = {view: data for view, data in self._views.items() if view[:2] != dropped}
        opened: tuple[TrainingData, TrainingData, TrainingData]
        if needed <= self._memory:
            opened = residents(task, form, device=self._device, limit_bytes=max(self._memory, 1))
        else:
            first, second, third = (
                open_inputs(part, form, cache=self._cache, name=task.name, device=self._device) for part in parts
            )
            opened = (first, second, third)
        self._images[key] = opened
        return opened


def _make_room(kept: OrderedDict[Any, Any], most: int) -> None:
    while len(kept) >= most:
        kept.popitem(last=False)


def _bytes(parts: tuple[TrainingData, TrainingData, TrainingData]) -> int:
    return sum(part.store.numel() for part in parts if isinstance(part, Resident))
