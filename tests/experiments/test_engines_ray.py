"""Ray: two raylets on this machine do what local workers do, to the same bits."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.engines.cohort_job import run_cohort
from experiments.engines.errors import EngineError
from experiments.store import Store
from experiments.tasks.npz8 import VARIABLE
from tests.experiments.engine_grids import contents, tiny_runs, tiny_store

pytest.importorskip("ray", reason="the extra 'ray' is not installed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a cluster of two nodes with one CPU each."""
    from ray.cluster_utils import Cluster

    small: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=small)
    made.add_node(**(small | {"include_dashboard": None}))
    yield made.address
    made.shutdown()


def _locally(folder: Path) -> None:
    with Store.open(folder) as store:
        plan = store.plan()
        assert plan is not None
        for cohort in plan.cohorts:
            run_cohort(store, cohort)


def test_two_nodes_give_the_bits_of_local_workers(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    from experiments.engines.ray import Share, room, run_ray

    monkeypatch.delenv(VARIABLE, raising=False)
    runs = tiny_runs(seeds=4)
    for name in ("here", "collected", "shared"):
        tiny_store(tmp_path / name, runs, way="vmap", chunk=2, size=4)
    _locally(tmp_path / "here")
    ray.init(address=cluster, logging_level=logging.ERROR, log_to_driver=False)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        assert len(nodes) == 2
        assert room(ray, Share()) == 2
        assert room(ray, Share(cpus=0.25)) == 8
        with pytest.raises(EngineError, match=r"no room for a task of 1 CPUs and 0\.5 GPUs"):
            room(ray, Share(gpus=0.5))
        with Store.open(tmp_path / "collected") as store:  # one run is done already, and stays
            digest = store.runs()[0]
            with Store.open(tmp_path / "here", "r") as here:
                store.commit(digest, here.result(digest), owner="before")
        places: list[int] = []
        outcome = run_ray(tmp_path / "collected", watch=lambda progress: places.append(progress.busy))
        assert (outcome.complete, outcome.new, outcome.failed) == (True, len(runs) - 1, {})
        assert max(places) == 2
        with caplog.at_level(logging.WARNING):
            outcome = run_ray(tmp_path / "shared", collect=False)
        assert (outcome.complete, outcome.new, outcome.failed) == (True, len(runs), {})
        assert not caplog.records
    finally:
        ray.shutdown()
    expected = contents(tmp_path / "here")
    assert contents(tmp_path / "collected") == expected
    assert contents(tmp_path / "shared") == expected
    with Store.open(tmp_path / "collected") as store:
        frame = store.frame()
        assert (frame.owner == "before").sum() == 2
        assert not store.status().leases


def test_what_a_task_cannot_do_is_given_up_with_its_error(cluster: str, tmp_path: Path) -> None:
    from experiments.engines.ray import run_ray

    runs = tiny_runs(("identity",), 1)
    tiny_store(tmp_path, runs, size=1)
    with Store.open(tmp_path) as store:
        name = store.runs()[1]
        store._database.connection.execute("UPDATE runs SET split_digest = ? WHERE digest = ?", ("0" * 64, name))
    outcome = run_ray(tmp_path, address=cluster)
    assert list(outcome.failed) == ["c1"]
    assert "not those that the grid began with" in outcome.failed["c1"]
    assert outcome.done == 1


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    from experiments.engines.ray import connected, imported

    with (
        pytest.raises(EngineError, match=r"Ray at 127\.0\.0\.1:1: nobody answers"),
        connected(imported(), "127.0.0.1:1", None),
    ):
        pass
