"""Sharpness against closed forms on quadratics, derivatives against dense ones, invariances of relative units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from experiments.measure.landscape.directions import filter_normalised, gaussian, units
from experiments.measure.landscape.flatness import FlatnessOptions, flatness
from experiments.measure.landscape.objective import NetworkLoss, value
from experiments.measure.landscape.scores import evaluator, panel
from experiments.measure.landscape.sharpness import (
    average_sharpness,
    epsilon_sharpness,
    filter_rise,
    hessian_trace,
    sam_sharpness,
)
from merging.flat import FlatSpace
from tests.experiments.reference_nets import Net as Normed
from tests.experiments.test_measure_landscape import Net, data, small, subject_of
from theory.errors import MergeboundError

torch.set_num_threads(1)


@dataclass(frozen=True, eq=False)
class Quadratic:
    """f_z(x) = (x - z)' H (x - z) / 2 on some points z: an independent statement of the protocol."""

    H: Tensor
    z: Tensor
    moving: int
    sources: Sequence[None] = (None,)

    def losses(self, x: Tensor) -> tuple[np.ndarray, ...]:
        away = x - self.z
        return (0.5 * ((away @ self.H) * away).sum(dim=1).numpy(),)

    def gradient(self, x: Tensor) -> Tensor:
        return self.H @ (x - self.z.mean(dim=0))

    def product(self, x: Tensor, v: Tensor) -> Tensor:
        return self.H @ v


def quadratic(size: int = 6, diagonal: bool = False) -> tuple[Quadratic, Tensor]:
    rng = np.random.default_rng(0)
    root = rng.standard_normal((size, size))
    H = np.diag(rng.uniform(0.5, 3.0, size)) if diagonal else root @ root.T
    z = rng.standard_normal((40, size))
    return Quadratic(torch.as_tensor(H), torch.as_tensor(z), size), torch.as_tensor(rng.standard_normal(size))


def largest_rise(H: np.ndarray, g: np.ndarray, radius: float) -> float:
    """max over the ball of g'd + d'Hd/2: d = (m - H)^-1 g with m above the spectrum and |d| = radius."""
    values, basis = np.linalg.eigh(H)
    c = basis.T @ g
    norm = lambda m: np.sqrt(((c / (m - values)) ** 2).sum()) - radius  # noqa: E731
    m = brentq(norm, values[-1] + 1e-12, values[-1] + 1e6, xtol=1e-14)
    d = c / (m - values)
    return float(c @ d + 0.5 * (values * d**2).sum())


def test_one_step_is_the_rise_along_the_gradient() -> None:
    loss, x = quadratic()
    g = loss.gradient(x)
    step = 0.3 * g / g.norm()
    found = sam_sharpness(loss, x, torch.ones(6, dtype=torch.float64), 0.3)
    assert found.value == pytest.approx(float(g @ step + 0.5 * step @ loss.H @ step), rel=1e-12)
    rises = loss.losses(x + step)[0] - loss.losses(x)[0]
    assert found.standard_error == pytest.approx(rises.std() / np.sqrt(40), rel=0.15)
    assert found.low < found.value < found.high


@pytest.mark.parametrize("kind", ["plain", "elements"])
def test_many_steps_find_the_maximum_of_the_ball(kind: str) -> None:
    """Against the secular equation; the adaptive ball is a plain one after a change of variables."""
    loss, x = quadratic()
    space = FlatSpace(("w",), ((6,),), (0, 6), torch.float64)
    unit = units(x, space, 6, "plain" if kind == "plain" else "elements")
    T = np.diag(unit.numpy())
    expected = largest_rise(T @ loss.H.numpy() @ T, T @ loss.gradient(x).numpy(), 2.0)
    found = sam_sharpness(loss, x, unit, 2.0, steps=200)
    one = sam_sharpness(loss, x, unit, 2.0)
    assert found.value == pytest.approx(expected, rel=1e-8)
    assert one.value < found.value
    centre = loss.z.mean(dim=0)  # stationary: the ascent starts at random
    top = np.linalg.eigvalsh(loss.H.numpy())[-1]
    flat = sam_sharpness(loss, centre, torch.ones(6, dtype=torch.float64), 0.5, steps=300)
    assert flat.value == pytest.approx(0.5 * top * 0.25, rel=1e-6)


