"""Curvature of tasks' risks against dense float64 computation, closed forms and Monte Carlo laws."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from experiments.measure.backbone import Backbone, differentiable_copy
from experiments.measure.curvature.density import spectral_density
from experiments.measure.curvature.directional import predict_from_segments, segment_curvature
from experiments.measure.curvature.global_smoothness import global_smoothness
from experiments.measure.curvature.gram import curvature_gram
from experiments.measure.curvature.lanczos import both_ends, extreme_eigenvalues, lanczos
from experiments.measure.curvature.losses import SquaredError
from experiments.measure.curvature.number import over_blocks
from experiments.measure.curvature.operators import KINDS, check_precision, curvature_operator
from experiments.measure.curvature.report import WANTED, Options, measure_curvature
from experiments.measure.curvature.risk import EmpiricalRisk, cast, full_point, task_risk
from experiments.measure.curvature.smoothness import batch_smoothness, segment_smoothness
from experiments.measure.curvature.traces import stochastic_diagonal, stochastic_trace
from experiments.measure.subject import Subject
from experiments.tasks.types import Split
from merging.merge import merge_state_dicts
from tests.experiments.reference_nets import CLASSES, Net, sample
from theory.certificate import curvature_risk
from theory.curvature import predict_curvature
from theory.errors import MergeboundError
from theory.krylov import lanczos_excess
from theory.quadratic import QuadraticTask
from theory.smoothness import deep_linear_smoothness, softmax_smoothness


class Attention(nn.Module):
    """One attention block with torch's LayerNorm and GELU, for (1, 4, 4) images: four tokens of four pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 12)
        self.out_norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(1).view(len(images), 4, 4)
        q, k, v = self.mix(self.norm(tokens)).chunk(3, dim=-1)
        mixed = tokens + torch.softmax(q @ k.mT / 2, dim=-1) @ v
        logits: Tensor = self.head(nn.functional.gelu(self.out_norm(mixed)).mean(dim=1))
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.body(images.flatten(1))))
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


MAKERS: dict[str, Callable[[], nn.Module]] = {"mlp": Perceptron, "convolution": Net, "attention": Attention}


def made(name: str, n: int = 7, batch: int = 3) -> tuple[EmpiricalRisk, Tensor]:
    """A risk over all parameters of a small network, in float64, and a point with nothing special about it."""
    torch.manual_seed(1)
    net = MAKERS[name]().double().eval()
    data = sample(n, seed=2)
    backbone = Backbone.of(net, net.state_dict(), shared_head=True)
    point = backbone.vector(net.state_dict())
    rng = torch.Generator().manual_seed(3)
    point = point + 0.2 * torch.rand(len(point), generator=rng, dtype=torch.float64)
    risk = EmpiricalRisk(backbone.call, data.images.double(), data.labels, len(point), batch=batch)
    return risk, point


class Dense:
    """Everything from the dense Jacobian and differences of gradients, through none of the package's products."""

    def __init__(self, risk: EmpiricalRisk, point: Tensor) -> None:
        self.risk, self.point = risk, point
        jacobian = jacrev(lambda x: risk.call(x, risk.images))(point)  # (n, C, P)
        p = torch.softmax(risk.call(point, risk.images), dim=-1)
        eye = torch.eye(p.shape[1], dtype=torch.float64)
        gradients = torch.einsum("nyc,ncp->nyp", p[:, None] - eye, jacobian)  # of every image, for every label
        own = gradients[torch.arange(len(p)), risk.labels]
        self.fisher = torch.einsum("ny,nyp,nyq->pq", p, gradients, gradients) / len(p)  # the definition
        self.empirical = own.T @ own / len(p)
        self.gradient = own.mean(dim=0)

    def slope(self, x: Tensor) -> Tensor:
        at = x.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(self.risk.call(at, self.risk.images), self.risk.labels)
        return torch.autograd.grad(loss, at)[0]

    def hessian(self, directions: Tensor) -> Tensor:
        """Products with the rows of directions, by central differences; good to about 1e-9."""
        step = 1e-5
        rows = [self.slope(self.point + step * d) - self.slope(self.point - step * d) for d in directions]
        return torch.stack(rows) / (2 * step)


