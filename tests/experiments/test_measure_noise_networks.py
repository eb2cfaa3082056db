"""Constants of trained networks: gradients against autograd and closed forms, drift against the training log."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from experiments.commands import about_experts, measure_noise
from experiments.finetune.reference import train_run
from experiments.inputs.shares import nested_subset
from experiments.measure.backbone import Backbone
from experiments.measure.noise.bounds import bounds_table, dispersion_of_average
from experiments.measure.noise.constants import Constants, constants_of
from experiments.measure.noise.drift import drift_table, log_table
from experiments.measure.noise.objective import objective_of, path_of
from experiments.measure.noise.per_sample import Rows
from experiments.measure.noise.recipe import expert_of, recipe_of
from experiments.measure.noise.report import gradients_at
from experiments.measure.noise.smoothness import sample_smoothness
from experiments.measure.subject import Subject
from experiments.tasks.types import Split
from merging.flat import FlatSpace
from merging.merge import flat_space
from merging.partition import partition
from tests.experiments.reference_nets import CLASSES, Net, sample, spec, start_of
from theory import master_bound
from theory.errors import AssumptionError, MergeboundError

HEAD = ("head.weight", "head.bias")


class Linear(nn.Module):
    """Two linear layers without anything between, for (1, 4, 4) images."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.body = nn.Linear(16, 3, bias=False)
            self.head = nn.Linear(3, CLASSES, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images.flatten(1)))
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


def _subject(model: nn.Module, *changes: dict[str, Any], **common: Any) -> Subject:
    """Experts trained by the reference loop in float64, each on a sample of its own."""
    model = model.double()
    start = start_of(model)
    private = [name for name in HEAD if name in start]
    parts = partition(start, private=private)
    layout = flat_space(start, parts)
    space = FlatSpace(layout.names, layout.shapes, layout.offsets, torch.float64)
    whole = Backbone.of(model, start, shared_head=True)
    vectors, heads, runs, logs, train, fresh, networks = [], [], [], [], [], [], []
    for number, change in enumerate(changes):
        run = spec(precision="float64", **{**common, **change})
        data = sample(24, seed=number)
        result = train_run(run, model, start, data)
        assert result.outcome == "finished"
        state = result.states[run.steps]
        own = {name: state[name] for name in private}
        constants = {f"model.{n}": start[n] for n in parts.constants} | {f"model.{n}": t for n, t in own.items()}
        networks.append(Backbone(whole.module, space, parts, constants, ""))
        vectors.append(space.flatten(state).double())
        used = data.take(nested_subset(len(data), run.data_share, run.seed))
        train.append(Split(used.images.double(), used.labels, used.source))
        other = sample(20, seed=100 + number)
        fresh.append(Split(other.images.double(), other.labels, other.source))
        heads.append(own)
        runs.append(run)
        logs.append(result.log)
    count = len(changes)
    return Subject(
        names=tuple(f"expert {i}" for i in range(count)),
        tasks=("t",) * count,
        architecture="net",
        model=model.eval(),
        networks=tuple(networks),
        base=space.flatten(start).double(),
        vectors=torch.stack(vectors),
        heads=tuple(heads),
        calibration=tuple(fresh),
        start_heads=({name: start[name] for name in private},) * count,
        train=tuple(train),
        runs=tuple(runs),
        logs=tuple(logs),
    )


def _measure(subject: Subject, **options: Any) -> Constants:
    usual = {"samples": 24, "pairs": 4, "curvature_samples": 2, "curvature_iterations": 2, "batches": 1, "lanczos": 4}
    return constants_of(subject, **{**usual, "distances": (0.01,), **options})


@pytest.mark.parametrize("trained", ["full", "backbone", "head"])
def test_gradients_are_those_of_autograd(trained: str) -> None:
    subject = _subject(Net(), {"label_smoothing": 0.1, "steps": 3, "trained": trained})
    images, labels = subject.train[0].images, subject.train[0].labels
    for point in path_of(subject, 0):
        objective = objective_of(subject, 0, point)
        model = Net().double().eval()
        model.load_state_dict({**subject.networks[0].space.unflatten(point.x), **point.head}, strict=False)
        named = dict(model.named_parameters())
        shared = [n for n in subject.networks[0].space.names if n in named] if trained != "head" else []
        names = shared + (list(HEAD) if trained != "backbone" else [])
        rows = torch.cat([block for block, _ in Rows(objective, images, labels).blocks()])
        assert rows.shape == (len(labels), sum(named[n].numel() for n in names))
        assert objective.shared == sum(named[n].numel() for n in shared)
        for k in (0, 7):
            loss = nn.functional.cross_entropy(model(images[k : k + 1]), labels[k : k + 1], label_smoothing=0.1)
            expected = torch.autograd.grad(loss, [named[n] for n in names])
            torch.testing.assert_close(rows[k], torch.cat([g.reshape(-1) for g in expected]), rtol=1e-9, atol=1e-12)