def test_epsilon_sharpness_against_all_corners() -> None:
    """Quadratics with positive curvature are largest at a corner of the box; separable ones at the gradient's."""
    loss, x = quadratic(diagonal=True)
    bound = 0.1 * (x.abs() + 1.0)
    corners = [torch.tensor(c, dtype=torch.float64) * bound for c in product((-1.0, 1.0), repeat=6)]
    top = max(value(loss, x + c) for c in corners)
    expected = 100 * (top - value(loss, x)) / (1 + value(loss, x))
    assert epsilon_sharpness(loss, x, epsilon=0.1).value == pytest.approx(expected, rel=1e-12)
    dense, y = quadratic()
    found = epsilon_sharpness(dense, y, epsilon=0.05, dimension=3, seed=1)
    basis = np.stack([gaussian(6, 1, (1 << 21) + k, y).numpy() for k in range(3)])
    box = 0.05 * (np.abs(np.linalg.pinv(basis.T) @ y.numpy()) + 1.0)
    tops = [value(dense, y + torch.as_tensor((np.array(c) * box) @ basis)) for c in product((-1.0, 1.0), repeat=3)]
    top = 100 * (max(tops) - value(dense, y)) / (1 + value(dense, y))
    assert found.value <= top * (1 + 1e-12)
    assert found.value >= 0.8 * top


def test_average_sharpness_and_trace_are_unbiased_and_their_intervals_cover() -> None:
    loss, x = quadratic()
    unit = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    truth = 0.5 * 0.2**2 * float((unit**2 * loss.H.diagonal()).sum())
    trace = float(loss.H.diagonal().sum())
    average = [average_sharpness(loss, x, unit, 0.2, draws=6, seed=s) for s in range(60)]
    traces = [hessian_trace(loss, x, probes=6, seed=s) for s in range(60)]
    for found, exact in ((average, truth), (traces, trace)):
        values = np.array([one.value for one in found])
        assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(60)
        assert sum(one.low <= exact <= one.high for one in found) >= 50
    spread = 2 * float((loss.H**2).sum() - (loss.H.diagonal() ** 2).sum())  # variance of one probe with random signs
    for probes in (4, 16):
        values = np.array([hessian_trace(loss, x, probes=probes, seed=1000 + s).value for s in range(150)])
        assert values.var(ddof=1) == pytest.approx(spread / probes, rel=0.5)
    diagonal, y = quadratic(diagonal=True)
    assert hessian_trace(diagonal, y, probes=2).value == pytest.approx(float(diagonal.H.diagonal().sum()), rel=1e-12)


def test_gradients_and_products_of_a_network_are_dense_ones() -> None:
    subject = small()
    on = panel(subject)
    x = subject.vectors.mean(dim=0)

    def joint(point: Tensor) -> Tensor:
        terms = [
            torch.nn.functional.cross_entropy(subject.networks[j].call(point, on.splits[j].images), on.splits[j].labels)
            for j in range(2)
        ]
        return torch.stack(terms).mean()

    loss = NetworkLoss(subject, on, (0, 1), batch=7)
    gradient = torch.autograd.functional.jacobian(joint, x)
    hessian = torch.autograd.functional.hessian(joint, x)
    assert value(loss, x) == pytest.approx(float(joint(x)), rel=1e-12)
    assert torch.allclose(loss.gradient(x), gradient, atol=1e-12)
    v = gaussian(len(x), 0, 0, x)
    assert torch.allclose(loss.product(x, v), hessian @ v, atol=1e-10)
    found = hessian_trace(loss, x, probes=200)
    assert abs(found.value - float(hessian.diagonal().sum())) < 4 * found.standard_error


def test_filters_get_the_norms_of_the_networks_own() -> None:
    subject = small()
    x = subject.vectors[0]
    space = subject.networks[0].space
    d = space.unflatten(filter_normalised(gaussian(len(x), 0, 0, x), x, space, len(x)))
    own = space.unflatten(x)
    assert torch.allclose(d["one.weight"].norm(dim=1), own["one.weight"].norm(dim=1))
    assert (d["one.bias"] == 0).all()
    u = space.unflatten(units(x, space, len(x), "filters"))
    assert torch.allclose(u["one.weight"].square().sum(dim=1), own["one.weight"].square().sum(dim=1))