@pytest.mark.parametrize("name", MAKERS)
def test_operators_equal_dense_matrices_however_images_are_batched(name: str) -> None:
    risk, point = made(name)
    truth = Dense(risk, point)
    vectors = torch.randn(5, risk.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = vectors.T.numpy()
    torch.testing.assert_close(risk.gradient(point), truth.gradient)
    found = {kind: curvature_operator(risk, point, kind) @ v for kind in KINDS}
    np.testing.assert_allclose(found["hessian"].T, truth.hessian(vectors), atol=1e-7)
    for kind in ("gauss_newton", "fisher"):
        np.testing.assert_allclose(found[kind], truth.fisher.numpy() @ v, atol=1e-13)
    np.testing.assert_allclose(found["empirical_fisher"], truth.empirical.numpy() @ v, atol=1e-13)
    once = curvature_operator(replace(risk, batch=100), point)
    np.testing.assert_allclose(found["hessian"], once @ v, atol=1e-13)
    part = torch.arange(3, risk.size, 7)
    inside = np.zeros((risk.size, 2))
    inside[part] = v[part, :2]
    block = curvature_operator(risk, point, columns=part)
    np.testing.assert_allclose(block @ v[part, :2], (once @ inside)[part], atol=1e-13)
    np.testing.assert_allclose(once.T @ v[:, 0], found["hessian"][:, 0], atol=1e-13)
    many = np.tile(v[:, :2], (1, 9))  # more than are multiplied at once
    np.testing.assert_allclose(curvature_operator(risk, point) @ many, np.tile(found["hessian"][:, :2], (1, 9)))


def test_sampled_fisher_is_a_fixed_matrix_and_its_mean_is_the_fisher() -> None:
    risk, point = made("mlp", n=3)
    truth = Dense(risk, point).fisher.numpy()
    eye = np.eye(risk.size)
    one = curvature_operator(risk, point, "sampled_fisher", seed=1) @ eye[:, 0]
    np.testing.assert_array_equal(one, curvature_operator(risk, point, "sampled_fisher", seed=1) @ eye[:, 0])
    assert np.abs(one - truth[0]).max() > 1e-4
    many = np.array([curvature_operator(risk, point, "sampled_fisher", seed=s) @ eye[:, 0] for s in range(40)])
    error = many.std(axis=0, ddof=1) / np.sqrt(len(many))
    assert (np.abs(many.mean(axis=0) - truth[:, 0]) < 4 * error + 1e-12).mean() > 0.98
    more = curvature_operator(risk, point, "sampled_fisher", samples=4000) @ eye[:, :8]
    np.testing.assert_allclose(more, truth[:, :8], atol=0.06 * np.abs(truth).max())


def test_second_derivatives_along_a_line_are_those_of_the_loss_through_layer_norm_too() -> None:
    """torch's own LayerNorm has wrong forward-over-forward derivatives, which this would not pass."""
    for name in MAKERS:
        risk, point = made(name)
        direction = torch.linspace(-1.0, 1.0, risk.size, dtype=torch.float64)
        found = segment_curvature(risk, point, point + direction, points=3)
        at = point + 0.5 * direction
        truth = Dense(risk, at)
        np.testing.assert_allclose(found.losses[1], risk.losses(at))
        assert found.slopes[1].mean() == pytest.approx(float(truth.gradient @ direction))
        bend = float(truth.hessian(direction[None])[0] @ direction)
        assert found.bends[1].mean() == pytest.approx(bend, rel=1e-6)
        assert found.gauss_newton[1].mean() == pytest.approx(float(direction @ truth.fisher @ direction))


def test_written_layer_norm_is_the_layer_norm() -> None:
    from timm.layers import LayerNorm2d

    torch.manual_seed(0)
    for norm, shape in (
        (nn.LayerNorm((3, 4)), (2, 5, 3, 4)),
        (LayerNorm2d(3), (2, 3, 4, 4)),
        (nn.LayerNorm(4), (3, 4)),
    ):
        for tensor in norm.parameters():
            tensor.data.normal_()
        x = torch.randn(shape)
        model = nn.Sequential(norm)
        twin = differentiable_copy(model)
        assert list(twin.state_dict()) == list(model.state_dict())
        assert type(twin[0]) is not type(norm)
        torch.testing.assert_close(functional_call(twin, dict(model.named_parameters()), (x,)), model(x))


# --- eigenvalues, density, traces ------------------------------------------------------------------------------------


def matrix(size: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    values = np.sort(np.concatenate([np.linspace(-1.0, 1.0, size - 3), [2.0, 3.0, 8.0]]))
    return (basis * values) @ basis.T, values


def test_lanczos_keeps_its_basis_orthonormal_and_finds_everything_in_the_end() -> None:
    full, values = matrix()
    space = lanczos(aslinearoperator(full), 40, np.arange(40.0) + 1)
    np.testing.assert_allclose(space.basis.T @ space.basis, np.eye(40), atol=1e-13)
    np.testing.assert_allclose(space.ritz()[0], values, atol=1e-12)
    low_rank = np.outer(full[0], full[0])
    assert lanczos(aslinearoperator(low_rank), 40, np.ones(40)).steps == 2  # exhausted, not divided by zero
    assert extreme_eigenvalues(aslinearoperator(np.zeros((5, 5)))).values[0] == 0.0


def test_eigenvalues_lie_within_their_residuals_and_limits() -> None:
    full, values = matrix()
    found = extreme_eigenvalues(aslinearoperator(full), 3, steps=14)
    np.testing.assert_allclose(found.values, values[::-1][:3], atol=1e-2)
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert np.abs(values - value).min() <= residual + 1e-12
    assert found.values[0] <= values[-1] + 1e-12 <= found.limit + 1e-9
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=0), 1.0)
    low, high = both_ends(aslinearoperator(full), steps=12)
    assert low.limit <= values[0] <= low.values[0] + 1e-12
    assert high.values[0] == pytest.approx(8.0)
    assert high.number().low <= 8.0 <= high.number().high + 1e-9


