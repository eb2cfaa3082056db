"""Fast evaluation: BatchNorm folded, bfloat16, channels-last layout, where they are faster *and* proven close.

:func:`fast_evaluator` builds candidates from a network, checks each against plain float32 on a probe of images, times
those that are close (in turns with plain float32, medians) on this machine, and keeps the fastest, or plain float32 if
none is faster in the median and in three of four turns.  So nothing is slower where a processor lacks the units, and
nothing that drifts is used.

A path is named by its parts, such as ``bf16+fold+channels_last``:

``fp32``, ``bf16``   type of weights and activations.  In bf16 BatchNorm that is not folded keeps float32 statistics,
                     and the last linear layer is computed in float32, so that logits are not rounded to bf16
``fold``             BatchNorm folded into the layer before it (:mod:`experiments.evaluate.folding`)
``channels_last``    memory layout of convolutions
``unfused``          attention written out instead of the fused kernel
``chunk32``          32 images at a time, so that activations of convolutional networks stay in the processor's cache

Closeness, on the probe: with d the largest absolute difference of a logit and s the root mean square of the float32
logits about each image's mean, d / s is at most 1e-4 in float32 and 0.1 in bf16, and at least 95 % of the images have
the same largest logit.
"""

from __future__ import annotations

import copy
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from experiments.evaluate.cpu import cpu
from experiments.evaluate.evaluate import Head, apply_head
from experiments.evaluate.folding import Pair, refill, structure
from experiments.evaluate.paths import Chunks, build, paths, prepared, race, seconds_of
from experiments.evaluate.predictions import Features, device_of
from experiments.models import head_tensors
from theory.errors import MergeboundError

_log = logging.getLogger(__name__)

ALLOWED = ("fold", "bf16", "channels_last", "chunk")
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""Largest difference of a logit over the spread of the logits."""
AGREEMENT = 0.95
"""Smallest share of probe images with the same largest logit."""
MARGIN = 1.05
"""A path must be this much faster than plain float32."""
SECONDS = 0.5
"""About what the timing of the candidates may take."""


@dataclass(frozen=True)
class Closeness:
    """How close outputs are to plain float32: ``difference`` is the largest one of a logit over the logits' spread,
    ``agreement`` the share of images with the same largest logit."""

    difference: float
    agreement: float

    def holds(self, path: str) -> bool:
        """Whether both are within the stated tolerances of the path's type of numbers."""
        return self.difference <= TOLERANCE[path.split("+")[0]] and self.agreement >= AGREEMENT


@dataclass(frozen=True)
class Candidate:
    """One path that was tried: seconds of a probe batch (NaN if it was not timed), speed over plain float32, how close
    it is, and why it was dropped (empty if it was not)."""

    path: str
    seconds: float
    ratio: float
    closeness: Closeness
    dropped: str = ""


