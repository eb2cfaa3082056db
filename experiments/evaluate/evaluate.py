"""Accuracy, loss and calibration error of a network, per task and joint, with intervals over test images.

Every number is *measured*, on n test images of a split that its digest identifies.  The joint value of a metric is
sum_i p_i metric_i over the tasks, p_i equal unless given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from experiments.evaluate.bootstrap import RESAMPLES, Floats, bootstrap_means, percentile
from experiments.evaluate.metrics import BINS, Scores, equal_width, join, score, summarise
from experiments.evaluate.predictions import BATCH, Function, backbone_of, batches, device_of, evaluation_mode
from experiments.evaluate.results import METRICS, Evaluation, EvaluationSet, JointEvaluation
from experiments.inputs.training_data import TrainingData
from experiments.measure.backbone import Readout
from experiments.statistics import Estimate, mean_interval, membership
from theory.errors import MergeboundError

Head = Readout | Function
"""A task's head: a linear readout, or a network or function of features (m, d) that gives logits (m, C)."""


def evaluate(
    model: Function,
    data: TrainingData | EvaluationSet,
    *,
    task: str = "",
    digest: str = "",
    split_seed: int | None = None,
    batch_size: int = BATCH,
    bins: int = BINS,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a network with its head on one task.

    Args:
        model: images to logits, such as an ``nn.Module`` (put into evaluation mode meanwhile) or a
            :class:`~experiments.evaluate.fast.FastModel`.
        data: test images without augmentation, or an :class:`EvaluationSet`, which has name, digest and seed.
        bins: of the calibration error.
        resamples: of the bootstrap over test images; 0 gives no intervals.
        level: of the intervals.
        seed: of the bootstrap.

    Raises:
        MergeboundError: no images, or labels that the network has no logit for.
    """
    if not isinstance(data, EvaluationSet):
        data = EvaluationSet(task, data, digest, split_seed)
    scores = predict(model, data, batch_size=batch_size)
    return evaluation(data, scores, path_of(model), bins=bins, resamples=resamples, level=level, seed=seed)


def evaluate_tasks(
    backbone: Function,
    heads: Mapping[str, Head],
    tasks: Sequence[EvaluationSet],
    *,
    weights: Mapping[str, float] | None = None,
    batch_size: int = BATCH,
    bins: int = BINS,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> JointEvaluation:
    """Evaluate one (merged) backbone on several tasks, each through its own head.

    Args:
        backbone: images to features; of a network with a separable head (timm's) the features before it.
        heads: by task.
        tasks: the test images.
        weights: p_i by task, nonnegative; divided by their sum; equal when absent.

    Raises:
        MergeboundError: a task without a head, two tasks of one name, or weights that do not fit.
    """
    features = backbone_of(backbone)
    found = []
    for data in tasks:
        if data.name not in heads:
            raise MergeboundError(
                f"task {data.name!r} has no head; there are heads for {', '.join(heads) or 'nothing'}"
            )
        scores = predict(features, data, head=heads[data.name], batch_size=batch_size)
        found.append(evaluation(data, scores, path_of(backbone), bins=bins, resamples=0, seed=seed))
    return combine(found, weights=weights, resamples=resamples, level=level, seed=seed)


def predict(function: Function, data: EvaluationSet, *, head: Head | None = None, batch_size: int = BATCH) -> Scores:
    """Scores of every image; with a ``head``, the function's outputs are its features (taken in float32)."""
    device = device_of(function)
    parts = []
    with evaluation_mode(function):
        for images, labels in batches(data.data, batch_size):
            out = function(images.to(device, non_blocking=True))
            parts.append(scored(out if head is None else apply_head(head, out), labels, data.name))
    return join(parts)


def apply_head(head: Head, features: Tensor) -> Tensor:
    """Logits of a head, in at least float32."""
    features = features if features.dtype == torch.float64 else features.float()
    if isinstance(head, Readout):
        return head.logits(features)
    if isinstance(head, nn.Module):
        with evaluation_mode(head):
            return head(features)  # type: ignore[no-any-return]
    return head(features)


def scored(logits: Tensor, labels: Tensor, task: str) -> Scores:
    """Scores of a batch; errors name the task."""
    try:
        return score(logits, labels)
    except MergeboundError as error:
        raise MergeboundError(f"task {task!r}: {error}") from error


def path_of(model: object) -> str:
    """Name of the path that a function computes by: a fast model's, otherwise its type of numbers."""
    path = getattr(model, "path", None)
    if isinstance(path, str):
        return path
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64", torch.float16: "fp16"}
            return names.get(parameter.dtype, str(parameter.dtype))
    return "fp32"


def evaluation(
    data: EvaluationSet,
    scores: Scores,
    path: str = "fp32",
    *,
    bins: int = BINS,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """The evaluation that belongs to scores."""
    bare = Evaluation(
        data.name, summarise(scores, bins=bins), {}, data.digest, data.seed, seed, path, scores, data.source
    )
    return _with_intervals([bare], resamples, level, seed)[0][0]


def combine(
    tasks: Sequence[Evaluation],
    *,
    weights: Mapping[str, float] | None = None,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> JointEvaluation:
    """Joint values of evaluations; images that tasks share (``source``) are drawn together.

    Raises:
        MergeboundError: no task, two tasks of one name, or weights that do not fit.
    """
    names = [found.task for found in tasks]
    shares = task_weights(names, weights)
    found, draws = _with_intervals(tasks, resamples, level, seed)
    joint = {}
    for name in METRICS:
        value = sum(p * one.intervals[name].value for p, one in zip(shares, found, strict=True))
        joint[name] = percentile(
            value, np.sum([p * d[name] for p, d in zip(shares, draws, strict=True)], axis=0), level
        )
    return JointEvaluation(tuple(found), shares, joint, seed)


def task_weights(names: Sequence[str], weights: Mapping[str, float] | None) -> tuple[float, ...]:
    """p_i in the order of the names, adding up to one.

    Raises:
        MergeboundError: no name, a name that occurs twice, or weights that do not fit.
    """
    if not names:
        raise MergeboundError("no tasks to evaluate on; give at least one")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise MergeboundError(f"two tasks are called {twice!r}; give each a name of its own")
    if weights is None:
        return (1.0 / len(names),) * len(names)
    if set(weights) != set(names):
        wrong = sorted(set(weights) ^ set(names))[0]
        raise MergeboundError(f"weights: {wrong!r} is not both a task and weighted; give one weight for each task")
    given = np.array([weights[name] for name in names], dtype=float)
    if not np.isfinite(given).all() or (given < 0).any() or given.sum() <= 0:
        raise MergeboundError(f"weights: {dict(weights)} must be nonnegative numbers, not all zero")
    return tuple(float(value) for value in given / given.sum())


def _with_intervals(
    tasks: Sequence[Evaluation], resamples: int, level: float, seed: int
) -> tuple[list[Evaluation], list[dict[str, Floats]]]:
    if resamples == 0:
        bare = [{name: percentile(getattr(one.metrics, name), np.empty(0)) for name in METRICS} for one in tasks]
        none: dict[str, Floats] = {name: np.empty(0) for name in METRICS}
        return [replace(one, intervals=own, seed=seed) for one, own in zip(tasks, bare, strict=True)], [none] * len(
            tasks
        )
    columns = [_columns_of(found.scores, found.metrics.bins) for found in tasks]
    means = bootstrap_means(columns, sources=[found.source for found in tasks], resamples=resamples, seed=seed)
    out, draws = [], []
    for found, block in zip(tasks, means, strict=True):
        own = {"accuracy": block[:, 0], "loss": block[:, 1], "brier": block[:, 2]}
        own["ece"] = np.abs(block[:, 3:]).sum(axis=1)
        draws.append(own)
        intervals = {name: percentile(getattr(found.metrics, name), own[name], level) for name in METRICS}
        out.append(replace(found, intervals=intervals, seed=seed))
    return out, draws


def _columns_of(scores: Scores, bins: int) -> Floats:
    """Quantities of each image whose means give every metric, (n, 3 + bins)."""
    gaps = np.zeros((len(scores), bins))
    gaps[np.arange(len(scores)), equal_width(np.nan_to_num(scores.confidence), bins)] = (
        scores.correct - scores.confidence
    )
    return np.column_stack([scores.correct.astype(float), scores.loss, scores.brier, gaps])


def over_groups(
    evaluations: Sequence[JointEvaluation],
    experts: Sequence[Sequence[str]],
    metric: str = "accuracy",
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Mean of a joint metric over merges, with the interval over *experts* that :mod:`experiments.statistics` gives.

    Args:
        evaluations: one for each merge.
        experts: names of the experts in each merge.

    Raises:
        MergeboundError: another number of merges than of groups.
    """
    if len(evaluations) != len(experts):
        raise MergeboundError(f"{len(evaluations)} evaluations for {len(experts)} groups of experts; give one for each")
    values = [one.joint[metric].value for one in evaluations]
    domain = {"accuracy": (0.0, 1.0), "ece": (0.0, 1.0), "brier": (0.0, 2.0)}.get(metric, (0.0, np.inf))
    return mean_interval(values, membership(experts), resamples, seed, level=level, domain=domain)
