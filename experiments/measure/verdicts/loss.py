"""A3 and what the loss is: coupling within a batch, random layers, boundedness (theory.md sections 1 and 3).

Whether a loss is a per-sample loss is tried, not looked up: one image is shown to the network in training mode next to
different other images, with the same random numbers.  If its logits change, some layer mixes images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from experiments.finetune.trained import set_modes
from experiments.grid.run_spec import RunSpec, Trained
from experiments.measure.verdicts.finding import Evidence, Finding, finding
from theory.errors import MergeboundError

PARTNERS = 0xC0DE
"""Names the stream that chooses and disturbs other images of a batch."""
_TINY = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Relative change of logits that is rounding: kernels sum in another order for other batches."""


@dataclass(frozen=True)
class Coupling:
    """How an image's logits in training mode react.

    Attributes:
        to_others: largest relative change when the other images of its batch change, same random numbers.
        to_seed: largest relative change when only the random numbers change (dropout, stochastic depth).
        rounding: what counts as no change.
        tries: batches that were tried.
        seed: of the tries.
    """

    to_others: float
    to_seed: float
    rounding: float
    tries: int
    seed: int


def coupling(model: nn.Module, images: Tensor, *, trained: Trained = "full", tries: int = 4, seed: int = 0) -> Coupling:
    """Try whether a network in the modes of training mixes the images of a batch, or draws random numbers.

    Args:
        model: is copied; the copy's parameters are moved a little, so that nothing hides behind a zero.
        images: (m, ...), two or more.
        trained: which part is in training mode (:func:`experiments.finetune.trained.set_modes`).
        tries: batches; half of the images of each are replaced by disturbed copies of others.
        seed: of the batches (``default_rng([seed, 0xC0DE])``).

    Raises:
        MergeboundError: fewer than two images, or no try.
    """
    if len(images) < 2 or tries < 1:
        raise MergeboundError(f"coupling: {len(images)} images and {tries} tries; give 2 or more, and at least 1 try")
    net = copy.deepcopy(model)
    set_modes(net, trained)
    rng = np.random.default_rng([seed, PARTNERS])
    _stir(net, rng)
    parameter = next(net.parameters(), None)
    shown = images if parameter is None else images.to(parameter.dtype)
    others, seeds, half = 0.0, 0.0, max(1, len(shown) // 2)
    for number in range(tries):
        order = torch.from_numpy(rng.permutation(len(shown)))
        batch = shown[order]
        changed = batch.clone()
        noise = torch.from_numpy(rng.standard_normal(tuple(batch[half:].shape))).to(batch.dtype)
        changed[half:] = batch[half:].flip(0) * float(rng.uniform(0.5, 2.0)) + noise
        here = _logits(net, batch, number)
        scale = float(here.abs().max()) or 1.0
        others = max(others, float((_logits(net, changed, number)[:half] - here[:half]).abs().max()) / scale)
        seeds = max(seeds, float((_logits(net, batch, number + tries) - here).abs().max()) / scale)
    return Coupling(others, seeds, _TINY.get(shown.dtype, 1e-2), tries, seed)


def _stir(net: nn.Module, rng: np.random.Generator) -> None:
    """Move every parameter a little: a head or a branch that starts at zero would hide what comes before it."""
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape))).to(parameter.dtype)
            scale = 0.1 * max(float(parameter.double().square().mean().sqrt()), 0.1)
            parameter.add_(scale * noise)


def _logits(net: nn.Module, images: Tensor, seed: int) -> Tensor:
    """With its own random numbers and unchanged running statistics."""
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        found: Tensor = net(images)
    for name, buffer in net.named_buffers():
        buffer.copy_(buffers[name])
    return found.double()


def judge_per_sample(name: str, found: Coupling) -> Finding:
    """A3: no image's loss depends on the other images of its batch."""
    evidence = Evidence.exact(
        "largest relative change of an image's logits when others of its batch change",
        found.to_others, f"{found.tries} batches in training mode, same random numbers",
    )  # fmt: skip
    if found.to_others > found.rounding:
        why = "images of a batch are mixed in training mode (as BatchNorm does)"
        remedy = "use networks without batch statistics (GroupNorm, LayerNorm, frozen BatchNorm), or held-out risks"
        return finding("per_sample_loss", name, "violated", why, evidence, remedy=remedy)
    return finding("per_sample_loss", name, "holds", "an image's logits do not react to its batch", evidence)