@pytest.mark.parametrize("steps", [8, 16])
def test_the_probable_limit_of_lanczos_holds_as_often_as_promised(steps: int) -> None:
    """Spectra in which the top is hard to see: one eigenvalue just above a block that hides it."""
    size, chance, misses, infinite = 200, 0.5, 0, 0
    values = np.concatenate([np.zeros(100), np.linspace(0.5, 0.97, 99), [1.0]])
    for seed in range(60):
        start = np.random.default_rng(seed).standard_normal(size)
        ritz = lanczos(aslinearoperator(np.diag(values)), steps, start).ritz()[0]
        excess = lanczos_excess(float(ritz[-1] - ritz[0]), size, steps, chance)
        infinite += not np.isfinite(excess)
        misses += ritz[-1] + excess < 1.0
    assert misses <= 60 * chance
    assert infinite == 0


def test_the_quadrature_integrates_low_polynomials_and_gives_the_density() -> None:
    full, values = matrix()
    found = spectral_density(aslinearoperator(full), steps=6, probes=12, seed=1)
    starts = [np.random.default_rng([1, 0xDE45, k]).standard_normal(40) for k in range(12)]
    for power in (1, 5, 11):  # exact below twice the steps, probe by probe
        high = np.linalg.matrix_power(full, power)
        exact = np.mean([s @ high @ s / (s @ s) for s in starts])
        assert found.mean(lambda x, k=power: x**k).value == pytest.approx(exact)
    trace = found.trace()
    assert trace.low <= values.sum() <= trace.high
    curve = found.curve()
    assert np.trapezoid(curve["density"], curve["eigenvalue"]) == pytest.approx(1.0, abs=1e-3)
    share = found.share_above(1.5)
    assert share.low - 0.03 <= 3 / 40 <= share.high + 0.03


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_traces_are_unbiased_and_their_errors_honest(method: Any) -> None:
    full, values = matrix()
    operator = aslinearoperator(full)
    runs = [stochastic_trace(operator, 12, method=method, seed=seed) for seed in range(250)]
    found = np.array([run.value for run in runs])
    assert abs(found.mean() - values.sum()) < 4 * found.std() / np.sqrt(len(runs))
    claimed = np.sqrt(np.mean([run.standard_error**2 for run in runs]))
    assert claimed == pytest.approx(found.std(), rel=0.35)
    assert runs[0].products == 12


def test_hutchinson_follows_its_law_in_the_number_of_probes_and_splits_by_layer() -> None:
    full, _ = matrix(24)
    operator = aslinearoperator(full)
    variance = 2 * ((full**2).sum() - (np.diag(full) ** 2).sum())
    for probes in (4, 16, 64):
        found = np.array([stochastic_trace(operator, probes, seed=seed).value for seed in range(300)])
        assert found.var() * probes / variance == pytest.approx(1.0, abs=0.3)
    parts = {"first": np.arange(10), "rest": np.arange(10, 24)}
    run = stochastic_trace(operator, 64, parts=parts)
    assert sum(part.value for part in run.parts.values()) == pytest.approx(run.value)
    truth = np.diag(full)[:10].sum()
    assert abs(run.parts["first"].value - truth) < 4 * run.parts["first"].standard_error
    assert len(run.to_frame()) == 3


def test_sketches_make_traces_of_low_rank_exact() -> None:
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((50, 4))
    low_rank = factor @ factor.T
    for method, products in (("hutch++", 18), ("xtrace", 12)):
        found = stochastic_trace(aslinearoperator(low_rank), products, method=method)  # type: ignore[arg-type]
        assert found.value == pytest.approx(np.trace(low_rank))
        assert found.standard_error == pytest.approx(0.0, abs=1e-9)
    assert stochastic_trace(aslinearoperator(low_rank), 18).standard_error > 1.0


