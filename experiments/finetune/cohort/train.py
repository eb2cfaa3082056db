"""One cohort of runs, trained in the way that its plan says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from experiments.grid.result import Cohort, RunResult
from experiments.grid.run_spec import RunSpec
from experiments.inputs.training_data import TrainingData
from theory.errors import MergeboundError

Trainer = Callable[
    [Sequence[RunSpec], nn.Module, Sequence[Mapping[str, Tensor]], Sequence[TrainingData], Cohort], list[RunResult]
]


def train_cohort(
    runs: Sequence[RunSpec],
    network: nn.Module,
    starts: Sequence[Mapping[str, Tensor]],
    data: Sequence[TrainingData],
    cohort: Cohort,
) -> list[RunResult]:
    """Train M runs of one architecture; same batches and, within rounding, same numbers as the reference loop.

    Args:
        runs: M specifications; they share architecture, head shape, optimizer, what is trained and precision.
        network: of that architecture, on the device of the data; its weights are overwritten.
        starts: M full state dicts x_0, heads included.
        data: M training samples; runs of one task may share one object.
        cohort: ``way`` says how, ``chunk`` how many experts at a time, ``options`` belong to the way.

    Returns:
        One result per run, in order; ``metrics`` are empty.

    Raises:
        MergeboundError: lists of different lengths, no runs, runs that cannot be trained together or in this way.
    """
    check_lists(runs, starts, data)
    trainers: dict[str, Trainer] = {"loop": _loop, "vmap": _vmapped, "folded": _folded, "written": _written}
    if cohort.way not in trainers:
        raise MergeboundError(f"cohort {cohort.name}: way {cohort.way!r} is unknown; choose from {', '.join(trainers)}")
    return trainers[cohort.way](runs, network, starts, data, cohort)


def check_lists(runs: Sequence[RunSpec], starts: Sequence[object], data: Sequence[object]) -> None:
    """Check that there is one start and one sample per run.

    Raises:
        MergeboundError: there is not, or there are no runs.
    """
    if not runs or not len(runs) == len(starts) == len(data):
        raise MergeboundError(
            f"a cohort of {len(runs)} runs came with {len(starts)} starts and {len(data)} samples; give one of each"
        )


def _loop(
    runs: Sequence[RunSpec],
    network: nn.Module,
    starts: Sequence[Mapping[str, Tensor]],
    data: Sequence[TrainingData],
    cohort: Cohort,
) -> list[RunResult]:
    from experiments.finetune.reference import train_run

    return [train_run(run, network, start, sample) for run, start, sample in zip(runs, starts, data, strict=True)]


def _vmapped(
    runs: Sequence[RunSpec],
    network: nn.Module,
    starts: Sequence[Mapping[str, Tensor]],
    data: Sequence[TrainingData],
    cohort: Cohort,
) -> list[RunResult]:
    from experiments.finetune.cohort.vmapped import train_vmapped

    return train_vmapped(runs, network, starts, data, cohort)


def _folded(
    runs: Sequence[RunSpec],
    network: nn.Module,
    starts: Sequence[Mapping[str, Tensor]],
    data: Sequence[TrainingData],
    cohort: Cohort,
) -> list[RunResult]:
    from experiments.finetune.cohort.folded import train_folded

    return train_folded(runs, network, starts, data, cohort)


def _written(
    runs: Sequence[RunSpec],
    network: nn.Module,
    starts: Sequence[Mapping[str, Tensor]],
    data: Sequence[TrainingData],
    cohort: Cohort,
) -> list[RunResult]:
    from experiments.finetune.cohort.written import train_written

    return train_written(runs, network, starts, data, cohort)
