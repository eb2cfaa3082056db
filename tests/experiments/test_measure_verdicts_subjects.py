"""Verdicts of whole subjects: a softmax regression of which everything is known, a BatchNorm network, checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from experiments.commands import about_experts, measure_verdicts
from experiments.finetune.reference import train_run
from experiments.inputs.shares import nested_subset
from experiments.measure.backbone import Backbone
from experiments.measure.noise.objective import objective_of, path_of
from experiments.measure.subject import Subject
from experiments.measure.verdicts.measuring import known_of, total_drift
from experiments.measure.verdicts.page import page_of
from experiments.measure.verdicts.report import Options, Stated, Verdicts, verdicts_of
from experiments.measure.verdicts.vectors import units_of
from experiments.page import render_page
from experiments.tasks.types import Split
from merging.flat import FlatSpace
from merging.merge import flat_space
from merging.partition import partition
from tests.experiments.reference_nets import CLASSES, Net, sample, spec, start_of
from theory.errors import MergeboundError

NAMES = ("head.weight", "head.bias")
SMALL = Options(samples=24, pairs=4, curvature_samples=2, lanczos=6, batches=1, between=1, pieces=2)


class Softmax(nn.Module):
    """One linear layer on (1, 4, 4) images; nothing is private."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


def _subject(model: nn.Module, private: tuple[str, ...], *changes: dict[str, Any], **common: Any) -> Subject:
    """Experts trained by the reference loop in float64, each on images of its own."""
    model = model.double()
    start = start_of(model)
    parts = partition(start, private=list(private))
    layout = flat_space(start, parts)
    space = FlatSpace(layout.names, layout.shapes, layout.offsets, torch.float64)
    whole = Backbone.of(model, start, shared_head=True)
    fields: dict[str, list[Any]] = {k: [] for k in ("vectors", "heads", "runs", "logs", "train", "fresh", "networks")}
    for number, change in enumerate(changes):
        run = spec(precision="float64", **{**common, **change})
        data = sample(24, seed=number)
        result = train_run(run, model, start, data)
        state = result.states[run.steps]
        own = {name: state[name] for name in private}
        constants = {f"model.{n}": start[n] for n in parts.constants} | {f"model.{n}": t for n, t in own.items()}
        fields["networks"].append(Backbone(whole.module, space, parts, constants, ""))
        fields["vectors"].append(space.flatten(state).double())
        used = data.take(nested_subset(len(data), run.data_share, run.seed))
        fields["train"].append(Split(used.images.double(), used.labels, used.source))
        other = sample(20, seed=100 + number)
        fields["fresh"].append(Split(other.images.double(), other.labels, other.source))
        fields["heads"].append(own)
        fields["runs"].append(run)
        fields["logs"].append(result.log)
    count = len(changes)
    return Subject(
        names=tuple(f"e{i}" for i in range(count)),
        tasks=tuple(f"t{i}" for i in range(count)),
        architecture="net",
        model=model.eval(),
        networks=tuple(fields["networks"]),
        base=space.flatten(start).double(),
        vectors=torch.stack(fields["vectors"]),
        heads=tuple(fields["heads"]),
        calibration=tuple(fields["fresh"]),
        start_heads=({name: start[name] for name in private},) * count,
        train=tuple(fields["train"]),
        runs=tuple(fields["runs"]),
        logs=tuple(fields["logs"]),
    )


def _softmax(**changes: Any) -> Subject:
    usual = {"sampling": "without_replacement", "steps": 6, "learning_rate": 0.02, "batch_size": 5}
    return _subject(Softmax(), (), {"seed": 1}, {"seed": 2}, **{**usual, **changes})


@pytest.fixture(scope="module")
def regression() -> tuple[Subject, Verdicts]:
    subject = _softmax()
    return subject, verdicts_of(subject, options=SMALL)


def test_everything_that_a_softmax_regression_can_prove_is_proven(regression: tuple[Subject, Verdicts]) -> None:
    subject, found = regression
    proven = ("per_sample_loss", "trained_loss", "nonnegative", "smooth", "smooth_merged", "convex", "step_descent",
              "step_nonexpansive", "step_momentum", "sgd", "no_clipping", "no_momentum", "unbiased_batches",
              "known_sampling", "log", "noise_on_path", "lipschitz", "fresh_gap", "fresh_judges")  # fmt: skip
    for name in subject.names:
        for key in proven:
            assert found.get(key, name).verdict == "holds", (key, found.get(key, name))
        assert found.get("pl", name).verdict == "unknown"  # no decay: no PL constant is known
        assert found.get("suprema", name).verdict == "unknown"
    assert found.get("independent_samples").verdict == "holds"
    assert found.get("independent_base").verdict == "holds"
    standing = {(i.statement.name, i.about): i for i in found.judged}
    assert standing["training clock, convex (kappa = 0)", "e0"].tier == "certified"
    assert standing["Theorem 3 (d), gradient log", "e0"].tier == "certified"
    assert standing["Theorem 3 (c)", "e0"].standing == "holds"
    assert standing["Theorem 3 (c)", "e0"].tier == "estimated"  # sigma and risks are measured
    assert standing["training risk, PL", "e0"].standing == "open"


