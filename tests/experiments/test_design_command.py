"""``mergebound design`` prints what :func:`theory.design` finds, and one sentence for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.recipe_file import read_recipe
from theory import Budget, design

RECIPE = """
defaults: {n: 400, batch_size: 8, learning_rate: 0.1, steps: 20, curvature: strongly_convex, L: 1.0, mu: 0.4,
           initial_gradient_norm: 0.9, sigma: 0.5, sigma0: 0.5, D_inf: 2.0, initial_risk: 1.0, minimal_risk: 0.05}
experts: [{name: a}, {name: b, n: 150}]
"""


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["design", *arguments])
    shown = capsys.readouterr()
    return int(str(stop.value.code)), shown.out, shown.err


def test_design_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    arguments = ["-r", str(path), "--free", "*.steps=1:40", "--budget", "samples=300"]
    code, out, _ = run([*arguments, "--json"], capsys)
    wanted = design(read_recipe(path), {"*.steps": (1, 40)}, budgets=[Budget("samples", 300)])
    content = json.loads(out)
    assert code == 0
    assert content["choices"] == dict(wanted.choices)
    assert content["value"] == pytest.approx(float(wanted.bound.value))
    assert content["cost"]["samples"] <= 300
    assert content["gap"] <= 0.011
    said = None if wanted.least_training is None else wanted.least_training.explain()
    assert content["least_training"] == said
    code, out, _ = run(arguments, capsys)
    assert code == 0
    assert "active term" in out
    code, out, _ = run(["-r", str(path), "-f", "steps=1:40", "--target", str(content["value"] * 1.2)], capsys)
    assert code == 0
    assert "target" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-f", "steps"], "two limits"),
        (["-f", "colour=1:2"], "cannot be free"),
        (["-f", "steps=1:9", "-b", "joules=3"], "choose samples"),
        (["-f", "steps=1:9", "-b", "samples=many"], "no limit"),
        (["-f", "steps=1:9", "--target", "0.0001"], "raise target"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    code, _, err = run(["-r", str(path), *arguments], capsys)
    assert code == 2
    assert words in err.replace("\n", " ")
    assert "Traceback" not in err
