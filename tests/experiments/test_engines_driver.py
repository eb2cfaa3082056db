"""The driver of the Ray engine over a cluster that is this process: what arrives is committed together, and kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.engines.cohort_job import run_cohort
from experiments.engines.ray import run_ray
from experiments.store import Store
from tests.experiments.engine_grids import contents, tiny_runs, tiny_store


class Here:
    """As much of Ray as the driver uses; a task is a generator, its stream gives one value at a time."""

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0, "memory": 8e9}}]

    def put(self, value: Any) -> Any:
        return value

    def get(self, value: Any, timeout: float = 0.0) -> Any:
        return value

    def cancel(self, stream: Any, force: bool = False) -> None:
        stream.close()

    def wait(self, streams: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return streams, []

    def remote(self, work: Callable[..., Iterator[Any]]) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=work))


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the commits, with a cluster in place of Ray."""
    found: list[int] = []
    plain = Store.commit_many

    def noted(self: Store, results: Any, **rest: Any) -> int:
        found.append(len(results))
        return plain(self, results, **rest)

    monkeypatch.setitem(sys.modules, "ray", Here())
    monkeypatch.setattr(Store, "commit_many", noted)
    return found


def test_what_arrives_is_committed_together_and_has_the_bits_of_one_worker(tmp_path: Path, commits: list[int]) -> None:
    runs = tiny_runs(("identity",), 2)
    for name in ("here", "collected", "shared"):
        tiny_store(tmp_path / name, runs, size=2)
    with Store.open(tmp_path / "here") as store:
        for cohort in store.plan().cohorts:  # type: ignore[union-attr]
            run_cohort(store, cohort)
    commits.clear()
    outcome = run_ray(tmp_path / "collected", workers=2)
    assert (outcome.done, outcome.new, outcome.failed) == (4, 4, {})
    assert sum(commits) == 4
    assert len(commits) <= 2  # of four results
    assert run_ray(tmp_path / "shared", workers=1, collect=False).complete
    assert contents(tmp_path / "here") == contents(tmp_path / "collected") == contents(tmp_path / "shared")


@pytest.mark.parametrize("collect", [True, False])
def test_a_worker_on_another_machine_than_the_plans_is_named_once(
    tmp_path: Path,
    commits: list[int],
    collect: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny_store(tmp_path, tiny_runs(("identity",), 2), size=2)
    with Store.open(tmp_path) as store, store._database.writing() as connection:
        connection.execute('UPDATE meta SET value = replace(value, \'"machine": ""\', \'"machine": "an abacus"\')')
    monkeypatch.setattr("experiments.finetune.cohort.planner.machine", lambda device: f"a slide rule, {device}")
    with caplog.at_level("WARNING", logger="experiments.engines"):
        assert run_ray(tmp_path, workers=2, collect=collect).complete
    [said] = [record.getMessage() for record in caplog.records]
    assert "made on an abacus, runs are trained on a slide rule, cpu" in said
    with Store.open(tmp_path, "r") as store:
        assert (store.status().machine, store.status().other_machines) == ("an abacus", ("a slide rule, cpu",))


def test_results_that_have_arrived_are_kept_when_the_driver_is_stopped(tmp_path: Path, commits: list[int]) -> None:
    tiny_store(tmp_path, tiny_runs(("identity",), 2), size=4)
    looks = iter(range(4))

    def watch(_: object) -> None:
        if next(looks) == 2:  # the task has begun, and two results have come
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ray(tmp_path, workers=1, watch=watch)
    assert commits == [2]
    with Store.open(tmp_path) as store:
        assert store.status().finished == 2
        assert not store.status().leases