def test_relative_units_do_not_see_a_rescaling_that_keeps_the_function() -> None:
    """Two hidden layers with ReLU: a layer's common factor for filters, any unit's factor for elements."""

    class Deep(Net):
        def __init__(self) -> None:
            super().__init__()
            self.two = torch.nn.Linear(5, 5)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.act(self.two(self.act(self.one(images.flatten(1)))))
            out: Tensor = self.head(hidden)
            return out

    torch.manual_seed(1)
    base = dict(Deep().state_dict())
    splits = [data(30, (1, 3, 4), 0, torch.float64)]
    factors = {"layer": torch.full((5,), 4.0), "unit": torch.tensor([4.0, 0.5, 2.0, 8.0, 0.25])}

    def measured(state: dict[str, Tensor]) -> dict[str, float]:
        subject = subject_of(Deep(), [state, state], splits, torch.float64)
        loss, x = NetworkLoss(subject, panel(subject), (0,)), subject.base
        space, size = subject.networks[0].space, len(subject.base)
        return {
            "curve": float(filter_rise(loss, x, space, [0.3], directions=3).mean[0]),
            "elements": sam_sharpness(loss, x, units(x, space, size, "elements"), 0.5, steps=3).value,
            "plain": sam_sharpness(loss, x, units(x, space, size, "plain"), 0.5, steps=3).value,
        }

    before = measured(base)
    for kind, c in factors.items():
        scaled = dict(base) | {"one.weight": base["one.weight"] * c[:, None], "one.bias": base["one.bias"] * c,
                               "two.weight": base["two.weight"] / c}  # fmt: skip
        after = measured(scaled)
        assert after["elements"] == pytest.approx(before["elements"], rel=1e-6)
        assert after["plain"] != pytest.approx(before["plain"], rel=0.05)
        same = after["curve"] == pytest.approx(before["curve"], rel=1e-6)
        assert same == (kind == "layer")


def test_the_report_holds_every_measure_once() -> None:
    subject = small()
    options = FlatnessOptions(steps=2, draws=2, probes=2, directions=2, points=3)
    points = {"base": subject.base, "e0": subject.vectors[0]}
    found = flatness(subject, panel(subject), points, tasks={"e0": (0,)}, options=options)
    frame = found.to_frame()
    assert len(frame) == 2 * len(options.measures)
    assert set(frame["task"]) == {"joint", "e0"}
    expert = found.points[1]
    direct = NetworkLoss(subject, panel(subject), (0,))
    assert expert.loss == value(direct, subject.vectors[0])
    assert expert["sam_steps"].value >= expert["sam"].value
    assert expert.rise is not None
    assert expert.rise.mean[1] == pytest.approx(expert.loss)
    with pytest.raises(MergeboundError, match="unknown"):
        FlatnessOptions(measures=("sharp",))


def test_statistics_are_estimated_again_around_the_same_points_as_on_lines() -> None:
    torch.manual_seed(0)
    model = Normed()
    states = [
        {n: t + 0.3 * torch.rand(t.shape) if t.is_floating_point() else t for n, t in model.state_dict().items()}
        for _ in range(3)
    ]
    splits = [data(16, (1, 4, 4), seed, torch.float32) for seed in range(2)]
    subject = subject_of(model, states, splits, torch.float32)
    on = panel(subject)
    x = subject.vectors.mean(dim=0)
    options = FlatnessOptions(measures=("sam",), directions=0)
    found = {}
    for kind in ("merged", "reestimated", "task"):
        measured = flatness(
            subject, on, {"middle": x, "own": x}, tasks={"own": (1,)}, options=options, batchnorm=kind
        )  # fmt: skip
        middle, own = measured.points
        judge = evaluator(subject, on, batchnorm=kind, path="plain")
        pooled = judge if kind != "task" else evaluator(subject, on, batchnorm="reestimated", path="plain")
        assert middle.loss == pytest.approx(pooled.score(x).mean_loss(), rel=1e-5)
        assert own.loss == pytest.approx(judge.score(x, (1,)).mean_loss(), rel=1e-5)
        assert (middle.batchnorm, own.batchnorm) == ("reestimated" if kind == "task" else kind, kind)
        found[kind] = own.loss
    assert len({round(loss, 4) for loss in found.values()}) == 3
