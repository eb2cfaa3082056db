"""How a grid's runs are grouped, and the way in which each group is trained: measured, chosen, and said why."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from experiments.grid.result import Plan
from experiments.grid.run_spec import RunSpec


def make_plan(
    runs: Mapping[str, RunSpec],
    *,
    open_network: Callable[[RunSpec], object],
    device: str = "cpu",
    seed: int = 0,
    probe_seconds: float = 20.0,
) -> Plan:
    """Group runs into cohorts and choose the fastest way for each; a probe of a few steps decides."""
    raise NotImplementedError