@dataclass(frozen=True)
class FastModel:
    """A network on its fastest close path; call it with float32 images for float32 logits (or features).

    Attributes:
        model: the network that is run.
        path: its name; ``fp32`` is the plain network.
        ratio: images per second over plain float32, on the probe.
        agreement, difference: on the probe, see :class:`Closeness`.
        candidates: everything that was tried.
        machine: the processor (or device) that it was timed on.
        plain: the network in float32, for checks and for loading other weights.
        pairs: what is folded.
        probe: images that closeness is checked on.
        heads: through which closeness is measured, where the network gives features.
    """

    model: nn.Module = field(repr=False)
    path: str
    ratio: float
    agreement: float
    difference: float
    candidates: tuple[Candidate, ...] = field(repr=False)
    machine: str
    plain: nn.Module = field(repr=False)
    pairs: tuple[Pair, ...] = field(repr=False)
    probe: Tensor = field(repr=False)
    heads: tuple[Head, ...] = field(repr=False, default=())

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return device_of(self.plain)

    def prepare(self, images: Tensor) -> Tensor:
        """Images in the type, layout and place that :meth:`run` takes; do it once where they are used often."""
        return prepared(images.to(self.device, non_blocking=True), self.path)

    @torch.inference_mode()
    def run(self, images: Tensor) -> Tensor:
        """Logits (or features) of prepared images, at least float32."""
        out: Tensor = self.model(images)
        return out if out.dtype == torch.float64 else out.float()

    def __call__(self, images: Tensor) -> Tensor:
        return self.run(self.prepare(images))

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of another network of the same architecture, in place; the head may be missing.

        Raises:
            MergeboundError: tensors that are missing, unknown or of another shape.
        """
        load_into(self.plain, state)
        if self.model is not self.plain:
            inner = self.model.model if isinstance(self.model, Chunks) else self.model
            refill(inner, self.plain, self.pairs)

    def check(self) -> Closeness:
        """How close the path is to plain float32 with the present weights, on the probe."""
        if self.model is self.plain:
            return Closeness(0.0, 1.0)
        with torch.inference_mode():
            return closeness(self.plain(self.probe), self(self.probe), self.heads)

    def as_plain(self) -> FastModel:
        """The same weights (and storage) by plain float32."""
        return replace(self, model=self.plain, path="fp32", ratio=1.0, agreement=1.0, difference=0.0, pairs=())


def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict; a network behind :class:`Features` takes names without prefix, and needs no head.

    Raises:
        MergeboundError: tensors that are missing, unknown or of another shape.
    """
    inner = model.model if isinstance(model, Features) else model
    try:
        missing, unexpected = inner.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[-1].split())
        raise MergeboundError(f"weights do not fit the network: {reason}") from error
    head = set(head_tensors(inner)) if isinstance(model, Features) else set()
    lacking = [name for name in missing if not name.endswith("num_batches_tracked") and name not in head]
    if lacking or unexpected:
        what, name = ("has no tensor", lacking[0]) if lacking else ("has an unknown tensor", unexpected[0])
        raise MergeboundError(f"the state {what} {name!r}; give the weights of the same architecture")


def closeness(reference: Tensor, other: Tensor, heads: Sequence[Head] = ()) -> Closeness:
    """Compare outputs (n, d), through heads where there are any: the worst of them."""
    if not heads:
        return _closeness(reference, other)
    found = [_closeness(apply_head(head, reference), apply_head(head, other)) for head in heads]
    return Closeness(max(one.difference for one in found), min(one.agreement for one in found))


def _closeness(reference: Tensor, other: Tensor) -> Closeness:
    wanted, found = reference.double(), other.double()
    if found.shape != wanted.shape or not (torch.isfinite(found).all() and torch.isfinite(wanted).all()):
        return Closeness(float("inf"), 0.0)
    spread = float((wanted - wanted.mean(dim=1, keepdim=True)).square().mean().sqrt())
    gap = float((found - wanted).abs().max())
    difference = gap / spread if spread > 0 else (0.0 if gap == 0 else float("inf"))
    return Closeness(difference, float((found.argmax(dim=1) == wanted.argmax(dim=1)).double().mean()))


