"""Many merges of one architecture on the same tasks: test images are put in place once, weights into the same buffers.

The path (plain float32, or a fast one) is chosen once, before.  With a fast path the closeness of every network is
checked on the probe; one that is not close is evaluated by plain float32, and its results say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from experiments.evaluate.evaluate import Head, apply_head, combine, evaluation, scored
from experiments.evaluate.fast import FastModel, plain_evaluator
from experiments.evaluate.metrics import BINS, join
from experiments.evaluate.predictions import BATCH, batches
from experiments.evaluate.results import EvaluationSet, JointEvaluation
from theory.errors import MergeboundError

MEMORY = 2 << 30
"""Bytes of prepared test images that are kept; what is beyond is read again for every network."""


def evaluate_many(
    states: Iterable[Mapping[str, Tensor]],
    model: nn.Module,
    tasks: Sequence[EvaluationSet],
    *,
    heads: Mapping[str, Head] | None = None,
    fast: FastModel | None = None,
    weights: Mapping[str, float] | None = None,
    batch_size: int = BATCH,
    bins: int = BINS,
    resamples: int = 0,
    level: float = 0.95,
    seed: int = 0,
    memory: int = MEMORY,
    recheck: bool = True,
    keep_scores: bool = False,
) -> Iterator[JointEvaluation]:
    """Evaluate networks one after the other; a result comes as soon as it is there.

    Args:
        states: state dicts of the model's architecture; may be made one by one.  With ``heads`` their head may be
            missing.
        model: the architecture; its own weights do not matter and stay as they are.
        tasks: the test images.
        heads: by task; without them the network's own head serves all tasks.
        fast: from :func:`~experiments.evaluate.fast.fast_evaluator` on this architecture (with the same kind of
            heads); its weights are overwritten.  Plain float32 when absent.
        weights: p_i by task; equal when absent.
        resamples: of the bootstrap over test images; 0 (no intervals) is meant for thousands of merges.
        memory: bytes of test images that may be kept ready.
        recheck: check the closeness of every network on the probe.
        keep_scores: keep the scores of each image in the results (33 bytes each).

    Raises:
        MergeboundError: a task without a head, or a state that does not fit.
    """
    for data in tasks:
        if heads is not None and data.name not in heads:
            raise MergeboundError(
                f"task {data.name!r} has no head; there are heads for {', '.join(heads) or 'nothing'}"
            )
    if fast is not None and bool(fast.heads) != (heads is not None):
        raise MergeboundError("fast: made with heads for a network with its own head, or the reverse; make it alike")
    chosen = plain_evaluator(model, heads=tuple((heads or {}).values())) if fast is None else fast
    return _evaluate(
        states, chosen, tasks, heads, weights, (batch_size, bins, resamples, level, seed), memory, recheck, keep_scores
    )


def _evaluate(
    states: Iterable[Mapping[str, Tensor]],
    fast: FastModel,
    tasks: Sequence[EvaluationSet],
    heads: Mapping[str, Head] | None,
    weights: Mapping[str, float] | None,
    options: tuple[int, int, int, float, int],
    memory: int,
    recheck: bool,
    keep_scores: bool,
) -> Iterator[JointEvaluation]:
    batch_size, bins, resamples, level, seed = options
    ready = _prepare(fast, tasks, batch_size, memory)
    for state in states:
        fast.load(state)
        used = fast
        if recheck and fast.path != "fp32" and not fast.check().holds(fast.path):
            used = fast.as_plain()
        found = []
        for data in tasks:
            head = None if heads is None else heads[data.name]
            parts = []
            # images in the fast path's type have lost digits, so a network that falls back reads its own
            kept = ready.get(data.name) if used is fast else None
            for images, labels in kept if kept is not None else _fresh(used, data, batch_size):
                out = used.run(images)
                parts.append(scored(out if head is None else apply_head(head, out), labels, data.name))
            found.append(evaluation(data, join(parts), used.path, bins=bins, resamples=0, seed=seed))
        joint = combine(found, weights=weights, resamples=resamples, level=level, seed=seed)
        yield joint if keep_scores else without_scores(joint)


def _fresh(fast: FastModel, data: EvaluationSet, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in batches(data.data, batch_size):
        yield fast.prepare(images), labels


def _prepare(
    fast: FastModel, tasks: Sequence[EvaluationSet], batch_size: int, memory: int
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Prepared batches of as many tasks as fit."""
    ready: dict[str, list[tuple[Tensor, Tensor]]] = {}
    left = memory
    for data in tasks:
        kept: list[tuple[Tensor, Tensor]] = []
        used = 0
        for images, labels in _fresh(fast, data, batch_size):
            used += images.numel() * images.element_size()
            if used > left:
                break
            kept.append((images, labels))
        else:
            ready[data.name] = kept
            left -= used
    return ready


def without_scores(joint: JointEvaluation) -> JointEvaluation:
    """The same numbers without the scores of each image."""
    return replace(joint, tasks=tuple(replace(one, scores=one.scores.empty(), source=None) for one in joint.tasks))
