"""Collectors of statistics against brute force and closed forms, on several kinds of timm models (random weights)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from experiments.measure.backbone import Backbone, Readout
from experiments.measure.entropy import adapt_coefficients, entropy, merged_vector
from experiments.measure.fisher import fisher_diagonal
from experiments.measure.function_space import collect
from experiments.measure.grams import input_grams
from experiments.measure.layerwise import (
    LayerStatistics,
    by_layer,
    by_tensor,
    collect_layers,
    curvature_optimal_coefficients,
    risk_optimal_coefficients,
    whole_model,
)
from experiments.models import build_model
from merging.flat import FlatSpace
from merging.merge import merge_state_dicts
from merging.methods.regmean import regmean
from merging.methods.risk_optimal import risk_optimal_flat
from theory.certificate import gauss_newton_form
from theory.curvature import predict_curvature
from theory.errors import MergeboundError
from theory.function_space import predict_risk


class Linear(nn.Module):
    """Softmax regression."""

    def __init__(self, inputs: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.flatten(1))
        return out


class Small(nn.Module):
    """Convolutions of all kinds, BatchNorm, a linear layer on tokens that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding="same", groups=4)
        self.grouped = nn.Conv2d(4, 6, 1, groups=2)
        self.mix = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(F.gelu(self.depthwise(self.norm(self.conv(x)))))
        x = self.mix(F.gelu(self.mix(x.flatten(2).mT)))
        out: Tensor = self.fc(x.mean(dim=1))
        return out


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Running statistics and zero-initialised parameters that are nothing special."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            assert name
    return model.eval()


def data(n: int, *shape: int, classes: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator, dtype=dtype), torch.randint(classes, (n,), generator=generator)


def brute_fisher(model: nn.Module, images: Tensor, weights: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Image by image and label by label; ``weights`` maps p (n, C) to the weight of each label."""
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    shares = weights(torch.softmax(model(images), -1).detach())
    for image, share in zip(images, shares, strict=True):
        for label in range(shares.shape[1]):
            log_p = torch.log_softmax(model(image[None]), -1)[0, label]
            gradients = torch.autograd.grad(log_p, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += share[label] * gradient.double().square() / len(images)
    return total


# --- Fisher ----------------------------------------------------------------------------------------------------------


def test_fisher_of_softmax_regression_is_known() -> None:
    """F of weight (c, d) is mean p_c (1 - p_c) x_d^2; of bias c, mean p_c (1 - p_c)."""
    model, (x, y) = Linear().double(), data(30, 6, classes=4)
    found = fisher_diagonal(model, model.state_dict(), [(x[:20], y[:20]), (x[20:], y[20:])])
    p = torch.softmax(model(x), -1).detach()
    variance = p * (1 - p)
    torch.testing.assert_close(found["fc.weight"], variance.T @ x.square() / 30)
    torch.testing.assert_close(found["fc.bias"], variance.mean(dim=0))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("mode", ["expected", "empirical"])
def test_fisher_against_image_by_image(mode: Any, together: bool) -> None:
    torch.manual_seed(0)
    model, (x, y) = randomised(Small().double()), data(5, 2, 8, 7)
    weights = {"expected": lambda p: p, "empirical": lambda p: F.one_hot(y, 3).double()}[mode]
    found = fisher_diagonal(model, model.state_dict(), [(x[:3], y[:3]), (x[3:], y[3:])], mode=mode, together=together)
    expected = brute_fisher(model, x, weights)
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12, msg=name)


def test_sampled_fisher_estimates_the_expected_one() -> None:
    model, (x, y) = Linear().double(), data(40, 6, classes=4)
    batches = [(x, y)]
    expected = fisher_diagonal(model, model.state_dict(), batches)["fc.weight"]
    drawn = torch.stack(
        [fisher_diagonal(model, model.state_dict(), batches, mode="sampled", seed=s)["fc.weight"] for s in range(60)]
    )
    error = drawn.std(dim=0) / 60**0.5
    assert float(((drawn.mean(dim=0) - expected) / error).abs().max()) < 4.5
    assert not torch.equal(drawn[0], drawn[1])


def test_fisher_is_not_the_square_of_a_batch_gradient() -> None:
    """What FusionBench and RegMean's code compute depends on the batch size; this does not."""
    model, (x, y) = Linear().double(), data(12, 6, classes=4)
    one = fisher_diagonal(model, model.state_dict(), [(x, y)])
    many = fisher_diagonal(model, model.state_dict(), list(zip(x.split(1), y.split(1), strict=True)))
    torch.testing.assert_close(one["fc.weight"], many["fc.weight"])


def test_fisher_refuses() -> None:
    model, (x, y) = Linear().double(), data(3, 6)
    state = model.state_dict()
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: fisher_diagonal(model, state, []), "no images"),
        (lambda: fisher_diagonal(model, state, [(x, y)], mode="other"), "choose expected"),  # type: ignore[arg-type]
        (lambda: fisher_diagonal(model, {}, [(x, y)]), "missing in the checkpoint"),
        (lambda: fisher_diagonal(model, state, [(x, y)], names=["fc.scale"]), "no floating parameter"),
        (lambda: fisher_diagonal(model, state, [(x * float("nan"), y)]), "not finite"),
        (lambda: fisher_diagonal(nn.Flatten(0), {}, [(x, y)]), "one row of logits"),
        (lambda: input_grams(model, state, []), "no images"),
    ]
    for call, message in cases:
        with pytest.raises(MergeboundError, match=message):
            call()


