"""What is asked of many merges: who takes part in each, with which coefficients, settings and seed."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merging.errors import MethodError
from merging.flat import FlatSpace
from merging.merge import merge_flat
from merging.method import Method
from merging.partition import Partition

Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]
Subsets = Sequence[Sequence[int]] | Flags | Tensor
ManyCoefficients = Sequence[Any] | Mapping[str, float] | NDArray[Any] | Tensor
"""One coefficient per expert, ``(N,)`` or by name, for all merges; or ``(C, N)``, for each merge its own."""


@dataclass(frozen=True)
class Asked:
    """C merges of N experts.

    Attributes:
        count: C.
        members: who takes part in each: indices of experts, ``None`` for all in all merges.
        coefficients: ``(C, N)`` or ``(1, N)``, or ``None``; those of experts that take no part are not looked at.
        settings: settings that all merges share.
        each: setting to one value per merge.
        seeds: one per merge, or a single one.
    """

    count: int
    members: tuple[tuple[int, ...], ...] | None
    coefficients: Numbers | None
    settings: Mapping[str, Any]
    each: Mapping[str, tuple[Any, ...]]
    seeds: tuple[int, ...]

    def who(self, index: int, experts: int) -> tuple[int, ...]:
        """Who takes part in one merge."""
        return tuple(range(experts)) if self.members is None else self.members[index]

    def seed(self, index: int) -> int:
        """The seed of one merge."""
        return self.seeds[index if len(self.seeds) > 1 else 0]

    def weights(self, index: int) -> Numbers | None:
        """One merge's coefficients for all N experts."""
        if self.coefficients is None:
            return None
        chosen: Numbers = self.coefficients[index if len(self.coefficients) > 1 else 0]
        return chosen

    def values(self, index: int) -> dict[str, Any]:
        """One merge's settings."""
        return {**self.settings, **{name: given[index] for name, given in self.each.items()}}


def asked(
    names: Sequence[str],
    coefficients: ManyCoefficients | None,
    subsets: Subsets | None,
    each: Mapping[str, Sequence[Any]] | None,
    seed: int | Sequence[int],
    settings: Mapping[str, Any],
) -> Asked:
    """Read the arguments of :func:`merging.many.merge_many`.

    Raises:
        MethodError: arguments of different lengths, of another number of experts, or of another kind.
    """
    experts = len(names)
    members = None if subsets is None else _members(subsets, experts)
    weights = None if coefficients is None else _weights(coefficients, names)
    varying = {name: _tuple(name, values) for name, values in (each or {}).items()}
    one_seed = isinstance(seed, int | np.integer)
    try:
        seeds = tuple(_index(value) for value in ((seed,) if one_seed else cast(Sequence[int], seed)))
    except TypeError:
        raise MethodError(f"seed is {seed!r}: give one whole number, or one for each merge") from None
    twice = sorted(set(varying) & set(settings))
    if twice:
        raise MethodError(f"'{twice[0]}' was given for all merges and in each=: give it once")
    lengths = {f"each[{name!r}]": len(values) for name, values in varying.items()}
    if members is not None:
        lengths["subsets"] = len(members)
        if () in members:
            raise MethodError(f"merge {members.index(())}: no expert takes part: give every merge at least one")
    if weights is not None and weights.shape[0] != 1:
        lengths["coefficients"] = weights.shape[0]
    if not one_seed:
        lengths["seed"] = len(seeds)
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{what} {length}" for what, length in lengths.items())
        raise MethodError(f"the merges were described with different lengths ({shown}): give one entry per merge")
    count = next(iter(lengths.values()), 1)
    return Asked(count, members, weights, dict(settings), varying, seeds)


def _tuple(name: str, values: Sequence[Any]) -> tuple[Any, ...]:
    try:
        if isinstance(values, str):
            raise TypeError
        return tuple(values.tolist() if isinstance(values, np.ndarray | Tensor) else values)
    except TypeError:
        raise MethodError(
            f"each[{name!r}] is {values!r}: give one value per merge, or {name}={values!r} for all of them"
        ) from None


