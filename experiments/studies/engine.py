"""Where the grids of a study run: processes of this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from theory.errors import MergeboundError

Name = Literal["local", "ray"]


@dataclass(frozen=True)
class Engine:
    """Where grids run: ``local`` processes, or a ``ray`` cluster at ``address``; ``workers`` and ``device`` as grids
    take them; ``download``: published weights may be downloaded."""

    name: Name = "local"
    workers: int | None = None
    device: str = "cpu"
    address: str | None = None
    download: bool = False


def chosen_engine(name: str, workers: int | None, device: str, address: str | None, download: bool) -> Engine:
    """The engine that a command line asks for.

    Raises:
        MergeboundError: an engine that there is not, or the address of a cluster without the engine of clusters.
    """
    if name not in ("local", "ray"):
        raise MergeboundError(f"--engine {name}: is unknown; choose local or ray")
    if address is not None and name != "ray":
        raise MergeboundError("--address: is of a Ray cluster; add --engine ray")
    return Engine(cast(Name, name), workers, device, address, download)


def run_store(
    store: Path,
    root: str | Path | None,
    engine: Engine,
    watch: Callable[[Any], None] | None = None,
    *,
    resamples: int | None = None,
) -> Any:
    """Do what is missing in the store of a grid whose plan is made; returns the engine's outcome.

    Args:
        store: folder of the store.
        root: of the data sets; default: what ``MERGEBOUND_DATA`` names.
        engine: where.
        watch: is told the progress.
        resamples: of test images, for every run's intervals; default as the engines have it.

    Raises:
        MergeboundError: what the engines raise.
    """
    options: dict[str, Any] = {} if resamples is None else {"resamples": resamples}
    options |= {"device": engine.device, "workers": engine.workers, "watch": watch}
    if engine.name == "ray":
        from experiments.engines.ray import run_ray

        return run_ray(store, root, address=engine.address, **options)
    from experiments.engines.local import run_local

    return run_local(store, root, **options)
