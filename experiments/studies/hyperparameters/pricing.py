"""Predictions of every merge in function space, with dispersion and drift of its experts; nothing is merged here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.combine.groups import Group, Member
from experiments.studies.hyperparameters.work import Row

POOL = 40
"""Experts of a pool at most: what they have in common is collected once for all groups of the pool."""


@dataclass(frozen=True)
class Wanted:
    """One group of a pool: its digest, its experts' places in the pool, and the coefficients that are priced."""

    group: str
    members: tuple[int, ...]
    alphas: tuple[float, ...]


@dataclass(frozen=True)
class PriceUnit:
    """Groups of one pool of experts, of one base.

    Attributes:
        store: folder of their grid.
        runs: digests.
        step: of the checkpoints; ``None``: each run's last.
        images: calibration images of each task, from its validation part.
        seed: names their draw.
        predictors: see :data:`experiments.measure.predictors.zoo.ZOO`.
        groups: what is priced.
        root: of the data sets.
    """

    store: str
    runs: tuple[str, ...]
    step: int | None
    images: int
    seed: int
    predictors: tuple[str, ...]
    groups: tuple[Wanted, ...]
    root: str | None = None


def key_of(group: str, alpha: float) -> str:
    """Names one merge of a group by a common coefficient."""
    return f"{group} {alpha:.9g}"


def price(unit: PriceUnit) -> list[Row]:
    """One row per group and coefficient.

    ``V`` is the dispersion sum_j |M - x_j|^2 / N of the merged coordinates, ``drift`` the root mean square of the task
    vectors' lengths (measured on the checkpoints); ``predictions`` by predictor: risk (nats) and accuracy, with the
    95 % interval that comes from the calibration images.
    """
    from experiments.measure.opening import from_store
    from experiments.measure.predictors import Merge, collect_fields, kinds_for, predict_merge
    from theory.dispersion import dispersion_from_gram

    subject = from_store(unit.store, unit.runs, images=unit.images, seed=unit.seed, root=unit.root, step=unit.step)
    statistics = collect_fields(subject, kinds=kinds_for(unit.predictors), seed=unit.seed)
    rows: list[Row] = []
    for wanted in unit.groups:
        own, few = subject.choose(wanted.members), statistics.choose(wanted.members)
        size = len(wanted.members)
        merges = [Merge(label=f"{k}", alpha=np.full(size, alpha)) for k, alpha in enumerate(wanted.alphas)]
        table = predict_merge(own, merges, few, names=unit.predictors, seed=unit.seed)
        gram = few.gram.sum(axis=0)
        p = np.full(size, 1.0 / size)
        for k, alpha in enumerate(wanted.alphas):
            part = table[table["merge"] == f"{k}"]
            rows.append(
                {
                    "key": key_of(wanted.group, alpha),
                    "group": wanted.group,
                    "alpha": alpha,
                    "size": size,
                    "V": float(dispersion_from_gram(gram, np.full(size, alpha), p)),
                    "drift": float(np.sqrt(np.trace(gram) / size)),
                    "images": unit.images,
                    "seed": unit.seed,
                    "predictions": {str(row["predictor"]): _numbers(row) for row in part.to_dict("records")},
                }
            )
    return rows


def _numbers(row: dict[Any, Any]) -> dict[str, float]:
    names = ("risk", "low", "high", "standard_error", "accuracy", "base_risk")
    return {name: float(row[name]) for name in names}


def pools(
    groups: Iterable[tuple[Group, tuple[float, ...]]],
) -> list[tuple[tuple[Member, ...], list[tuple[Group, tuple[float, ...]]]]]:
    """Groups gathered so that little is collected twice: by base and checkpoint, then by what they were drawn for.

    A pool of E experts costs about E^2 passes of calibration images, a group of N alone N^2: pools that are dearer
    than their groups, or larger than :data:`POOL`, are given up for single groups.
    """
    gathered: dict[tuple[Any, ...], list[tuple[Group, tuple[float, ...]]]] = {}
    for group, alphas in groups:
        place = (group.base, group.stratum, group.factor, str(group.level), group.step)
        if group.factor == "experts":  # sizes of one design are parts of each other
            place = (group.base, group.stratum, group.factor, "", group.step)
        gathered.setdefault(place, []).append((group, alphas))
    found = []
    for several in gathered.values():
        experts = tuple(sorted({member for group, _ in several for member in group.members}))
        alone = sum(len(group.members) ** 2 for group, _ in several)
        if len(experts) <= POOL and len(experts) ** 2 <= alone:
            found.append((experts, several))
        else:
            found += [(group.members, [(group, alphas)]) for group, alphas in several]
    return found


def units_of(
    groups: Sequence[tuple[Group, tuple[float, ...]]],
    *,
    store: str,
    images: int,
    seed: int,
    predictors: tuple[str, ...],
    last: dict[str, int],
    root: str | None = None,
) -> list[PriceUnit]:
    """Units for the groups of one grid; ``last``: every run's last checkpoint by its digest."""
    found = []
    for experts, several in pools(groups):
        place = {member: k for k, member in enumerate(experts)}
        wanted = tuple(Wanted(g.digest, tuple(place[m] for m in g.members), alphas) for g, alphas in several)
        runs = tuple(member.run for member in experts)
        found.append(
            PriceUnit(store, runs, step_of(experts, last), images, seed, predictors, wanted, root)
        )  # fmt: skip
    return found


def step_of(experts: Iterable[Member], last: dict[str, int]) -> int | None:
    """The common checkpoint of some experts; ``None`` where each is its run's last."""
    own = list(experts)
    if all(member.step == last[member.run] for member in own):
        return None
    (step,) = {member.step for member in own}
    return step
