"""Recipe files: the example runs, and every mistake is one sentence with file, field and remedy (exit code 2)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from experiments.cli import main
from experiments.recipe_file import read_recipe, recipe_from
from theory import RecipeError, Schedule, master_bound
from theory.recipe import COEFFICIENT_METHODS, Method

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "recipe.yaml"
GOOD = """
experts:
  - {name: a, n: 100, batch_size: 10, learning_rate: 0.1, steps: 20, curvature: convex, L: 1.0,
     initial_gradient_norm: 0.5, sigma: 1.0, D_inf: 2.0, training_risk: 0.1}
"""


def test_example_recipe() -> None:
    merge = read_recipe(EXAMPLE)
    assert [expert.name for expert in merge.experts] == ["photos", "sketches", "paintings"]
    assert isinstance(merge.experts[1].learning_rate, Schedule)
    assert merge.experts[0].sampling == "reshuffle"
    bound = master_bound(merge)
    assert bound.tier == "estimated"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("learning_rate: 0.1", "learning_rate: -0.1", ["'a'", "learning_rate", "positive"]),
        ("learning_rate: 0.1", "learning_rate: .nan", ["'a'", "learning_rate"]),
        ("learning_rate: 0.1", "learning_rate: [0.1, x]", ["'a'", "learning_rate"]),
        ("batch_size: 10", "batch_size: 200", ["'a'", "batch_size", "reduce it to n"]),
        ("n: 100", "n: many", ["'a'", "n is 'many'"]),
        ("n: 100, ", "", ["'a'", "n is missing"]),
        ("sigma: 1.0", "sigmaa: 1.0", ["'a'", "sigmaa", "not a known field", "did you mean 'sigma'"]),
        ("curvature: convex", "curvature: convx", ["'a'", "curvature is 'convx'", "did you mean 'convex'"]),
        ("name: a, ", "", ["expert number 1", "name is missing"]),
        ("curvature: convex", "curvature: round", ["'a'", "curvature"]),
        ("experts:", "expert:", ["expert"]),
        ("{name: a", "{name: a,, ", ["not valid YAML"]),
        ("steps: 20", "optimizer: adamw, steps: 20", ["'a'", "adamw", "measured drift"]),
    ],
)
def test_mistakes(tmp_path: Path, old: str, new: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(SystemExit) as caught:
        main(["bound", "--recipe", str(path)])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "recipe.yaml" in message.replace("\n", "")
    assert all(word in message for word in words), message
    assert "Traceback" not in message


def test_broken_assumption_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD + "merge: {method: average, per_sample_loss: false}\n")
    merge = read_recipe(path)
    with pytest.raises(RecipeError, match="per_sample_loss"):
        master_bound(merge)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_can_be_written_down(method: str) -> None:
    run = dict(name="a", n=100, batch_size=10, learning_rate=0.1, steps=20, curvature="convex", L=1.0)
    run |= dict(initial_gradient_norm=0.5, sigma=1.0, D_inf=2.0, training_risk=0.1)
    merge: dict[str, object] = {"method": method, "sensitivity": 1.0, "dispersion": 0.1, "measured": ["dispersion"]}
    if method in COEFFICIENT_METHODS:
        merge["coefficients"] = 0.5
    read = recipe_from({"experts": [run], "merge": merge}, "recipe.yaml")
    assert read.method == method
    assert read.measured == {"dispersion"}
    assert master_bound(read).value > 0


def test_command_prints_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--latex"], ["--json"]):
        with pytest.raises(SystemExit) as caught:
            main(["bound", "--recipe", str(EXAMPLE), *arguments])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        if arguments == ["--json"]:
            content = json.loads(text)
            assert content["tier"] == "estimated"
            assert [term["name"] for term in content["terms"]] == ["training", "dispersion", "instability"]
        else:
            assert "instability" in text
            assert "tier: estimated" in text


def test_importing_theory_is_quick_and_light() -> None:
    code = "import sys, theory; print(sorted({'torch', 'sympy', 'scipy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
