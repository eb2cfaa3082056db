"""Gradient constants against closed forms: additive-noise quadratics and logistic regression, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from experiments.measure.noise.at_point import noise_at
from experiments.measure.noise.constant import exactly, from_parts, largest, largest_of, quantile
from experiments.measure.noise.constants import batch_noise
from experiments.measure.noise.heterogeneity import _products, successive_cosines, task_gradients
from experiments.measure.noise.objective import Objective
from experiments.measure.noise.one_step import one_step
from experiments.measure.noise.per_sample import Rows, moments, squared_gaps
from experiments.measure.noise.smoothness import _lanczos, ends, sample_smoothness
from experiments.tasks.types import Split
from theory import Expert, QuadraticTask, with_true_constants
from theory.clocks import clock, step_excess
from theory.drift import drift_base, drift_energy, drift_noise
from theory.errors import MergeboundError
from theory.quadratic import draw_data, expert_moments
from theory.stability import epsilon_recursion, epsilon_rms, gamma

D = 5
SHARED = 3


def _task(seed: int = 0, low: float = 0.3, high: float = 2.0) -> QuadraticTask:
    rng = np.random.default_rng([seed, 1])
    basis = np.linalg.qr(rng.standard_normal((D, D)))[0]
    spread = rng.standard_normal((D, D))
    H = basis @ np.diag(np.linspace(low, high, D)) @ basis.T
    return QuadraticTask(H, rng.standard_normal(D), spread @ spread.T / D)


def _objective(H: np.ndarray, x: np.ndarray, decay: float = 0.0) -> Objective:
    matrix = torch.from_numpy(np.ascontiguousarray(H))

    def losses(theta: Tensor, z: Tensor, labels: Tensor) -> Tensor:
        away = theta - z
        return 0.5 * ((away @ matrix) * away).sum(dim=-1)

    return Objective(losses, torch.from_numpy(np.array(x)), SHARED, decay)


def _split(z: np.ndarray) -> Split:
    return Split(torch.from_numpy(np.array(z)), torch.zeros(len(z), dtype=torch.int64), np.arange(len(z)))


def test_all_of_S_on_a_quadratic_is_exact_part_by_part() -> None:
    task, rng, decay = _task(), np.random.default_rng(3), 0.2
    x = rng.standard_normal(D)
    z, fresh = draw_data(task, 20, 2, rng)
    found = noise_at(_objective(task.H, x, decay), _split(z), _split(fresh), population=20, pairs=20)
    rows, others = (x - z) @ task.H, (x - fresh) @ task.H
    for part, span in (("all", slice(None)), ("shared", slice(SHARED)), ("head", slice(SHARED, None))):
        g, o = rows[:, span], others[:, span]
        mean = g.mean(axis=0)
        gaps = np.linalg.norm(g[:, None] - o[None], axis=2)
        expected = {
            "gradient": np.linalg.norm(mean),
            "objective_gradient": np.linalg.norm(mean + decay * x[span]),
            "sigma": np.sqrt(((g - mean) ** 2).sum(axis=1).mean()),
            "gap": np.sqrt((gaps**2).mean()),
            "largest_gap": gaps.max(),
            "largest_norm": np.linalg.norm(np.concatenate([g, o]), axis=1).max(),
        }
        for name, value in expected.items():
            assert getattr(found[part], name).value == pytest.approx(value, rel=1e-10), (part, name)
        assert found[part].sigma.low == found[part].sigma.high  # all of S: no sampling error
        assert found[part].norms[0][1].value == pytest.approx(np.median(np.linalg.norm(g, axis=1)))
    losses = 0.5 * np.einsum("ja,ab,jb->j", x - z, task.H, x - z)
    objective = losses.mean() + 0.5 * decay * x @ x
    assert found.loss.value == pytest.approx(losses.mean())
    assert found.pl_ratio.value == pytest.approx(((rows.mean(axis=0) + decay * x) ** 2).sum() / (2 * objective))
    small = noise_at(_objective(task.H, x, decay), _split(z), _split(fresh), population=20, pairs=20, memory=D * 8 * 12)
    assert small["all"].gap.value == pytest.approx(found["all"].gap.value, rel=1e-12)  # blocks of three samples
    assert small["all"].largest_gap.value == pytest.approx(found["all"].largest_gap.value, rel=1e-12)


@pytest.mark.parametrize("sampling", ["without_replacement", "with_replacement"])
def test_noise_of_batches_against_all_batches(sampling: str) -> None:
    task = _task(12)
    x, z = np.ones(D), draw_data(task, 6, 1, np.random.default_rng(4))[0]
    found = noise_at(_objective(task.H, x), _split(z), None, population=6, pairs=1)["all"]
    rows = (x - z) @ task.H
    every = itertools.combinations(range(6), 2) if sampling == "without_replacement" else np.ndindex(6, 6)
    means = np.array([rows[list(batch)].mean(axis=0) for batch in every])
    expected = np.sqrt(((means - rows.mean(axis=0)) ** 2).sum(axis=1).mean())
    assert batch_noise(found.sigma, 6, 2, sampling).value == pytest.approx(expected)


def test_subsets_of_S_are_unbiased_and_intervals_cover() -> None:
    """m of n samples: squared constants have the right mean, intervals hold S's own values in about 95 % of draws."""
    task, rng = _task(1), np.random.default_rng(5)
    x, n, m, draws = rng.standard_normal(D), 60, 25, 100
    z, pool = draw_data(task, n, 2, rng)
    objective = _objective(task.H, x)
    rows, others = (x - z) @ task.H, (x - pool) @ task.H
    sigma = ((rows - rows.mean(axis=0)) ** 2).sum(axis=1).mean()
    truth = {
        "gradient": (rows.mean(axis=0) ** 2).sum(),
        "sigma": sigma,
        "gap": ((rows[:, None] - others[None]) ** 2).sum(axis=2).mean(),
    }
    squares: dict[str, list[float]] = {name: [] for name in truth}
    inside: dict[str, list[bool]] = {name: [] for name in truth}
    for _ in range(draws):
        sample = _split(z[rng.permutation(n)[:m]])
        fresh = _split(pool[rng.integers(0, n, size=m)])
        found = noise_at(objective, sample, fresh, population=n, pairs=1)["all"]
        for name, value in truth.items():
            constant = getattr(found, name)
            squares[name].append(constant.value**2)
            inside[name].append(constant.low**2 <= value <= constant.high**2)
    for name, value in truth.items():
        values = np.array(squares[name])
        assert abs(values.mean() - value) < 4 * values.std(ddof=1) / np.sqrt(draws), name
        assert np.mean(inside[name]) > 0.87, name


