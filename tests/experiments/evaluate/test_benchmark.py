"""The benchmark of evaluation: its tables, and one small network through all of it."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.evaluation_speed.main import CASES, Case, Mlp, digits, main, markdown, measure, plain_loop, prepare


def test_images_of_the_fit_and_the_test_differ() -> None:
    x, y = digits(100, 8)
    fit, _ = digits(100, 8, start=100)
    assert x.shape == (100, 3, 8, 8)
    assert set(y.tolist()) <= set(range(10))
    assert not any(torch.equal(a, b) for a in x[:20] for b in fit)


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory through /proc")
def test_a_small_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case("mlp", lambda: Mlp(192, 32), 8, 200, 50, "7")
    model, x, y, data = prepare(case, 200)
    assert data == "digits"
    assert float((plain_loop(model, x, 50).argmax(1) == y).double().mean()) > 0.7  # the fitted head works
    row = measure(case, rounds=2, images=200, seconds=0.01)
    assert (row.parameters, row.images) == (sum(p.numel() for p in model.parameters()), 200)
    assert row.plain_rate > 0
    assert row.largest_difference < 0.2
    assert abs(row.points) < 5
    page = markdown([row, replace(row, network="other")], 2)
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
    monkeypatch.setattr("benchmarks.evaluation_speed.main.CASES", (case,))
    assert main(["--quick", "--cases", "mlp", "--out", str(tmp_path)]) == 0
    with open(tmp_path / "evaluation.csv", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["network"] for row in rows] == ["mlp"]
    assert (tmp_path / "tables.md").read_text(encoding="utf-8") in capsys.readouterr().out


def test_all_cases_are_named_once() -> None:
    assert len({case.name for case in CASES}) == len(CASES) == 7