@pytest.mark.parametrize("deflate", [0, 4])
def test_diagonals_are_unbiased_with_the_spread_of_their_law(deflate: int) -> None:
    full, _ = matrix(30)
    operator = aslinearoperator(full)
    runs = [stochastic_diagonal(operator, 16, deflate=deflate, seed=seed) for seed in range(200)]
    found = np.array([run.value for run in runs])
    error = found.std(axis=0, ddof=1) / np.sqrt(len(runs))
    assert (np.abs(found.mean(axis=0) - np.diag(full)) < 4.5 * error).all()
    claimed = np.mean([run.standard_error**2 for run in runs], axis=0)
    assert claimed.mean() == pytest.approx(found.var(axis=0).mean(), rel=0.2 if not deflate else 0.5)
    if not deflate:
        law = ((full**2).sum(axis=1) - np.diag(full) ** 2) / 16
        np.testing.assert_allclose(claimed.mean(), law.mean(), rtol=0.1)


def test_errors_over_blocks_are_those_of_a_weighted_mean() -> None:
    rng = np.random.default_rng(0)
    sizes = [4, 4, 4, 2]
    ends = np.cumsum([0, *sizes])
    draws = rng.standard_normal((4000, sum(sizes))) * 3 + 1
    blocks = np.stack([draws[:, a:b].mean(axis=1) for a, b in itertools.pairwise(ends)])
    mean, error = over_blocks(blocks, sizes)
    np.testing.assert_allclose(mean, draws.mean(axis=1))
    assert (error**2).mean() == pytest.approx(9 / 14, rel=0.05)
    assert np.isnan(over_blocks(blocks[:1], [4])[1]).all()


# --- quadratics: closed forms ----------------------------------------------------------------------------------------


def quadratic(seed: int, n: int = 40) -> tuple[QuadraticTask, EmpiricalRisk, np.ndarray]:
    """f = (x - z)' H (x - z)/2 as a squared error of ``R (x - z)``, R'R = H, with the drawn z."""
    rng = np.random.default_rng(seed)
    d = 4
    a = rng.standard_normal((d, d))
    task = QuadraticTask(a @ a.T / d, rng.standard_normal(d), np.eye(d) * 0.3)
    z = rng.multivariate_normal(task.theta, task.Omega, n)
    root = torch.from_numpy(np.linalg.cholesky(task.H).T.copy())
    risk = EmpiricalRisk(
        lambda x, images: (x - images) @ root.T,
        torch.from_numpy(z),
        torch.zeros(n, d, dtype=torch.float64),
        d,
        SquaredError(),
        batch=9,
    )
    return task, risk, z


def test_quadratics_agree_with_their_closed_forms() -> None:
    task, risk, z = quadratic(0)
    x, y = torch.tensor([1.0, -2.0, 0.5, 3.0]).double(), torch.tensor([0.0, 1.0, 1.0, -1.0]).double()
    for kind in ("hessian", "gauss_newton", "fisher"):
        np.testing.assert_allclose(curvature_operator(risk, x, kind) @ np.eye(4), task.H, atol=1e-13)
    u = (y - x).numpy()
    found = segment_curvature(risk, x, y)
    centre = x.numpy() - z
    np.testing.assert_allclose(found.losses[0], 0.5 * np.einsum("na,ab,nb->n", centre, task.H, centre))
    np.testing.assert_allclose(found.bends, u @ task.H @ u)
    assert found.largest().standard_error == pytest.approx(0.0, abs=1e-12)
    top = segment_smoothness(risk, x, y, points=2)
    assert top.high().value == pytest.approx(np.linalg.eigvalsh(task.H)[-1])
    assert top.low().value == pytest.approx(np.linalg.eigvalsh(task.H)[0])
    end = 0.5 * np.einsum("na,ab,nb->n", y.numpy() - z, task.H, y.numpy() - z).mean()
    predicted = predict_from_segments([found])
    assert predicted.taylor.value == pytest.approx(end)  # exact: the loss is its own Taylor polynomial
    assert predicted.segment.value >= end  # lemma 1
    assert predicted.slopes.value <= predicted.segment.value + 1e-9


# --- subjects --------------------------------------------------------------------------------------------------------