def test_errors_fall_as_one_over_root_m() -> None:
    task, rng = _task(2), np.random.default_rng(7)
    objective, width = _objective(task.H, rng.standard_normal(D)), {}
    for m in (100, 1600):
        z = draw_data(task, m, 1, rng)[0]
        found = noise_at(objective, _split(z), None, population=None, pairs=1)["all"].sigma
        width[m] = found.high - found.low
        true = np.sqrt(np.trace(task.H @ task.Omega @ task.H))
        assert abs(found.value - true) < width[m]
    assert width[100] / width[1600] == pytest.approx(4.0, rel=0.35)


def test_measured_constants_bound_the_exact_drift_and_stability_of_the_quadratic_family() -> None:
    """Measured g, sigma, D_2 and kappa are the closed forms, and Theorems 2 and 3 hold with them."""
    task, n, b = _task(3), 30, 5
    x0 = np.random.default_rng(11).standard_normal(D)
    run = Expert(
        "a",
        n=n,
        batch_size=b,
        learning_rate=0.2,
        steps=15,
        weight_decay=0.1,
        curvature="strongly_convex",
        L=2.0,
        mu=0.3,
    )
    true, exact = with_true_constants(task, x0, run), expert_moments(task, x0, run)
    rng, found = np.random.default_rng(13), []
    for _ in range(60):
        z, fresh = draw_data(task, n, 2, rng)
        at = noise_at(_objective(task.H, x0, 0.1), _split(z), _split(fresh), population=n, pairs=1)["all"]
        found.append([at.objective_gradient.value**2, at.sigma.value**2, at.gap.value**2])
    mean, error = np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / np.sqrt(len(found))
    expected = np.array([float(true.initial_gradient_norm), float(true.sigma), float(true.D_2)]) ** 2
    assert np.all(np.abs(mean - expected) < 4 * error)

    steps = one_step(
        [("base", _objective(task.H, x0, 0.1))],
        _split(z).images,
        _split(z).labels,
        learning_rate=0.2,
        batch_size=b,
        batches=2,
    )
    rate = float(step_excess(run, 0.2)) / 0.2  # -(mu + omega): the step contracts
    assert steps.kappa.value == pytest.approx(rate, rel=1e-9)
    g, sigma, gap = np.sqrt(mean)
    measured = Expert(
        "a", n=n, batch_size=b, learning_rate=0.2, steps=15, weight_decay=0.1, kappa=steps.kappa.value, L=2.0,
        initial_gradient_norm=g, sigma=sigma, sigma0=sigma, D_2=gap, initial_risk=float(true.initial_risk),
        base_norm=float(np.linalg.norm(x0)), measured=frozenset({"initial_gradient_norm", "sigma", "sigma0", "D_2"}),
    )  # fmt: skip
    timing = clock(measured)
    for bound in (drift_noise(measured, timing), drift_base(measured, timing), drift_energy(measured)):
        assert float(exact.drift) <= float(bound) * 1.02
    rms = float(epsilon_rms(gap, timing.tau, n, gamma(measured, timing)))
    assert float(exact.epsilon) <= float(epsilon_recursion(measured, gap)) * 1.02 <= rms * 1.02 * 1.001
    assert rms < 5 * float(exact.epsilon)  # and they are not empty


