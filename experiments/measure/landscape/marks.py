"""The merge of every method as a point, from a subject alone.

Methods that need data get it from the subject's calibration images (never from test images): Fisher information, Gram
matrices, coefficients that minimise a prediction or the entropy, accuracies of soups.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.measure.subject import Subject
from merging.errors import MethodError
from merging.merge import merge_flat
from merging.method import Method
from merging.registry import get, methods
from theory.errors import MergeboundError

_log = logging.getLogger(__name__)

SLOW = ("adamerging", "adamerging_pp")
"""Methods that train on the calibration images: made only where they are named."""


@dataclass(frozen=True, eq=False)
class Merges:
    """Merged points.

    Attributes:
        vectors: by method, (P,).
        left_out: methods that could not be applied, with the reason.
        seed: of methods that draw random numbers.
    """

    vectors: Mapping[str, Tensor]
    left_out: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0


def merge_points(
    subject: Subject,
    names: Sequence[str] | None = None,
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    steps: int = 200,
) -> Merges:
    """Merge a subject's experts by every method.

    Args:
        names: methods; default all that fit, but for :data:`SLOW` ones, and for ``weighted`` (with equal coefficients
            it is ``average``).
        settings: of methods, by name; the others have their defaults (``coefficients`` is a setting here).
        seed: for random masks and random images.
        steps: of the methods that train coefficients.

    Raises:
        MergeboundError: an unknown method, or one that was named and cannot be applied.
    """
    known = methods()
    wanted = tuple(known) if names is None else tuple(dict.fromkeys(names))
    vectors: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    data = _Data(subject, seed, steps)
    for name in wanted:
        method = get(name)
        given = dict((settings or {}).get(name, {}))
        if names is None and (name in SLOW or (name == "weighted" and "coefficients" not in given)):
            left_out[name] = "made only where it is named"
            continue
        try:
            vectors[name] = _merge(subject, method, given, data, seed)
        except MergeboundError as error:
            if names is not None:
                raise
            left_out[name] = str(error)
            _log.info("method %s is left out: %s", name, error)
    return Merges(vectors, left_out, seed)


def _merge(subject: Subject, method: Method, given: Mapping[str, Any], data: _Data, seed: int) -> Tensor:
    least, most = method.experts
    if subject.size < least or (most is not None and subject.size > most):
        raise MethodError(f"method '{method.name}' merges {least} to {most or 'any number of'} experts")
    network = subject.networks[0]
    settings = {**data.of(method, given), **given}
    merged = merge_flat(
        method, subject.base, subject.deltas, network.space, network.partition, names=subject.names, seed=seed,
        **settings,
    )  # fmt: skip
    if not bool(torch.isfinite(merged).all()):
        raise MethodError(f"method '{method.name}' gave weights that are not finite")
    return merged


class _Data:
    """What methods need beyond the experts, collected when it is first asked for."""

    def __init__(self, subject: Subject, seed: int, steps: int) -> None:
        self._subject, self._seed, self._steps = subject, seed, steps
        self._layers: Any = None

    def of(self, method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a method that come from data."""
        if method.name == "weighted":
            return {} if "coefficients" in given else {"coefficients": [1.0 / self._subject.size] * self._subject.size}
        if method.name in ("risk_optimal", "curvature_optimal"):
            return {} if "coefficients" in given else self._optimal(method.name)
        if method.name in SLOW:
            return (
                {}
                if "coefficients" in given
                else self._adapted(method.name, float(method.settings(given).get("density", 1.0)))
            )
        if method.name == "fisher":
            return {"fisher": [self._tensors("fisher", j) for j in range(self._subject.size)]}
        if method.name == "regmean":
            return {"grams": [self._tensors("gram", j) for j in range(self._subject.size)]}
        if method.name == "greedy_soup":
            return self._soup()
        if method.needs_data or (method.coefficients == "required" and "coefficients" not in given):
            raise MethodError(f"method '{method.name}' needs data or coefficients that are not collected here")
        return {}

    def _tensors(self, kind: str, j: int) -> dict[str, Tensor]:
        """Fisher information or Gram matrices of expert j on its own task's images, by the merged tensors' names."""
        from experiments.measure.fisher import fisher_diagonal
        from experiments.measure.grams import input_grams

        subject = self._subject
        network = subject.networks[j]
        state = {**network.constants}
        state |= {f"model.{n}": t for n, t in network.space.unflatten(subject.vectors[j]).items()}
        names = [f"model.{name}" for name in network.partition.shared]
        split = subject.calibration[j]
        pairs = [
            (split.images[start : start + 64], split.labels[start : start + 64]) for start in range(0, len(split), 64)
        ]
        if kind == "fisher":
            found = fisher_diagonal(network.module, state, pairs, names=names, seed=self._seed)
        else:
            found = input_grams(network.module, state, pairs, names=names)
        return {name.removeprefix("model."): tensor for name, tensor in found.items()}

    def _optimal(self, name: str) -> dict[str, Any]:
        from experiments.measure.layerwise import (
            collect_layers,
            curvature_optimal_coefficients,
            risk_optimal_coefficients,
        )

        subject = self._subject
        if self._layers is None:
            self._layers = collect_layers(
                subject.networks, subject.readouts, subject.base, list(subject.vectors),
                [split.images for split in subject.calibration], [split.labels for split in subject.calibration],
                anchors=("base", "own"), names=subject.names,
            )  # fmt: skip
        if name == "risk_optimal":
            return risk_optimal_coefficients(self._layers, "middle")[0].settings()
        return curvature_optimal_coefficients(self._layers)[0].settings()

    def _adapted(self, name: str, density: float) -> dict[str, Any]:
        from experiments.measure.entropy import adapt_coefficients
        from merging.methods.adamerging_pp import without_conflicts

        subject = self._subject
        space = subject.networks[0].space
        base, rows = subject.base, list(subject.deltas.unbind(0))
        if name == "adamerging_pp":  # running statistics are averaged, whatever the coefficients
            end = space.offsets[len(subject.networks[0].partition.shared)]
            base = torch.cat((base[:end], subject.vectors[:, end:].mean(dim=0)))
            cleaned = without_conflicts([row[:end] for row in rows], density)
            rows = [torch.cat((row, torch.zeros_like(base[end:]))) for row in cleaned]
        found = adapt_coefficients(
            [one.call for one in subject.networks], base, rows, space, [split.images for split in subject.calibration],
            names=subject.names, steps=self._steps, seed=self._seed,
        )  # fmt: skip
        return found.coefficients.settings()

    def _soup(self) -> dict[str, Any]:
        from experiments.measure.landscape.scores import evaluator, panel

        subject = self._subject
        judge = evaluator(subject, panel(subject, "calibration", 10**9), path="plain")
        space = subject.networks[0].space

        def accuracy(vector: Tensor) -> float:
            return 1.0 - judge.score(vector).mean_error()

        def evaluate(task_vector: Mapping[str, Tensor]) -> float:
            moved = subject.base.clone()
            for name, piece in space.segments():
                if name in task_vector:
                    moved[piece] += task_vector[name].reshape(-1).to(moved.dtype)
            return accuracy(moved)

        return {"scores": [float(np.float64(accuracy(row))) for row in subject.vectors], "evaluate": evaluate}