def _index(value: Any) -> int:
    """A whole number; flags are none, so that a list of them is not taken for experts 0 and 1."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        raise TypeError
    return operator.index(value)


def _members(subsets: Subsets, experts: int) -> tuple[tuple[int, ...], ...]:
    if isinstance(subsets, Tensor):
        subsets = subsets.detach().cpu().numpy()
    if isinstance(subsets, np.ndarray):
        if subsets.dtype != np.bool_ or subsets.ndim != 2 or subsets.shape[1] != experts:
            raise MethodError(
                f"subsets of type {subsets.dtype} and shape {subsets.shape} do not fit {experts} experts: give "
                "booleans of shape (merges, experts), or lists of indices"
            )
        where, who = np.nonzero(subsets)
        cuts = np.searchsorted(where, np.arange(1, len(subsets)))
        return tuple(tuple(part.tolist()) for part in np.split(who, cuts)) if len(subsets) else ()
    try:
        found = tuple(tuple(_index(index) for index in chosen) for chosen in subsets)
    except TypeError:
        raise MethodError(
            "subsets are no lists of experts' indices: give a list of indices for each merge, as in [[0, 2], [1]], or "
            "an array of booleans of shape (merges, experts)"
        ) from None
    for number, chosen in enumerate(found):
        if len(set(chosen)) != len(chosen) or not all(0 <= index < experts for index in chosen):
            raise MethodError(
                f"merge {number}: the subset {list(chosen)} does not fit {experts} experts: give distinct indices "
                f"from 0 to {experts - 1}"
            )
    return found


def _weights(coefficients: ManyCoefficients, names: Sequence[str]) -> Numbers:
    if isinstance(coefficients, Mapping):
        if set(coefficients) != set(names):
            raise MethodError(
                f"coefficients name {sorted(coefficients)} but the experts are {sorted(names)}: name each once"
            )
        coefficients = [coefficients[name] for name in names]
    if isinstance(coefficients, Tensor):
        coefficients = coefficients.detach().cpu().numpy()
    try:
        table = np.asarray(coefficients, dtype=np.float64)
    except (TypeError, ValueError):
        raise MethodError(
            "coefficients are no table of numbers: give (experts,) or (merges, experts) numbers"
        ) from None
    if table.ndim not in (1, 2) or table.shape[-1] != len(names):
        raise MethodError(
            f"coefficients of shape {table.shape} do not fit {len(names)} experts: give (experts,) or (merges, experts)"
        )
    return table.reshape(-1, len(names))


def merge_one(
    method: Method,
    base: Tensor,
    rows: Sequence[Tensor],
    names: Sequence[str],
    space: FlatSpace,
    partition: Partition,
    wanted: Asked,
    index: int,
) -> Tensor:
    """Merge number ``index`` by its definition: :func:`merging.merge.merge_flat` of those who take part.

    Raises:
        MethodError: see there; the message says which merge.
    """
    who = wanted.who(index, len(rows))
    weights = wanted.weights(index)
    given = wanted.values(index)
    for key in method.per_expert:
        if given.get(key) is not None:
            given[key] = _of(given[key], who, names)
    if "groups" in method.extras and given.get("groups"):
        given["groups"] = {pattern: _of(values, who, names) for pattern, values in given["groups"].items()}
    try:
        return merge_flat(
            method,
            base,
            [rows[i] for i in who],
            space,
            partition,
            names=[names[i] for i in who],
            coefficients=None if weights is None else [float(weights[i]) for i in who],
            seed=wanted.seed(index),
            **given,
        )
    except MethodError as error:
        raise MethodError(f"merge {index}: {error}") from None


def _of(values: Any, who: Iterable[int], names: Sequence[str]) -> Any:
    """The entries of those who take part, of a sequence in the order of all experts or a mapping by their names."""
    if isinstance(values, Mapping):
        return {names[i]: values[names[i]] for i in who if names[i] in values}
    if torch.is_tensor(values) or len(values) != len(names):
        return values
    return [values[i] for i in who]
