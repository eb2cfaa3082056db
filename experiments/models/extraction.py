"""What the head of a network reads: features of images, and the head alone.

*Features* are what the head's classifiers are applied to, (n, d); where two classifiers read different features
(distilled networks, two-branch networks) d is the sum of both.  ``head_logits(model, features(model, x))`` equals
``model(x)`` in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from experiments.models.form import input_format
from experiments.models.parts import head_units, without_numbers
from theory.errors import MergeboundError


@torch.no_grad()
def features(model: nn.Module, images: Tensor, *, batch: int = 256, units: Sequence[str] | None = None) -> Tensor:
    """What the head is applied to, in evaluation mode and without gradients.

    Args:
        images: (n, channels, height, width), normalised; moved to the model's device batch by batch.
        batch: images at a time.
        units: :func:`~experiments.models.parts.head_units` of the model, where they are known; finding them copies it.

    Returns:
        (n, d) on the model's device; the model's output itself where it has no classifier.

    Raises:
        MergeboundError: the features are not one row per image.
    """
    units = head_units(model) if units is None else units
    place = next((p.device for p in model.parameters()), images.device)
    mode = model.training
    model.eval()
    try:
        rows = [_rows(model, part.to(place), units) for part in torch.split(images, batch)]
    finally:
        model.train(mode)
    return torch.cat(rows)


def feature_dim(model: nn.Module) -> int:
    """The d of :func:`features`, from one image of zeros.

    Raises:
        MergeboundError: as :func:`features`, or the model does not run on the images that it says it takes.
    """
    return int(_try(model).shape[1])


def head_logits(model: nn.Module, rows: Tensor) -> Tensor:
    """The head alone, in evaluation mode: features (n, d) to logits (n, classes); differentiable in ``rows``.

    Raises:
        MergeboundError: features of another width; a head that does not read the features alone (VOLO's second head
            reads every patch).
    """
    units = [model.get_submodule(name) for name in head_units(model)]
    if not units:
        return rows
    if getattr(model, "aux_head", None) is not None:
        raise MergeboundError(
            f"{type(model).__name__}: its second head reads every patch, not the pooled features; build the model "
            "with use_aux_head=False"
        )
    widths = [_width(unit) for unit in units]
    if len(set(widths)) == 1 and rows.shape[1] == widths[0]:
        pieces: Sequence[Tensor] = [rows] * len(units)
    elif sum(widths) == rows.shape[1]:
        pieces = torch.split(rows, widths, dim=1)
    elif len(units) % 2 == 0 and sum(widths) == 2 * rows.shape[1]:  # two rows of classifiers on the same features
        pieces = [*torch.split(rows, widths[: len(units) // 2], dim=1)] * 2
    else:
        raise MergeboundError(
            f"features have width {rows.shape[1]}, but the head of {type(model).__name__} reads {sum(widths)}; give "
            "features of the same model"
        )
    with ExitStack() as stack:
        for unit in units:
            stack.callback(unit.train, unit.training)
            unit.eval()
        return _combined(model, [_apply(unit, piece) for unit, piece in zip(units, pieces, strict=True)])


def _combined(model: nn.Module, outputs: list[Tensor]) -> Tensor:
    """Averaged; EfficientViM weighs its stages, and averages over its one or two rows of classifiers."""
    fusing = [getattr(model, name, None) for name in ("weights", "weights_dist")]
    weights = [w.softmax(-1) for w in fusing if isinstance(w, nn.Parameter)]
    if len(outputs) > 1 and weights and sum(len(w) for w in weights) == len(outputs):
        fused: Tensor = torch.tensordot(torch.cat(weights), torch.stack(outputs), 1) / len(weights)
        return fused
    return torch.stack(outputs).mean(0) if len(outputs) > 1 else outputs[0]


def _width(unit: nn.Module) -> int:
    """How many features a classifier reads."""
    first = next(m for m in unit.modules() if any(True for _ in m.parameters(recurse=False)))
    for name in ("in_features", "in_channels", "num_features"):
        if isinstance(getattr(first, name, None), int):
            return int(getattr(first, name))
    raise MergeboundError(f"{type(first).__name__}: a first layer of a head that is not known here; use another model")


def _apply(unit: nn.Module, rows: Tensor) -> Tensor:
    first = next(m for m in unit.modules() if any(True for _ in m.parameters(recurse=False)))
    out: Tensor = unit(rows[:, :, None, None] if isinstance(first, nn.Conv2d) else rows)
    return out.flatten(1)


def _rows(model: nn.Module, images: Tensor, units: Sequence[str]) -> Tensor:
    """Features of one batch: what each classifier is called with, caught on the way."""
    caught: dict[str, Tensor] = {}

    def catch(name: str, inputs: tuple[Any, ...]) -> None:
        caught[name] = inputs[0]

    with ExitStack() as stack:
        for name in units:
            hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: catch(name, inputs))
            stack.callback(hook.remove)
        out = model(images)
    different = {id(tensor): tensor for tensor in (caught[name] for name in units if name in caught)}
    pieces = list(different.values()) if units else [out]
    flat = [p.flatten(1) if isinstance(p, Tensor) and p.ndim == 4 and p.shape[2:] == (1, 1) else p for p in pieces]
    flat = [p for p in flat if isinstance(p, Tensor) and p.ndim == 2]
    if not flat or (len(flat) < len(pieces) and getattr(model, "aux_head", None) is None):
        shapes = ", ".join(str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in pieces)
        raise MergeboundError(
            f"{type(model).__name__}: its features ({shapes or 'none'}) are not one row per image; build it with a "
            "classifier and global_pool"
        )
    return torch.cat(flat, dim=1)


@torch.no_grad()
def _try(model: nn.Module) -> Tensor:
    """Features of one image of zeros: shapes only where the model allows it."""
    form = input_format(model)
    shape = (1, form.channels, form.height, form.width)
    units = head_units(model)
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        return _rows(without_numbers(model).eval(), torch.empty(shape, device="meta", dtype=kind), units)
    except MergeboundError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
        pass  # some layers need numbers
    try:
        return features(model, torch.zeros(shape, dtype=kind))
    except (RuntimeError, AssertionError, TypeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise MergeboundError(
            f"{type(model).__name__}: it does not run on images of shape {shape[1:]} ({reason}); build it for the "
            "images that you have"
        ) from error
