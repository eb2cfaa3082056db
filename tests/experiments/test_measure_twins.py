"""Stability twins against separate runs, closed forms and steps by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from experiments.bases.spec import BaseSpec
from experiments.finetune.optimizers import heavy_ball
from experiments.finetune.reference import train_run
from experiments.finetune.schedules import schedule
from experiments.grid.run_spec import RunSpec
from experiments.measure.twins.estimates import stability, summary
from experiments.measure.twins.merges import MergeChoice, MergeTwins
from experiments.measure.twins.pairs import NEVER, Pairs, couple, draw_pairs, fresh_rows, replaced, sample_of
from experiments.measure.twins.quadratic import quadratic_twins
from experiments.measure.twins.recipes import recipes, setups
from experiments.measure.twins.theorem2 import elasticities, gradient_gaps, response, theorem2
from experiments.measure.twins.train import train_twins
from experiments.models import build_model
from experiments.tasks.types import Split
from merging.merge import flat_space
from merging.partition import partition
from theory.errors import MergeboundError
from theory.quadratic import QuadraticTask, expert_moments
from theory.recipe import Expert

BASE = BaseSpec(kind="random", architecture="mlp_6_5", classes=4)


def images(n: int, seed: int, shape: tuple[int, ...] = (1, 3, 3)) -> Split:
    rng = np.random.default_rng(seed)
    pixels = torch.from_numpy(rng.standard_normal((n, *shape)))
    return Split(pixels, torch.from_numpy(rng.integers(0, 4, n)), np.arange(n))


def spec(**fields: object) -> RunSpec:
    values = {"task": "x", "base": BASE, "learning_rate": 0.1, "steps": 9, "batch_size": 4, "precision": "float64"}
    return RunSpec(**{**values, "checkpoints": (4, 9), "seed": 3, **fields})  # type: ignore[arg-type]


def start_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in network.state_dict().items()}


def network_of(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build_model(name, 4, in_chans=1, img_size=3)


RULES = [
    {},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"momentum": 0.9, "nesterov": True, "schedule": "cosine"},
    {"optimizer": "adamw", "momentum": 0.9, "weight_decay": 0.1, "learning_rate": 0.01},
    {"optimizer": "sam", "clip_norm": 0.4, "label_smoothing": 0.1},
    {"sampling": "with_replacement", "data_share": 0.7, "trained": "head"},
]


@pytest.mark.parametrize("fields", RULES, ids=lambda f: "-".join(map(str, f.values())) or "sgd")
@pytest.mark.parametrize(("name", "way"), [("mlp_6_5", "auto"), ("logistic", "auto"), ("mlp_6_tanh", "folded")])
def test_twins_equal_separate_runs(name: str, way: str, fields: dict[str, object]) -> None:
    run, network, data, fresh = spec(**fields), network_of(name), images(19, 0), images(8, 1)
    start, sample = start_of(network), sample_of(run, data)
    pairs = draw_pairs(len(sample), 8, 5, 2)
    found = train_twins(run, network, start, data, fresh, pairs, way=way, chunk=2)
    check = separate(run, network, start, data, fresh, pairs)
    assert found.way == ("written" if way == "auto" else "folded")
    np.testing.assert_allclose(found.distances[:, :, 0], check, atol=1e-10)
    np.testing.assert_allclose(np.hypot(found.distances[..., 1], found.distances[..., 2]), check, atol=1e-10)
    assert found.trained_steps < 5 * run.steps
    assert found.rounding[-1] < 1e-12
    assert (found.distances[found.starts == NEVER] == 0).all()


def separate(
    run: RunSpec, network: nn.Module, start: dict[str, torch.Tensor], data: Split, fresh: Split, pairs: Pairs
) -> np.ndarray:
    """Distances (T, C) from two plain runs of the reference loop per twin."""
    from experiments.inputs.shares import nested_subset

    used = nested_subset(len(data), run.data_share, run.seed)
    names = [name for name, _ in network.named_parameters()]
    base = train_run(run, network, start, data)
    rows = []
    for j, other in zip(used[pairs.samples], pairs.fresh, strict=True):
        pixels, labels = data.images.clone(), data.labels.clone()
        pixels[j], labels[j] = fresh.images[other], fresh.labels[other]
        twin = train_run(run, network, start, Split(pixels, labels, data.source))
        rows.append(
            [
                float(sum((twin.states[k][n] - base.states[k][n]).square().sum() for n in names)) ** 0.5
                for k in run.checkpoints
            ]
        )
    return np.array(rows)


def test_twins_of_a_network_with_batch_norm() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_model("resnet_bn", 4)
    run, data, fresh = spec(steps=3, checkpoints=(3,), batch_size=5), images(9, 0, (1, 8, 8)), images(3, 1, (1, 8, 8))
    pairs, start = draw_pairs(9, 3, 2, 0), start_of(network)
    found = train_twins(run, network, start, data, fresh, pairs)
    check = separate(run, network, start, data, fresh, pairs)
    assert found.way == "folded"
    assert (check > 0).any()
    np.testing.assert_allclose(found.distances[:, :, 0], check, atol=1e-10)


def test_few_snapshots_and_little_memory_change_nothing() -> None:
    run, network, data, fresh = spec(momentum=0.5), network_of("mlp_6_5"), images(19, 0), images(8, 1)
    start, pairs = start_of(network), draw_pairs(19, 8, 6, 2)
    plain = train_twins(run, network, start, data, fresh, pairs)
    with pytest.raises(MergeboundError, match="needs") as told:
        train_twins(run, network, start, data, fresh, pairs, memory=1)
    least = int(str(told.value).split("needs ")[1].split(";")[0])
    tight = train_twins(run, network, start, data, fresh, pairs, memory=least)
    assert tight.room.bytes <= least
    assert tight.room.chunk == 1
    assert tight.room.snapshots < plain.room.snapshots
    np.testing.assert_allclose(tight.distances, plain.distances, atol=1e-12)


def test_one_step_of_logistic_regression_by_hand() -> None:
    run, network = spec(steps=1, checkpoints=(1,), sampling="without_replacement"), network_of("logistic")
    data, fresh, start = images(7, 0), images(7, 1), start_of(network)
    found = train_twins(run, network, start, data, fresh, Pairs(np.arange(7), np.arange(7)))
    sample = sample_of(run, data)
    w, b = start["head.weight"].numpy(), start["head.bias"].numpy()

    def gradient(x: np.ndarray, y: int) -> np.ndarray:
        z = w @ x + b
        p = np.exp(z - z.max())
        return np.outer(p / p.sum() - np.eye(4)[y], np.append(x, 1.0))

    batch = couple(run, 7, found.pairs).rows[0]
    for j in range(7):
        mine = gradient(sample.images[j].flatten().numpy(), int(sample.labels[j]))
        other = gradient(fresh.images[j].flatten().numpy(), int(fresh.labels[j]))
        expected = 0.1 / 4 * np.linalg.norm(mine - other) if j in batch else 0.0
        assert found.distances[j, 0, 0] == pytest.approx(expected, abs=1e-12)
    gaps = gradient_gaps(run, network, start, sample, fresh_rows(sample, fresh, found.pairs), found.pairs)
    hit = np.isin(np.arange(7), batch)
    np.testing.assert_allclose(found.distances[hit, 0, 0], 0.1 / 4 * gaps[hit], atol=1e-12)
    full = theorem2(run, 7, gaps)[1]  # one step, the gap is that of the envelope: exact in expectation over batches
    assert full.value == pytest.approx(0.1 * np.sqrt((gaps**2).mean() * (1 / 49 + 1 / 28 - 1 / 49)))


@pytest.mark.parametrize("sampling", ["without_replacement", "with_replacement", "reshuffle"])
def test_closed_form_of_the_quadratic_family(sampling: str) -> None:
    rng = np.random.default_rng(0)
    root = rng.standard_normal((3, 3))
    task = QuadraticTask(root @ root.T / 3, np.ones(3), np.diag([0.5, 1.0, 2.0]))
    expert = Expert(
        "a",
        n=10,
        batch_size=3,
        learning_rate=0.2,
        steps=12,
        momentum=0.3,
        L=4.0,
        sampling=sampling,  # type: ignore[arg-type]
    )
    runs = quadratic_twins(task, np.zeros(3), expert, 60, 1)
    away = np.linalg.norm(runs[:, 1:] - runs[:, :1], axis=2)
    exact = float(expert_moments(task, np.zeros(3), expert).epsilon)
    found = summary(list(away), "rms", level=0.99)
    assert found.low <= exact <= found.high
    assert (found.high - found.low) / exact < 0.35
    merged = 0.3 * runs  # the other experts of a linear merge are the same in both: c_i = |alpha_i|, end to end
    assert summary(list(np.linalg.norm(merged[:, 1:] - merged[:, :1], axis=2))).value == pytest.approx(
        0.3 * found.value
    )


def test_bootstrap_interval_covers() -> None:
    rng = np.random.default_rng(5)
    truth, hits = np.sqrt(2.0), 0
    for trial in range(120):
        found = summary([rng.exponential(size=80)], "rms", seed=trial, resamples=300)
        hits += found.low <= truth <= found.high
    assert 0.82 <= hits / 120 <= 0.99


def test_sensitivity_through_merges() -> None:
    run, network, data, fresh = spec(steps=4, checkpoints=(4,)), network_of("mlp_6_5"), images(12, 0), images(12, 1)
    start = start_of(network)
    parts = partition(start)
    space = flat_space(start, parts)
    base = space.flatten(start)
    others = torch.randn(2, space.size, dtype=base.dtype, generator=torch.Generator().manual_seed(0)) * 0.1
    vectors = torch.stack([base, base + others[0], base + others[1]])
    choices = [
        MergeChoice("average"),
        MergeChoice("task_arithmetic", {"coefficient": 0.4}),
        MergeChoice("ties", {"density": 0.5}),
    ]
    merger = MergeTwins(base, vectors, space, parts, 0, choices, run.steps)
    pairs = draw_pairs(12, 12, 8, 0)
    found = train_twins(run, network, start, data, fresh, pairs, collect=merger.collect)
    average, arithmetic, ties = merger.results(8)
    assert average.sensitivity.value == pytest.approx(1 / 3, rel=1e-6)
    assert average.theory == pytest.approx(1 / 3)
    assert arithmetic.sensitivity.value == pytest.approx(0.4, rel=1e-6)
    assert arithmetic.theory == pytest.approx(0.4)
    assert ties.guarantee == "local"
    assert ties.sensitivity.value > 0
    shared = stability(found).rms["shared"][-1].value
    assert arithmetic.epsilon.value == pytest.approx(0.4 * shared, rel=1e-6)


def test_clock_and_elasticities() -> None:
    run = spec(steps=50, checkpoints=(50,), sampling="without_replacement", batch_size=5)
    assert response(run).sum() == pytest.approx(0.1 * 50)
    slopes = elasticities(run, 1000)
    assert slopes["learning_rate"] == pytest.approx(1.0, abs=1e-6)
    tau, gamma = 5.0, 0.5 * (1 / 5000 - 1e-6)
    share = (tau / 1000) ** 2 / ((tau / 1000) ** 2 + gamma)
    assert slopes["steps"] == pytest.approx(share + (1 - share) / 2, abs=0.01)
    assert slopes["n"] == pytest.approx(-(share + (1 - share) / 2), abs=0.02)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_the_response_is_that_of_the_optimiser_to_one_gradient(nesterov: bool, decay: str) -> None:
    run = spec(momentum=0.9, nesterov=nesterov, schedule=decay, steps=5, checkpoints=(5,))
    factor = schedule(run.schedule, run.steps)
    moved = []
    for kicked in range(run.steps):
        x = torch.zeros(1, dtype=torch.float64)
        update = heavy_ball(x, run.momentum, nesterov=nesterov)
        for k in range(run.steps):
            update(x, torch.full_like(x, float(k == kicked)), run.learning_rate * factor(k))
        moved.append(-x.item())
    np.testing.assert_allclose(response(run), moved, rtol=1e-12)
    if decay == "constant":  # 0.1 (1 + ... + 0.9^j), j = 4 ... 0 for heavy ball and 5 ... 1 for Nesterov
        assert response(run).sum() == pytest.approx(1.682969 if nesterov else 1.31441)


def test_augmented_samples_keep_their_draws() -> None:
    from experiments.inputs.augment import augmentation
    from experiments.inputs.resident_data import Resident
    from experiments.tasks.form import InputFormat

    def resident(n: int, seed: int) -> Resident:
        rng = np.random.default_rng(seed)
        pixels = torch.from_numpy(rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8))
        form = InputFormat(1, 8, 8, (0.5,), (0.5,), "bicubic", 1.0)
        labels = torch.from_numpy(rng.integers(0, 4, n))
        return Resident(pixels, labels, np.arange(n), form, augmentation("light"), 7, "x", torch.float64)

    data, fresh = resident(11, 0), resident(11, 1).evaluation()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = build_model("logistic", 4, in_chans=1, img_size=8)
    run, start, pairs = spec(), start_of(network), draw_pairs(11, 11, 3, 0)
    found = train_twins(run, network, start, data, fresh, pairs)
    sample = sample_of(run, data)
    exchanged = fresh_rows(sample, fresh, pairs)
    whole = train_run(run, network, start, data)
    from experiments.inputs.shares import nested_subset

    back = np.argsort(nested_subset(11, 1.0, run.seed))
    for t in range(3):
        twin = train_run(run, network, start, replaced(sample, exchanged, pairs, t).take(back))
        away = sum((twin.states[9][n] - whole.states[9][n]).square().sum() for n in start)
        assert found.distances[t, -1, 0] == pytest.approx(float(away) ** 0.5, abs=1e-10)


def test_the_lists_of_recipes_are_heterogeneous_and_whole() -> None:
    for name in setups():
        found = recipes(name)
        assert len(found) >= 30
        assert len({each.run.model_dump_json() for each in found}) == len(found)
        assert {each.run.sampling for each in found} >= {"reshuffle", "with_replacement", "without_replacement"}


def test_errors_say_what_to_do() -> None:
    network, data = network_of("logistic"), images(6, 0)
    with pytest.raises(MergeboundError, match="choose 1 to 6"):
        draw_pairs(6, 9, 7, 0)
    with pytest.raises(MergeboundError, match="not among"):
        train_twins(spec(), network, start_of(network), data, data, Pairs(np.array([6]), np.array([0])))
    with pytest.raises(MergeboundError, match="lower learning_rate"):
        train_twins(
            spec(learning_rate=1e38, precision="float32"),
            network,
            start_of(network),
            data,
            data,
            draw_pairs(6, 6, 2, 0),
        )
