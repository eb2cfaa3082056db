"""Recipes whose fields carry configurations on different axes, and the single recipes they stand for."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np

from theory import Expert, Merge, Schedule
from theory.ties import CONSTANTS

PER_EXPERT = ("weights", "coefficients", "sensitivity")


def layout(rng: np.random.Generator, experts: int, steps: int) -> tuple[int, ...]:
    """A shape of configurations; lengths collide with the number of experts, of steps, with 1 and 2."""
    lengths = [1, 2, 3, experts, steps]
    axes = int(rng.choice([0, 1, 1, 2, 2, 2]))
    return tuple(int(rng.choice(lengths)) for _ in range(axes))


def part(rng: np.random.Generator, full: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of configurations that one field carries: none, all, the last, or all with one axis of length one."""
    kinds: list[tuple[int, ...]] = [(), (), full, full[-1:]]
    if len(full) == 2:
        kinds += [(1, full[1]), (full[0], 1)]
    return kinds[int(rng.integers(len(kinds)))]


class Drawer:
    """Numbers and arrays whose axes of configurations are drawn: a field carries them with probability ``density``."""

    def __init__(self, rng: np.random.Generator, experts: int, steps: int) -> None:
        self.rng, self.experts, self.steps = rng, experts, steps
        self.full = layout(rng, experts, steps)
        self.density = float(rng.choice([0.03, 0.1, 0.3, 1.0]))

    def maybe(self, chance: float) -> bool:
        return bool(self.rng.random() < chance)

    def shape(self) -> tuple[int, ...]:
        return part(self.rng, self.full) if self.rng.random() < self.density else ()

    def some(self, low: float, high: float) -> Any:
        shape = self.shape()
        return self.rng.uniform(low, high, shape) if shape else float(self.rng.uniform(low, high))

    def whole(self, low: int, high: int) -> Any:
        shape = self.shape()
        return self.rng.integers(low, high, shape) if shape else int(self.rng.integers(low, high))

    def of(self, *options: float) -> Any:
        shape = self.shape()
        return self.rng.choice(options, shape) if shape else float(self.rng.choice(options))

    def schedule(self, low: float, high: float) -> Schedule:
        return Schedule(self.rng.uniform(low, high, (*self.shape(), self.steps)))

    def rows(self, low: float, high: float) -> np.ndarray:
        return self.rng.uniform(low, high, (self.experts, *self.shape()))

    def shares(self) -> np.ndarray:
        values = self.rng.uniform(0.1, 1.0, (self.experts, *self.shape()))
        return values / values.sum(axis=0)


def at(value: Any, full: tuple[int, ...], index: tuple[int, ...], lead: int = 0, trail: int = 0) -> Any:
    """The entry of one configuration of an array with ``lead`` axes before and ``trail`` after the configurations."""
    array = np.asarray(value)
    middle = array.shape[lead : array.ndim - trail]
    assert len(middle) <= len(full), (array.shape, full)
    shape = (*array.shape[:lead], *(1,) * (len(full) - len(middle)), *array.shape[lead:])
    after = shape[len(shape) - trail :] if trail else ()
    whole = np.broadcast_to(array.reshape(shape), (*array.shape[:lead], *full, *after))
    return whole[(slice(None),) * lead + tuple(index)]


def alone(record: Any, full: tuple[int, ...], index: tuple[int, ...]) -> Any:
    """One configuration of an expert or of a merge, with plain numbers."""
    changes: dict[str, Any] = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if item.name == "experts":
            changes["experts"] = tuple(alone(expert, full, index) for expert in value)
        elif isinstance(value, Schedule):
            changes[item.name] = Schedule(at(value.values, full, index, trail=1))
        elif item.name in PER_EXPERT and np.ndim(value):
            changes[item.name] = at(value, full, index, lead=1)
        elif isinstance(value, np.ndarray) and value.ndim:
            found = at(value, full, index)
            changes[item.name] = int(found) if np.issubdtype(value.dtype, np.integer) else float(found)
    return replace(record, **changes)


