"""What was collected for a group of experts: the material of every predictor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from experiments.measure.layerwise import LayerGroup
from experiments.measure.predictors.kinds import KINDS
from theory.errors import MergeboundError
from theory.function_space import Array, Labels, cross_entropy

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class FieldStatistics:
    """Logits and derivatives of N tasks with an expert each and L layers; tuples run over the tasks.

    Attributes:
        names: of the experts.
        groups: the layers; one where the whole model moves together.
        labels: true classes, (n,).
        data: by kind (:data:`experiments.measure.predictors.kinds.KINDS`), (rows, n, C) in logits; rows are in the
            order of :func:`experiments.measure.predictors.kinds.layout`, those of layered kinds expert by expert and,
            within an expert, layer by layer: (N L, n, C).
        gram: inner products of the task vectors by layer, (L, N, N).
        sources: row numbers of the images in their task's calibration part, (n,).
        tasks: names of the tasks; where two are the same and ``sources`` agree, it is the same image.
        seconds: that each kind took, on all tasks; ``probe`` is what choosing the batches took.
        second_error: largest range over classes of the error of ``second`` and ``second_mixed`` (0 for exact
            derivatives; for finite differences the change when the step is doubled), by kind.
        seed: that named the calibration images, where it is known.
        tier: always ``"estimated"``.
    """

    names: tuple[str, ...]
    groups: tuple[LayerGroup, ...]
    labels: tuple[Labels, ...]
    data: tuple[Mapping[str, Array], ...]
    gram: Array
    sources: tuple[Labels, ...]
    tasks: tuple[str, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    second_error: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None
    tier: str = "estimated"

    @property
    def size(self) -> int:
        """Number of experts N."""
        return len(self.names)

    @property
    def depth(self) -> int:
        """Number of layers L."""
        return len(self.groups)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What was collected."""
        return tuple(self.data[0])

    @property
    def images(self) -> tuple[int, ...]:
        """Calibration images of each task."""
        return tuple(len(y) for y in self.labels)

    def of(self, kind: str, j: int) -> Array:
        """Task j's measurements of a kind for whole models, (rows, n, C); layers of Jacobian products are added up.

        Raises:
            MergeboundError: it was not collected.
        """
        found = self.layered(kind, j)
        if KINDS[kind].layers and kind != "secant_layers" and self.depth > 1:
            return np.asarray(found.reshape(self.size, self.depth, *found.shape[1:]).sum(axis=1))
        return found

    def layered(self, kind: str, j: int) -> Array:
        """Task j's measurements of a kind as collected, (N L, n, C) for layered ones."""
        if kind not in self.data[j]:
            raise MergeboundError(
                f"{KINDS[kind].meaning} were not collected: add {kind!r} to the kinds (now {', '.join(self.kinds)})"
            )
        return self.data[j][kind]

    def base_logits(self, j: int) -> Array:
        """h_j(x_0), (n, C)."""
        return np.asarray(self.data[j]["secant"][0])

    def expert_logits(self, j: int) -> Array:
        """h_j(x_i) for every expert i, (N, n, C)."""
        return np.asarray(self.data[j]["secant"][1:])

    def own_logits(self, j: int) -> Array:
        """h_j(x_j), (n, C)."""
        return np.asarray(self.data[j]["secant"][1 + j])

    def own_risks(self) -> Array:
        """Each expert's loss on its own calibration images, (N,), in nats."""
        return np.array([cross_entropy(self.own_logits(j), y).mean() for j, y in enumerate(self.labels)])

    def base_risks(self) -> Array:
        """The base's loss under each expert's final head, (N,), in nats."""
        return np.array([cross_entropy(self.base_logits(j), y).mean() for j, y in enumerate(self.labels)])

    def image_names(self) -> tuple[Labels, ...]:
        """Integers that name the images over all tasks, for :func:`theory.function_space.joint_standard_error`."""
        number = {task: k for k, task in enumerate(dict.fromkeys(self.tasks))}
        stride = 1 + max((int(s.max(initial=0)) for s in self.sources), default=0)
        return tuple(s + number[task] * stride for s, task in zip(self.sources, self.tasks, strict=True))

    def shares(self) -> Array:
        """Share of each layer in the squared length of each task vector, (N, L); rows sum to one."""
        squares: Array = np.einsum("lii->il", self.gram)
        total = squares.sum(axis=1, keepdims=True)
        even = np.full_like(squares, 1.0 / self.depth)
        return np.asarray(np.where(total > 0.0, squares / np.where(total > 0.0, total, 1.0), even))

    def take(self, images: int) -> FieldStatistics:
        """The first images of every task (draws are nested: a subset of the same seed).

        Raises:
            MergeboundError: fewer than one.
        """
        if images < 1:
            raise MergeboundError(f"images = {images}: give 1 or more")
        return replace(
            self,
            labels=tuple(y[:images] for y in self.labels),
            sources=tuple(s[:images] for s in self.sources),
            data=tuple({k: v[:, :images] for k, v in one.items()} for one in self.data),
        )

    def choose(self, members: Sequence[int]) -> FieldStatistics:
        """A smaller group of experts, without new passes; only for kinds whose points do not involve all experts.

        ``average`` and what is measured at it or half-way to it are left out.
        """
        rows = list(members)
        kept = [k for k in self.kinds if k.removeprefix("tangent_") not in ("average", "between")]
        return replace(
            self,
            names=tuple(self.names[i] for i in rows),
            labels=tuple(self.labels[i] for i in rows),
            sources=tuple(self.sources[i] for i in rows),
            tasks=tuple(self.tasks[i] for i in rows),
            gram=self.gram[:, rows][:, :, rows],
            data=tuple({k: self._members(self.data[j][k], k, rows) for k in kept} for j in rows),
        )

    def _members(self, table: Array, kind: str, rows: Sequence[int]) -> Array:
        if kind == "secant":
            return table[[0, *(1 + i for i in rows)]]
        if kind in ("pairs", "sums", "second_mixed"):
            place = {(int(i), int(k)): d for d, (i, k) in enumerate(zip(*np.triu_indices(self.size, 1), strict=True))}
            ends = ((rows[a], rows[b]) for a in range(len(rows)) for b in range(a + 1, len(rows)))
            return table[[place[min(two), max(two)] for two in ends]]
        if KINDS[kind].layers:
            deep = table.reshape(self.size, self.depth, *table.shape[1:])[list(rows)]
            return deep.reshape(-1, *table.shape[1:])
        return table[list(rows)]

    def save(self, path: str | Path) -> None:
        """Write everything to an ``.npz`` file without pickles."""
        about = {
            "format": _FORMAT,
            "names": self.names,
            "tasks": self.tasks,
            "groups": [[g.name, list(g.tensors)] for g in self.groups],
            "seconds": dict(self.seconds),
            "second_error": dict(self.second_error),
            "seed": self.seed,
        }
        arrays: dict[str, Array | Labels] = {"gram": self.gram}
        for j in range(self.size):
            arrays |= {f"labels_{j}": self.labels[j], f"sources_{j}": self.sources[j]}
            arrays |= {f"data_{j}_{kind}": table for kind, table in self.data[j].items()}
        np.savez(Path(path), about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> FieldStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            MergeboundError: the file cannot be read, or is something else.
        """
        try:
            with np.load(Path(path), allow_pickle=False) as found:
                about = json.loads(str(found["about"]))
                count = len(about["names"])
                data = tuple(
                    {kind: found[f"data_{j}_{kind}"] for kind in KINDS if f"data_{j}_{kind}" in found}
                    for j in range(count)
                )
                return cls(
                    tuple(about["names"]),
                    tuple(LayerGroup(name, tuple(tensors)) for name, tensors in about["groups"]),
                    tuple(found[f"labels_{j}"] for j in range(count)),
                    data,
                    found["gram"],
                    tuple(found[f"sources_{j}"] for j in range(count)),
                    tuple(about["tasks"]),
                    about["seconds"],
                    about["second_error"],
                    about["seed"],
                )
        except (OSError, ValueError, KeyError) as error:
            raise MergeboundError(f"{path}: not a file of collected statistics ({error}); collect again") from error
