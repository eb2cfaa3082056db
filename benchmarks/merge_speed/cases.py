"""What is merged: methods with each tool's settings for the same arithmetic, and the plan of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["warm", "cold", "whole"]
"""``warm``: inputs in the page cache; ``cold``: evicted; ``whole``: the process from start to end, inputs warm."""

STATES: tuple[State, ...] = ("warm", "cold", "whole")
OURS = "ours"
FLOOR = "floor"
TOOLS = (OURS, "mergekit", "fusionbench", FLOOR)


@dataclass(frozen=True)
class Case:
    """One merge.

    Attributes:
        name: in tables.
        method: ours, as ``mergebound methods`` lists it.
        settings: ours.
        base: whether the base is read.
        mergekit: ``merge_method`` and parameters, or ``None`` where it has no such method.
        fusionbench: algorithm and parameters, or ``None``.
        experts: how many of the experts, ``None`` for all.
        random: the tools draw different masks, so that results agree in distribution only.
        note: what makes it the same arithmetic.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: bool = True
    mergekit: tuple[str, Mapping[str, Any]] | None = None
    fusionbench: tuple[str, Mapping[str, Any]] | None = None
    experts: int | None = None
    random: bool = False
    note: str = ""

    def has(self, tool: str) -> bool:
        """Whether a tool has this merge."""
        if tool == "mergekit":
            return self.mergekit is not None
        return tool != "fusionbench" or self.fusionbench is not None


_TIES_FUSIONBENCH = ("ties", {"scaling_factor": 1.0, "threshold": 0.2, "remove_keys": [], "merge_func": "mean"})

CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case(
            "linear",
            "average",
            base=False,
            mergekit=("linear", {"weight": 1.0}),
            fusionbench=("average", {}),
            note="mean of the experts",
        ),
        Case(
            "task_arithmetic",
            "task_arithmetic",
            {"coefficient": 0.3},
            mergekit=("task_arithmetic", {"weight": 0.3}),
            fusionbench=("task_arithmetic", {"scaling_factor": 0.3}),
            note="coefficient 0.3",
        ),
        Case(
            "ties_tensor",
            "ties",
            {"density": 0.2, "scope": "tensor", "rounding": "down"},
            mergekit=("ties", {"weight": 1.0, "density": 0.2}),
            note="density 0.2 within each tensor, rounded down, disjoint mean",
        ),
        Case(
            "ties_global",
            "ties",
            {"density": 0.2, "scope": "global"},
            fusionbench=_TIES_FUSIONBENCH,
            note="density 0.2 over the whole model, disjoint mean",
        ),
        Case(
            "ties_global_4",
            "ties",
            {"density": 0.2, "scope": "global"},
            fusionbench=_TIES_FUSIONBENCH,
            experts=4,
            note="the same with four experts, since whole models in memory bound FusionBench",
        ),
        Case(
            "dare_ties",
            "dare_ties",
            {"drop": 0.5, "rescaling": "l1", "aggregation": "sum"},
            mergekit=("dare_ties", {"weight": 1.0, "density": 0.5}),
            random=True,
            note="mergekit's definition: half dropped, L1 norm of each tensor kept, disjoint sum",
        ),
        Case(
            "karcher",
            "karcher",
            {"max_iter": 10, "tolerance": 1e-5},
            base=False,
            mergekit=("karcher", {"max_iter": 10, "tol": 1e-5}),
            note="of the weights, per tensor, at most 10 steps, tolerance 1e-5",
        ),
    )
}


@dataclass(frozen=True)
class Plan:
    """What one process is told to do.

    Attributes:
        tool: one of :data:`TOOLS`.
        case: name in :data:`CASES`.
        state: of the page cache, or ``whole``.
        base: file.
        experts: files.
        out: where to write: a folder of its own.
        warm_up: base and experts of the tiny merge that comes first, which loads compiled kernels.
        dtype: storage type of inputs and output, ``float32`` or ``bfloat16``.
        threads: for every tool.
        memory: bytes of writable memory that the process may map, a guard; 0 for no limit.
    """

    tool: str
    case: str
    state: State
    base: str
    experts: tuple[str, ...]
    out: str
    warm_up: tuple[str, ...] = ()
    dtype: str = "float32"
    threads: int = 1
    memory: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`."""
        lists = {key: tuple(data[key]) for key in ("experts", "warm_up")}
        return Plan(**{**data, **lists})

    @property
    def inputs(self) -> tuple[str, ...]:
        """Every file that the merge reads."""
        return (self.base, *self.experts) if CASES[self.case].base else self.experts


@dataclass(frozen=True)
class Job:
    """A merge of files as a tool sees it."""

    case: Case
    base: Path
    experts: tuple[Path, ...]
    out: Path
    dtype: str
    threads: int

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Every file that is read."""
        return (self.base, *self.experts) if self.case.base else self.experts
