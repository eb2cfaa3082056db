"""The prediction study: what is drawn, collected, measured and judged, against independent computations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from experiments.measure.backbone import Backbone
from experiments.measure.layerwise import LayerGroup
from experiments.prediction.bank import STRIDE, Bank, build_bank
from experiments.prediction.compare import Collected, coarse, compare_rows
from experiments.prediction.curve import price_rows
from experiments.prediction.draws import Pool, PoolKey, StudyExpert, StudyGroup, draw_groups, recipe_numbers
from experiments.prediction.hull import hull_layer_rows, hull_rows
from experiments.prediction.judged import flag_table, honest, interval_table, with_choices
from experiments.prediction.material import Material, plain_backbone
from experiments.prediction.rows import merge_rows
from experiments.prediction.spec import StudySpec, read_study
from experiments.tasks.types import Split
from experiments.validation import Settings
from merging.merge import merge_state_dicts
from merging.variances import clamped_share, zero_share
from theory.errors import MergeboundError

TASKS = ("a", "b", "c")
CLASSES = {"a": 3, "b": 4, "c": 5}


def spec(**changes: object) -> StudySpec:
    content = {
        "name": "tiny",
        "regimes": {"mild": "npz8-mild"},
        "halves": {"A": [0], "B": [1]},
        "groups": {2: 2, 3: 1},
        "methods": [
            {"name": "average"},
            {"name": "task_arithmetic", "settings": {"coefficient": 0.3}},
            {"name": "ties", "settings": {"density": 0.5}, "sizes": [2]},
        ],
        "calibration_images": 16,
        "test_images": 24,
        "own_tangent_sizes": [2],
        "comparison": {
            "sizes": [3],
            "tuning": [0.1, 0.5],
            "objectives": ["secant"],
            "layer_groups": 2,
            "layer_images": 8,
            "fisher_images": 8,
            "adamerging": {"steps": 2, "batch": 4},
        },
    }
    return StudySpec.model_validate(content | changes)


def network(classes: int) -> torch.nn.Module:
    from experiments.models import build_model

    return build_model("mlp_6_5_tanh", classes=classes).eval()


@pytest.fixture(scope="module")
def material() -> Material:
    """Three random experts of a tiny perceptron on random images."""
    torch.manual_seed(0)
    model = network(3)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backbone = Backbone.of(model, base)
    origin = backbone.vector(base)
    vectors = origin + 0.4 * torch.randn(3, len(origin))
    heads = []
    for task in TASKS:
        other = network(CLASSES[task]).state_dict()
        heads.append({name: tensor for name, tensor in other.items() if name.startswith(backbone.head)})

    def images(count: int, number: int, start: int) -> Split:
        task = TASKS[number]
        pixels = torch.randn(count, 1, 8, 8)
        return Split(pixels, torch.arange(count) % CLASSES[task], np.arange(start, start + count) + number * STRIDE)

    return Material(
        tuple(f"e-{task}" for task in TASKS),
        TASKS,
        backbone,
        plain_backbone(backbone, model),
        model,
        base,
        origin,
        vectors,
        tuple(heads),
        tuple(backbone.readout(head) for head in heads),
        {task: images(16, k, 0) for k, task in enumerate(TASKS)},
        {task: images(24, k, 100) for k, task in enumerate(TASKS)},
    )


@pytest.fixture(scope="module")
def pool() -> Pool:
    experts = tuple(StudyExpert(str(k), f"e-{task}", task, 0) for k, task in enumerate(TASKS))
    groups = (StudyGroup(0, (0, 1)), StudyGroup(1, (1, 2)), StudyGroup(2, (0, 1, 2)))
    return Pool(PoolKey("mild", "mlp", "A"), experts, groups)


@pytest.fixture(scope="module")
def bank(material: Material, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("bank")
    own = spec().own_tangents
    build_bank(material, pool, folder, lambda *_: None, own)
    return build_bank(material, pool, folder, lambda *_: None, own)  # the second time from disk


def dense(material: Material, vector: torch.Tensor, j: int, images: torch.Tensor) -> torch.Tensor:
    """Logits by loading whole states into the network."""
    model = network(CLASSES[TASKS[j]]).double()
    state = {**material.base_state, **material.backbone.space.unflatten(vector), **material.states[j]}
    model.load_state_dict(state)
    with torch.no_grad():
        return model(images.double())


def test_the_specification_names_what_is_wrong() -> None:
    study = read_study("npz8-prediction")
    assert sum(n * sum(m.merges(size) for m in study.methods) for size, n in study.groups.items()) * 8 == 408
    with pytest.raises(MergeboundError, match="npz8-prediction"):
        read_study("npz9")
    for changes, word in (
        ({"halves": {"A": [0], "B": [0]}}, "recipe 0"),
        ({"methods": [{"name": "average"}, {"name": "average"}]}, "two entries"),
        ({"curve": {"sizes": [5]}}, "curve.sizes"),
        ({"comparison": {"sizes": [3], "objectives": ["oracle"]}}, "oracle"),
    ):
        with pytest.raises(ValueError, match=word):
            spec(**changes)


def test_groups_are_drawn_by_seed_from_distinct_tasks_without_repeats() -> None:
    experts = [StudyExpert(f"{t}{r}", f"{t}{r}", t, r) for t in TASKS for r in (0, 1)]
    study = spec(groups={2: 9, 3: 8})
    groups = draw_groups(study, experts, (study.seed, 1))
    assert groups == draw_groups(study, experts, (study.seed, 1)) != draw_groups(study, experts, (study.seed, 2))
    assert [len(g.members) for g in groups] == [2] * 9 + [3] * 8
    assert len({g.members for g in groups}) == 17  # 12 pairs and 8 triples exist
    assert all(len({experts[i].task for i in g.members}) == len(g.members) for g in groups)
    with pytest.raises(MergeboundError, match="3 tasks"):
        draw_groups(spec(groups={4: 1}, comparison=None), experts, (0,))


def test_recipes_are_numbered_as_the_grid_expands() -> None:
    from experiments.grid.expand import expand
    from experiments.grid.yaml_source import read_grid

    runs = expand(read_grid("npz8-mild").spec)
    numbers = recipe_numbers(runs)
    first = [run.learning_rate for run in runs if run.task == runs[0].task and run.base == runs[0].base]
    assert [numbers[rate] for rate in first] == [0, 1, 2, 3]
    assert len(runs) == 56
    assert all(sum(numbers[run.learning_rate] == k for run in runs) == 14 for k in range(4))


def test_collected_statistics_against_whole_networks(material: Material, bank: Bank) -> None:
    stats = bank.fields([1, 2])
    delta = material.deltas[[1, 2]]
    for row, j in enumerate((1, 2)):
        images = material.calibration[TASKS[j]].images
        points = {
            "secant": [material.origin, *material.vectors[[1, 2]]],
            "halves": [material.origin + 0.5 * d for d in delta],
            "pairs": [material.origin + 0.5 * (delta[0] + delta[1])],
        }
        for kind, vectors in points.items():
            truth = torch.stack([dense(material, vector, j, images) for vector in vectors])
            np.testing.assert_allclose(stats.of(kind, row), truth.numpy(), atol=2e-5)
        step = 1e-4
        for kind, anchor in (("tangent_base", material.origin), ("tangent_own", material.vectors[j])):
            for i in range(2):
                ahead = dense(material, anchor.double() + step * delta[i].double(), j, images)
                behind = dense(material, anchor.double() - step * delta[i].double(), j, images)
                slope = ((ahead - behind) / (2 * step)).numpy()
                np.testing.assert_allclose(stats.of(kind, row)[i], slope, atol=1e-4)
    assert "tangent_own" not in bank.fields([0, 1, 2]).kinds
    assert set(np.concatenate(stats.sources)) == set(range(STRIDE, STRIDE + 16)) | set(
        range(2 * STRIDE, 2 * STRIDE + 16)
    )


def test_merges_are_measured_as_whole_networks_do(material: Material, pool: Pool, bank: Bank) -> None:
    study = spec()
    rows = merge_rows(study, pool, bank, pool.groups[0], {})
    assert [row["method"] for row in rows] == ["average", "task_arithmetic", "ties"]
    states = {
        material.names[j]: {**material.base_state, **material.backbone.space.unflatten(material.vectors[j])}
        for j in (0, 1)
    }
    for row, settings in zip(rows, ({}, {"coefficient": 0.3}, {"density": 0.5}), strict=True):
        merged = merge_state_dicts(
            row["method"], dict(material.base_state), states, partition=material.backbone.partition, **settings
        )
        vector = material.backbone.vector(merged)
        losses, hits = [], []
        for j in (0, 1):
            split = material.test[TASKS[j]]
            logits = dense(material, vector, j, split.images)
            losses.append(F.cross_entropy(logits, split.labels).item())
            hits.append((logits.argmax(1) == split.labels).double().mean().item())
        assert row["measured_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
        assert row["measured_accuracy"] == pytest.approx(np.mean(hits))
        assert row["measured_loss"] == pytest.approx((row["measured_loss_even"] + row["measured_loss_odd"]) / 2)
    own = [
        F.cross_entropy(dense(material, material.vectors[j], j, material.test[TASKS[j]].images),
                        material.test[TASKS[j]].labels).item()
        for j in (0, 1)
    ]  # fmt: skip
    assert rows[0]["expert_loss"] == pytest.approx(np.mean(own), abs=1e-5)
    # the secant of an average is the loss of the mean logits; pairs evaluate the average of two experts
    assert rows[0]["pred_secant"] == pytest.approx(rows[0]["trivial_logit_mean"], abs=1e-6)
    assert rows[0]["pred_pairs"] == pytest.approx(rows[0]["measured_loss_calibration"], abs=1e-5)
    third = merge_rows(study, pool, bank, pool.groups[2], {})
    assert [row["method"] for row in third] == ["average", "task_arithmetic"]
    assert third[0]["pred_anchored"] == pytest.approx(third[0]["measured_loss_calibration"], abs=1e-5)


def test_the_comparison_takes_its_choices_from_calibration_images(material: Material, pool: Pool, bank: Bank) -> None:
    study = spec()
    assert study.comparison is not None
    table = merge_rows(study, pool, bank, pool.groups[2], {})
    collected = Collected(material, study.comparison, study.seed)
    rows = {r["method"]: r for r in compare_rows(study, pool, bank, pool.groups[2], collected, table)}
    assert {"average", "task_arithmetic", "task_arithmetic_tuned", "fisher", "regmean", "adamerging"} <= set(rows)
    assert {"risk_optimal_secant", "risk_optimal_layers"} <= set(rows)

    def loss(vector: torch.Tensor, splits: object) -> float:
        found = [
            F.cross_entropy(dense(material, vector, j, splits[t].images), splits[t].labels).item()  # type: ignore[index]
            for j, t in enumerate(TASKS)
        ]
        return float(np.mean(found))

    scaled = {v: material.origin + v * material.deltas.sum(dim=0) for v in (0.1, 0.5)}
    best = min(scaled, key=lambda v: loss(scaled[v], material.calibration))
    assert rows["task_arithmetic_tuned"]["measured_loss"] == pytest.approx(loss(scaled[best], material.test), abs=1e-5)
    alpha = torch.tensor([float(v) for v in rows["risk_optimal_secant"]["alpha"].split(";")])
    merged = material.origin + alpha @ material.deltas
    assert rows["risk_optimal_secant"]["measured_loss"] == pytest.approx(loss(merged, material.test), abs=1e-3)


def test_coefficients_in_the_hull_of_every_block_are_merged(material: Material, pool: Pool, bank: Bank) -> None:
    study, group = spec(), pool.groups[2]
    assert study.comparison is not None
    collected = Collected(material, study.comparison, study.seed)
    (row,) = hull_layer_rows(study, pool, bank, group, collected)
    (whole,) = hull_rows(study, pool, bank, group)
    assert (row["method"], whole["method"]) == ("risk_optimal_layers_hull", "risk_optimal_secant_hull")
    alpha = np.array([float(v) for v in row["alpha"].split(";")]).reshape(3, 2)  # expert by expert, two blocks
    assert alpha.min() >= 0
    assert alpha.sum(axis=0).max() <= 1 + 1e-3
    count = study.comparison.layer_images
    places, moves = dict(material.backbone.space.segments()), torch.zeros(3, 2, len(material.origin))
    for l, block in enumerate(collected.groups):
        for name in block.tensors:
            moves[:, l, places[name]] = material.deltas[:, places[name]]

    def tangent_risk(coefficients: np.ndarray) -> float:
        """Mean cross-entropy of h(x_0) plus central differences, on the first images."""
        step = torch.einsum("il,ilp->p", torch.from_numpy(coefficients).float(), moves)
        found = []
        for j, task in enumerate(TASKS):
            images = material.calibration[task].images[:count]
            ends = [dense(material, material.origin + t * step, j, images) for t in (0.0, 0.01, -0.01)]
            labels = material.calibration[task].labels[: len(images)]
            found.append(F.cross_entropy(ends[0] + (ends[1] - ends[2]) / 0.02, labels).item())
        return float(np.mean(found))

    assert row["predicted"] == pytest.approx(tangent_risk(alpha), abs=1e-3)
    rng = np.random.default_rng(0)
    others = [rng.dirichlet(np.ones(4), 2)[:, :3].T for _ in range(5)]
    assert all(row["predicted"] <= tangent_risk(other) + 1e-3 for other in others)
    merged = material.origin + torch.einsum("il,ilp->p", torch.from_numpy(alpha).float(), moves)
    losses = [
        F.cross_entropy(dense(material, merged, j, material.test[t].images), material.test[t].labels).item()
        for j, t in enumerate(TASKS)
    ]
    assert row["measured_loss"] == pytest.approx(float(np.mean(losses)), abs=1e-3)


def test_running_variances_below_zero_are_counted_from_the_checkpoints() -> None:
    from merging.flat import FlatSpace

    state = {
        "w": torch.tensor([1.0]),
        "n.running_mean": torch.tensor([-1.0]),
        "n.running_var": torch.tensor([1.0, 1.0]),
    }
    experts = [
        {"w": torch.tensor([-9.0]), "n.running_mean": torch.tensor([-9.0]), "n.running_var": torch.tensor([0.2, 0.9])},
        {"w": torch.tensor([-9.0]), "n.running_mean": torch.tensor([-9.0]), "n.running_var": torch.tensor([0.4, 0.8])},
    ]
    space = FlatSpace.of(state)
    origin = space.flatten(state)
    deltas = torch.stack([space.flatten(one) - origin for one in experts])
    for alpha, share in (([0.5, 0.5], 0.0), ([0.7, 0.7], 0.0), ([0.8, 0.8], 0.5), ([5.0, 5.0], 1.0)):
        assert clamped_share(space, origin, deltas, alpha) == share
        merged = origin + torch.tensor(alpha) @ deltas
        merged[1:] = torch.where(merged[1:] < 0, 0, merged[1:])  # as merging does; the mean is negative by right
        merged[space.names.index("n.running_mean")] = -1.0
        assert zero_share(space, origin, merged, deltas) == share


@pytest.mark.parametrize("size", range(2, 12))
def test_channels_that_are_dead_in_every_expert_are_no_alarm(size: int) -> None:
    """Averages of dead channels round to a little below zero; extrapolating a living one is told apart."""
    from merging.flat import FlatSpace

    state = {"n.running_var": torch.tensor([0.77, 1.0, 0.5])}
    space = FlatSpace.of(state)
    origin = space.flatten(state)
    deltas = torch.stack([torch.tensor([1e-9 * i, 0.0, 0.4]) for i in range(size)]) - origin
    assert clamped_share(space, origin, deltas, np.full(size, 1 / size)) == 0.0
    average = (origin + deltas.mean(dim=0)).clamp(min=0.0)
    assert zero_share(space, origin, average, deltas) == 0.0
    assert clamped_share(space, origin, deltas, np.full(size, 6 / size)) == pytest.approx(1 / 3)
    many = np.repeat(np.full((size, 1), 6 / size), 3, axis=1)
    many[:, 2] = 1 / size
    assert clamped_share(space, origin, deltas, many) == 0.0


def test_neighbouring_layers_are_joined_evenly() -> None:
    groups = [LayerGroup(f"layer {k}", (f"w{k}",)) for k in range(5)]
    joined = coarse(groups, 2)
    assert [g.tensors for g in joined] == [("w0", "w1"), ("w2", "w3", "w4")]
    assert coarse(groups, 9) == tuple(groups)


def test_break_even_is_where_the_costs_meet(pool: Pool, bank: Bank) -> None:
    for row in price_rows(spec(), pool, bank, pool.groups[2]):
        if np.isfinite(row["break_even"]):
            pays, cheaper = row["break_even"], row["seconds_measure"] - row["seconds_price"]
            assert row["seconds_collect"] <= pays * cheaper * (1 + 1e-9)
            assert row["seconds_collect"] > (pays - 1) * cheaper * (1 - 1e-9)


def merges(seed: int, groups: int = 60, noise: float = 0.2) -> pd.DataFrame:
    """Merges of which ``secant`` is right in half A up to a little noise and ``tangent_base`` in half B."""
    rng = np.random.default_rng(seed)
    rows = []
    for g in range(groups):
        half = "AB"[g % 2]
        for method in ("average", "task_arithmetic"):
            truth = float(np.exp(rng.normal()))
            near, far = truth * np.exp(0.01 * rng.normal()), truth * np.exp(1.0 + noise * rng.normal())
            rows.append(
                {
                    "regime": "mild", "architecture": "mlp", "half": half, "group": g, "N": 2, "method": method,
                    "experts": f"{half}{g}", "measured_loss": truth, "measured_loss_calibration": truth,
                    "measured_loss_even": truth, "measured_loss_odd": truth,
                    "measured_accuracy": 0.2 if truth > 2 else 0.9, "measured_accuracy_even": 0.2 if truth > 2 else 0.9,
                    "measured_accuracy_odd": 0.2 if truth > 2 else 0.9, "expert_accuracy": 0.9,
                    "pred_secant": near if half == "A" else far, "pred_tangent_base": far if half == "A" else near,
                    "pred_pairs": near, "trivial_base_risk": 1.0,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def test_choices_are_made_on_the_other_half() -> None:
    frame = with_choices(honest(merges(0)).drop(columns="pred_pairs"))
    for half, chosen in (("A", "tangent_base"), ("B", "secant")):  # what was best where it is not judged
        part = frame[frame["half"] == half]
        assert set(part["chosen_best"]) == {chosen}
        assert np.allclose(part["pred_best"], part[f"pred_{chosen}"])


def test_no_predictor_is_credited_with_a_merge_that_it_evaluated() -> None:
    frame = honest(merges(0).assign(pred_anchored=1.0))
    average = frame["method"] == "average"
    assert frame.loc[average, ["pred_pairs", "pred_anchored"]].isna().all(axis=None)
    assert frame.loc[~average, ["pred_pairs", "pred_anchored"]].notna().all(axis=None)
    assert ((frame["state"] == "collapsed") == (frame["measured_accuracy"] <= 0.45)).all()


def test_intervals_cover_what_they_promise_on_the_other_half() -> None:
    rng = np.random.default_rng(1)
    found = []
    for seed in range(6):
        frame = honest(merges(seed, groups=120)).assign(pred_noisy=lambda f: f["measured_loss"])
        frame["pred_noisy"] *= np.exp(0.3 * rng.normal(size=len(frame)))
        found.append(interval_table(frame, ["noisy"], Settings(seed=seed)).iloc[0]["covered"])
    assert 0.86 <= float(np.mean(found)) <= 0.96  # 90 % asked, 1440 merges judged


def test_flags_are_judged_on_the_other_half() -> None:
    frame = honest(merges(2)).assign(over_base=lambda f: np.log(f["measured_loss"]))
    row = flag_table(frame, ["over_base"], Settings()).iloc[0]
    assert row["collapsed"] == int((frame["state"] == "collapsed").sum())
    assert row["missed"] <= 0.25 * row["collapsed"]  # a tenth is allowed on average; the score separates perfectly
    assert row["alarms"] <= 0.1 * row["merges"]


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    from experiments.commands.study_prediction import _stores

    with pytest.raises(MergeboundError, match="mild=FOLDER"):
        _stores(["mild"])
    assert _stores(["mild=x", "harsh=y"]) == {"mild": Path("x"), "harsh": Path("y")}