def test_one_step_factor_of_a_quadratic_is_that_of_its_spectrum() -> None:
    task, decay = _task(4), 0.05
    x = np.ones(D)
    h = np.linalg.eigvalsh(task.H)
    z = _split(draw_data(task, 12, 1, np.random.default_rng(1))[0])
    for eta in (0.1, 0.6, 1.2):
        found = one_step(
            [("base", _objective(task.H, x, decay))],
            z.images,
            z.labels,
            learning_rate=eta,
            batch_size=4,
            batches=2,
            randoms=2,
            drift=torch.from_numpy(x),
        )
        frame = found.to_frame()
        factor = frame.groupby("direction")["factor"]
        assert factor.max()["top"] == pytest.approx(abs(1 - eta * (h[-1] + decay)), rel=1e-8)
        assert factor.min()["bottom"] == pytest.approx(abs(1 - eta * (h[0] + decay)), rel=1e-8)
        limit = max(abs(1 - eta * (h[-1] + decay)), abs(1 - eta * (h[0] + decay)))
        assert found.largest.value == pytest.approx(limit, rel=1e-8)
        assert found.limit.value == pytest.approx(limit, rel=1e-8)
        assert (frame["factor"] <= limit * (1 + 1e-9)).all()
        along = factor.max()["drift"]  # v = ones: |(1 - eta (H + omega)) v| / |v|
        assert along == pytest.approx(np.linalg.norm(x - eta * (task.H @ x + decay * x)) / np.linalg.norm(x))


