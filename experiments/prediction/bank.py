"""What predictions need, collected once per pool of experts: features and Jacobian products on calibration images.

Features (before the head) are kept, so that every expert's head reads them; points that several groups share (an
expert, half-way to it, the average of two experts) are passed once.  Each stage is written to disk when it is done.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.atomic import write_atomically
from experiments.collected import PoolStatistics, UnitCosts
from experiments.measure.layerwise import whole_model
from experiments.measure.predictors.kinds import KINDS, passes
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.prediction.draws import Pool
from experiments.prediction.material import Material, features
from theory.errors import MergeboundError
from theory.function_space import Array

Progress = Callable[[str, int, int], None]
STAGES = ("secant", "halves", "pairs", "tangent_base", "tangent_own")
STRIDE = 1 << 24
"""Image names of task k are row numbers plus k times this, so that tasks share none."""


@dataclass(frozen=True, eq=False)
class Bank:
    """A pool's statistics.

    Attributes:
        material: experts and images.
        pool: logits' ingredients of secant and tangents, as every measurement of merges takes them.
        halves: features at x_0 + Delta_i / 2, by (expert, task).
        pairs: features at x_0 + (Delta_i + Delta_k) / 2, by (i, k, task) with i < k.
        seconds: processor seconds of one pass over one task's calibration images, by stage.
    """

    material: Material
    pool: PoolStatistics
    halves: Mapping[tuple[int, str], Tensor]
    pairs: Mapping[tuple[int, int, str], Tensor]
    seconds: Mapping[str, float] = field(default_factory=dict)

    def fields(self, members: Sequence[int], averages: Mapping[str, Tensor] | None = None) -> FieldStatistics:
        """The statistics of one group as the predictors take them.

        Args:
            members: experts of the group.
            averages: features at their average by task, if predictions may use them.
        """
        rows, material, pool = list(members), self.material, self.pool
        data, labels, sources = [], [], []
        for j in rows:
            task, head = material.tasks[j], material.readouts[j]
            ordered = [(min(a, b), max(a, b)) for n, a in enumerate(rows) for b in rows[n + 1 :]]
            features = {
                "secant": torch.stack([pool.base_features[task], *(pool.expert_features[i, task] for i in rows)]),
                "halves": torch.stack([self.halves[i, task] for i in rows]),
                "pairs": torch.stack([self.pairs[a, b, task] for a, b in ordered]),
            }
            if averages is not None:
                features["average"] = averages[task][None]
            found = {kind: _wide(head.logits(values)) for kind, values in features.items()}
            found["tangent_base"] = _wide(head.products(torch.stack([pool.base_products[i, task] for i in rows])))
            if all((j, i) in pool.own_products for j in rows for i in rows):
                found["tangent_own"] = _wide(head.products(torch.stack([pool.own_products[j, i] for i in rows])))
            data.append({kind: found[kind] for kind in KINDS if kind in found})
            labels.append(material.calibration[task].labels.numpy())
            sources.append(material.calibration[task].source)
        wide = pool.deltas[rows].double()
        return FieldStatistics(
            tuple(material.names[i] for i in rows),
            whole_model(material.backbone.space.names),
            tuple(labels),
            tuple(data),
            (wide @ wide.T).numpy()[None],
            tuple(sources),
            tuple(material.tasks[i] for i in rows),
            self.group_seconds(len(rows)),
        )

    def group_seconds(self, size: int) -> dict[str, float]:
        """Processor seconds that each kind costs for one group alone, from the measured price of one pass."""
        once = dict(self.seconds) | {"average": self.seconds["secant"]}
        return {kind: size * passes(kind, size) * seconds for kind, seconds in once.items()}


def _wide(tensor: Tensor) -> Array:
    return np.asarray(tensor.double().numpy())


@dataclass(frozen=True)
class _Stage:
    """Arrays by key, and what they cost: ``seconds`` per pass over one task's images."""

    arrays: dict[str, Tensor]
    seconds: float


def build_bank(
    material: Material, pool: Pool, folder: Path, progress: Progress, own: Callable[[int], bool] | None = None
) -> Bank:
    """Collect every pair (point, task) that occurs in a group of the pool; finished stages are read from ``folder``.

    ``own`` says for which sizes of groups products at the experts are wanted (default: all).

    Raises:
        MergeboundError: a stage's file that holds something else (remove it).
    """
    partners = _partners(group.members for group in pool.groups)
    own_partners = _partners(g.members for g in pool.groups if own is None or own(len(g.members)))
    makers = {
        "secant": lambda: _secants(material, partners, progress),
        "halves": lambda: _points(material, _half_points(material, partners), "halves", progress),
        "pairs": lambda: _points(material, _pair_points(material, pool), "pairs", progress),
        "tangent_base": lambda: _base_products(material, partners, progress),
        "tangent_own": lambda: _own_products(material, own_partners, progress),
    }
    stages = {name: _kept(folder / f"{name}.npz", makers[name]) for name in STAGES}
    secant, halves, pairs, at_base, at_own = (stages[name].arrays for name in STAGES)
    statistics = PoolStatistics(
        material.plain,
        material.origin,
        material.vectors,
        material.deltas,
        material.readouts,
        material.tasks,
        material.calibration,
        material.test,
        {task: secant[f"base|{task}"] for task in dict.fromkeys(material.tasks)},
        {(int(i), task): v for (i, task), v in _split(secant, 2) if i != "base"},
        {(int(i), task): v for (i, task), v in _split(at_base, 2)},
        {(int(j), int(i)): v for (j, i), v in _split(at_own, 2)},
        np.full(len(material.names), np.nan),
        UnitCosts(stages["secant"].seconds, stages["tangent_base"].seconds, stages["tangent_own"].seconds, np.nan),
    )
    return Bank(
        material,
        statistics,
        {(int(i), task): v for (i, task), v in _split(halves, 2)},
        {(int(i), int(k), task): v for (i, k, task), v in _split(pairs, 3)},
        {name: stage.seconds for name, stage in stages.items()},
    )