def judge_trained_loss(name: str, found: Coupling, run: RunSpec | None) -> Finding:
    """Whether the constants, which are of plain images and the evaluation mode, describe the loss that was trained."""
    differences, evidence = (
        [],
        [
            Evidence.exact(
                "largest relative change of logits with the random numbers of training", found.to_seed, "tries"
            ),
            Evidence.exact("the same with the other images of the batch", found.to_others, "tries"),
        ],
    )
    if found.to_others > found.rounding:
        differences.append("batch statistics")
    if found.to_seed > found.rounding:
        differences.append("random layers (dropout)")
    if run is not None and run.augment != "none":
        differences.append(f"augmentation {run.augment!r}")
    if run is not None and run.label_smoothing:
        differences.append("label smoothing: constants are of the smoothed loss, merges are judged by the plain one")
        evidence.append(Evidence.exact("label smoothing", run.label_smoothing, "recipe"))
    if run is not None and run.optimizer == "sam":
        differences.append("sharpness-aware steps")
    if differences:
        why = f"training had {', '.join(differences)}"
        return finding(
            "trained_loss", name, "violated", why, *evidence,
            remedy="constants are of the plain loss: read bounds made of them as estimates, or train without",
        )  # fmt: skip
    if run is None:
        why = "nothing random in the network, but the recipe (augmentation, smoothing) is not known"
        return finding("trained_loss", name, "unknown", why, *evidence, seen="for", remedy="open the grid's store")
    return finding("trained_loss", name, "holds", "plain images, nothing random, no smoothing", *evidence)


def judge_nonnegative(name: str, smallest: Evidence | None = None, *, by_form: bool = False) -> Finding:
    """Losses of at least 0: by their form (cross-entropy, squared error), else by the smallest one seen."""
    seen = () if smallest is None else (smallest,)
    if smallest is not None and smallest.value < 0:
        why = f"a loss of {smallest.value:.3g} was seen"
        return finding("nonnegative", name, "violated", why, *seen, remedy="add a constant to the loss")
    if by_form:
        return finding("nonnegative", name, "holds", "cross-entropy and squared error are never negative", *seen)
    return finding("nonnegative", name, "unknown", "no negative loss was seen", *seen, seen="for")


def judge_bounded(name: str, largest: Evidence, *, stated: float | None = None) -> Finding:
    """Losses in [0, B]: the cross-entropy has no bound; a stated B is held against the largest loss seen."""
    if stated is None:
        why = "the cross-entropy has no upper bound; the largest loss seen is no bound"
        return finding("bounded", name, "unknown", why, largest, remedy="state B, or clip the loss")
    if largest.value > stated:
        why = f"a loss of {largest.value:.3g} was seen, above B = {stated:g}"
        return finding("bounded", name, "violated", why, largest, remedy="raise B")
    return finding("bounded", name, "holds", f"B = {stated:g} is stated, and no loss seen exceeds it", largest)


def kinks(call: Callable[[Tensor], Tensor], theta: Tensor) -> tuple[str, ...]:
    """Operations between theta and the output whose derivative jumps (rectifiers, maxima), by autograd's names.

    Found in the recorded graph, so that only those count that what was trained passes through.
    """
    point = theta.detach().clone().requires_grad_()
    output = call(point)
    if output.grad_fn is None:
        return ()
    seen, stack, found = set(), [output.grad_fn], []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        name = node.name().removesuffix("0").removesuffix("Backward")
        if any(name.startswith(kind) for kind in KINKED):
            found.append(name)
        stack += [parent for parent, _ in node.next_functions if parent is not None]
    return tuple(sorted(found))


KINKED = ("Relu", "LeakyRelu", "PreluKernel", "RreluWith", "Threshold", "Hardtanh", "Hardswish", "Hardsigmoid",
          "Clamp", "Abs", "MaxPool", "AdaptiveMaxPool", "Amax", "Max", "Maximum", "Minimum", "Min", "Softshrink",
          "Hardshrink")  # fmt: skip
"""Beginnings of autograd's names of operations without a continuous derivative."""