def test_logistic_regression_against_dense_derivatives() -> None:
    rng = np.random.default_rng(2)
    inputs, labels = torch.from_numpy(rng.standard_normal((14, 4))), torch.from_numpy(rng.integers(0, 2, 14))

    def losses(theta: Tensor, a: Tensor, y: Tensor) -> Tensor:
        sign = 2.0 * y.to(theta.dtype) - 1.0
        return torch.nn.functional.softplus(-sign * (a @ theta))

    theta = torch.from_numpy(rng.standard_normal(4))
    objective = Objective(losses, theta, 4)
    p = torch.sigmoid(inputs @ theta)
    expected = (p - labels)[:, None] * inputs
    rows = Rows(objective, inputs, labels)
    torch.testing.assert_close(next(iter(rows.blocks()))[0], expected, rtol=1e-10, atol=1e-12)
    assert moments(rows).squares[:, 0] == pytest.approx((expected**2).sum(dim=1).numpy())
    gaps = (expected[:, None] - expected[None]).square().sum(dim=2).numpy()
    assert squared_gaps(rows, rows).sum(axis=2) == pytest.approx(gaps, abs=1e-10)

    curvature = (p * (1 - p)).numpy()
    alone = curvature * (inputs**2).sum(dim=1).numpy()  # rank one: p (1 - p) |a|^2
    assert sample_smoothness(objective, inputs, labels, iterations=3) == pytest.approx(alone, rel=1e-6)
    H = (inputs.numpy().T * curvature) @ inputs.numpy() / 14
    low, bottom, high, top = ends(objective, inputs, labels)
    values, vectors = np.linalg.eigh(H)
    assert [low, high] == pytest.approx([values[0], values[-1]], rel=1e-9)
    assert abs(top.numpy() @ vectors[:, -1]) == pytest.approx(1.0)
    assert abs(bottom.numpy() @ vectors[:, 0]) == pytest.approx(1.0)

    eta = 0.5
    found = one_step([("x", objective)], inputs, labels, learning_rate=eta, batch_size=14, batches=1, distances=(1e-4,))
    assert found.largest.value == pytest.approx(max(abs(1 - eta * values[0]), abs(1 - eta * values[-1])), rel=1e-5)
    steep = Expert("a", n=14, batch_size=14, learning_rate=eta, steps=1, curvature="convex", L=float(alone.max()))
    assert found.kappa.value <= float(step_excess(steep, eta)) / eta + 1e-9  # q = 1 of a convex loss, eta L <= 2


def test_lanczos_finds_both_ends() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((80, 80))
    matrix = matrix + matrix.T
    values, vectors = _lanczos(lambda v: matrix @ v, 80, 60, np.random.default_rng(1))
    exact = np.linalg.eigvalsh(matrix)
    assert [values[0], values[-1]] == pytest.approx([exact[0], exact[-1]], rel=1e-6)
    assert np.linalg.norm(matrix @ vectors[:, -1] - values[-1] * vectors[:, -1]) < 1e-3
    identity, _ = _lanczos(lambda v: 2.0 * v, 80, 10, np.random.default_rng(1))
    assert identity == pytest.approx([2.0])


def test_task_gradients_against_dense_and_their_bias() -> None:
    tasks, rng = [_task(6), _task(7), _task(8)], np.random.default_rng(17)
    x = rng.standard_normal(D)
    n = 40
    data = [draw_data(task, n, 1, rng)[0] for task in tasks]
    objectives = [_objective(task.H, x) for task in tasks]
    full = task_gradients(objectives, [_split(z) for z in data], [n] * 3, "abc", part="all")
    g = np.stack([((x - z) @ task.H).mean(axis=0) for z, task in zip(data, tasks, strict=True)])
    norms = np.linalg.norm(g, axis=1)
    assert [c.value for c in full.norms] == pytest.approx(norms)
    cosines = g @ g.T / np.outer(norms, norms)
    assert np.array([[c.value for c in row] for row in full.cosines]) == pytest.approx(cosines)
    assert full.cosines[0][1].low == full.cosines[0][1].high
    assert full.heterogeneity.value**2 == pytest.approx(((g - g.mean(axis=0)) ** 2).sum(axis=1).mean())
    assert full.joint.value == pytest.approx(np.linalg.norm(g.mean(axis=0)))
    shared = task_gradients(objectives, [_split(z) for z in data], [n] * 3, "abc")
    assert [c.value for c in shared.norms] == pytest.approx(np.linalg.norm(g[:, :SHARED], axis=1))
    assert len(full.to_frame()) == 3

    squares, covered, draws = [], [], 100
    for _ in range(draws):
        some = [_split(z[rng.permutation(n)[:12]]) for z in data]
        found = task_gradients(objectives, some, [n] * 3, "abc", part="all")
        squares.append([found.heterogeneity.value**2, found.norms[0].value ** 2])
        cosine = found.cosines[0][1]
        covered.append(cosine.low <= cosines[0, 1] <= cosine.high)
    values = np.array(squares)
    error = values.std(axis=0, ddof=1) / np.sqrt(draws)
    assert np.all(np.abs(values.mean(axis=0) - [full.heterogeneity.value**2, norms[0] ** 2]) < 4 * error)
    assert np.mean(covered) > 0.85
    with pytest.raises(MergeboundError, match="choose from all, shared"):
        task_gradients(objectives, some, [n] * 3, "abc", part="body")


