"""The pieces of ``benchmarks/cohort.py``: the plain loop against the reference, rows, tables."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch

from benchmarks.cohort_speed.cases import CASES
from benchmarks.cohort_speed.main import main, report
from benchmarks.cohort_speed.measuring import Row, absent, run_case, smaller
from benchmarks.cohort_speed.plain import Expert, plain_loop
from experiments.models import build_model


def test_the_plain_loop_is_sgd_by_hand() -> None:
    network = build_model("logistic", 3, 0, img_size=2)
    start = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    images, labels = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    rows = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 3, 5]])
    (found,) = plain_loop(network, [start], [Expert(0.5, 0.9, 0.1, rows)], images, labels)
    w, b = start["head.weight"].double().numpy(), start["head.bias"].double().numpy()
    v_w, v_b = np.zeros_like(w), np.zeros_like(b)
    for batch in rows:
        x, y = images[batch].flatten(1).double().numpy(), np.eye(3)[labels[batch]]
        p = np.exp(x @ w.T + b)
        error = (p / p.sum(1, keepdims=True) - y) / 3
        v_w, v_b = 0.9 * v_w + error.T @ x + 0.1 * w, 0.9 * v_b + error.sum(0) + 0.1 * b
        w, b = w - 0.5 * v_w, b - 0.5 * v_b
    np.testing.assert_allclose(found["head.weight"], w, atol=1e-6)
    np.testing.assert_allclose(found["head.bias"], b, atol=1e-6)


def test_one_case_agrees_with_the_plain_loop() -> None:
    row = run_case(smaller(CASES["logistic"]), "float32", rounds=1, probe_seconds=0.2)
    assert row.agreement < 1e-4
    assert row.ratio > 0
    assert row.rate > 0
    assert (row.experts, row.batch, row.steps, row.target) == (2, 4, 2, 4.0)


def test_what_was_not_measured_is_marked(tmp_path: Path) -> None:
    rows = [absent(CASES["mlp"], "float32", "cuda", "no GPU here"), Row("mlp", "cpu", "float32", 64, 32, 9, "written")]
    text = report(rows, {"processor": "made up"})
    assert "not measured: no GPU here" in text
    assert "| 10 |" in text
    assert main(["--quick", "--cases", "logistic", "--precisions", "float32", "--out", str(tmp_path)]) == 0
    with open(tmp_path / "cohort.csv", encoding="utf-8") as handle:
        kept = list(csv.DictReader(handle))
    assert [row["device"] for row in kept] == ["cpu", "cuda"]
    assert float(kept[0]["ratio"]) > 0
    assert "| logistic | cpu | float32 | 2 |" in (tmp_path / "tables.md").read_text(encoding="utf-8")