# --- Gram matrices ---------------------------------------------------------------------------------------------------


def test_grams_against_patches_cut_out_by_hand() -> None:
    torch.manual_seed(1)
    model, (x, y) = randomised(Small().double()), data(5, 2, 8, 7)
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda m, a, o, name=name: seen.setdefault(name, []).append(a[0].detach()))
        for name, module in model.named_modules()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    sums = input_grams(model, model.state_dict(), [(x[:2], y[:2]), (x[2:], y[2:])], mean=False)
    means = input_grams(model, model.state_dict(), [(x, y)])
    assert set(sums) == {f"{name}.weight" for name in ("conv", "depthwise", "grouped", "mix", "fc")}
    for name in ("mix", "fc"):
        rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in seen[name]])
        torch.testing.assert_close(sums[f"{name}.weight"], rows.T @ rows)
        torch.testing.assert_close(means[f"{name}.weight"], rows.T @ rows / len(rows))
    for name in ("conv", "depthwise", "grouped"):
        layer = model.get_submodule(name)
        gram, rows = patch_gram(seen[name][0].numpy(), layer)
        found = sums[f"{name}.weight"].numpy()
        np.testing.assert_allclose(found, gram if layer.groups > 1 else gram[0], rtol=1e-10)
        np.testing.assert_allclose(means[f"{name}.weight"].numpy(), found / rows, rtol=1e-10)


def patch_gram(x: np.ndarray, layer: Any) -> tuple[np.ndarray, int]:
    """X^T X over explicit patches, per group, and the number of rows."""
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    ph, pw = ((kh - 1) // 2, (kw - 1) // 2) if layer.padding == "same" else layer.padding
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    width = x.shape[1] // layer.groups
    grams, rows = [], 0
    for g in range(layer.groups):
        part, found = x[:, g * width : (g + 1) * width], []
        tops = range(0, part.shape[2] - dh * (kh - 1), sh)
        lefts = range(0, part.shape[3] - dw * (kw - 1), sw)
        for image, top, left in product(range(len(part)), tops, lefts):
            patch = part[image, :, top : top + dh * (kh - 1) + 1 : dh, left : left + dw * (kw - 1) + 1 : dw]
            found.append(patch.ravel())
        matrix = np.array(found)
        grams.append(matrix.T @ matrix)
        rows = len(matrix)
    return np.array(grams), rows


def test_regmean_with_collected_grams_is_the_best_first_layer() -> None:
    """On the first layer, whose inputs are the images: no other weight is closer to the experts' outputs."""
    torch.manual_seed(2)
    models = [randomised(Small().double(), seed) for seed in (1, 2)]
    sets = [data(6, 2, 8, 7, seed=seed) for seed in (3, 4)]
    states = [model.state_dict() for model in models]
    grams = [input_grams(m, s, [d], mean=False) for m, s, d in zip(models, states, sets, strict=True)]
    weight = regmean([{"conv.weight": s["conv.weight"]} for s in states], grams=grams, off_diagonal=1.0)[
        "conv.weight"
    ].requires_grad_()
    layer = models[0].conv
    cost = torch.zeros((), dtype=torch.float64)
    for state, (x, _) in zip(states, sets, strict=True):
        merged = functional_call(layer, {"weight": weight}, (x,))
        cost = cost + (merged - functional_call(layer, {"weight": state["conv.weight"]}, (x,))).square().sum()
    (gradient,) = torch.autograd.grad(cost, weight)
    assert float(cost.detach()) > 1e-3
    assert float(gradient.abs().max()) < 1e-9


# --- any timm model --------------------------------------------------------------------------------------------------


def mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    model: nn.Module = MlpMixer(num_classes=3, img_size=32, patch_size=8, num_blocks=1, embed_dim=24)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: build_model("vit_tiny_patch16_224", 3, img_size=32, depth=1, embed_dim=48),
    "resnet": lambda: build_model("test_resnet", 3),
    "convnext": lambda: build_model("test_convnext", 3),
    "efficientnet": lambda: build_model("test_efficientnet", 3),
    "mixer": mixer,
}


