"""Collecting logits and their derivatives, and what predictors make of them, against dense computations in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.measure.predictors import (
    KINDS,
    ZOO,
    FieldStatistics,
    Loss,
    Merge,
    collect_fields,
    estimate,
    label_bias,
    layer_fields,
    layered_fields,
    merged_vector,
    point_at,
    predict_merge,
    predictors,
)
from experiments.measure.predictors.memory import LiveTensors
from experiments.measure.predictors.merges import form, function_projection, project
from experiments.measure.predictors.products import second_differences
from experiments.tasks.types import Split
from tests.experiments.predictor_cases import EXPERTS, IMAGES, collected, subject, true_logits
from theory.errors import MergeboundError
from theory.function_space import Array, minimise_risk, predict_risk, risk_gradient


def some_alphas() -> Array:
    inside = np.random.default_rng(0).dirichlet(np.ones(EXPERTS), 3)
    return np.vstack([inside, np.full(EXPERTS, 0.3), [1.0, 1.0, 0.0], [0.7, -0.2, 0.9], np.zeros(EXPERTS)])


def test_products_and_second_derivatives_are_those_of_dense_jacobians_and_hessians() -> None:
    s, st = subject(True), collected(True)
    deltas = s.deltas
    first, second = np.triu_indices(EXPERTS, 1)
    anchors = {"base": s.base, "average": s.vectors.mean(0), "between": s.base + deltas.mean(0) / 2}
    for j in range(EXPERTS):
        x = s.calibration[j].images

        def logits(v: Tensor, j: int = j, x: Tensor = x) -> Tensor:
            return s.networks[j].call(v, x)

        for name, point in {**anchors, "own": s.vectors[j]}.items():
            dense = torch.einsum("ncp,ip->inc", torch.func.jacrev(logits)(point), deltas).numpy()
            np.testing.assert_allclose(st.of(f"tangent_{name}", j), dense, rtol=1e-9, atol=1e-12)
        hessian = torch.func.hessian(logits)(s.base)
        table = torch.einsum("ncpq,ip,kq->iknc", hessian, deltas, deltas).numpy()
        np.testing.assert_allclose(st.of("second", j), table[np.arange(EXPERTS), np.arange(EXPERTS)], atol=1e-10)
        np.testing.assert_allclose(st.of("second_mixed", j), table[first, second], atol=1e-10)
        t = 1e-5
        slope = (logits(s.base + t * deltas[0]) - logits(s.base - t * deltas[0])) / (2 * t)
        np.testing.assert_allclose(st.of("tangent_base", j)[0], slope.numpy(), atol=1e-8)
    assert st.second_error == {"second": 0.0, "second_mixed": 0.0}


def test_second_derivatives_by_differences_know_their_error() -> None:
    s, exact = subject(True), collected(True)
    found = collect_fields(s, kinds=("second", "second_mixed"), second="differences")
    worst = max(
        float(np.ptp(found.of(kind, j) - exact.of(kind, j), axis=-1).max())
        for j in range(EXPERTS)
        for kind in ("second", "second_mixed")
    )
    assert 0.0 < worst <= max(found.second_error.values()) < 0.5
    far, error = second_differences(s.networks[0], s.base, s.deltas[:1], s.deltas[:1], s.calibration[0].images, 0.2)
    assert (far - torch.from_numpy(exact.of("second", 0)[:1])).abs().max() <= error.max()


def test_values_are_those_of_the_points() -> None:
    s, st = subject(True), collected(True)
    points = {
        "average": [np.full(3, 1 / 3)],
        "between": [np.full(3, 1 / 6)],
        "halves": list(np.eye(3) / 2),
        "pairs": [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
        "sums": [[1, 1, 0], [1, 0, 1], [0, 1, 1]],
        "secant": [np.zeros(3), *np.eye(3)],
    }
    for kind, alphas in points.items():
        truth = np.stack([true_logits(s, 1, np.asarray(a, dtype=float)) for a in alphas])
        np.testing.assert_allclose(st.of(kind, 1), truth, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["pairs_halves", "pairs_tangent", "second_derivative", "pairs_average", "pairs_wide", "cubic", "cubic_all"]
)
def test_a_quadratic_network_is_predicted_exactly_for_every_alpha(name: str) -> None:
    s, st = subject(), collected()
    for j, field in enumerate(ZOO[name].fields(st)):
        truth = np.stack([true_logits(s, j, a) for a in some_alphas()])
        np.testing.assert_allclose(field.at(some_alphas()), truth, atol=1e-7)


def test_pairs_alone_are_exact_for_mixtures_of_a_quadratic_network_and_the_secant_is_not() -> None:
    s, st = subject(), collected()
    mixtures = some_alphas()[:3]
    truth = np.stack([true_logits(s, 0, a) for a in mixtures])
    np.testing.assert_allclose(ZOO["pairs"].fields(st)[0].at(mixtures), truth, atol=1e-9)
    assert np.abs(ZOO["secant"].fields(st)[0].at(mixtures) - truth).max() > 0.05


@pytest.mark.parametrize("name", list(ZOO))
def test_predictors_go_through_what_they_know_and_their_gradients_are_derivatives(name: str) -> None:
    s, st = subject(True), collected(True)
    fields = ZOO[name].fields(st)
    known = {"secant": [np.zeros(3), *np.eye(3)], "average": [np.full(3, 1 / 3)], "pairs": [np.array([0.5, 0, 0.5])]}
    if len(ZOO[name].parts) == 1:
        for kind in set(ZOO[name].parts[0].kinds) & set(known):
            for a in known[kind]:
                # cubic_all has more derivatives than coefficients, and satisfies values to its weights
                np.testing.assert_allclose(
                    fields[0].at(a), true_logits(s, 0, a), atol=2e-3 if name == "cubic_all" else 1e-6
                )
    a, p, t = np.array([0.2, 0.5, 0.1]), np.full(3, 1 / 3), 1e-6
    value, gradient = risk_gradient(fields, a, p)
    assert value == pytest.approx(float(predict_risk(fields, a).risk))
    numeric = [
        (predict_risk(fields, a + t * e).risk - predict_risk(fields, a - t * e).risk) / (2 * t) for e in np.eye(3)
    ]
    np.testing.assert_allclose(gradient, numeric, atol=1e-6)


def test_layers_add_up_to_the_whole_and_layered_fields_agree_with_it() -> None:
    st, deep = collected(True), collected(True, "tensor")
    assert deep.depth == 4
    assert st.depth == 1
    for kind in ("tangent_base", "tangent_own", "tangent_average"):
        np.testing.assert_allclose(deep.of(kind, 1), st.of(kind, 1), atol=1e-12)
    np.testing.assert_allclose(deep.gram.sum(0), st.gram[0], rtol=1e-12)
    alpha = np.array([0.2, 0.5, 0.1])
    whole = ZOO["pairs_tangent"].fields(st)
    layered = layered_fields(ZOO["pairs_tangent"], deep)
    np.testing.assert_allclose(layered[0].at(np.repeat(alpha, 4)), whole[0].at(alpha), atol=1e-9)
    for kind in ("tangent_base", "tangent_average", "secant_layers"):
        field = layer_fields(deep, kind)[2]
        assert field.slopes.shape == (12, IMAGES, 3)
    a, t = np.random.default_rng(1).random(12), 1e-6
    slopes = layered[1].slopes_at(a)
    numeric = [(layered[1].at(a + t * e) - layered[1].at(a - t * e)) / (2 * t) for e in np.eye(12)]
    np.testing.assert_allclose(slopes, numeric, atol=1e-6)
    assert minimise_risk(layered, layers=4).risk <= float(predict_risk(whole, np.full(3, 1 / 3)).risk)


def test_layer_secants_are_the_points_and_second_order_in_one_layer_is_seen() -> None:
    s, deep = subject(True), collected(True, "tensor")
    columns = s.columns(deep.groups[1])
    point = s.base.clone()
    point[columns] = s.vectors[2, columns]
    truth = s.networks[0].features(point, s.calibration[0].images).numpy()
    alpha = np.zeros(12)
    alpha[2 * 4 + 1] = 1.0
    np.testing.assert_allclose(layer_fields(deep, "secant_layers")[0].at(alpha), truth, atol=1e-12)


def test_streamed_in_little_memory_equals_unstreamed_and_the_bound_holds() -> None:
    s = subject(True)
    wide = replace(
        s,
        calibration=tuple(
            Split(x.images.repeat(60, 1, 1, 1), x.labels.repeat(60), np.arange(300)) for x in s.calibration
        ),
    )
    kinds = ("average", "pairs", "tangent_base", "second")
    whole = collect_fields(wide, kinds=kinds, batch=300)
    with LiveTensors() as seen:
        limit = 96 << 10
        little = collect_fields(wide, kinds=kinds, memory=limit)
    with LiveTensors() as free:
        collect_fields(wide, kinds=kinds, batch=300)
    assert seen.peak <= limit < free.peak
    for kind in whole.kinds:
        np.testing.assert_allclose(little.of(kind, 2), whole.of(kind, 2), atol=1e-12)
    with pytest.raises(MergeboundError, match="one image takes"):
        collect_fields(wide, memory=100)


def test_batchnorm_in_evaluation_mode_is_seen_through() -> None:
    s = subject(True, True)
    st = collect_fields(s, kinds=("tangent_base", "average"))
    x, t = s.calibration[0].images, 1e-5
    slope = (s.networks[0].call(s.base + t * s.deltas[1], x) - s.networks[0].call(s.base - t * s.deltas[1], x)) / (
        2 * t
    )
    np.testing.assert_allclose(st.of("tangent_base", 0)[1], slope.numpy(), atol=1e-7)
    assert float(point_at(s, np.full(3, -9.0)).min()) < 0.0  # weights may be negative, variances not
    names = dict(s.networks[0].space.segments())
    assert float(point_at(s, np.full(3, -9.0))[names["norm.running_var"]].min()) == 0.0


def test_a_smaller_group_and_fewer_images_need_no_new_passes(tmp_path: Path) -> None:
    st = collected(True)
    kept = tuple(k for k in KINDS if k.removeprefix("tangent_") not in ("average", "between"))
    fresh = collect_fields(subject(True).choose([2, 0]), kinds=kept, images=3)
    chosen = st.choose([2, 0]).take(3)
    assert chosen.kinds == fresh.kinds
    assert chosen.names == ("e2", "e0")
    for kind in fresh.kinds:
        np.testing.assert_allclose(chosen.of(kind, 0), fresh.of(kind, 0), atol=1e-12)
    chosen.save(tmp_path / "s.npz")
    again = FieldStatistics.load(tmp_path / "s.npz")
    assert again.names == chosen.names
    assert again.groups == chosen.groups
    assert again.seed == 7
    np.testing.assert_array_equal(again.of("pairs", 1), chosen.of("pairs", 1))
    (tmp_path / "bad.npz").write_bytes(b"no")
    with pytest.raises(MergeboundError, match="not a file"):
        FieldStatistics.load(tmp_path / "bad.npz")


def test_merges_become_coefficients_and_residuals_orthogonal_to_the_task_vectors() -> None:
    s, st = subject(), collected()
    linear = form(s, Merge(method="task_arithmetic", settings={"coefficient": 0.4}), st.groups)
    assert linear.residual is None
    assert linear.layers[:, 0] == pytest.approx([0.4] * 3)
    ties = Merge(method="ties", settings={"density": 0.5})
    formed = form(s, ties, st.groups)
    vector = merged_vector(s, ties)
    assert formed.residual is not None
    assert 0.0 < formed.explained < 1.0
    rebuilt = s.base + torch.from_numpy(formed.layers[:, 0]) @ s.deltas + formed.residual
    torch.testing.assert_close(rebuilt, vector)
    assert float((s.deltas @ formed.residual).abs().max()) < 1e-10
    by_tensor, rest = project(s, vector - s.base, s.layers("tensor"))
    assert by_tensor.shape == (3, 4)
    assert float(rest.square().sum()) < float(formed.residual.square().sum())
    target = np.tensordot([0.2, -0.4, 1.0], st.of("tangent_base", 0), axes=1)
    alpha, left = function_projection(st.of("tangent_base", 0), target)
    np.testing.assert_allclose(alpha, [0.2, -0.4, 1.0], atol=1e-3)
    assert np.abs(left).max() < 1e-2
    for merge, match in ((Merge(method="fisher"), "needs statistics"), (Merge(alpha=[1.0]), "give 3")):
        with pytest.raises(MergeboundError, match=match):
            form(s, merge, st.groups)
    with pytest.raises(MergeboundError, match="alpha, by a method"):
        Merge()


def test_the_tangent_with_the_residual_is_the_dense_first_order_of_a_non_linear_merge() -> None:
    s, st = subject(True), collected(True)
    ties = Merge(method="ties", settings={"density": 0.5})
    u = merged_vector(s, ties) - s.base
    losses = []
    for j in range(EXPERTS):
        x = s.calibration[j].images
        jacobian = torch.func.jacrev(lambda v, j=j, x=x: s.networks[j].call(v, x))(s.base)
        logits = (s.networks[j].call(s.base, x) + jacobian @ u).numpy()
        losses.append(float(Loss().per_image(st, j, logits).mean()))
    frame = predict_merge(s, [ties, Merge(alpha=[0.3] * 3)], st, names=["tangent_base", "secant", "pairs"], seed=1)
    rows = frame.set_index(["merge", "predictor"])
    assert rows.loc[(ties.label, "tangent_base"), "risk"] == pytest.approx(np.mean(losses), abs=1e-9)
    assert set(frame["tier"]) == {"estimated"}
    assert frame["standard_error"].gt(0).all()
    assert rows.loc[(ties.label, "secant"), "explained"] < 1.0
    certified = frame.dropna(subset="certificate_remainder")  # pairs have no reference here
    assert set(certified["predictor"]) == {"tangent_base", "secant"}
    assert certified["certificate_remainder"].ge(certified["risk"]).all()
    low = frame[frame["predictor"].isin(["secant", "tangent_base"])].groupby("merge")["risk"].min()
    assert rows.loc[(ties.label, "pairs"), "bracket_low"] == pytest.approx(low[ties.label])
    dropped = predict_merge(s, [ties], st, names=["tangent_base"], residual="none")
    assert dropped["risk"][0] != pytest.approx(np.mean(losses), abs=1e-6)


def test_losses_without_labels_are_their_definitions() -> None:
    st = collected(True)
    h = [st.of("average", j) for j in range(EXPERTS)]
    p = np.exp(st.own_logits(1)) / np.exp(st.own_logits(1)).sum(-1, keepdims=True)
    q = np.exp(h[1][0]) / np.exp(h[1][0]).sum(-1, keepdims=True)
    np.testing.assert_allclose(Loss("soft").per_image(st, 1, h[1])[0], -(p * np.log(q)).sum(-1))
    np.testing.assert_allclose(Loss("entropy").per_image(st, 1, h[1])[0], -(q * np.log(q)).sum(-1))
    picked = -np.log(q[np.arange(IMAGES), p.argmax(-1)])
    np.testing.assert_allclose(Loss("pseudo", clip=0.9).per_image(st, 1, h[1])[0], np.minimum(picked, 0.9))
    right = replace(st, labels=tuple(st.own_logits(j).argmax(-1) for j in range(EXPERTS)))
    assert label_bias(right, h)["pseudo"] == pytest.approx([0.0])
    accuracy = np.mean([(h[j][0].argmax(-1) == st.labels[j]).mean() for j in range(EXPERTS)])
    assert estimate(st, h).accuracy == pytest.approx([accuracy])


def test_errors_say_what_to_do() -> None:
    s, st = subject(), collected()
    with pytest.raises(MergeboundError, match="choose from"):
        collect_fields(s, kinds=("tangents",))
    small = collect_fields(s, kinds=("secant",))
    with pytest.raises(MergeboundError, match="collect these kinds"):
        predictors(["pairs"], small)
    with pytest.raises(MergeboundError, match="is not known"):
        predictors(["pears"], st)
    assert predictors(["bracket_0.25"], st)[0].tier == "calibrated"
    with pytest.raises(MergeboundError, match="other experts"):
        predict_merge(s.choose([0, 1]), [Merge(alpha=[1, 0])], st)


def test_merges_that_clamp_running_variances_are_flagged_and_have_no_numbers() -> None:
    """The experts' variances are a tenth of the base's: a sum of coefficients above 10/9 makes them negative."""
    s = subject(False, True)
    ((_, piece),) = [(n, p) for n, p in s.networks[0].space.segments() if n.endswith("running_var")]
    vectors = s.vectors.clone()
    vectors[:, piece] = 0.1 * s.base[piece]
    s = replace(s, vectors=vectors)
    statistics = collect_fields(s, kinds=("secant", "tangent_base"), by="tensor", seed=7)
    table = np.full((s.size, statistics.depth), 0.5)  # 1.5 in all: too much in the layer of the variances alone
    gentle = table.copy()
    (layer,) = [g for g, group in enumerate(statistics.groups) if any("running_var" in n for n in group.tensors)]
    gentle[:, layer] = 1 / 3
    wanted = [Merge(method="average"), Merge(alpha=(0.5, 0.5, 0.5)), Merge(alpha=table), Merge(alpha=gentle)]
    wanted.append(Merge(method="task_arithmetic", settings={"coefficient": 1.0}))
    frame = predict_merge(s, wanted, statistics)
    for number, broken in enumerate((False, True, True, False, True)):
        rows = (
            frame[frame["merge"] == wanted[number].label].iloc[[0]]
            if number in (2, 3)
            else frame[frame["merge"] == wanted[number].label]
        )
        assert (rows["clamped"] == float(broken)).all(), wanted[number].label
        assert rows["risk"].isna().all() == broken
        assert not broken or (rows["flag"].all() and rows["certificate_remainder"].isna().all())
    assert float(point_at(s, np.full(3, 0.5))[piece].max()) == 0.0  # that is what would be evaluated