def random_expert(d: Drawer, name: str, *, kind: str = "any") -> Expert:
    rng = d.rng
    smooth = d.some(0.1, 2.0)
    top = float(np.max(smooth))
    decayed = d.maybe(0.3) and kind != "plain"
    limit = {"any": 2.1, "small": 1.0, "plain": 1.0}[kind] / (top + 0.1)
    scheduled = d.maybe(0.4)
    logged = d.maybe(0.3)
    fixed = scheduled or logged
    known: dict[str, Any] = {}
    for field in ("sigma", "sigma0", "D_2", "D_envelope", "base_norm", "minimal_risk", "minimizer_distance", "D_inf"):
        if d.maybe(0.6):
            known[field] = d.some(0.0, 2.0)
    for field in ("initial_risk", "training_risk"):
        if d.maybe(0.7):
            known[field] = d.some(0.0, 2.0)
    if d.maybe(0.2):
        known["drift"] = d.some(0.0, 2.0)
        if d.maybe(0.5):
            known["private_drift"] = d.some(0.0, 1.0)
    if d.maybe(0.2):
        known["epsilon"] = d.some(0.0, 1.0)
    if logged:
        if d.maybe(0.5):
            known["batch_losses"] = d.schedule(0.0, 1.0)
        else:
            known["batch_gradient_norms"] = d.schedule(0.0, 1.0)
    if d.maybe(0.4):
        known["D_inf_private"] = d.some(0.0, 1.0)
    if d.maybe(0.3):
        known["D_inf_shared"] = d.some(0.0, 1.0)
    if d.maybe(0.3):
        known["cross_smoothness"] = d.some(0.0, 1.0)
    curvature = str(rng.choice(["convex", "smooth", "strongly_convex"]))
    if curvature == "strongly_convex":
        known["mu"] = float(np.min(smooth)) * d.some(0.1, 1.0)
    if d.maybe(0.15):
        known["pl_constant"] = float(np.min(smooth)) * d.some(0.1, 1.0)
    if d.maybe(0.1):
        known["kappa"] = d.some(-0.1, 0.5)
    momentum = d.of(0.0, 0.5) if d.maybe(0.3) and kind != "plain" else 0.0
    if kind == "plain":
        sampling = str(rng.choice(["without_replacement", "with_replacement"]))
    else:
        sampling = str(rng.choice(["without_replacement", "with_replacement", "reshuffle"]))
    batch: Any = d.whole(1, 12) if d.maybe(0.8) else Schedule(rng.integers(1, 12, (*d.shape(), d.steps)))
    fixed = fixed or isinstance(batch, Schedule)
    return Expert(
        name,
        n=d.whole(12, 40),
        batch_size=batch,
        learning_rate=d.schedule(0.01 * limit, limit) if scheduled else limit * d.some(0.1, 1.0),
        steps=None if fixed else d.whole(1, 12),
        L=smooth,
        curvature=curvature,
        momentum=momentum,
        nesterov=d.maybe(0.4),
        decoupled_decay=d.maybe(0.4),
        weight_decay=d.of(0.0, 0.1) if decayed else 0.0,
        sampling=sampling,
        drop_last=d.maybe(0.3) and not isinstance(batch, Schedule),
        head=str(rng.choice(["none", "frozen", "trained"])) if kind == "any" else "none",
        initial_gradient_norm=d.some(0.0, 2.0),
        measured=frozenset(CONSTANTS),  # drawn one by one: no common loss has them
        **({"G": d.some(0.1, 2.0)} if d.maybe(0.7) else {}),
        **({"B": d.some(0.1, 2.0)} if d.maybe(0.7) else {}),
        **known,
    )


def random_merge(d: Drawer, *, kind: str = "any") -> Merge:
    experts = tuple(random_expert(d, f"e{i}", kind=kind) for i in range(d.experts))
    more: dict[str, Any] = {}
    method = str(d.rng.choice(["average", "weighted", "task_arithmetic", "dare", "dare", "ties"]))
    if d.maybe(0.4):
        more["weights"] = d.shares()
    if method == "ties" or d.maybe(0.15):
        more["dispersion"] = d.some(0.0, 1.0)
        more["sensitivity"] = d.rows(0.0, 1.5) if d.maybe(0.7) else float(d.rng.random())
    if method in ("weighted", "task_arithmetic", "dare"):
        more["coefficients"] = d.rows(0.05, 1.3) if d.maybe(0.8) else float(d.rng.random()) + 0.05
    if method == "dare":
        more |= {"drop_rate": d.some(0.0, 0.9), "rescale": d.maybe(0.5), "independent_masks": d.maybe(0.5)}
    if kind == "any":
        more["shared_samples"] = [None, False, True][int(d.rng.integers(3))]
    else:
        more["shared_samples"] = [None, False][int(d.rng.integers(2))]
    more["orthogonal_task_vectors"] = d.maybe(0.4)
    more["data_independent_choices"] = True if d.maybe(0.7) else None
    more["per_sample_loss"] = True if d.maybe(0.7) else None
    return Merge(experts, method=method, **more)