@pytest.fixture(scope="module", params=list(MODELS))
def timm_model(request: Any) -> tuple[nn.Module, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = randomised(MODELS[request.param]())
    return model, data(2, 3, 32, 32, dtype=torch.float32)[0]


def test_collectors_run_on_timm_models(timm_model: tuple[nn.Module, Tensor]) -> None:
    model, x = timm_model
    state, y = model.state_dict(), torch.tensor([0, 2])
    found = fisher_diagonal(model, state, [(x, y)], mode="empirical")
    expected = brute_fisher(model, x, lambda p: F.one_hot(y, 3).double())
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=2e-3, atol=1e-5 * float(values.max()) + 1e-12, msg=name)
    grams = input_grams(model, state, [(x, y)])
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(grams) == {f"{name}.weight" for name in layers}
    for name, module in layers.items():
        groups = getattr(module, "groups", 1)
        width = module.weight[0].numel()
        assert tuple(grams[f"{name}.weight"].shape) == ((width, width) if groups == 1 else (groups, width, width))
    regmean([{n: p.detach() for n, p in model.named_parameters()}] * 2, grams=[grams, grams])  # shapes fit


def test_logits_and_products_of_timm_models(timm_model: tuple[nn.Module, Tensor]) -> None:
    """Products of the layers add up to the directional derivative of the logits, by central differences."""
    model, x = timm_model
    wide, x = model.double(), x.double()
    state = {name: tensor.detach().clone() for name, tensor in wide.state_dict().items()}
    network = Backbone.of(wide, state, shared_head=True)
    base = network.vector(state)
    delta = 0.05 * torch.randn(base.shape, generator=torch.Generator().manual_seed(1), dtype=base.dtype) * base.abs()
    groups = by_layer(network.space.names)
    found = collect_layers(
        [network], [Readout()], base, [base + delta], [x], [torch.tensor([0, 1])], groups=groups, batch=1
    )
    np.testing.assert_allclose(found.base_logits[0], wide(x).detach().numpy(), rtol=1e-6, atol=1e-9)
    step = 1e-5
    ahead, behind = network.call(base + step * delta, x), network.call(base - step * delta, x)
    slope = ((ahead - behind) / (2 * step)).numpy()
    np.testing.assert_allclose(found.base_products[0].sum(axis=1)[0], slope, rtol=1e-4, atol=1e-6)
    wide.float()


# --- layer-wise statistics and coefficients --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group() -> tuple[LayerStatistics, LayerStatistics, Backbone, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Two experts of the digit ViT: random steps away from a random base, each with its head."""
    model = build_model("vit", 4).double()
    state = dict(model.state_dict())
    network = Backbone.of(model, state)
    base = network.vector(state)
    generator = torch.Generator().manual_seed(5)
    experts = [
        base + 0.3 * torch.randn(base.shape, generator=generator, dtype=base.dtype) * base.std() for _ in range(2)
    ]
    readout = network.readout(state)
    sets = [data(12, 1, 8, 8, classes=4, seed=seed) for seed in (6, 7)]
    images, labels = [s[0] for s in sets], [s[1] for s in sets]
    fine, coarse = (
        collect_layers(
            [network] * 2, [readout] * 2, base, experts, images, labels, groups=groups, anchors=("base", "own"), batch=5
        )
        for groups in (by_layer(network.space.names), None)
    )
    return fine, coarse, network, base, experts, images, labels