def subject(name: str = "mlp", experts: int = 3, n: int = 12, dtype: torch.dtype = torch.float64) -> Subject:
    """Experts near a base, each with a head of its own; nothing is trained."""
    torch.manual_seed(0)
    model = MAKERS[name]().to(dtype).eval()
    state = model.state_dict()
    full = Backbone.of(model, state)
    whole = Backbone.of(model, state, shared_head=True)
    base = full.vector(state)
    rng = torch.Generator().manual_seed(5)
    vectors, heads, networks, data = [], [], [], []
    for j in range(experts):
        vectors.append(base + 0.3 * torch.rand(len(base), generator=rng, dtype=torch.float64).to(dtype))
        own = {k: t + 0.2 * torch.rand(t.shape, generator=rng).to(dtype) for k, t in state.items() if k[:5] == "head."}
        constants = {**full.constants, **{f"model.{k}": t for k, t in own.items()}}
        networks.append(replace(whole, space=full.space, partition=full.partition, constants=constants))
        heads.append(own)
        split = sample(n, seed=j)
        data.append(Split(split.images.to(dtype), split.labels, split.source))
    names = tuple("abcdefg"[:experts])
    return Subject(
        names, names, name, model, tuple(networks), base, torch.stack(vectors), tuple(heads), tuple(data),
        train=tuple(data),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "by"),
    [("gauss_newton", "all"), ("gauss_newton", "tensor"), ("hessian", "tensor"), ("empirical_fisher", "all")],
)
def test_gram_matrices_equal_dense_ones(kind: Any, by: str) -> None:
    group = subject()
    anchors = ("own", "base", (0.2, 0.3, 0.4))
    found = curvature_gram(group, anchors=anchors, kind=kind, by=by, batch=5)
    assert found.anchors == ("own", "base", "0.2,0.3,0.4")
    places = [group.columns(layer) for layer in group.layers(by)]
    rows = torch.zeros(group.size, len(places), group.base.numel(), dtype=torch.float64)
    for l, place in enumerate(places):
        rows[:, l, place] = group.deltas[:, place]
    directions = rows.flatten(0, 1)
    for j in (0, 2):
        risk = task_risk(group, j)
        mixed = group.base + torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64) @ group.deltas
        for s, point in enumerate([group.vectors[j], group.base, mixed]):
            truth = Dense(risk, point)
            if kind == "hessian":
                exact = truth.hessian(directions) @ directions.T
            else:
                exact = directions @ (truth.fisher if kind == "gauss_newton" else truth.empirical) @ directions.T
            np.testing.assert_allclose(found.forms(j)[s], exact, atol=1e-7 if kind == "hessian" else 1e-12)
    if by == "tensor":
        together = curvature_gram(group, kind=kind, anchors=anchors)
        np.testing.assert_allclose(found.together().forms(1), together.forms(1), atol=1e-12)
    if kind != "hessian":
        np.testing.assert_allclose(found.negative_share(1), 0.0, atol=1e-12)


def test_gram_predictions_are_the_theory_s_and_their_optimum_merges() -> None:
    group = subject()
    gram = curvature_gram(group, anchors=("own", "average"), batch=3)
    alpha = np.array([[0.3, 0.3, 0.3], [0.5, 0.2, 0.1]])
    predicted = gram.predict(alpha)
    by_hand = []
    for a in alpha:
        bends = [max((a - np.eye(3)[j]) @ q @ (a - np.eye(3)[j]) for q in gram.clipped(j)) for j in range(3)]
        own = [gram.own_risk(j).value for j in range(3)]
        by_hand.append(float(curvature_risk(np.array(own), np.array(bends), np.full(3, 1 / 3))))
    np.testing.assert_allclose(predicted.value, by_hand)
    np.testing.assert_allclose(predicted.value, predict_curvature(gram.models(), alpha))
    assert (predicted.standard_error > 0).all()
    coefficients, optimum = gram.optimal()
    assert optimum.risk <= predicted.value.min()
    states = [group.networks[0].space.unflatten(v) for v in (group.base, *group.vectors)]
    experts = dict(zip(group.names, states[1:], strict=True))
    merged = merge_state_dicts("curvature_optimal", states[0], experts, **coefficients.settings())
    torch.testing.assert_close(
        group.networks[0].space.flatten(merged),
        group.base + torch.tensor(optimum.alpha) @ group.deltas,
        rtol=1e-9,
        atol=1e-9,
    )
    scale = gram.best_scale()
    grid = np.linspace(0, 1.5, 301)
    forms = [gram.clipped(j)[0] for j in range(3)]
    energy = [
        sum((g - np.eye(3)[j]) @ forms[j] @ (g - np.eye(3)[j]) for j in range(3)) for g in grid[:, None] * np.ones(3)
    ]
    assert scale.value == pytest.approx(grid[int(np.argmin(energy))], abs=0.005)


