"""Whether the runs of a store are among those of a grid that it shall grow to."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.engines.errors import EngineError
from experiments.grid.run_spec import RunSpec
from experiments.store import Store


def outside(store: Store, runs: Sequence[RunSpec]) -> list[str]:
    """Digests of stored runs that are none of these, as far as specifications tell: no base is opened."""
    shapes = {shape_of(run) for run in runs}
    return [digest for digest, (run, *_) in store.known(store.runs()).items() if shape_of(run) not in shapes]


def check_grown(store: Store, lacking: Sequence[str]) -> None:
    """Refuse a grid that lacks runs which the store holds.

    Raises:
        EngineError: it does; names one.
    """
    if not lacking:
        return
    run = store.spec(lacking[0])
    raise EngineError(
        f"{store.folder}: {len(lacking):,} of its {len(store.runs()):,} runs are not in the new specification, such as "
        f"run {lacking[0][:12]} ({run.task}, {run.architecture}, learning_rate {run.learning_rate:g}, batch_size "
        f"{run.batch_size}, steps {run.steps}, seed {run.seed}); a grid can only grow: keep every value that it had, "
        "or choose an empty folder with --store"
    )


def shape_of(run: RunSpec) -> str:
    """Everything of a run but what digests of its base and split tell."""
    return run.model_dump_json(exclude={"base": {"weights"}, "task": True})