def test_certified_constants_against_dense_derivatives(regression: tuple[Subject, Verdicts]) -> None:
    subject, found = regression
    known = known_of(subject, 0)
    assert known.L is not None
    assert known.G is not None
    images, labels = subject.train[0].images, subject.train[0].labels  # type: ignore[union-attr]
    objective = objective_of(subject, 0, path_of(subject, 0)[-1])
    largest = 0.0
    for k in range(len(labels)):

        def loss(theta: Tensor, k: int = k) -> Tensor:
            return objective.losses(theta, images[k : k + 1], labels[k : k + 1])[0]

        hessian = torch.autograd.functional.hessian(loss, objective.theta)
        largest = max(largest, float(torch.linalg.eigvalsh(hessian)[-1]))  # type: ignore[arg-type]
        theta = objective.theta.clone().requires_grad_()
        assert float(torch.autograd.grad(loss(theta), theta)[0].norm()) <= known.G
    assert 0.2 * known.L < largest <= known.L
    squares = subject.train[0].images.flatten(1).square().sum(1)  # type: ignore[union-attr]
    both = torch.cat([squares, subject.calibration[0].images.flatten(1).square().sum(1)])
    assert pytest.approx(float(both.max() + 1) / 2) == known.L
    moved = total_drift(subject, 0)
    assert moved == pytest.approx(float(subject.deltas[0].norm()))
    assert [float(e.value) for e in found.get("log", "e0").evidence][2] == pytest.approx(moved)
    rows = {n: [k for k in range(CLASSES) for _ in range(16)] if n == "head.weight" else [0, 1, 2] for n in NAMES}
    space, expected, first = subject.networks[0].space, [], 0
    for name in space.names:
        expected += [first + row for row in rows[name]]
        first += CLASSES
    assert units_of(subject).tolist() == expected  # one unit per output row of each tensor


def test_one_change_of_the_recipe_breaks_what_it_should() -> None:
    quick = replace(SMALL, measure=False)
    decay = verdicts_of(_softmax(weight_decay=0.1), options=SMALL)
    assert decay.get("pl", "e0").verdict == "holds"  # convex with decay: mu = omega
    assert decay.get("no_decay", "e0").verdict == "violated"
    large = verdicts_of(_softmax(learning_rate=5.0), options=SMALL)
    assert large.get("step_nonexpansive", "e0").verdict == "violated"
    subject = _softmax()
    same = replace(subject, train=(subject.train[0], subject.train[0]))
    assert verdicts_of(same, options=quick).get("independent_samples").verdict == "violated"
    seen = replace(subject, calibration=(subject.train[0], subject.calibration[1]))  # type: ignore[arg-type]
    found = verdicts_of(seen, options=quick)
    assert found.get("fresh_judges", "e0").verdict == "violated"
    assert found.get("fresh_judges", "e1").verdict == "holds"
    silent = replace(subject.logs[0], gradient_norm_shared=np.zeros(6), gradient_norm_head=np.zeros(6))  # type: ignore[type-var]
    swapped = replace(subject, logs=(silent, subject.logs[1]))
    found = verdicts_of(swapped, options=quick)
    assert found.get("log", "e0").verdict == "violated"
    assert found.get("smooth", "e0").verdict == "unknown"
    claimed = verdicts_of(subject, options=SMALL, stated=Stated(L=1e-3, G=1e-3, B=1e-3, sigma=1e-3))
    assert {claimed.get(k, "e0").verdict for k in ("smooth", "lipschitz", "bounded", "noise_on_path")} == {"violated"}


def test_a_batch_norm_network_keeps_only_what_needs_no_per_sample_loss() -> None:
    subject = _subject(Net(), ("head.weight", "head.bias"), {"steps": 3})
    found = verdicts_of(subject, options=SMALL)
    assert found.get("per_sample_loss", "e0").verdict == "violated"
    assert found.get("smooth", "e0").verdict == "unknown"  # tanh: smooth, without a global L
    assert found.get("frozen_head", "e0").covered
    standing = {i.statement.name: i.standing for i in found.judged}
    assert standing["Theorem 2, sup"] == standing["Theorem 1"] == standing["master bound"] == "broken"
    assert standing["Theorem 3 (d), gradient log"] == "holds"
    assert standing["master bound on held-out risks"] == "open"
    bare = replace(subject, train=(None,), test=(None,), runs=(None,), logs=(None,), start_heads=(None,))
    unknown = verdicts_of(bare, options=replace(SMALL, measure=False))
    assert unknown.get("sgd", "e0").verdict == "unknown"
    assert unknown.get("per_sample_loss", "e0").verdict == "violated"
    left = {i.statement.name for i in unknown.judged if i.standing == "holds" and i.statement.needs}
    assert left == {"V, orthogonal"}  # of one task vector


def test_tables_page_and_command(regression: tuple[Subject, Verdicts], monkeypatch: Any, tmp_path: Path) -> None:
    subject, found = regression
    rows = found.to_frame()
    assert len(rows) == len(found.findings)
    assert len(found.summary()) < len(found.statements_frame())
    page = render_page(page_of(found))
    assert "Theorem 3 (c)" in page
    assert found.get("smooth", "e0").assumption.statement in page
    import typer

    monkeypatch.setattr(about_experts, "open_subject", lambda **options: subject)
    app = typer.Typer()
    app.callback()(lambda: None)
    measure_verdicts.register(app)
    result = CliRunner().invoke(app, ["verdicts", "--recipe-only", "--json", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert {row["verdict"] for row in content["assumptions"]} == {"holds", "violated", "unknown"}
    assert (tmp_path / "verdicts.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "statements.csv").exists()
    with pytest.raises(MergeboundError, match="chosen_on"):
        verdicts_of(subject, options=Options(chosen_on="test"))
    with pytest.raises(MergeboundError, match="coefficients"):
        verdicts_of(subject, options=Options(coefficients=[1.0, 2.0, 3.0]))
