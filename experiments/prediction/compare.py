"""``risk_optimal`` against other merging methods on the same groups; every choice is made on calibration images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.measure.entropy import adapt_coefficients
from experiments.measure.fisher import fisher_diagonal
from experiments.measure.grams import input_grams
from experiments.measure.layerwise import (
    LayerGroup,
    LayerStatistics,
    by_layer,
    by_tensor,
    risk_optimal_coefficients,
    whole_model,
)
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.predictors.zoo import ZOO
from experiments.prediction.bank import Bank
from experiments.prediction.draws import Pool, StudyGroup, group_columns
from experiments.prediction.material import Material
from experiments.prediction.measuring import form, measure_sets
from experiments.prediction.spec import ComparisonSpec, StudySpec
from experiments.spec import MethodSpec
from merging.statistics import Coefficients
from theory.function_space import Array, minimise_risk

Row = dict[str, Any]
LAYERED = "risk_optimal_layers"
FROM_TABLE = ("average", "task_arithmetic", "ties")
"""Methods that the main table has measured already."""


class Collected:
    """Statistics of single experts that several groups share, made when first asked for."""

    def __init__(self, material: Material, spec: ComparisonSpec, seed: int) -> None:
        self._material, self._spec, self._seed = material, spec, seed
        self._fisher: dict[int, dict[str, Tensor]] = {}
        self._grams: dict[int, dict[str, Tensor]] = {}
        self._layers: dict[tuple[int, str], Array] = {}
        self.groups = coarse(by_layer(material.backbone.space.names), max(spec.layer_groups, 1))
        self.seconds: dict[str, float] = {"fisher": 0.0, "regmean": 0.0, "layers": 0.0}

    def fisher(self, j: int) -> dict[str, Tensor]:
        """The Fisher diagonal of one expert on its calibration images, one label drawn per image."""
        if j not in self._fisher:
            self._fisher[j] = self._timed("fisher", lambda: self._fisher_of(j))
        return self._fisher[j]

    def grams(self, j: int) -> dict[str, Tensor]:
        """Gram matrices of one expert's layer inputs on its calibration images."""
        if j not in self._grams:
            material = self._material
            split = material.calibration[material.tasks[j]]
            shared = [name for name in material.backbone.space.names if name in dict(material.model.named_parameters())]
            self._grams[j] = self._timed(
                "regmean",
                lambda: input_grams(material.model, self._state(j), [(split.images, split.labels)], names=shared),
            )
        return self._grams[j]

    def layers(self, i: int, task: str) -> Array:
        """J_task(x_0) Delta_il in features for every block of layers, (L, n, d)."""
        if (i, task) not in self._layers:
            self._layers[i, task] = self._timed("layers", lambda: self._layers_of(i, task))
        return self._layers[i, task]

    def _fisher_of(self, j: int) -> dict[str, Tensor]:
        material, count = self._material, self._spec.fisher_images
        split = material.calibration[material.tasks[j]]
        batch = (split.images[:count], split.labels[:count])
        return fisher_diagonal(material.model, self._state(j), [batch], mode="sampled", seed=self._seed)

    def _layers_of(self, i: int, task: str) -> Array:
        material = self._material
        images = material.calibration[task].images[: self._spec.layer_images]
        places = dict(material.backbone.space.segments())
        delta = material.vectors[i] - material.origin
        moves = torch.zeros(len(self.groups), len(delta), dtype=delta.dtype)
        for row, group in zip(moves, self.groups, strict=True):
            for name in group.tensors:
                row[places[name]] = delta[places[name]]
        return np.asarray(material.backbone.products(material.origin, moves, images).double().numpy())

    def _state(self, j: int) -> dict[str, Tensor]:
        material = self._material
        return {**material.base_state, **material.backbone.space.unflatten(material.vectors[j]), **material.states[j]}

    def _timed(self, what: str, make: Callable[[], Any]) -> Any:
        started = time.process_time()
        found = make()
        self.seconds[what] += time.process_time() - started
        return found


def coarse(groups: Sequence[LayerGroup], most: int) -> tuple[LayerGroup, ...]:
    """At most so many groups, by joining neighbours in depth as evenly as possible."""
    count = min(most, len(groups))
    cuts = np.linspace(0, len(groups), count + 1).round().astype(int)
    joined = []
    for low, high in pairwise(cuts):
        part = groups[low:high]
        name = part[0].name if len(part) == 1 else f"{part[0].name} to {part[-1].name}"
        joined.append(LayerGroup(name, tuple(t for group in part for t in group.tensors)))
    return tuple(joined)