def test_gradient_descent_on_an_isotropic_quadratic_keeps_its_direction() -> None:
    centre = np.random.default_rng(1).standard_normal(D)
    z = centre + np.zeros((6, D))
    points = [_objective(np.eye(D), centre * share) for share in (0.0, 0.5, 0.9)]
    frame = successive_cosines(points, _split(z), ["base", "middle", "expert"], population=6)
    for column in ("with_first", "with_previous", "with_descent"):
        assert frame[column].to_numpy() == pytest.approx([1.0, 1.0, 1.0])
        assert (frame[f"{column}_error"] == 0.0).all()
    assert frame["gradient_norm"].to_numpy() == pytest.approx(np.linalg.norm(centre) * np.array([1.0, 0.5, 0.1]))
    bent = [points[0], _objective(np.eye(D), 2 * centre)]
    assert successive_cosines(bent, _split(z), ["base", "expert"])["with_first"][1] == pytest.approx(-1.0)


def test_gradients_along_training_are_freed_of_the_noise_of_their_common_samples() -> None:
    """m of n samples: inner products at two points are unbiased; norms and cosines are made of them, as g is."""
    rng, n, m = np.random.default_rng(29), 40, 12
    tasks = [_task(21), _task(22), _task(24)]
    x = 0.5 * rng.standard_normal((3, D))
    z = draw_data(tasks[0], n, 1, rng)[0]
    points = [_objective(task.H, at) for task, at in zip(tasks, x, strict=True)]  # other curvature at each point
    each = np.stack([(at - z) @ task.H for task, at in zip(tasks, x, strict=True)])
    g = each.mean(axis=1)

    def products(rows: np.ndarray) -> np.ndarray:
        own = np.einsum("kjd,ljd->jkl", each[:, rows], each[:, rows])
        inner = np.einsum("kjd,ld->jkl", each[:, rows], each[:, rows].mean(axis=1))
        return np.asarray(_products(inner, own, n)[0])

    draws = [rng.permutation(n)[:m] for _ in range(5000)]
    found = np.array([products(rows) for rows in draws])
    means = np.array([each[:, rows].mean(axis=1) for rows in draws])
    error = found.std(axis=0, ddof=1) / np.sqrt(len(draws))
    assert np.all(np.abs(found.mean(axis=0) - g @ g.T) < 4.5 * error)
    excess = (1 - m / n) / m * np.einsum("kjd,ljd->kl", each - g[:, None], each - g[:, None]) / (n - 1)
    assert np.all(np.diag(excess) > 6 * np.diag(error))  # what is taken off is not small
    taken = np.einsum("rkd,rld->rkl", means, means).mean(axis=0) - found.mean(axis=0)
    assert taken == pytest.approx(excess, rel=0.05, abs=0.05 * excess.max())

    one, gram = noise_at(points[0], _split(z[draws[0]]), None, population=n, pairs=1), products(draws[0])
    frame = successive_cosines(points, _split(z[draws[0]]), "abc", population=n)
    assert torch.is_grad_enabled()  # blocks of several points are read in turns
    norms = np.sqrt(np.diag(gram))
    assert frame["gradient_norm"].to_numpy() == pytest.approx(norms)
    assert frame["gradient_norm"][0] == pytest.approx(one["all"].gradient.value)
    assert frame["with_first"].to_numpy() == pytest.approx([1.0, *(gram[0, 1:] / norms[0] / norms[1:])])
    assert frame["with_previous"][2] == pytest.approx(gram[2, 1] / norms[1] / norms[2])
    way = x[0] - x[2]
    assert frame["with_descent"][1] == pytest.approx(means[0][1] @ way / norms[1] / np.linalg.norm(way))
    small = successive_cosines(points, _split(z[draws[0]]), "abc", population=n, memory=8 * D * 8)
    pd.testing.assert_frame_equal(small, frame, rtol=1e-9)  # blocks of few samples
    truth, inside = g[2] @ g[1] / np.linalg.norm(g[2]) / np.linalg.norm(g[1]), []
    for rows in draws[:40]:
        last = successive_cosines(points[1:], _split(z[rows]), "bc", population=n).iloc[1]
        inside.append(abs(last["with_first"] - truth) < 2.2 * last["with_first_error"])  # t, 11 degrees
    assert np.mean(inside) > 0.85


