"""Where the grids of a study run: the options of both studies, and the engine that they reach."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import main
from experiments.engines.local import run_local
from experiments.engines.ray import run_ray
from experiments.studies.engine import Engine, chosen_engine, run_store
from theory.errors import MergeboundError

STUDIES = ("hyperparameters", "scale")


def _said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code not in (0, None)
    caught = capsys.readouterr()
    return " ".join((caught.out + caught.err).split())


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "slurm"], "--engine slurm: is unknown; choose local or ray"),
        (["--address", "auto"], "--address: is of a Ray cluster; add --engine ray"),
    ],
)
def test_an_engine_that_there_is_not_is_refused_before_anything_runs(
    study: str, options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in _said(["study", study, "--size", "tiny", "--out", str(tmp_path / "out"), *options], capsys)
    assert not (tmp_path / "out").exists()


def test_the_engine_of_the_command_line_reaches_the_grid_of_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Path, dict[str, Any]]] = []

    def cluster(store: Path, root: object, **options: Any) -> None:
        asked.append((store, options))
        raise MergeboundError("the cluster was asked; enough")

    monkeypatch.setattr("experiments.engines.prepare.prepare", lambda *_, **__: None)
    monkeypatch.setattr("experiments.engines.ray.run_ray", cluster)
    command = ["study", "scale", "--size", "tiny", "--out", str(tmp_path), "--engine", "ray", "--address", "head:6379"]
    assert "the cluster was asked; enough" in _said([*command, "--workers", "3"], capsys)
    ((store, options),) = asked
    assert store.name.startswith("experts-")
    options.pop("watch")
    assert options == {"address": "head:6379", "device": "cpu", "workers": 3, "resamples": 0}


def test_each_engine_is_called_with_options_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the signatures of the engines, so that an option that one of them loses is noticed."""
    for real, name in ((run_local, "local"), (run_ray, "ray")):
        bound: list[dict[str, Any]] = []

        def fake(*given: Any, real: Any = real, bound: Any = bound, **named: Any) -> str:
            bound.append(dict(inspect.signature(real).bind(*given, **named).arguments))
            return "done"

        monkeypatch.setattr(f"experiments.engines.{name}.{real.__name__}", fake)
        engine = chosen_engine(name, 2, "cuda", None, True)
        assert engine == Engine(name, 2, "cuda", None, True)  # type: ignore[arg-type]
        assert run_store(tmp_path, "data", engine) == "done"
        assert run_store(tmp_path, None, engine, print, resamples=0) == "done"
        first, second = bound
        assert (first["device"], first["workers"], first["root"], "resamples" in first) == ("cuda", 2, "data", False)
        assert (second["resamples"], second["watch"]) == (0, print)
