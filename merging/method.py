"""What a merging method is: a function, its parameters with their domains, its paper, and what it promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.flat import FlatSpace, compute_dtype
from merging.types import TaskVector

if TYPE_CHECKING:
    from merging.linear_form import LinearForm

Rows = Sequence[Tensor]
"""N flat task vectors of shape ``(P,)``: a list of them, or the rows of an ``(N, P)`` matrix."""


@dataclass(frozen=True)
class Parameter:
    """A setting of a method: its default, its domain and its meaning.

    ``choices`` lists the values of a categorical setting; otherwise the setting is a number between ``low`` and
    ``high`` (each end included unless ``low_open`` / ``high_open``), or a switch when the default is a bool.
    """

    name: str
    default: float | str | bool
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    choices: tuple[str, ...] = ()

    @property
    def domain(self) -> str:
        """The domain in words, as in ``(0, 1]`` or ``global | tensor``."""
        if self.choices:
            return " | ".join(self.choices)
        if isinstance(self.default, bool):
            return "true | false"
        if math.isinf(self.low) and math.isinf(self.high):
            return "any finite number"
        left = "(" if self.low_open or math.isinf(self.low) else "["
        right = ")" if self.high_open or math.isinf(self.high) else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"

    def parse(self, text: str) -> float | str | bool:
        """Read a value as typed on a command line.

        Raises:
            MethodError: not a value of this parameter's kind, or outside its domain.
        """
        value: float | str | bool = text
        if isinstance(self.default, bool):
            value = {"true": True, "false": False}.get(text.strip().lower(), text)
        elif not self.choices:
            try:
                value = float(text)
            except ValueError:
                value = text
        return self.check(value)

    def check(self, value: Any) -> float | str | bool:
        """Return the value if it lies in the domain.

        Raises:
            MethodError: it does not.
        """
        if self.choices:
            good = isinstance(value, str) and value in self.choices
        elif isinstance(self.default, bool):
            good = isinstance(value, bool)
        else:
            good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if good:
                above = value > self.low if self.low_open else value >= self.low
                below = value < self.high if self.high_open else value <= self.high
                good = above and below
        if not good:
            raise MethodError(f"parameter '{self.name}' is {value!r}, outside its domain: choose {self.domain}")
        return value  # type: ignore[no-any-return]


def never(settings: Mapping[str, Any]) -> bool:
    """Whatever the settings: no."""
    return False


def always(settings: Mapping[str, Any]) -> bool:
    """Whatever the settings: yes."""
    return True


@dataclass(frozen=True)
class Method:
    """A merging method and its declared properties (tests enforce the declarations, in both directions).

    Attributes:
        name: the name users type.
        function: ``function(task_vectors, **settings) -> dict[str, Tensor]``, the merged task vector.
        flat: the same on rows: ``flat(rows, space, **settings) -> Tensor`` of shape ``(P,)``; ``None`` derives it from
            ``function``.
        summary: one line for tables.
        paper: citation.
        parameters: settings with defaults and domains.
        coefficients: whether per-expert coefficients are ``"required"``, ``"optional"`` or not used (``"none"``).
        linear: the merged task vector is a linear combination of the task vectors with fixed coefficients.
        elementwise: each coordinate depends on the experts' values at that coordinate only.
        tensorwise: each tensor depends on the experts' values in that tensor only, at default settings (implied by
            ``elementwise``; a ``scope`` setting decides where a method has one).
        deterministic: no randomness; a method that is not deterministic also receives ``names`` and ``seed``.
        permutation_invariant: the order in which experts are given does not matter (coefficients travel along); where
            it does, experts are merged in the order given.
        idempotent: merging copies of one expert, at default settings, gives that expert back.
        lipschitz: the merged task vector is a Lipschitz function of the task vectors, at default settings: some
            constant C has ``|m(Delta) - m(Delta')| <= C max_i |Delta_i - Delta_i'|`` for all inputs.
        base_free: whether, given the settings, the merged *model* does not depend on the base, so that checkpoints can
            be merged without one (coefficients that sum to one, methods on whole weights).
        merges_buffers: BatchNorm's running statistics are merged like parameters (implied by ``linear``); without it
            they are averaged.
        needs_base: the function also receives ``base``: the base's tensors (``flat``: the base as a row).
        needs_data: statistics of data are needed beyond the checkpoints.
        experts: smallest and largest number of experts.
        extras: names of further keyword settings that are passed on unchecked (structures such as statistics).
        per_expert: those of ``extras`` that hold one entry per expert, as a sequence in the order of the experts or as
            a mapping by their names.
        localized: ``localized(task_vectors, **settings) -> list[dict[str, Tensor]]``, one task vector per expert, for
            methods that compress experts into one vector and hand each of them back (masks, rescalers).
        linear_form: ``linear_form(experts, tensor, **settings) -> LinearForm``, for linear methods: the numbers behind
            ``flat`` for one tensor (``experts`` is their number), so that compiled loops can do the same.
    """

    name: str
    function: Callable[..., dict[str, Tensor]]
    flat: Callable[..., Tensor] | None
    summary: str
    paper: str
    parameters: tuple[Parameter, ...] = ()
    coefficients: Literal["none", "optional", "required"] = "none"
    linear: bool = False
    elementwise: bool = False
    tensorwise: bool = False
    deterministic: bool = True
    permutation_invariant: bool = True
    idempotent: bool = False
    lipschitz: bool = False
    base_free: Callable[[Mapping[str, Any]], bool] = never
    merges_buffers: bool = False
    needs_base: bool = False
    needs_data: bool = False
    experts: tuple[int, int | None] = (1, None)
    extras: tuple[str, ...] = ()
    per_expert: tuple[str, ...] = ()
    localized: Callable[..., list[dict[str, Tensor]]] | None = None
    linear_form: Callable[..., LinearForm] | None = None

    def is_tensorwise(self, settings: Mapping[str, Any]) -> bool:
        """Whether, with these settings, each tensor of the result depends on that tensor of the experts only."""
        if "scope" in settings:
            return self.elementwise or settings["scope"] != "global"
        return self.elementwise or self.tensorwise

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in defaults and check every domain.

        Raises:
            MethodError: an unknown setting, or one outside its domain.
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        filled: dict[str, Any] = {name: parameter.default for name, parameter in known.items()}
        for name, value in given.items():
            if name in self.extras:
                filled[name] = value
            elif name in known:
                try:
                    filled[name] = known[name].check(value)
                except MethodError as error:
                    raise MethodError(f"method '{self.name}': {error}") from None
            else:
                options = ", ".join([*known, *self.extras]) or "it takes none"
                raise MethodError(f"method '{self.name}' has no parameter '{name}': choose among {options}")
        return filled

    def on_rows(self, rows: Rows, space: FlatSpace, **settings: Any) -> Tensor:
        """Merge N flat task vectors into one of shape ``(P,)``."""
        if self.flat is not None:
            return self.flat(rows, space, **settings)
        if self.needs_base:
            settings = settings | {"base": space.unflatten(settings["base"])}
        return space.flatten(self.function([space.unflatten(row) for row in rows], **settings))


def apply_flat(task_vectors: Sequence[TaskVector], flat: Callable[[Rows, FlatSpace], Tensor]) -> dict[str, Tensor]:
    """Run a method written on rows on mappings: flatten, merge, unflatten (float32, or float64 where stored so).

    Raises:
        MethodError: no task vectors.
        CheckpointError: task vectors over different tensors.
    """
    space = common_space(task_vectors)
    return space.unflatten(flat([space.flatten(vector) for vector in task_vectors], space))


def common_space(task_vectors: Sequence[TaskVector]) -> FlatSpace:
    """The layout of the first task vector, held in float32 (float64 where any tensor is stored so).

    Raises:
        MethodError: no task vectors.
    """
    if not task_vectors:
        raise MethodError("there is nothing to merge: give at least one expert")
    space = FlatSpace.of(task_vectors[0])
    dtype = compute_dtype(tensor for vector in task_vectors for tensor in vector.values())
    return FlatSpace(space.names, space.shapes, space.offsets, dtype)


def apply_tensorwise(
    task_vectors: Sequence[TaskVector], tensorwise: Callable[[str, list[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Run a method written on single tensors: ``tensorwise(name, [Delta_1, ..., Delta_N]) -> Tensor`` of their shape.

    The tensors it receives are float32 (float64 where any is stored so) and may be views; they must not be modified.

    Raises:
        MethodError: no task vectors.
        CheckpointError: task vectors over different tensors.
    """
    space = common_space(task_vectors)
    views = [space.unflatten(space.flatten(vector)) for vector in task_vectors]
    return {name: tensorwise(name, [view[name] for view in views]) for name in space.names}


def check_coefficients(coefficients: Sequence[float], experts: int) -> tuple[float, ...]:
    """Return one finite coefficient per expert.

    Raises:
        MethodError: another number of coefficients than experts, or one that is not finite.
    """
    values = tuple(float(value) for value in coefficients)
    if len(values) != experts:
        raise MethodError(f"{len(values)} coefficients were given for {experts} experts: give one per expert, in order")
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise MethodError(f"coefficient {index + 1} is {value}: give finite numbers")
    return values


def combine(rows: Rows, coefficients: Sequence[float] | None = None) -> Tensor:
    """``sum_i alpha_i Delta_i`` over N rows, shape ``(P,)``; without coefficients the plain sum.

    Products and sums are rounded separately and in the order of the rows, so that the result does not depend on vector
    width, thread count or where a coordinate lies in memory.
    """
    if coefficients is None:
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        return total
    total = rows[0] * coefficients[0]
    product = torch.empty_like(total)
    for row, coefficient in zip(rows[1:], coefficients[1:], strict=True):
        total += torch.mul(row, coefficient, out=product)
    return total