def test_a_linear_network_has_the_closed_form_gradients_and_curvature() -> None:
    subject = _subject(Linear(), {"steps": 2})
    images, labels = subject.train[0].images, subject.train[0].labels
    objective = objective_of(subject, 0, path_of(subject, 0)[-1])
    B, W = (objective.theta[a:b].view(3, n) for a, b, n in ((0, 48, 16), (48, 57, 3)))
    x = images.flatten(1)
    p = torch.softmax(x @ B.T @ W.T, dim=1)
    wrong = p - nn.functional.one_hot(labels, CLASSES)
    expected = torch.cat(
        [torch.einsum("na,nb->nab", wrong @ W, x).flatten(1), torch.einsum("na,nb->nab", wrong, x @ B.T).flatten(1)], 1
    )
    rows = torch.cat([block for block, _ in Rows(objective, images, labels).blocks()])
    torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-12)

    frozen = _subject(Linear(), {"steps": 2, "trained": "head"})  # softmax regression on fixed features
    objective = objective_of(frozen, 0, path_of(frozen, 0)[-1])
    features = x @ Linear().double().body.weight.detach().T
    p = torch.softmax(features @ objective.theta.view(3, 3).T, dim=1)
    spread = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    exact = torch.linalg.eigvalsh(spread)[:, -1] * features.square().sum(dim=1)
    found = sample_smoothness(objective, images[:4], labels[:4], iterations=60)
    assert found == pytest.approx(exact[:4].numpy(), rel=1e-4)


def test_drift_of_one_step_is_its_bound_from_the_log() -> None:
    """After one step the triangle inequality is an equality, part by part: eta |g|, Nesterov eta (1 + beta) |g|."""
    subject = _subject(
        Net(),
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.3},
        {"clip_norm": 0.05, "weight_decay": 0.1, "warm_up": 0},
        {"optimizer": "sam", "momentum": 0.5},
        steps=1,
    )
    table = drift_table(subject, _measure(subject, batches=0))
    rows = table[table["form"] == "6(d) gradient log"]
    assert len(rows) == 12
    assert rows["ratio"].to_numpy() == pytest.approx(1.0, rel=1e-6)


def test_measured_drift_against_every_form() -> None:
    subject = _subject(
        Net(),
        {"momentum": 0.8, "schedule": "cosine"},
        {"sampling": "without_replacement", "learning_rate": 0.02},
        {"optimizer": "adamw", "learning_rate": 0.01, "momentum": 0.9},
        {"trained": "low_rank", "rank": 1},
        {"clip_norm": 0.2, "momentum": 0.5},
        steps=12,
    )
    table = drift_table(subject, _measure(subject)).set_index(["expert", "form", "part"])
    assert not table["violated"].any()
    alone = log_table(subject).set_index(["expert", "form", "part"])  # without constants: the same rows
    pd.testing.assert_frame_equal(alone, table.loc[alone.index].drop(columns="seed"))
    log, others = "6(d) gradient log", [f for f in table.index.unique("form") if f != "6(d) gradient log"]
    for name in ("expert 0", "expert 1", "expert 4"):
        parts = table.loc[name].loc[log]
        assert parts["applies"].all()
        assert ((parts["ratio"] > 0.05) & (parts["ratio"] <= 1)).all()
        delta = subject.deltas[int(name[-1])][: subject.networks[0].space.offsets[5]]
        assert parts.loc["shared", "measured"] == pytest.approx(float(delta.norm()))
    assert "heavy ball" in table.loc[("expert 2", log, "all"), "why"]
    assert "factors" in table.loc[("expert 3", log, "all"), "why"]
    applies = table["applies"]
    assert applies["expert 1"][others].all()  # plain SGD, independent batches: every form
    assert not applies["expert 0"]["6(a) noise on the path"].any()  # reshuffled
    assert applies["expert 0"]["6(b) noise at the base"].all()
    assert not applies["expert 2"].any()
    assert (table["low"] <= table["bound"])[applies].all()
    assert (table["bound"] <= table["high"])[applies].all()
    rows = table.loc["expert 1"].droplevel("part")  # kappa and L are largest values seen: no upper end, and said
    assert (rows.loc[others, "high"] == np.inf).all()
    assert rows.loc["6(b) noise at the base", "why"].endswith(
        "from lower estimates (kappa): no upper limit, and no proof"
    )
    moving = table.loc["expert 0"].droplevel("part").loc["6(b) noise at the base"]  # momentum: the clock needs L, too
    assert moving["why"].endswith("from lower estimates (kappa, L): no upper limit, and no proof")
    assert [entry.partition(" = ")[0] for entry in moving["inputs"].split(", ")][-2:] == ["kappa", "L"]
    assert (rows.loc[log, "high"] == rows.loc[log, "bound"]).all()  # a triangle inequality on the log is exact


