"""Called in the process that workers of tests are forked from: what every worker does first is done once here."""

from __future__ import annotations

import tempfile
from pathlib import Path


def once() -> None:
    """Two runs of a perceptron, from the digits to the store: kernels are loaded, and nothing is kept."""
    import torch

    from experiments.engines.cohort_job import run_cohort
    from experiments.store import Store
    from tests.experiments.engine_grids import tiny_runs, tiny_store

    torch.set_num_threads(1)  # so that no thread is there when workers are forked
    for way in ("vmap", "loop"):
        with tempfile.TemporaryDirectory() as folder:
            runs = tiny_runs(("identity",), seeds=1, steps=2, checkpoints=(2,))
            tiny_store(Path(folder) / "s", runs, way=way, chunk=2, size=2)
            with Store.open(Path(folder) / "s") as store:
                plan = store.plan()
                assert plan is not None
                run_cohort(store, plan.cohorts[0])
