"""Rescaled DARE, DARE-TIES, DELLA and Breadcrumbs: literal definitions, statistics, other tools' results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from merging.checkpoint import load_state_dict
from merging.election import fuse
from merging.errors import MethodError
from merging.merge import merge_state_dicts
from merging.methods.breadcrumbs import breadcrumbs
from merging.methods.dare import dare
from merging.methods.dare_ties import dare_ties
from merging.methods.della import della, drop_probabilities
from merging.methods.task_arithmetic import task_arithmetic
from merging.methods.ties import ties
from merging.partition import partition
from merging.random_masks import uniform_words

Array = NDArray[np.float64]
SHAPES = {"a": (4, 6), "b": (7,), "c": (), "d": (0, 2), "e": (3, 2, 2, 2)}
NAMES = list(SHAPES)
WEIGHTS = (0.4, 0.3, 0.2, 0.1)


def vectors(seed: int, experts: int, tied: bool = False) -> list[dict[str, Tensor]]:
    generator = np.random.default_rng(seed)
    drawn = [{n: generator.normal(size=s) for n, s in SHAPES.items()} for _ in range(experts)]
    return [{n: torch.tensor(np.round(2 * v) / 2 if tied else v) for n, v in d.items()} for d in drawn]


def arrays(vector: dict[str, Tensor]) -> list[Array]:
    return [vector[n].numpy().astype(np.float64) for n in NAMES]


def flat(vector: dict[str, Tensor]) -> Array:
    return np.concatenate([a.ravel() for a in arrays(vector)])


def close(merged: dict[str, Tensor], expected: Array) -> None:
    assert {n: tuple(t.shape) for n, t in merged.items()} == SHAPES
    np.testing.assert_allclose(flat(merged), expected, rtol=1e-9, atol=1e-12)


def numpy_largest(values: Array, count: int) -> NDArray[np.bool_]:
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    return np.isin(np.arange(len(values)), order[:count])


def up(share: float, size: int) -> int:
    return -(-round(share * 1000) * size // 1000)


def numpy_fuse(rows: Array, election: str, aggregation: str, weights: Array) -> Array:
    sign = np.sign((rows * (weights if election == "weighted" else np.ones_like(weights))[:, None]).sum(axis=0))
    voting = np.ones_like(rows) if election == "none" else (np.sign(rows) == sign) & (sign != 0)
    mass = (voting * weights[:, None]).sum(axis=0) if aggregation == "mean" else np.ones(rows.shape[1])
    return np.asarray((voting * rows * weights[:, None]).sum(axis=0) / np.where(mass == 0, 1, mass))


def words(seed: int, expert: str) -> Array:
    sizes = {n: int(np.prod(s)) for n, s in SHAPES.items()}
    return np.concatenate([uniform_words(seed, expert, n, k) for n, k in sizes.items()]) / 2.0**32


def l1_matched(whole: Array, rest: Array) -> Array:
    cuts = np.cumsum([int(np.prod(SHAPES[n])) for n in NAMES])[:-1]
    pairs = zip(np.split(whole, cuts), np.split(rest, cuts), strict=True)
    return np.concatenate([r * (abs(w).sum() / abs(r).sum() if abs(r).sum() else 1.0) for w, r in pairs])


@given(
    seed=st.integers(0, 999),
    experts=st.integers(1, 5),
    drop=st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    rescale=st.booleans(),
    rescaling=st.sampled_from(["probability", "l1"]),
    density=st.sampled_from([0.3, 1.0]),
    scope=st.sampled_from(["global", "tensor"]),
    aggregation=st.sampled_from(["mean", "sum"]),
    election=st.sampled_from(["plain", "weighted"]),
    weighted=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_dare_and_dare_ties_are_their_definitions(
    seed: int,
    experts: int,
    drop: float,
    rescale: bool,
    rescaling: Any,
    density: float,
    scope: Any,
    aggregation: Any,
    election: Any,
    weighted: bool,
) -> None:
    taus, names = vectors(seed, experts), [f"e{i}" for i in range(experts)]
    alpha = np.random.default_rng(seed).uniform(0.1, 2, experts) if weighted else np.ones(experts)
    rows = np.stack([flat(t) * (words(seed, n) >= drop) for t, n in zip(taus, names, strict=True)])
    if rescale and rescaling == "probability":
        rows = rows / (1 - drop)
    elif rescale:
        rows = np.stack([l1_matched(flat(t), r) for t, r in zip(taus, rows, strict=True)])
    given: dict[str, Any] = {"names": names, "seed": seed, "drop": drop, "rescale": rescale, "rescaling": rescaling}
    given |= {"coefficients": list(alpha)} if weighted else {}
    close(dare(taus, coefficient=0.7, **given), 0.7 * alpha @ rows)
    cuts = np.cumsum([int(np.prod(SHAPES[n])) for n in NAMES])[:-1] if scope == "tensor" else []
    if density < 1.0:
        rows = np.stack(
            [np.concatenate([p * numpy_largest(p, up(density, len(p))) for p in np.split(r, cuts)]) for r in rows]
        )
    merged = dare_ties(
        taus, density=density, scope=scope, aggregation=aggregation, election=election, coefficient=0.7, **given
    )
    close(merged, 0.7 * numpy_fuse(rows, election, aggregation, alpha))


def test_dare_ties_without_drop_is_ties() -> None:
    taus = vectors(0, 3, tied=True)
    for scope in ("global", "tensor"):
        merged = dare_ties(taus, names="abc", drop=0.0, density=0.4, scope=scope)  # type: ignore[arg-type]
        expected = ties(taus, density=0.4, scope=scope)  # type: ignore[arg-type]
        assert all(torch.equal(merged[n], expected[n]) for n in NAMES)


def test_l1_rescaling_keeps_the_norm_of_every_tensor_and_is_biased() -> None:
    tau = vectors(1, 1)[0]
    merged = dare([tau], names=["e"], drop=0.5, rescaling="l1", coefficient=1.0)
    for name in ("a", "e"):
        torch.testing.assert_close(merged[name].abs().sum(), tau[name].abs().sum())
    # of two entries 1 and 3 at p = 1/2 both survive, or one of them takes the norm 4, or nothing is left
    seeds = 2000
    pair = {"x": torch.tensor([1.0, 3.0], dtype=torch.float64)}
    draws = torch.stack(
        [dare([pair], names=["e"], seed=s, drop=0.5, rescaling="l1", coefficient=1.0)["x"] for s in range(seeds)]
    )
    expected, error = torch.tensor([1.25, 1.75]), draws.std(dim=0) / seeds**0.5
    assert bool(((draws.mean(dim=0) - expected).abs() < 4.5 * error).all())


def numpy_probabilities(values: Array, drop: float, window: float, probability: str) -> Array:
    n, size = len(values), abs(values)
    order = sorted(range(n), key=lambda i: (-size[i], i))
    rank = np.array([order.index(i) for i in range(n)], dtype=float)
    if probability == "magnitude":
        small = (size.max() - size) / np.ptp(size) if np.ptp(size) > 0 else np.full(n, 0.5)
    else:
        small = rank / n if probability == "step" else rank / (n - 1) if n > 1 else np.full(n, 0.5)
    return np.asarray(drop - window / 2 + window * small)


def numpy_chances(vector: dict[str, Tensor], ranking: str, **how: Any) -> Array:
    parts = []
    for values in filter(np.size, arrays(vector)):
        rows = list(values.reshape(len(values), -1)) if ranking == "row" and values.ndim > 1 else [values.ravel()]
        parts += [numpy_probabilities(row, **how) for row in rows]
    return np.concatenate(parts)


@given(
    seed=st.integers(0, 999),
    experts=st.integers(1, 4),
    chances=st.sampled_from([(0.3, 0.14), (0.5, 1.0 - 1e-9), (0.9, 0.1), (0.2, 0.0)]),
    ranking=st.sampled_from(["row", "tensor"]),
    probability=st.sampled_from(["rank", "step", "magnitude"]),
    rescaling=st.sampled_from([None, "probability", "l1"]),
    election=st.sampled_from(["plain", "weighted", "none"]),
    aggregation=st.sampled_from(["mean", "sum"]),
    tied=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_della_is_its_definition(
    seed: int,
    experts: int,
    chances: tuple[float, float],
    ranking: Any,
    probability: Any,
    rescaling: Any,
    election: Any,
    aggregation: Any,
    tied: bool,
) -> None:
    taus, names = vectors(seed, experts, tied), [f"e{i}" for i in range(experts)]
    alpha, rows = np.random.default_rng(seed).uniform(0.1, 2, experts), []
    for tau, name in zip(taus, names, strict=True):
        p = numpy_chances(tau, ranking, drop=chances[0], window=chances[1], probability=probability)
        kept = flat(tau) * (words(seed, name) >= p)
        rescaled = {None: kept, "probability": kept / (1 - p), "l1": l1_matched(flat(tau), kept)}
        rows.append(rescaled[rescaling])
    merged = della(
        taus,
        names=names,
        seed=seed,
        drop=chances[0],
        window=chances[1],
        ranking=ranking,
        probability=probability,
        rescale=rescaling is not None,
        rescaling=rescaling or "probability",
        election=election,
        aggregation=aggregation,
        coefficient=1.1,
        coefficients=list(alpha),
    )
    close(merged, 1.1 * numpy_fuse(np.stack(rows), election, aggregation, alpha))


@given(seed=st.integers(0, 999), size=st.integers(2, 40), drop=st.floats(0.2, 0.7))
@settings(max_examples=30, deadline=None)
def test_magprune_drops_small_entries_more_often_and_p_on_average(seed: int, size: int, drop: float) -> None:
    magnitudes = torch.tensor(np.abs(np.random.default_rng(seed).normal(size=(3, size))))
    chances = drop_probabilities(magnitudes, drop, 0.3)
    torch.testing.assert_close(chances.mean(dim=1), torch.full((3,), drop, dtype=torch.float64))
    torch.testing.assert_close(chances.amax(dim=1) - chances.amin(dim=1), torch.full((3,), 0.3, dtype=torch.float64))
    for row, chance in zip(magnitudes, chances, strict=True):
        assert bool((chance[torch.argsort(row)].diff() < 0).all())
    printed = drop_probabilities(magnitudes, drop, 0.3, "step")
    assert abs(float(printed.mean()) - (drop - 0.3 / (2 * size))) < 1e-12  # the formula as printed falls short of p


def test_mean_of_della_over_seeds_is_the_task_vector() -> None:
    tau = {"x": torch.linspace(-1.0, 2.0, 48, dtype=torch.float64).reshape(4, 12)}
    seeds, chances = 2000, drop_probabilities(tau["x"].abs(), 0.6, 0.5)
    draws = torch.stack(
        [della([tau], names=["e"], seed=s, drop=0.6, window=0.5, aggregation="sum")["x"] for s in range(seeds)]
    )
    error = tau["x"].abs() * (chances / (1 - chances) / seeds).sqrt()
    z = ((draws.mean(dim=0) - tau["x"]) / error).numpy()
    assert np.abs(z).max() < 4.5  # 48 coordinates
    assert 0.6 < np.mean(z**2) < 1.5  # as spread out as independent draws are
    dropped = (draws == 0.0).double().mean(dim=0)
    assert bool(((dropped - chances).abs() < 4.5 * (chances * (1 - chances) / seeds).sqrt()).all())


@pytest.mark.parametrize("method", [dare_ties, della])
def test_experts_have_independent_masks(method: Any) -> None:
    ones = {"w": torch.ones(20000), "v": torch.ones(20000)}
    kept = [method([ones], names=[name]) for name in ("e1", "e2", "e3")]
    masks = [(k[t] != 0.0).double() for k in kept for t in ("w", "v")] + [
        (method([ones], names=["e1"], seed=1)["w"] != 0)
    ]
    correlation = np.corrcoef(torch.stack([m.double() for m in masks]).numpy())
    assert np.abs(correlation - np.eye(len(masks))).max() < 4.5 / 20000**0.5


def test_della_without_window_or_election_is_dare() -> None:
    taus, names = vectors(3, 4), ["a", "b", "c", "d"]
    plain = della(taus, names=names, drop=0.4, window=0.0, election="none", aggregation="sum", coefficient=0.3)
    close(plain, flat(dare(taus, names=names, drop=0.4, coefficient=0.3)))
    elected = della(taus, names=names, drop=0.4, window=0.0)
    close(elected, flat(dare_ties(taus, names=names, drop=0.4)))


@pytest.mark.parametrize("method", ["dare_ties", "della"])
@pytest.mark.parametrize("rescaling", ["probability", "l1"])
def test_order_of_experts_and_tensors_changes_no_bit(method: str, rescaling: str) -> None:
    base, *states = vectors(4, 4)
    experts = {f"e{i}": s for i, s in enumerate(states)}
    given: dict[str, Any] = {"seed": 9, "rescaling": rescaling}
    first = merge_state_dicts(method, base, experts, coefficients=(0.5, 0.3, 0.2), **given)
    turned = {n: dict(reversed(experts[n].items())) for n in ("e2", "e0", "e1")}
    other = dict(reversed(base.items()))
    again = merge_state_dicts(method, other, turned, coefficients=(0.2, 0.5, 0.3), **given)
    assert all(torch.equal(first[n], again[n]) for n in NAMES)


@given(
    seed=st.integers(0, 999),
    experts=st.integers(1, 4),
    density=st.sampled_from([0.05, 0.3, 0.6, 1.0]),
    gamma=st.sampled_from([0.0, 0.05, 0.2, 0.7]),
    ranking=st.sampled_from(["tensor", "row"]),
    rounding=st.sampled_from(["up", "down"]),
    election=st.sampled_from(["none", "plain", "weighted"]),
    aggregation=st.sampled_from(["sum", "mean"]),
    tied=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_breadcrumbs_is_its_definition(
    seed: int,
    experts: int,
    density: float,
    gamma: float,
    ranking: Any,
    rounding: Any,
    election: Any,
    aggregation: Any,
    tied: bool,
) -> None:
    def numpy_middle(values: Array) -> Array:
        keep = up(density, len(values)) if rounding == "up" else round(1000 * density) * len(values) // 1000
        outliers = min(round(1000 * gamma) * len(values) // 1000, len(values) - keep)
        return values * (numpy_largest(values, keep + outliers) & ~numpy_largest(values, outliers))

    def numpy_masked(values: Array) -> Array:
        if ranking == "row" and values.ndim == 0:
            return values.ravel()
        rows = values.reshape(-1, values.shape[-1]) if ranking == "row" else values.reshape(1, -1)
        return np.concatenate([numpy_middle(row) for row in rows]) if rows.size else np.zeros(0)

    taus, alpha = vectors(seed, experts, tied), np.random.default_rng(seed).uniform(0.1, 2, experts)
    rows = np.stack([np.concatenate([numpy_masked(a) for a in arrays(t)]) for t in taus])
    merged = breadcrumbs(
        taus,
        density=density,
        gamma=gamma,
        ranking=ranking,
        rounding=rounding,
        election=election,
        aggregation=aggregation,
        coefficient=0.7,
        coefficients=list(alpha),
    )
    close(merged, 0.7 * numpy_fuse(rows, election, aggregation, alpha))


def test_breadcrumbs_leaves_out_outliers_and_small_entries() -> None:
    tau = {"x": torch.tensor([5.0, -0.1, 2.0, -3.0, 0.2, 1.0, -9.0, 0.3, 0.4, 0.5])}
    kept = breadcrumbs([tau], density=0.3, gamma=0.2, coefficient=1.0)["x"]
    assert kept.tolist() == [0.0, 0.0, 2.0, -3.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert breadcrumbs([tau], density=1.0, gamma=0.0, coefficient=1.0)["x"].equal(tau["x"])
    small = {"x": torch.tensor([5.0, 1.0, 2.0])}  # gamma n < 1: nothing to leave out (mergekit then drops everything)
    assert breadcrumbs([small], density=0.6, gamma=0.1, coefficient=1.0)["x"].tolist() == [5.0, 0.0, 2.0]


@given(seed=st.integers(0, 999), experts=st.integers(1, 5), data=st.data())
@settings(max_examples=40, deadline=None)
def test_fuse_is_its_definition_also_for_negative_weights(seed: int, experts: int, data: st.DataObject) -> None:
    generator = np.random.default_rng(seed)
    rows, alpha = np.round(2 * generator.normal(size=(experts, 30))) / 2, generator.uniform(-1, 2, experts)
    tensors = list(torch.tensor(rows).unbind(0))
    scaled = rows * alpha[:, None]
    plain = fuse(tensors, "sum", "weighted", list(alpha)).numpy()
    np.testing.assert_allclose(plain, numpy_fuse(scaled, "plain", "sum", np.ones(experts)), atol=1e-12)
    np.testing.assert_allclose(fuse(tensors, "sum", "none", list(alpha)).numpy(), alpha @ rows, atol=1e-12)
    positive = np.abs(alpha) + 0.1
    election, aggregation = (
        data.draw(st.sampled_from(["plain", "weighted"])),
        data.draw(st.sampled_from(["mean", "sum"])),
    )
    fused = fuse(tensors, aggregation, election, list(positive)).numpy()
    np.testing.assert_allclose(fused, numpy_fuse(rows, election, aggregation, positive), atol=1e-12)


def test_special_experts() -> None:
    zero = {n: torch.zeros(s) for n, s in SHAPES.items()}
    taus = vectors(5, 1)
    opposite = [taus[0], {n: -t for n, t in taus[0].items()}]
    for merged in (
        breadcrumbs([zero, zero], election="plain"),
        della([zero, zero], names=["a", "b"], rescaling="l1"),
        dare_ties([zero, zero], names=["a", "b"], rescaling="l1"),
        breadcrumbs(opposite, density=1.0, gamma=0.0, election="plain", aggregation="mean"),
        dare_ties(opposite, names=["a", "b"], drop=0.0),
    ):
        close(merged, np.zeros(56))
    close(
        breadcrumbs(taus * 3, density=1.0, gamma=0.0, election="plain", aggregation="mean", coefficient=1.0),
        flat(taus[0]),
    )
    close(della(taus, names=["a"], drop=0.0, window=0.0), flat(taus[0]))
    close(breadcrumbs(taus * 2, density=1.0, gamma=0.0), flat(task_arithmetic(taus * 2, coefficient=0.2)))


def test_bad_settings_are_named() -> None:
    taus = vectors(6, 2)
    with pytest.raises(MethodError, match="distinct name"):
        della(taus, names=["a", "a"])
    with pytest.raises(MethodError, match="distinct name"):
        dare_ties(taus, names=["a"])
    for drop, window in ((0.1, 0.3), (0.9, 0.2)):
        with pytest.raises(MethodError, match="choose drop and window"):
            della(taus, names=["a", "b"], drop=drop, window=window)
    with pytest.raises(MethodError, match="positive coefficients"):
        della(taus, names=["a", "b"], coefficients=(1.0, 0.0))
    with pytest.raises(MethodError, match="sum to zero"):
        breadcrumbs(taus, aggregation="mean", coefficients=(1.0, -1.0))


@pytest.mark.parametrize(
    ("file", "given"),
    [
        ("breadcrumbs_density0.6_gamma0.05", {"coefficients": WEIGHTS}),
        ("breadcrumbs_ties_density0.6_gamma0.05", {"election": "plain", "aggregation": "mean"}),
        ("breadcrumbs_ties_density0.6_gamma0.05", {"election": "weighted", "aggregation": "mean"}),
    ],
)
def test_breadcrumbs_agrees_with_mergekit(golden: Path, file: str, given: dict[str, Any]) -> None:
    base = load_state_dict(golden / "base.safetensors")
    experts = {f"expert{i}": load_state_dict(golden / f"expert{i}.safetensors") for i in range(4)}
    expected = load_state_dict(golden / "mergekit" / f"{file}.safetensors")
    given = {"density": 0.6, "gamma": 0.05, "rounding": "down", "coefficient": 1.0} | given
    merged = merge_state_dicts("breadcrumbs", base, experts, partition=partition(base, private=()), **given)
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-6)
