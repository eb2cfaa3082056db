"""Held-out transfer against scikit-learn, scipy and literal definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch import Tensor

from experiments.evaluate import neighbours
from experiments.evaluate.neighbours import k_nearest, nearest_class_mean, top_k
from experiments.evaluate.predictions import backbone_of
from experiments.evaluate.probe import linear_probe
from experiments.evaluate.transfer import METHODS, TransferFeatures, transfer, transfer_features
from experiments.models import build_model, parts
from experiments.models.extraction import features as features_of
from experiments.tasks.digits8 import digits8
from theory.errors import MergeboundError


def blobs(seed: int, n: int = 120, d: int = 6, classes: int = 4, distance: float = 1.5) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    middles = np.random.default_rng(99).standard_normal((classes, d)) * distance + 1.0
    labels = rng.integers(0, classes, n)
    return torch.from_numpy(middles[labels] + rng.standard_normal((n, d))), torch.from_numpy(labels)


def unit(x: Tensor) -> np.ndarray:
    return (x / x.norm(dim=1, keepdim=True)).numpy()


def test_nearest_class_mean() -> None:
    (x, y), (q, _) = blobs(0), blobs(1)
    reference = NearestCentroid().fit(x.numpy(), y.numpy())
    found = nearest_class_mean(x, y, q, 4, distance="euclidean")
    assert (found.argmax(1).numpy() == reference.predict(q.numpy())).all()
    distances = np.square(q.numpy()[:, None] - reference.centroids_[None]).sum(-1)
    assert np.allclose(-found.numpy(), distances)
    means = np.stack([unit(x)[y.numpy() == c].mean(0) for c in range(4)])
    cosine = unit(q) @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    assert np.allclose(nearest_class_mean(x, y, q, 4).numpy(), cosine)
    wide = nearest_class_mean(x, y, q, 6)
    assert torch.isneginf(wide[:, 4:]).all()
    assert torch.equal(wide[:, :4], nearest_class_mean(x, y, q, 4))


@pytest.mark.parametrize("k", [1, 5, 20, 120])
def test_majority_votes(k: int) -> None:
    (x, y), (q, _) = blobs(2), blobs(3)
    reference = KNeighborsClassifier(k, algorithm="brute").fit(x.numpy(), y.numpy())
    found = k_nearest(x, y, q, 4, k=k, distance="euclidean")
    assert np.allclose(found.numpy(), reference.predict_proba(q.numpy()))
    assert (found.numpy().argmax(1) == reference.predict(q.numpy())).all()
    cosine = KNeighborsClassifier(k, algorithm="brute", metric="cosine").fit(x.numpy(), y.numpy())
    assert np.allclose(k_nearest(x, y, q, 4, k=k).numpy(), cosine.predict_proba(q.numpy()))


def test_softmax_votes_by_their_definition() -> None:
    (x, y), (q, _) = blobs(4), blobs(5, n=15)
    found = k_nearest(x, y, q, 4, k=7, vote="softmax", temperature=0.1).numpy()
    for row, similarity in enumerate(unit(q) @ unit(x).T):
        near = np.argsort(-similarity)[:7]
        ballot = [sum(np.exp(similarity[i] / 0.1) for i in near if y[i] == c) for c in range(4)]
        assert np.allclose(found[row], np.array(ballot) / sum(ballot))


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), (q, _) = blobs(6), blobs(7)
    whole = [k_nearest(x, y, q, 4, k=9), nearest_class_mean(x, y, q, 4, distance="euclidean")]
    monkeypatch.setattr(neighbours, "CELLS", 1000)
    parts = [k_nearest(x, y, q, 4, k=9), nearest_class_mean(x, y, q, 4, distance="euclidean")]
    assert all(torch.allclose(a, b) for a, b in zip(whole, parts, strict=True))


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_ties_are_taken_in_the_order_of_the_training_set(seed: int, k: int) -> None:
    similarity = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, (5, 9)).astype(float))
    values, index = top_k(similarity, k)
    for row in range(5):
        order = sorted(range(9), key=lambda i: (-similarity[row, i].item(), i))[:k]
        assert index[row].tolist() == order
        assert values[row].tolist() == [similarity[row, i].item() for i in order]


def objective(flat: np.ndarray, x: np.ndarray, y: np.ndarray, classes: int, l2: float) -> float:
    weight, bias = flat[:-classes].reshape(classes, -1), flat[-classes:]
    logits = x @ weight.T + bias
    top = logits.max(1, keepdims=True)
    loss = np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[np.arange(len(y)), y]
    return float(loss.mean() + l2 / 2 * (weight**2).sum())


@pytest.mark.parametrize("classes", [2, 4])
def test_linear_probe_is_the_minimiser(classes: int) -> None:
    (x, y), (v, w) = blobs(8, classes=classes, d=4), blobs(9, classes=classes, d=4)
    x[:, 0] = 3.0  # constant
    found = linear_probe(x, y, v, w, classes, grid=(0.01,))
    assert found.converged
    z = ((x - found.mean) / found.std).numpy()
    start = np.zeros(classes * 5)
    own = np.concatenate([found.weight.numpy().ravel(), found.bias.numpy()])
    best = minimize(objective, start, (z, y.numpy(), classes, 0.01), options={"gtol": 1e-7})
    value = objective(own, z, y.numpy(), classes, 0.01)
    assert value == pytest.approx(best.fun, abs=1e-8)
    assert np.allclose(found.weight.numpy().ravel(), best.x[:-classes], atol=1e-3)


def test_linear_probe_against_scikit_learn_and_the_grid() -> None:
    (x, y), (v, w) = blobs(10), blobs(11)
    found = linear_probe(x, y, v, w, 4, grid=(1.0, 1e-2, 1e-4))
    z = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    q = ((v - x.mean(0)) / x.std(0, correction=0)).numpy()
    scores = {}
    for l2 in (1.0, 1e-2, 1e-4):
        reference = LogisticRegression(C=1 / (l2 * 120), tol=1e-8, max_iter=5000).fit(z, y.numpy())
        scores[l2] = reference.score(q, w.numpy())
        if l2 == found.l2:
            assert np.allclose(reference.decision_function(q), centred(found.logits(v)), atol=1e-3)
    assert found.validation == pytest.approx(scores)
    assert found.validation[found.l2] == max(scores.values())


def centred(logits: Tensor) -> np.ndarray:
    return (logits - logits.mean(dim=1, keepdim=True)).numpy()


def test_linear_probe_says_when_it_has_not_converged(caplog: pytest.LogCaptureFixture) -> None:
    (x, y), (v, w) = blobs(12), blobs(13)
    found = linear_probe(x, y, v, w, 4, grid=(1e-4,), iterations=2)
    assert not found.converged
    assert found.gradient > 1e-4
    assert "after 2 iterations" in caplog.text


def test_classes_without_training_images_are_never_predicted() -> None:
    (x, y), (v, w) = blobs(14), blobs(15)
    found = linear_probe(x, 2 * y, v, 2 * w, 9, grid=(0.1,))
    assert set(found.logits(v).argmax(1).tolist()) <= {0, 2, 4, 6}


def features(seed: int = 0) -> TransferFeatures:
    return TransferFeatures("blobs", 4, blobs(seed), blobs(seed + 1, 60), blobs(seed + 2, 90), "digest", 5)


def test_transfer_of_all_methods() -> None:
    found = transfer(features(), resamples=200)
    assert tuple(found) == METHODS
    for method, one in found.items():
        row = one.to_row()
        assert (row["method"], row["n"], row["split_digest"], row["split_seed"]) == (method, 90, "digest", 5)
        assert one.accuracy.low <= one.accuracy.value <= one.accuracy.high
        assert one.accuracy.value == one.correct.mean()
        assert one.accuracy.value > 0.8  # chance is 0.25
    assert found["linear_probe"].settings["converged"]
    (x, y), (q, w) = blobs(0), blobs(2, 90)
    assert found["ncm_euclidean"].accuracy.value == NearestCentroid().fit(x.numpy(), y.numpy()).score(q, w.numpy())


def test_k_is_chosen_on_validation_images() -> None:
    data = features(20)
    chosen = transfer(data, ["knn_majority"], neighbours=(1, 5, 500), resamples=0)["knn_majority"].settings["k"]
    right = {
        k: int((k_nearest(*data.train, data.validation[0], 4, k=k).argmax(1) == data.validation[1]).sum())
        for k in (1, 5, 120)
    }
    assert right[chosen] == max(right.values())
    assert chosen == min(k for k, value in right.items() if value == right[chosen])


def test_features_of_a_network() -> None:
    task = digits8().tasks["flip"]
    data = transfer_features(build_model("resnet_bn"), task.train, task.calibration, task.test, 10, name="flip")
    assert data.train[0].shape == (80, 40)
    pixels = transfer_features(lambda x: x.flatten(1), task.train, task.calibration, task.test, 10)
    found = transfer(pixels, ["ncm_cosine", "linear_probe"], grid=(0.1,), resamples=0)
    assert found["linear_probe"].accuracy.value > 0.8  # chance is 0.1
    assert found["ncm_cosine"].accuracy.value > 0.7


def test_errors() -> None:
    x, y = blobs(0)
    with pytest.raises(MergeboundError, match="did you mean 'ncm_cosine'"):
        transfer(features(), ["ncm_cosin"])
    with pytest.raises(MergeboundError, match="k = 121 with 120"):
        k_nearest(x, y, x, 4, k=121)
    with pytest.raises(MergeboundError, match="softmax votes"):
        k_nearest(x, y, x, 4, distance="euclidean", vote="softmax")
    with pytest.raises(MergeboundError, match="out of range for 3"):
        nearest_class_mean(x, y, x, 3)
    bad = x.clone()
    bad[3, 1] = torch.nan
    with pytest.raises(MergeboundError, match="query features hold NaN"):
        nearest_class_mean(x, y, bad, 4)
    with pytest.raises(MergeboundError, match="positive values"):
        linear_probe(x, y, x, y, 4, grid=(0.0,))
    with pytest.raises(MergeboundError, match="one class"):
        linear_probe(x, torch.zeros_like(y), x, y, 4)
    with pytest.raises(MergeboundError, match="at least one k"):
        transfer(features(), neighbours=())


def test_a_head_of_two_classifiers_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("deit_tiny_distilled_patch16_224", classes=3, img_size=32, depth=1).eval()
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = features_of(model, images)
    backbone = backbone_of(model)
    monkeypatch.setattr(parts, "without_numbers", lambda _: pytest.fail("the network was copied for a batch"))
    with torch.inference_mode():
        assert torch.equal(backbone(images), expected)
