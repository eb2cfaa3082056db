"""Smoothness constants that hold everywhere, where a network has one: frozen features with a trained linear head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from experiments.measure.subject import Subject
from theory.smoothness import SoftmaxSmoothness, softmax_smoothness

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class GlobalSmoothness:
    """An upper bound on L that holds at every point, or the reason why there is none.

    Attributes:
        name: of the task.
        what: of which coordinates.
        bound: of the risk, of one image, and of a batch; ``None`` where no bound exists.
        reason: why.
        tier: certified where there is a bound (given these images).
    """

    name: str
    what: str
    bound: SoftmaxSmoothness | None
    reason: str

    @property
    def tier(self) -> str:
        """Certified given the images, or ``none``."""
        return "none" if self.bound is None else self.bound.tier


def global_smoothness(
    subject: Subject,
    task: int,
    point: Tensor,
    *,
    images: Tensor | None = None,
    batch_size: int | None = None,
) -> tuple[GlobalSmoothness, GlobalSmoothness]:
    """Global smoothness of task j's risk: in the whole network, and in its linear head alone.

    The head's bound holds for every head, with the other layers fixed at ``point``: softmax regression on the features
    there.  The whole network has a bound only where it *is* a linear classifier of its inputs (no hidden layer), else
    the reason says that there is none.

    Args:
        subject: experts.
        task: j.
        point: merged coordinates at which features are taken, (P,).
        images: default the calibration images.
        batch_size: bound batches of this size too.

    Raises:
        MergeboundError: features that are not one row per image.
    """
    shown = subject.calibration[task].images if images is None else images
    name = subject.names[task]
    inputs = _head_inputs(subject, task, point, shown)
    if inputs is None:
        reason = "the network has no single linear classifier whose input could be read"
        head = GlobalSmoothness(name, "head", None, reason)
    else:
        head = GlobalSmoothness(
            name,
            "head, other layers fixed",
            softmax_smoothness(inputs.double().cpu().numpy(), bias=_has_bias(subject, task), batch_size=batch_size),
            "softmax regression on the features at this point (theory.smoothness)",
        )
    if inputs is not None and _is_linear(subject, task):
        raw = shown.flatten(1).double().cpu().numpy()
        bound = softmax_smoothness(raw, bias=_has_bias(subject, task), batch_size=batch_size)
        return GlobalSmoothness(name, "all", bound, "a linear classifier of its inputs: softmax regression"), head
    reason = "a network with hidden layers has no global L: nothing that needs it is certified (theory.md section 1)"
    return GlobalSmoothness(name, "all", None, reason), head


def _classifiers(model: nn.Module) -> list[nn.Linear]:
    from experiments.models.parts import head_units

    found = [model.get_submodule(unit) for unit in head_units(model)]
    return [unit for unit in found if isinstance(unit, nn.Linear)] if len(found) == 1 else []


def _head_inputs(subject: Subject, task: int, point: Tensor, images: Tensor) -> Tensor | None:
    """What the single linear classifier is applied to at the point, (n, d)."""
    from experiments.models.parts import head_units

    network = subject.networks[task]
    model = network.module.model
    assert isinstance(model, nn.Module)
    units = _classifiers(model)
    if not units:
        return None
    name = head_units(model)[0]
    rows: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].detach()))
    try:
        network.features(point, images)
    finally:
        hook.remove()
    found = torch.cat(rows)
    return found if found.ndim == 2 and len(found) == len(images) else None


def _has_bias(subject: Subject, task: int) -> bool:
    model = subject.networks[task].module.model
    assert isinstance(model, nn.Module)
    return all(unit.bias is not None for unit in _classifiers(model))


def _is_linear(subject: Subject, task: int) -> bool:
    """Whether every parameter belongs to the one classifier, which reads the flattened images."""
    model = subject.networks[task].module.model
    assert isinstance(model, nn.Module)
    units = _classifiers(model)
    own = {id(p) for unit in units for p in unit.parameters()}
    pixels = subject.calibration[task].images[0].numel()
    return bool(units) and all(id(p) in own for p in model.parameters()) and units[0].in_features == pixels