def fast_evaluator(
    model: nn.Module,
    sample: Tensor,
    *,
    allow: Sequence[str] = ALLOWED,
    heads: Sequence[Head] = (),
    seconds: float = SECONDS,
) -> FastModel:
    """Choose the fastest close path for a network on this machine.

    Args:
        model: gives logits, or features where ``heads`` are given; it is copied, and stays as it is.
        sample: (n, channels, height, width) probe images, float32: real ones if there are any, since closeness is
            checked on them, and about as many as a batch.
        allow: of :data:`ALLOWED`.
        heads: with heads, the network's features are used and closeness is measured on the heads' logits.
        seconds: about what the timing may take, without the first pass of each candidate.

    Raises:
        MergeboundError: an unknown part of a path, or fewer than two images.
    """
    unknown = [part for part in allow if part not in ALLOWED]
    if unknown:
        raise MergeboundError(f"allow: {unknown[0]!r} is no part of a fast path; choose from {', '.join(ALLOWED)}")
    if len(sample) < 2:
        raise MergeboundError(f"a probe of {len(sample)} images cannot tell; give a batch of images")
    plain = plain_copy(model, features=bool(heads))
    images = sample.to(device_of(plain))
    found = structure(plain, images[:2])
    first = seconds_of(plain, images[:4])
    share = min(len(images), max(8, int(4 * 2 * seconds / max(first, 1e-9))))
    probe = images[:share]
    with torch.inference_mode():
        reference = plain(probe)
    timed = images[: min(len(images), max(8, int(4 * seconds / 12 / max(first, 1e-9))))]
    tried: list[Candidate] = []
    built: dict[str, nn.Module] = {}
    for path in paths(plain, allow, bool(found.pairs), images.device):
        try:
            twin = build(plain, path, found.pairs, found.last)
            with torch.inference_mode():
                out = twin(prepared(probe, path)).float()
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            tried.append(Candidate(path, float("nan"), float("nan"), Closeness(float("nan"), float("nan")), reason))
            continue
        close = closeness(reference, out, heads)
        dropped = "" if close.holds(path) else "not close"
        if not dropped and seconds_of(twin, prepared(timed, path)) > 3.0 * seconds_of(plain, timed):
            dropped = "slower"
        tried.append(Candidate(path, float("nan"), float("nan"), close, dropped))
        if not dropped:
            built[path] = twin
    times = race({"fp32": plain, **built}, timed, seconds) if built else {}
    candidates = tuple(_timed(one, times) for one in tried)
    machine = str(cpu()) if images.device.type == "cpu" else torch.cuda.get_device_name(images.device)
    chosen = max((one for one in candidates if not one.dropped), key=lambda one: one.ratio, default=None)
    for one in candidates:
        _log.info("path %s: %.2f times plain float32, %s%s", one.path, one.ratio, one.closeness, one.dropped)
    if chosen is None or not chosen.ratio >= MARGIN:
        return FastModel(plain, "fp32", 1.0, 1.0, 0.0, candidates, machine, plain, (), probe, tuple(heads))
    return FastModel(
        built[chosen.path],
        chosen.path,
        chosen.ratio,
        chosen.closeness.agreement,
        chosen.closeness.difference,
        candidates,
        machine,
        plain,
        found.pairs if "fold" in chosen.path.split("+") else (),
        probe,
        tuple(heads),
    )


def plain_evaluator(model: nn.Module, *, heads: Sequence[Head] = ()) -> FastModel:
    """A network (copied) on the plain float32 path, with the interface of fast ones."""
    plain = plain_copy(model, features=bool(heads))
    machine = str(cpu()) if device_of(plain).type == "cpu" else torch.cuda.get_device_name(device_of(plain))
    return FastModel(plain, "fp32", 1.0, 1.0, 0.0, (), machine, plain, (), torch.empty(0), tuple(heads))


def reuse(fast: FastModel, model: nn.Module) -> FastModel:
    """Another network of the same architecture on the path that was chosen before; nothing is timed again.

    ``ratio`` is the one measured before; closeness is measured anew, and where it does not hold, the result is plain.
    """
    plain = plain_copy(model, features=isinstance(fast.plain, Features) and not isinstance(model, Features))
    if fast.model is fast.plain:
        return replace(fast, model=plain, plain=plain)
    last = structure(plain, fast.probe[:2]).last
    twin = replace(fast, model=build(plain, fast.path, fast.pairs, last), plain=plain)
    close = twin.check()
    if not close.holds(fast.path):
        return twin.as_plain()
    return replace(twin, agreement=close.agreement, difference=close.difference)


def plain_copy(model: nn.Module, *, features: bool = False) -> nn.Module:
    """A copy in evaluation mode without gradients; the network's features where asked for."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    if features and not isinstance(twin, Features) and hasattr(twin, "forward_head"):
        twin = Features(twin).eval()
    return twin


def _timed(candidate: Candidate, times: Mapping[str, list[float]]) -> Candidate:
    own = times.get(candidate.path)
    if not own:
        return candidate
    ratios = [plain / mine for plain, mine in zip(times["fp32"], own, strict=True)]
    steady = sum(ratio > 1.0 for ratio in ratios) >= 0.75 * len(ratios)
    dropped = "" if steady else "not faster in three of four turns"
    return replace(candidate, seconds=statistics.median(own), ratio=statistics.median(ratios), dropped=dropped)
