"""Bases made on the spot at a graded quality, kept in a cache, and measured."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.bases.base import Base, BaseError, Provenance, build, make_base, read_base, save_base
from experiments.bases.training import QUALITIES, PretrainSpec, Quality, State, train
from experiments.bases.waiting import alone
from experiments.inputs.training_data import TrainingData
from experiments.spec import NUMERICS_VERSION
from merging.checkpoint import load_state_dict, open_checkpoint, save_state_dict
from theory.errors import nearest

_log = logging.getLogger(__name__)

WHOLE = 256 << 20
"""Data of up to so many bytes (as given to the network) are digested whole."""
PROBED = 256
"""Of larger data, so many samples spread over them."""

Report = Callable[[int, int, float], None]
"""Called after each step with (step, steps, loss)."""


def pretrain_base(
    architecture: str,
    data: TrainingData,
    quality: Quality | PretrainSpec = "strong",
    *,
    classes: int | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    validation: TrainingData | None = None,
    data_digest: str | None = None,
    cache: Path | None = None,
    device: str | torch.device = "cpu",
    every: float = 60.0,
    wait: float = 3600.0,
    report: Report | None = None,
) -> Base:
    """A base pretrained here and now, or taken from the cache if it was made before.

    With a cache, training keeps its state every ``every`` seconds, and a later call goes on from there after an
    interruption, to the same bits.  Two processes that want the same base: one works, the other waits and takes what it
    made; after ``wait`` seconds it works for itself.  The file appears under its name only when it is complete.

    Args:
        architecture: as :func:`experiments.models.build_model` knows it.
        data: the pretraining sample, augmented by its own ``batch(rows, epoch)``.
        quality: a grade (:data:`experiments.bases.training.QUALITIES`), or the numbers themselves.
        classes: outputs of the head; default: as many as ``data`` has labels.
        options: of the network (``img_size``, ``in_chans``, ...).
        seed: names initial weights, subset, order and dropout.
        validation: images that the quality is measured on (no augmentation); without them it is only named.
        data_digest: what identifies the data (``ImageTask.digest``); default: :func:`digest_of`.
        cache: folder of finished bases; default: nothing is kept.
        device: where the network runs.
        every: seconds between kept states.
        wait: seconds to wait for another process.
        report: is told the progress.

    Raises:
        MergeboundError: unknown grade, architecture or option; the loss left the finite numbers; the disk refuses.
    """
    grade, spec = _grade(quality)
    if not len(data):
        raise BaseError(f"{architecture}: there is no image to pretrain on; give some")
    held = int(data.labels.max()) + 1
    classes = held if classes is None else classes
    if classes < held:
        raise BaseError(f"{architecture}: the data have {held} classes, more than classes = {classes}; raise it")
    recipe = {
        "numerics": NUMERICS_VERSION,
        "architecture": architecture,
        "classes": classes,
        "options": dict(options or {}),
        "seed": seed,
        "spec": spec.model_dump(mode="json"),
        "data": data_digest or digest_of(data),
    }
    make = _Maker(recipe, data, grade, spec, torch.device(device), report)
    if cache is None or not spec.steps:
        base = make.base(None, None, every)
    else:
        cache = Path(cache).expanduser()
        cache.mkdir(parents=True, exist_ok=True)
        base = _cached(make, cache, every, wait)
    return base if validation is None else measured(base, validation, device=device)


def measured(base: Base, validation: TrainingData, *, device: str | torch.device = "cpu") -> Base:
    """The base with its accuracy on these images in its provenance."""
    accuracy = accuracy_of(base.model(), validation, device=device)
    return replace(base, provenance=replace(base.provenance, accuracy=accuracy, images=len(validation)))


def accuracy_of(
    model: nn.Module, data: TrainingData, *, batch_size: int = 500, device: str | torch.device = "cpu"
) -> float:
    """Share of images that a network classifies rightly, in evaluation mode and float32."""
    model.to(device).eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(data), batch_size):
            images, labels = data.batch(np.arange(start, min(start + batch_size, len(data))), 0)
            right += int((model(images.to(device)).argmax(1) == labels.to(device)).sum())
    return right / max(len(data), 1)


def digest_of(data: TrainingData) -> str:
    """What tells data for the network apart: SHA-256 of labels and of images as the first two epochs give them.

    All images of the first epoch where they take at most :data:`WHOLE` bytes, else :data:`PROBED` of them; and
    :data:`PROBED` of the second epoch, which shows the augmentation.  64 hexadecimal digits.
    """
    count = len(data)
    digest = sha256(f"mergebound data 1 {count}".encode())
    digest.update(data.labels.cpu().numpy().astype("<i8").tobytes())
    probe = np.unique(np.linspace(0, count - 1, min(PROBED, count)).round().astype(np.int64))
    first, _ = data.batch(probe[:1], 0)
    rows = np.arange(count) if first.numel() * first.element_size() * count <= WHOLE else probe
    for epoch, chosen in ((0, rows), (1, probe)):
        for start in range(0, len(chosen), PROBED):
            images, _ = data.batch(chosen[start : start + PROBED], epoch)
            digest.update(_bytes(images))
    return digest.hexdigest()


def _bytes(images: Tensor) -> bytes:
    return images.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _grade(quality: Quality | PretrainSpec) -> tuple[str, PretrainSpec]:
    if isinstance(quality, PretrainSpec):
        return "custom", quality
    if quality not in QUALITIES:
        raise BaseError(f"quality: {quality!r} is unknown; {nearest(quality, QUALITIES)}, or give a PretrainSpec")
    return quality, QUALITIES[quality]


class _Maker:
    """Makes one base; everything that decides its bits is in the recipe."""

    def __init__(
        self,
        recipe: Mapping[str, Any],
        data: TrainingData,
        grade: str,
        spec: PretrainSpec,
        device: torch.device,
        report: Report | None,
    ) -> None:
        self.recipe = recipe
        self.key = sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()
        self._data, self.grade, self._spec, self._device, self._report = data, grade, spec, device, report

    @property
    def name(self) -> str:
        """File name in the cache, without the suffix."""
        plain = re.sub(r"[^0-9A-Za-z]+", "_", str(self.recipe["architecture"])).strip("_")
        return f"{plain}-{self.grade}-{self.key[:16]}"

    def base(self, kept: State | None, partial: Path | None, every: float) -> Base:
        """Train to the end, from a kept state if there is one, and keep states in ``partial``."""
        recipe, spec = self.recipe, self._spec
        model = build(recipe["architecture"], recipe["classes"], recipe["options"], recipe["seed"])
        started = last = time.monotonic()
        loss = float("nan")
        first = 0 if kept is None else int(kept["step"])
        for now in train(model, self._data, spec, recipe["seed"], device=self._device, kept=kept):
            loss = now.loss
            if self._report is not None:
                self._report(now.step, spec.steps, now.loss)
            if partial is not None and now.step < spec.steps and time.monotonic() - last >= every:
                save_state_dict(partial, now.keep(), {"key": self.key, "step": now.step})
                last = time.monotonic()
        import timm

        details = {
            **recipe,
            "samples": max(1, round(spec.share * len(self._data))),
            "final_batch_loss": loss if spec.steps else None,
            "seconds": round(time.monotonic() - started, 3),
            "resumed_at": first,
            "device": self._device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        }
        provenance = Provenance(
            "pretrain",
            f"pretrained on {len(self._data)} images (data {str(recipe['data'])[:12]})",
            quality=self.grade,
            seed=recipe["seed"],
            details=details,
        )
        return make_base(
            model.cpu().state_dict(), recipe["architecture"], recipe["classes"], recipe["options"], provenance
        )


def _cached(make: _Maker, cache: Path, every: float, wait: float) -> Base:
    target, partial = cache / f"{make.name}.safetensors", cache / f".{make.name}.partial.safetensors"
    if target.exists():
        return read_base(target)
    with alone(cache / f".{make.name}.lock", wait, done=target.exists) as held:
        if target.exists():
            return read_base(target)
        if not held:
            _log.warning("%s: another process has not finished it in %.0f seconds; it is made twice", target, wait)
        base = make.base(_kept(partial, make.key) if held else None, partial if held else None, every)
        save_base(target, base)
        if held:
            partial.unlink(missing_ok=True)
    return base


def _kept(partial: Path, key: str) -> State | None:
    """What an interrupted training kept; None where there is nothing that can be used."""
    if not partial.exists():
        return None
    try:
        if open_checkpoint(partial).metadata.get("key") == key:
            return load_state_dict(partial)
    except ValueError as error:
        _log.warning("%s: cannot be used (%s), so pretraining starts again", partial, error)
    return None