def compare_rows(
    spec: StudySpec, pool: Pool, bank: Bank, group: StudyGroup, collected: Collected, table: Sequence[Row]
) -> list[Row]:
    """Merge one group by every method of the comparison and measure each on test images.

    Args:
        collected: statistics of the pool's experts.
        table: this group's rows of the main table, from which methods without choices are taken.
    """
    wanted = spec.comparison
    assert wanted is not None
    material, members = bank.material, list(group.members)
    stats = bank.fields(members)
    rows: list[Row] = []

    def add(
        name: str,
        loss: float,
        accuracy: float,
        seconds: float,
        alpha: Array | None = None,
        predicted: float | None = None,
    ) -> None:
        rows.append(
            {
                **group_columns(pool, group, material.names, spec.seed),
                "method": name,
                "measured_loss": loss,
                "measured_accuracy": accuracy,
                "predicted": predicted,
                "alpha": None if alpha is None else ";".join(f"{v:.4f}" for v in alpha),
                "seconds": seconds,
                "tier": "measured",
            }
        )

    def measured(
        name: str,
        method: MethodSpec,
        seconds: float,
        alpha: Array | None = None,
        predicted: float | None = None,
        **extras: Any,
    ) -> None:
        formed = form(material, members, method, spec.seed, **extras)
        found = measure_sets(material, formed.vector, members, [material.test])[0]
        add(name, found.loss, found.accuracy, seconds + formed.seconds, alpha, predicted)

    for row in table:
        if row["method"] in FROM_TABLE:
            add(row["method"], row["measured_loss"], row["measured_accuracy"], 0.0)
    method, seconds = tuned(material, members, wanted.tuning, spec.seed)
    measured("task_arithmetic_tuned", method, seconds)
    started = time.process_time()
    diagonals = [collected.fisher(j) for j in members]
    measured("fisher", MethodSpec(name="fisher"), time.process_time() - started, fisher=diagonals)
    started = time.process_time()
    grams = [collected.grams(j) for j in members]
    measured("regmean", MethodSpec(name="regmean"), time.process_time() - started, grams=grams)
    if wanted.adamerging is not None:
        started = time.process_time()
        found = adapted(material, members, wanted, spec.seed)
        measured("adamerging", MethodSpec(name="adamerging"), time.process_time() - started, **found.settings())
    for name in wanted.objectives:
        started = time.process_time()
        optimum = minimise_risk(ZOO[name].fields(stats), bounds=(0.0, 1.0))
        spent = time.process_time() - started + bank_seconds(bank, name, len(members))
        weights = Coefficients(tuple(float(v) for v in optimum.alpha))
        measured(
            f"risk_optimal_{name}",
            MethodSpec(name="risk_optimal"),
            spent,
            optimum.alpha,
            optimum.risk,
            **weights.settings(),
        )
    if wanted.layer_groups:
        started = time.process_time()
        layered = layer_statistics(bank, members, stats, collected, wanted.layer_images)
        coefficients, optimum = risk_optimal_coefficients(layered, "tangent", hull=False)
        spent = time.process_time() - started
        measured(
            LAYERED, MethodSpec(name="risk_optimal"), spent, optimum.alpha, optimum.risk, **coefficients.settings()
        )
    return rows


def bank_seconds(bank: Bank, name: str, size: int) -> float:
    """Processor seconds of collecting what a predictor needs for one group alone."""
    seconds = bank.group_seconds(size)
    return sum(seconds[kind] for kind in ZOO[name].needs)


def tuned(material: Material, members: Sequence[int], values: Sequence[float], seed: int) -> tuple[MethodSpec, float]:
    """Task arithmetic with the coefficient of smallest measured loss on the calibration images, and its seconds."""
    best, smallest, started = MethodSpec(name="task_arithmetic"), float("inf"), time.process_time()
    for value in values:
        method = MethodSpec(name="task_arithmetic", settings={"coefficient": value})
        formed = form(material, members, method, seed)
        loss = measure_sets(material, formed.vector, members, [material.calibration])[0].loss
        if loss < smallest:
            best, smallest = method, loss
    return best, time.process_time() - started


def adapted(material: Material, members: Sequence[int], wanted: ComparisonSpec, seed: int) -> Coefficients:
    """AdaMerging's coefficients from the calibration images without their labels."""
    settings = wanted.adamerging
    assert settings is not None
    names = material.backbone.space.names
    groups = {"all": whole_model, "layer": by_layer, "tensor": by_tensor}[settings.by](names)

    def network(j: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda vector, images: material.readouts[j].logits(material.backbone.call(vector, images))

    found = adapt_coefficients(
        [network(j) for j in members],
        material.origin,
        list(material.deltas[list(members)]),
        material.backbone.space,
        [material.calibration[material.tasks[j]].images for j in members],
        groups=groups,
        names=[material.names[j] for j in members],
        start=settings.start,
        rate=settings.rate,
        steps=settings.steps,
        batch=settings.batch,
        seed=seed,
    )
    return Coefficients(found.coefficients.default, found.coefficients.groups)


def layer_statistics(
    bank: Bank, members: Sequence[int], stats: FieldStatistics, collected: Collected, images: int
) -> LayerStatistics:
    """What per-layer coefficients are solved from, on the first calibration images."""
    material = bank.material
    few = stats.take(images)
    products = []
    for j in members:
        head = material.readouts[j]
        rows = [torch.from_numpy(collected.layers(i, material.tasks[j])).float() for i in members]
        products.append(np.stack([head.products(row).double().numpy() for row in rows]))
    return LayerStatistics(
        tuple(material.names[j] for j in members),
        collected.groups,
        few.labels,
        tuple(few.base_logits(j) for j in range(few.size)),
        tuple(few.expert_logits(j) for j in range(few.size)),
        tuple(products),
    )