def test_the_standard_error_of_a_gram_prediction_is_that_of_drawing_images() -> None:
    """Many draws of the images of one task, against the error that each claims."""
    group = subject(experts=2, n=400)
    pool = group.calibration[0]
    values, claimed = [], []
    for seed in range(24):
        rows = np.random.default_rng(seed).permutation(400)[:48]
        few = group.calibration[1].take(np.arange(8))
        gram = curvature_gram(replace(group, calibration=(pool.take(rows), few)), batch=64)
        found = gram.predict([0.5, 0.5], weights=[1.0, 0.0])
        values.append(float(found.value))
        claimed.append(float(found.standard_error) ** 2)
    assert np.sqrt(np.mean(claimed)) == pytest.approx(np.std(values), rel=0.5)


def test_indefinite_hessians_are_clipped_as_matrices() -> None:
    gram = curvature_gram(subject("convolution"), kind="hessian", anchors=("base",), by="tensor")
    raw, clipped = gram.forms(0)[0], gram.clipped(0)[0]
    assert np.linalg.eigvalsh(raw).min() < -1e-6
    values, vectors = np.linalg.eigh(raw)
    np.testing.assert_allclose(clipped, (vectors * values.clip(0)) @ vectors.T, atol=1e-12)
    assert 0 < gram.negative_share(0)[0] < 1
    assert gram.to_frame()["clipped"].notna().all()