def test_the_jackknife_of_gradients_along_training_leaves_out_one_sample_at_a_time() -> None:
    task, rng = _task(23), np.random.default_rng(31)
    points = [_objective(task.H, at) for at in (2 * np.ones(D), np.linspace(-1, 2, D))]
    z = draw_data(task, 9, 1, rng)[0]
    whole = successive_cosines(points, _split(z), "ab")
    fewer = [successive_cosines(points, _split(np.delete(z, j, axis=0)), "ab") for j in range(9)]
    for column in ("gradient_norm", "with_first", "with_descent"):
        values = np.array([f[column][1] for f in fewer])
        assert whole[f"{column}_error"][1] == pytest.approx(np.sqrt(8 * values.var()), rel=1e-8)
    assert whole["with_first_error"][0] == 0.0


def test_pl_ratio_of_an_isotropic_quadratic_is_its_curvature() -> None:
    z = draw_data(_task(9), 10, 1, np.random.default_rng(0))[0]
    least = 0.5 * 1.7 * ((z - z.mean(axis=0)) ** 2).sum(axis=1).mean()
    found = noise_at(_objective(1.7 * np.eye(D), np.ones(D)), _split(z), None, population=10, pairs=1, least=least)
    assert found.pl_ratio.value == pytest.approx(1.7)
    assert not found.fresh


def test_intervals_of_quantiles_and_largest_values_have_their_level() -> None:
    rng = np.random.default_rng(23)
    draws = rng.random((400, 50))
    found = [quantile(row, 0.9, 0) for row in draws]
    assert np.mean([c.low <= 0.9 <= c.high for c in found]) > 0.93
    tops = [largest(row, 0) for row in draws]
    assert np.mean([1.0 - c.value <= c.exceeding for c in tops]) == pytest.approx(0.95, abs=0.035)
    means = [from_parts(row.mean(), (row, None), seed=0) for row in draws]
    assert np.mean([c.low <= 0.5 <= c.high for c in means]) == pytest.approx(0.95, abs=0.035)


def test_largest_values_are_lower_estimates_with_one_sided_intervals() -> None:
    seen = largest([3.0, 1.0], 0)
    assert (seen.value, seen.low, seen.high, seen.at("high")) == (3.0, 3.0, np.inf, 3.0)
    assert seen.lower_estimate
    assert (seen.scaled(2.0).value, seen.scaled(2.0).high, seen.scaled(0.0).high) == (6.0, np.inf, 0.0)
    assert largest_of([seen, exactly(5.0, 1, 0)]).high == np.inf  # 5 was seen, and nothing bounds the other
    assert not from_parts(1.0, (np.arange(4.0), None), seed=0).lower_estimate
    rng = np.random.default_rng(3)
    z, fresh = draw_data(_task(), 8, 2, rng)
    objective = _objective(_task().H, np.ones(D))
    found = noise_at(objective, _split(z), _split(fresh), population=8, pairs=8)["all"]
    assert found.largest_gap.lower_estimate
    assert found.largest_norm.lower_estimate  # all of S, but not all fresh samples
    assert not found.gap.lower_estimate
    steps = one_step([("x", objective)], _split(z).images, _split(z).labels, learning_rate=0.1, batch_size=4, batches=1)
    assert steps.kappa.low == steps.kappa.value < steps.kappa.high == steps.largest.high == steps.limit.high == np.inf


def test_errors_say_what_to_do() -> None:
    objective = _objective(np.eye(D), np.zeros(D))
    with pytest.raises(MergeboundError, match="at least one"):
        Rows(objective, torch.zeros(0, D), torch.zeros(0, dtype=torch.int64))
    z = _split(np.full((3, D), np.nan))
    with pytest.raises(MergeboundError, match="NaN or infinite"):
        noise_at(objective, z, None, population=3)
    good = _split(np.zeros((3, D)))
    with pytest.raises(MergeboundError, match="larger than the 3 samples"):
        one_step([("x", objective)], good.images, good.labels, learning_rate=0.1, batch_size=4)
    with pytest.raises(MergeboundError, match="at least one point"):
        one_step([], good.images, good.labels, learning_rate=0.1, batch_size=2)