def test_layers_hold_every_tensor_once(group: Any) -> None:
    fine, coarse, network = group[:3]
    assert [g.name for g in fine.groups] == ["before the layers", "layer 0", "layer 1", "after the layers"]
    assert sorted(t for g in fine.groups for t in g.tensors) == sorted(network.space.names)
    assert len(by_tensor(network.space.names)) == len(network.space.names)
    assert coarse.groups == whole_model(network.space.names)


def test_one_layer_is_the_collection_of_whole_models(group: Any) -> None:
    fine, coarse, network, base, experts, images, labels = group
    readout = network.readout(dict(build_model("vit", 4).double().state_dict()))
    whole = collect(network, base, experts, [readout] * 2, images, labels)
    for j in range(2):
        np.testing.assert_allclose(coarse.expert_logits[j], whole.expert_logits[j], rtol=1e-9, atol=1e-12)
        for one, several, known in (
            (coarse.base_products, fine.base_products, whole.base_products),
            (coarse.own_products, fine.own_products, whole.own_products),
        ):
            np.testing.assert_allclose(one[j][:, 0], known[j], rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(several[j].sum(axis=1), known[j], rtol=1e-8, atol=1e-10)


def test_layers_predict_what_layers_do(group: Any) -> None:
    """Near the base the predicted logits of a layer-wise merge are the merge's own, to first order."""
    fine, _, network, base, experts, images, _ = group
    table = np.random.default_rng(0).normal(size=(2, fine.depth))
    readout = network.readout(dict(build_model("vit", 4).double().state_dict()))
    errors = []
    for scale in (1e-2, 1e-3):
        groups = {g.pattern: list(scale * table[:, l]) for l, g in enumerate(fine.groups)}
        rows = [x - base for x in experts]
        merged = base + risk_optimal_flat(rows, network.space, coefficients=(9.0, 9.0), groups=groups)
        measured = readout.logits(network.features(merged, images[0])).numpy()
        predicted = fine.tangents()[0].at(scale * table.ravel())
        errors.append(np.abs(measured - predicted).max())
    assert errors[1] < 2e-2 * errors[0]


def test_per_layer_coefficients_are_never_worse(group: Any) -> None:
    fine, coarse = group[:2]
    for options in ({}, {"simplex": True}, {"bounds": (-0.5, 1.5)}):
        _, one = risk_optimal_coefficients(coarse, **options)
        found, many = risk_optimal_coefficients(fine, **options)
        assert many.risk <= one.risk + 1e-12
        assert many.gap <= 1e-3
        repeated = np.repeat(one.alpha, fine.depth)
        assert float(predict_risk(fine.tangents(), repeated).risk) == pytest.approx(one.risk)
        assert len(found.groups) == fine.depth
        for anchors in (("own",), ("own", "base")):
            _, flat = curvature_optimal_coefficients(coarse, anchors, **options)
            _, deep = curvature_optimal_coefficients(fine, anchors, **options)
            assert deep.risk <= flat.risk + flat.gap
            models = fine.curvatures(anchors)
            assert float(predict_curvature(models, np.repeat(flat.alpha, fine.depth))) == pytest.approx(flat.risk)
    assert risk_optimal_coefficients(coarse, "secant")[1].gap < 1e-4
    assert risk_optimal_coefficients(coarse, "middle")[1].gap < 1e-4
    with pytest.raises(MergeboundError, match="objective tangent"):
        risk_optimal_coefficients(fine, "secant")


def test_curvature_model_is_exact_for_linear_logits() -> None:
    """Where logits are linear in x, the collected form is the Gauss-Newton matrix computed from explicit features."""
    model, (x, y) = Linear(6, 3).double(), data(9, 6)
    state = dict(model.state_dict())
    network = Backbone.of(model, state, shared_head=True)
    base = network.vector(state)
    generator = torch.Generator().manual_seed(3)
    experts = [base + torch.randn(base.shape, generator=generator, dtype=base.dtype) for _ in range(2)]
    found = collect_layers([network] * 2, [Readout()] * 2, base, experts, [x, x], [y, y], anchors=("own",))
    features = torch.cat([x, torch.ones(9, 1, dtype=x.dtype)], dim=1).numpy()
    for j in range(2):
        weights = [np.concatenate([(v - base)[3:].reshape(3, 6), (v - base)[:3, None]], axis=1) for v in experts]
        logits = features @ np.concatenate([experts[j][3:].reshape(3, 6), experts[j][:3, None]], axis=1).T
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        form = np.zeros((2, 2))
        for z, q in zip(features, p, strict=True):
            changes = np.array([w @ z for w in weights])
            form += changes @ (np.diag(q) - np.outer(q, q)) @ changes.T / 9
        np.testing.assert_allclose(found.curvatures()[j].forms[0], form, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(gauss_newton_form(logits, found.own_products[j][:, 0]), form, rtol=1e-9)


def test_groups_have_to_cover_the_model(group: Any) -> None:
    network, base, experts, images, labels = group[2:]
    some = by_layer(network.space.names)[:-1]
    with pytest.raises(MergeboundError, match="exactly once"):
        collect_layers([network], [Readout()], base, experts, images[:1], labels[:1], groups=some)
    with pytest.raises(MergeboundError, match="not collected"):
        LayerStatistics(("a",), whole_model(["w"]), (), (), ()).tangents()
    with pytest.raises(MergeboundError, match="needs an anchor"):
        group[0].curvatures(())


# --- AdaMerging ------------------------------------------------------------------------------------------------------


def test_gradient_of_the_entropy_against_finite_differences(group: Any) -> None:
    network, base, experts, images, _ = group[2:]
    readout = network.readout(dict(build_model("vit", 4).double().state_dict()))
    vectors, layout = [x - base for x in experts], by_layer(network.space.names)
    which = torch.zeros(network.space.size, dtype=torch.int32)
    for name, piece in network.space.segments():
        which[piece] = next(g for g, layer in enumerate(layout) if name in layer.tensors)

    def objective(table: Tensor) -> Tensor:
        merged = merged_vector(base, vectors, table, which)
        return entropy(readout.logits(network.call(merged, images[0]))).mean()

    table = torch.full((2, len(layout)), 0.3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(objective(table), table)
    for i, l in product(range(2), range(len(layout))):
        step = torch.zeros_like(table)
        step[i, l] = 1e-5
        with torch.no_grad():
            slope = (objective(table + step) - objective(table - step)) / 2e-5
        assert float(gradient[i, l]) == pytest.approx(float(slope), rel=1e-4, abs=1e-9)
    p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    assert float(entropy(p.log() + 7.0)) == pytest.approx(-float((p * p.log()).sum()))


def literal_adamerging(steps: int, rate: float, clamp: bool) -> np.ndarray:
    """Ten lines: one task, logits [a l_1, b l_2, 0], Adam by hand with the entropy's analytic gradient."""
    scale, lam = np.array([1.5, -0.8]), np.array([0.3, 0.3])
    m, v = np.zeros(2), np.zeros(2)
    for t in range(1, steps + 1):
        used = lam.clip(0, 1) if clamp else lam
        h = np.append(scale * used, 0.0)
        log_p = h - np.log(np.exp(h).sum())
        p = np.exp(log_p)
        slope = -p * (log_p - (p * log_p).sum())  # dH / dh
        g = slope[:2] * scale * (((lam >= 0) & (lam <= 1)) if clamp else 1.0)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        lam = lam - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return lam.clip(0, 1) if clamp else lam


@pytest.mark.parametrize("clamp", [True, False])
def test_adapting_is_adam_on_the_entropy(clamp: bool) -> None:
    base = torch.zeros(2, dtype=torch.float64)
    vectors = [torch.tensor([1.5, 0.0], dtype=torch.float64), torch.tensor([0.0, -0.8], dtype=torch.float64)]
    space = FlatSpace.of({"w": base})

    def logits(x: Tensor, images: Tensor) -> Tensor:
        return F.pad(x, (0, 1)).expand(len(images), 3)

    found = adapt_coefficients(
        [logits], base, vectors, space, [torch.zeros(3, 1)], rate=0.05, steps=40, clamp="forward" if clamp else "none"
    )
    expected = literal_adamerging(40, 0.05, clamp)
    np.testing.assert_allclose(found.table[:, 0].numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(found.coefficients.default, expected, rtol=1e-9)
    assert found.entropies[-1] < found.entropies[0]


def test_adapting_tensor_by_tensor_lowers_the_entropy(group: Any) -> None:
    network, base, experts, images, _ = group[2:]
    readout = network.readout(dict(build_model("vit", 4).double().state_dict()))
    networks = [lambda v, x: readout.logits(network.call(v, x))] * 2
    vectors = [x - base for x in experts]
    groups = by_tensor(network.space.names)
    found = adapt_coefficients(
        networks, base, vectors, network.space, images, groups=groups, rate=0.05, steps=15, batch=12, clamp="project"
    )
    assert found.entropies[-1] < found.entropies[0]
    assert 0.0 <= float(found.table.min()) <= float(found.table.max()) <= 1.0
    settings = found.coefficients.settings()
    rows = risk_optimal_flat(vectors, network.space, **settings)
    merged = dict(network.space.unflatten(base + rows))
    names = network.space.names
    states = {str(i): network.space.unflatten(x) for i, x in enumerate(experts)}
    by_method = merge_state_dicts("adamerging", network.space.unflatten(base), states, **settings)
    for name in names:
        torch.testing.assert_close(by_method[name], merged[name])
    for l, name in enumerate(names):
        alpha = found.table[:, l]
        expected = network.space.unflatten(base)[name] + sum(
            a * network.space.unflatten(v)[name] for a, v in zip(alpha, vectors, strict=True)
        )
        torch.testing.assert_close(merged[name], expected)


def test_adapting_refuses() -> None:
    base, space = torch.zeros(2), FlatSpace.of({"w": torch.zeros(2)})
    network = [lambda v, x: v.expand(len(x), 2)]
    with pytest.raises(MergeboundError, match="one of each per task"):
        adapt_coefficients(network, base, [base], space, [])
    with pytest.raises(MergeboundError, match="no images"):
        adapt_coefficients(network, base, [base], space, [torch.zeros(0, 1)])
    with pytest.raises(MergeboundError, match="exactly once"):
        adapt_coefficients(network, base, [base], space, [torch.zeros(1, 1)], groups=())
    with pytest.raises(MergeboundError, match="not finite"):
        adapt_coefficients(network, base, [base + float("nan")], space, [torch.zeros(1, 1)])


@pytest.mark.parametrize("names", [("w",), ("w", "n.running_var")])
def test_coefficients_stay_between_base_and_experts_where_there_are_running_variances(names: tuple[str, ...]) -> None:
    """Logits that ask for all of two experts: the box gives both, the hull a mixture."""
    labels = np.array([0, 0, 1, 1])
    right = np.where(np.arange(2) == labels[:, None], 1.0, -1.0)
    still = np.zeros((4, 2))
    statistics = LayerStatistics(
        ("a", "b"), whole_model(list(names)), (labels, labels), (still, still), (np.stack([right, right]),) * 2
    )
    own, _ = risk_optimal_coefficients(statistics, "secant")
    free, _ = risk_optimal_coefficients(statistics, "secant", hull=False)
    wide, _ = risk_optimal_coefficients(statistics, "secant", bounds=(0.0, 1.5))
    assert sum(free.default) == pytest.approx(2.0, abs=1e-4)
    assert sum(wide.default) == pytest.approx(3.0, abs=1e-4)  # whoever gives bounds has them
    assert sum(own.default) == pytest.approx(1.0 if len(names) == 2 else 2.0, abs=1e-4)
    inside, _ = risk_optimal_coefficients(statistics, "secant", hull=True)
    assert sum(inside.default) == pytest.approx(1.0, abs=1e-4)