def test_heads_and_single_precision() -> None:
    group = subject("convolution")
    wide = task_risk(group, 1, head=True)
    point = full_point(group, 1, group.vectors[1])
    alone = task_risk(group, 1)
    np.testing.assert_array_equal(wide.losses(point), alone.losses(group.vectors[1]))
    some = np.eye(alone.size)[:, ::20]
    inner = curvature_operator(wide, point, columns=torch.arange(alone.size)) @ some
    np.testing.assert_allclose(inner, curvature_operator(alone, group.vectors[1]) @ some, atol=1e-13)
    directions = torch.randn(2, wide.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = Dense(wide, point).hessian(directions)
    np.testing.assert_allclose((curvature_operator(wide, point) @ directions.T.numpy()).T, truth, atol=1e-7)
    for kind in ("hessian", "gauss_newton"):
        narrow = task_risk(group, 1, dtype=torch.float32)
        found = check_precision(narrow, alone, group.vectors[1], kind)  # type: ignore[arg-type]
        assert 1e-9 < found.relative_error < 1e-5
        assert found.symmetry < 1e-6
    assert cast(group.networks[0], torch.float32).space.dtype == torch.float32


def test_the_report_holds_the_numbers_of_its_parts() -> None:
    group = subject("convolution", experts=2, n=6)
    options = Options(
        wanted=WANTED, coordinates="merged", by="tensor", steps=6, products=4, points=2, batches=1, batch_size=3,
        eigenvalues=2,
    )  # fmt: skip
    report = measure_curvature(group, options)
    average = group.vectors.mean(dim=0)
    risks = [task_risk(group, j) for j in range(2)]
    shown = report.tables["average"].set_index("from")
    assert shown.loc["evaluated", "risk"] == pytest.approx(np.mean([r.losses(average).mean() for r in risks]))
    for name in ("eigenvalues", "traces", "density", "segments", "gram", "coefficients", "smoothness", "precision"):
        assert {"tier", "seed"} <= set(report.tables[name].columns)
        assert set(report.tables[name].get("task", ["a", "b"])) == {"a", "b"}
    trace = report.tables["traces"].query("task == 'b' and part == 'all'")["trace"].item()
    assert trace == pytest.approx(stochastic_trace(curvature_operator(risks[1], group.vectors[1]), 4).value)
    assert report.coefficients is not None
    assert set(report.coefficients.experts) == {"a", "b"}
    best = report.tables["coefficients"].set_index("merge")["predicted_risk"]
    assert best["curvature_optimal"] == best.min()
    with pytest.raises(MergeboundError, match="did you mean 'spectrum'"):
        measure_curvature(group, Options(wanted=("spectra",)))
    with pytest.raises(MergeboundError, match="did you mean 'trained'"):
        measure_curvature(group, Options(coordinates="trainde"))  # type: ignore[arg-type]


def parameter_names(group: Subject, head: bool) -> list[str]:
    names = sorted(name for name, _ in group.model.named_parameters())
    return [n for n in names if n[:5] != "head."] + (list(group.heads[0]) if head else [])


def dense_parameter_hessian(group: Subject, j: int, point: Tensor, head: bool = False) -> np.ndarray:
    """Over the parameters that torch lists (the head's last, if at all), by name, through torch's own BatchNorm."""
    state = group.model.state_dict() | group.networks[j].space.unflatten(point) | dict(group.heads[j])
    moving = parameter_names(group, head)
    start = torch.cat([state[name].reshape(-1) for name in moving])
    data = group.calibration[j]

    def loss(theta: Tensor) -> Tensor:
        pieces = torch.split(theta, [state[name].numel() for name in moving])
        named = {name: piece.view(state[name].shape) for name, piece in zip(moving, pieces, strict=True)}
        return nn.functional.cross_entropy(functional_call(group.model, {**state, **named}, data.images), data.labels)

    found: np.ndarray = jacrev(jacrev(loss))(start).numpy()
    return found


@pytest.mark.parametrize("head", [False, True])
def test_running_statistics_are_no_weights_unless_asked_for(head: bool) -> None:
    group = subject("convolution", experts=1, n=5)
    cut = sum(p.numel() for name, p in group.model.named_parameters() if name[:5] != "head.")
    assert group.base.numel() == cut + 8  # four running means and variances
    usual = Options(wanted=("spectrum", "trace", "smoothness"), steps=200, products=6, points=2, head=head)
    report = measure_curvature(group, usual)
    full = dense_parameter_hessian(group, 0, group.vectors[0], head)
    ends = report.tables["eigenvalues"].set_index("end")["eigenvalue"]
    np.testing.assert_allclose(ends[["smallest", "largest"]], np.linalg.eigvalsh(full)[[0, -1]], rtol=1e-6)
    sizes = {name: p.numel() for name, p in group.model.named_parameters()}
    names = [name for name in parameter_names(group, head) for _ in range(sizes[name])]
    signs = np.random.default_rng([0, 0x7ACE]).integers(0, 2, (6, len(full)), dtype=np.int8) * 2.0 - 1.0
    energy = (signs * (signs @ full)).mean(axis=0)  # of every coordinate, with the named draw
    traces = report.tables["traces"].set_index("part")["trace"]
    assert traces["all"] == pytest.approx(energy.sum())
    for layer in group.layers("layer"):
        inside = [name in layer.tensors for name in names]
        assert traces[layer.name] == pytest.approx(energy[inside].sum())
    inner = [dense_parameter_hessian(group, 0, x) for x in (group.base, group.vectors[0])]
    tops = [np.linalg.eigvalsh(h)[-1] for h in inner]
    np.testing.assert_allclose(report.tables["smoothness"]["largest"], tops, rtol=1e-6)
    assert any("8 running statistics stay fixed" in note for note in report.notes)
    merged = measure_curvature(group, replace(usual, coordinates="merged"))
    everything = merged.tables["eigenvalues"].set_index("end")["eigenvalue"]
    assert everything["largest"] > ends["largest"] * 1.001 or everything["smallest"] < ends["smallest"] * 1.001
    assert set(merged.tables["traces"]["coordinates"]) == {"merged"}
    assert not any("limits are missing" in note for note in merged.notes)
    short = measure_curvature(group, Options(wanted=("spectrum",), steps=2))
    assert np.isinf(short.tables["eigenvalues"]["limit"]).all()
    assert any("2 Lanczos steps are too few" in note for note in short.notes)


# --- smoothness ------------------------------------------------------------------------------------------------------


def test_global_smoothness_bounds_every_head_and_is_attained() -> None:
    group = subject("mlp")
    everything, head = global_smoothness(group, 0, group.vectors[0], batch_size=4)
    assert everything.bound is None
    assert everything.tier == "none"
    assert head.bound is not None
    assert head.tier == "certified"
    risk = task_risk(group, 0, head=True)
    size = group.base.numel()
    columns = torch.arange(size, risk.size)
    rng = torch.Generator().manual_seed(0)
    for scale in (0.0, 1.0, 5.0):
        own = scale * torch.randn(len(columns), generator=rng, dtype=torch.float64)
        point = torch.cat([group.vectors[0], own])
        full = curvature_operator(risk, point, columns=columns) @ np.eye(len(columns))
        assert np.linalg.eigvalsh(full)[-1] <= head.bound.risk + 1e-12
        parts = batch_smoothness(risk.take(np.arange(12)), point, 4, batches=3, steps=40)
        assert len(parts.largest) == 3
        for row in range(2):
            single = risk.take(np.array([row]))
            top = np.linalg.eigvalsh(curvature_operator(single, point, columns=columns) @ np.eye(len(columns)))[-1]
            assert top <= head.bound.sample + 1e-12
    two = softmax_smoothness([[3.0, 4.0]], bias=False)  # two classes, p = 1/2: attained
    assert two.risk == pytest.approx(
        np.linalg.eigvalsh(np.kron([[0.25, -0.25], [-0.25, 0.25]], [[9, 12], [12, 16]]))[-1]
    )
    assert head.bound.batch is not None
    assert head.bound.risk <= head.bound.batch <= head.bound.sample


def test_batches_have_the_smoothness_of_their_dense_hessians() -> None:
    risk, point = made("mlp", n=9)
    found = batch_smoothness(risk, point, 3, batches=2, steps=60, seed=4)
    rng = np.random.default_rng([4, 0xBA7C5])
    for number in range(2):
        rows = np.sort(rng.permutation(9)[:3])
        part = risk.take(rows)
        full = hessian(lambda x, r=part: torch.nn.functional.cross_entropy(r.call(x, r.images), r.labels))(point)
        values = np.linalg.eigvalsh(full.numpy())
        assert found.largest[number] == pytest.approx(values[-1], rel=1e-5)
        assert found.smallest[number] == pytest.approx(values[0], rel=1e-3)
        assert found.limits[number, 0] <= values[0] <= values[-1] <= found.limits[number, 1] + 1e-7


def test_deep_linear_networks_respect_their_bound_on_a_ball() -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (3, 3), (2, 3)]
    sizes = [a * b for a, b in shapes]
    centre = [torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes]
    images = torch.randn(5, 2, generator=rng, dtype=torch.float64)

    def call(point: Tensor, x: Tensor) -> Tensor:
        for piece, shape in zip(torch.split(point, sizes), shapes, strict=True):
            x = x @ piece.view(shape).T
        return x

    risk = EmpiricalRisk(call, images, torch.tensor([0, 1, 1, 0, 1]), sum(sizes))
    norms = [float(torch.linalg.matrix_norm(w, 2)) for w in centre]
    reach = float(images.norm(dim=1).max())
    flat = torch.cat([w.flatten() for w in centre])
    ratios = []
    for radius in (0.0, 0.5, 2.0):
        bound = deep_linear_smoothness(norms, reach, radius)
        for _ in range(4):
            u = torch.randn(len(flat), generator=rng, dtype=torch.float64)
            full = curvature_operator(risk, flat + radius * u / u.norm()) @ np.eye(len(flat))
            ratios.append(np.abs(np.linalg.eigvalsh(full)).max() / bound)
    assert max(ratios) <= 1.0
    assert max(ratios) > 0.02  # a bound, and not a vacuous one
    assert deep_linear_smoothness([1.0, 1.0], 1.0, float("inf")) == float("inf")
    one = softmax_smoothness(images.numpy(), bias=False)
    assert deep_linear_smoothness([7.0], reach) == pytest.approx(one.sample)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused() -> None:
    group = subject()
    risk, point = made("mlp")
    operator = curvature_operator(risk, point)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: curvature_operator(risk, point, "hesian"), "did you mean 'hessian'"),  # type: ignore[arg-type]
        (lambda: curvature_operator(risk, point[:3]) @ np.ones(risk.size), "expected"),
        (lambda: stochastic_trace(operator, 2, method="xtrace"), "at least 4"),
        (lambda: stochastic_trace(operator, 9, method="xtrace", parts={"a": np.arange(2)}), "hutchinson"),
        (lambda: stochastic_diagonal(operator, 5, deflate=2), "must be left"),
        (lambda: extreme_eigenvalues(operator, 5, steps=3), "count"),
        (lambda: curvature_gram(group, anchors=("owm",)), "own"),
        (lambda: curvature_gram(group, anchors=((0.1, 0.2),)), "3 finite coefficients"),
        (lambda: segment_curvature(risk, point, point, times=[0.5, 1.0]), "begin with 0"),
        (lambda: task_risk(group, 3), "tasks 0 to 2"),
        (lambda: task_risk(group, 0, part="test"), "not known"),
        (lambda: batch_smoothness(risk, point, 100), "1 to 7"),
        (lambda: softmax_smoothness([1.0]), "features"),
        (lambda: lanczos_excess(-1.0, 3, 2, 0.1), "width"),
    ]
    for call, text in calls:
        with pytest.raises(MergeboundError, match=text):
            call()
    broken = point.clone()
    broken[0] = float("nan")
    with pytest.raises(MergeboundError, match="not finite"):
        risk.outputs(broken)
    with pytest.raises(MergeboundError, match="not finite"):
        extreme_eigenvalues(curvature_operator(risk, broken))