def _partners(groups: Iterable[Sequence[int]]) -> dict[int, set[int]]:
    """Each expert to all experts that it shares a group with, itself included."""
    found: dict[int, set[int]] = {}
    for members in groups:
        for j in members:
            found.setdefault(j, set()).update(members)
    return found


def _split(arrays: Mapping[str, Tensor], parts: int) -> Iterable[tuple[tuple[str, ...], Tensor]]:
    for key, values in arrays.items():
        yield tuple(key.split("|", parts - 1)), values


def _kept(path: Path, make: Callable[[], _Stage]) -> _Stage:
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as found:
                about = json.loads(str(found["about"]))
                arrays = {key: torch.from_numpy(found[str(n)]) for n, key in enumerate(about["keys"])}
                return _Stage(arrays, float(about["seconds"]))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise MergeboundError(f"{path}: cannot be read ({error}); remove it and run again") from error
    stage = make()
    about = json.dumps({"keys": list(stage.arrays), "seconds": stage.seconds})
    buffer = io.BytesIO()
    named = {str(n): values.numpy() for n, values in enumerate(stage.arrays.values())}
    np.savez(buffer, about=np.array(about), **named)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())
    return stage


def _tasks_of(material: Material, members: Iterable[int]) -> list[str]:
    wanted = {material.tasks[i] for i in members}
    return [task for task in dict.fromkeys(material.tasks) if task in wanted]


Points = list[tuple[str, Tensor, list[str]]]
"""Key, coordinates, and the tasks on whose images features are wanted."""


def _secants(material: Material, partners: Mapping[int, set[int]], progress: Progress) -> _Stage:
    everything = list(dict.fromkeys(material.tasks))
    points: Points = [("base", material.origin, everything)]
    points += [(str(i), material.vectors[i], _tasks_of(material, partners[i])) for i in sorted(partners)]
    return _points(material, points, "secant", progress)


def _half_points(material: Material, partners: Mapping[int, set[int]]) -> Points:
    deltas = material.deltas
    return [(str(i), material.origin + 0.5 * deltas[i], _tasks_of(material, partners[i])) for i in sorted(partners)]


def _pair_points(material: Material, pool: Pool) -> Points:
    wanted: dict[tuple[int, int], set[int]] = {}
    for group in pool.groups:
        rows = sorted(group.members)
        for n, a in enumerate(rows):
            for b in rows[n + 1 :]:
                wanted.setdefault((a, b), set()).update(rows)
    vectors = material.vectors
    return [
        (f"{a}|{b}", 0.5 * (vectors[a] + vectors[b]), _tasks_of(material, members))
        for (a, b), members in sorted(wanted.items())
    ]


def _points(material: Material, points: Points, what: str, progress: Progress) -> _Stage:
    """Features at points of parameter space; all tasks of a point in one pass."""
    arrays: dict[str, Tensor] = {}
    passes = 0
    started = time.process_time()
    for done, (key, vector, tasks) in enumerate(points):
        images = torch.cat([material.calibration[task].images for task in tasks])
        sizes = [len(material.calibration[task]) for task in tasks]
        pieces = torch.split(features(material, vector, images), sizes)
        arrays |= {f"{key}|{task}": piece.clone() for task, piece in zip(tasks, pieces, strict=True)}
        passes += len(tasks)
        progress(f"collecting {what}", done + 1, len(points))
    return _Stage(arrays, (time.process_time() - started) / max(passes, 1))


def _base_products(material: Material, partners: Mapping[int, set[int]], progress: Progress) -> _Stage:
    arrays: dict[str, Tensor] = {}
    tasks, deltas = list(dict.fromkeys(material.tasks)), material.deltas
    started = time.process_time()
    for done, task in enumerate(tasks):
        rows = [i for i in sorted(partners) if any(material.tasks[k] == task for k in partners[i])]
        if rows:
            found = material.backbone.products(material.origin, deltas[rows], material.calibration[task].images)
            arrays |= {f"{i}|{task}": values.clone() for i, values in zip(rows, found, strict=True)}
        progress("collecting tangent_base", done + 1, len(tasks))
    return _Stage(arrays, (time.process_time() - started) / max(len(arrays), 1))


def _own_products(material: Material, partners: Mapping[int, set[int]], progress: Progress) -> _Stage:
    arrays: dict[str, Tensor] = {}
    deltas = material.deltas
    started = time.process_time()
    for done, j in enumerate(sorted(partners)):
        rows = sorted(partners[j])
        images = material.calibration[material.tasks[j]].images
        found = material.backbone.products(material.vectors[j], deltas[rows], images)
        arrays |= {f"{j}|{i}": values.clone() for i, values in zip(rows, found, strict=True)}
        progress("collecting tangent_own", done + 1, len(partners))
    return _Stage(arrays, (time.process_time() - started) / max(len(arrays), 1))