def test_recipes_say_what_was_run_and_give_bounds() -> None:
    changes = {"learning_rate": 0.02, "steps": 6, "trained": "backbone", "weight_decay": 0.01}
    model = Linear()
    subject = _subject(model, changes, {**changes, "schedule": "linear"}, sampling="without_replacement")
    constants = _measure(subject)
    assert constants.per_sample_loss
    recipe = recipe_of(subject, constants)
    first, second = recipe.experts
    assert (first.n, first.batch_size, first.steps, first.weight_decay) == (19, 5, 6, 0.01)
    assert (first.head, first.sampling, first.optimizer) == ("frozen", "without_replacement", "sgd")
    assert second.learning_rate.values == pytest.approx(0.02 * (1 - np.arange(6) / 6))
    assert {"L", "sigma", "D_2", "kappa"} <= first.measured
    bound = master_bound(recipe)
    assert bound.tier == "estimated"
    assert np.isfinite(float(bound.value))
    table = bounds_table(subject, constants)
    assert set(table["tier"]) == {"estimated"}
    known = table[table["value"].notna()]
    assert (known["low"] <= known["value"] * (1 + 1e-12)).all()
    assert (known["value"] <= known["high"] * (1 + 1e-12)).all()
    open_ended = known["why"].str.contains("lower estimates")
    assert (known["high"][open_ended] == np.inf).all()
    assert np.isfinite(known["high"][~open_ended]).all()
    assert set(known["statement"][~open_ended]) <= {"Theorem 2, cap sqrt(2) d", "Theorem 3, 6(d) gradient log"}
    row = table.set_index("statement").loc["master, from the recipe"]
    assert row["value"] == pytest.approx(float(bound.value))
    eps = known[known["bounds"] == "eps_i"].set_index(["subject", "statement"])["value"]
    used = bound.experts[0].epsilon
    assert float(used) <= eps["expert 0"].min() * (1 + 1e-9)  # the bound takes the smallest form
    measured = table.set_index("statement").loc["Theorem 4, measured drift", "inputs"]
    assert f"V = {dispersion_of_average(subject):.4g}" in measured

    higher = expert_of(subject, 0, constants.experts[0], which="high")
    assert float(higher.D_2) > float(first.D_2)
    with pytest.raises(MergeboundError, match="other experts"):
        recipe_of(subject.choose([0]), constants)


def test_batch_statistics_are_refused_by_the_master_bound_and_said() -> None:
    subject = _subject(Net(), {"steps": 2}, {"steps": 2})
    constants = _measure(subject, batches=0)
    assert not constants.per_sample_loss
    assert any("BatchNorm" in note for note in constants.notes)
    with pytest.raises(AssumptionError, match="A3"):
        master_bound(recipe_of(subject, constants))
    table = bounds_table(subject, constants).set_index("statement")
    assert np.isnan(table.loc["master, from the recipe", "value"])
    assert np.isfinite(table.loc["master, measured drift", "value"])


def test_gradients_of_tasks_go_through_their_own_heads() -> None:
    subject = _subject(Net(), {"steps": 2}, {"steps": 4})
    found = gradients_at(subject, subject.base, name="base", samples=24)
    means = []
    for j in range(2):
        model = Net().double().eval()
        state = {**subject.networks[j].space.unflatten(subject.base), **subject.heads[j]}
        model.load_state_dict(state, strict=False)
        loss = nn.functional.cross_entropy(model(subject.train[j].images), subject.train[j].labels)
        named = dict(model.named_parameters())
        names = [n for n in subject.networks[j].space.names if n in named]
        means.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [named[n] for n in names])]))
    assert [c.value for c in found.norms] == pytest.approx([float(g.norm()) for g in means])
    cosine = float(means[0] @ means[1] / (means[0].norm() * means[1].norm()))
    assert found.cosines[0][1].value == pytest.approx(cosine)


def test_the_command_shows_constants_and_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    subject = _subject(Net(), {"steps": 2}, {"steps": 2, "momentum": 0.5})
    monkeypatch.setattr(about_experts, "open_subject", lambda **_: subject)
    app = typer.Typer()
    measure_noise.register(app)
    app.callback()(lambda: None)
    words = ["noise", "--samples", "24", "--pairs", "4", "--curvature-samples", "2", "--batches", "1", "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    content = json.loads(result.stdout)
    assert content["tier"] == "estimated"
    by = {(row["expert"], row["constant"]): row["value"] for row in content["constants"]}
    expected = _measure(subject).experts[0]
    assert by["expert 0", "sigma"] == pytest.approx(expected.sigma.value)
    assert {row["point"] for row in content["points"]} == {"base", "expert"}
    assert not any(row["violated"] for row in content["drift"])
    assert {row["point"] for row in content["tasks"]} >= {"average", "own base", "own expert"}
    assert len(content["along_training"]) == 4
    assert content["one_step"]
    high = {row["constant"]: row["high"] for row in content["constants"] if row["expert"] == "expert 0"}
    assert {name for name, end in high.items() if end is None} == {
        "D_inf", "D_inf_shared", "D_inf_private", "G", "L", "highest", "kappa"
    }  # fmt: skip
    assert content["bounds"]
