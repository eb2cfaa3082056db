"""Update rules, frozen parts, low-rank updates and divergence of the reference loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.finetune.low_rank import low_rank, matrices
from experiments.finetune.optimizers import ascent, clip_factor, heavy_ball
from experiments.finetune.reference import train_run
from experiments.finetune.trained import set_modes, trained_network
from experiments.models import build_model, head_tensors
from experiments.tasks.types import Split
from tests.experiments.reference_nets import CLASSES, Net, assert_same, recorded, sample, spec, start_of
from theory.errors import MergeboundError

HEAD = ("head.weight", "head.bias")
STATISTICS = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")

# --- update rules ----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0.0, 0.99))
def test_heavy_ball_moves_by_the_weighted_sum_of_its_gradients(seed: int, steps: int, momentum: float) -> None:
    """theory.md 6(d): x_K - x_0 = -sum_k w_k g_k with w_k = sum_{l >= k} eta_l beta^(l - k), at any learning rates."""
    rng = np.random.default_rng([seed, 3])
    gradients, eta = torch.from_numpy(rng.standard_normal((steps, 4))), rng.uniform(0.0, 1.0, steps)
    x = torch.zeros(4, dtype=torch.float64)
    update = heavy_ball(x, momentum)
    for gradient, rate in zip(gradients, eta, strict=True):
        update(x, gradient, rate)
    weights = [sum(eta[j] * momentum ** (j - k) for j in range(k, steps)) for k in range(steps)]
    expected = -sum((w * g for w, g in zip(weights, gradients, strict=True)), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6), st.floats(1e-3, 1e3))
def test_clipping_is_that_of_torch(seed: int, size: float, largest: float) -> None:
    gradient = size * torch.from_numpy(np.random.default_rng([seed, 4]).standard_normal(7))
    parts = [nn.Parameter(torch.zeros(3, dtype=torch.float64)), nn.Parameter(torch.zeros(4, dtype=torch.float64))]
    for part, piece in zip(parts, gradient.split([3, 4]), strict=True):
        part.grad = piece.clone()
    torch.nn.utils.clip_grad_norm_(parts, largest)
    expected = torch.cat([part.grad for part in parts if part.grad is not None])
    torch.testing.assert_close(gradient * clip_factor(gradient, largest), expected, rtol=1e-12, atol=0.0)


def test_ascent_has_length_rho_and_a_zero_gradient_gives_none() -> None:
    gradient = torch.tensor([3.0, -4.0], dtype=torch.float64)
    torch.testing.assert_close(ascent(gradient, 0.5), torch.tensor([0.3, -0.4], dtype=torch.float64))
    assert torch.equal(ascent(torch.zeros(2), 0.5), torch.zeros(2))


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "sam"])
@pytest.mark.parametrize(
    ("trained", "frozen"),
    [
        ("full", ()),
        ("backbone", HEAD),
        ("head", ("conv.weight", "bn.weight", "bn.bias", "body.weight", "body.bias", *STATISTICS)),
        ("low_rank", ("bn.weight", "bn.bias", "body.bias", *STATISTICS)),
    ],
)
def test_frozen_tensors_keep_their_bits_and_all_others_move(
    trained: str, frozen: tuple[str, ...], optimizer: Any
) -> None:
    rank = 2 if trained == "low_rank" else None
    run = spec(trained=trained, rank=rank, optimizer=optimizer, steps=4, weight_decay=0.1, momentum=0.5)
    start = start_of(Net())
    result = train_run(run, Net(), start, sample())
    same = {name for name, tensor in result.states[4].items() if torch.equal(tensor, start[name])}
    assert same == set(frozen)
    still = {"shared": trained == "head", "head": trained == "backbone"}
    assert (result.log.gradient_norm_shared == 0).all() == still["shared"]
    assert (result.log.gradient_norm_head == 0).all() == still["head"]


def test_a_frozen_backbone_normalises_with_the_statistics_of_the_base() -> None:
    """Training the head is logistic regression on the features that the base computes in evaluation mode."""
    run = spec(trained="head", precision="float64", momentum=0.5, weight_decay=0.02)
    start = start_of(Net())
    start["bn.running_mean"], start["bn.running_var"] = torch.full((4,), 0.3), torch.full((4,), 2.0)
    model = Net(drop=0.5).double()
    model.load_state_dict(start)
    model.eval()
    head = nn.Linear(6, CLASSES).double()
    head.load_state_dict(model.head.state_dict())
    optimizer = torch.optim.SGD(head.parameters(), run.learning_rate, 0.5, weight_decay=0.02)
    model.head = nn.Identity()  # type: ignore[assignment]
    for images, labels in recorded(run, sample()):
        optimizer.zero_grad()
        F.cross_entropy(head(model(images).detach()), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    result = train_run(run, Net(drop=0.5), start, sample())
    torch.testing.assert_close(result.states[30]["head.weight"], head.weight.detach(), rtol=1e-12, atol=1e-12)


def test_modes_of_every_part() -> None:
    model = build_model("resnet_bn", seed=1)
    model.get_submodule(next(iter(head_tensors(model))).rpartition(".")[0]).add_module("inner", nn.BatchNorm1d(3))
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    modes = {}
    for trained in ("full", "backbone", "head", "low_rank"):
        set_modes(model, trained)  # type: ignore[arg-type]
        modes[trained] = {name for name, m in model.named_modules() if m.training}
    everything = {name for name, _ in model.named_modules()}
    head = {name for name in everything if name == "fc" or name.startswith("fc.")}
    assert modes == {
        "full": everything,
        "backbone": everything - head,
        "head": head,
        "low_rank": everything - norms,
    }


# --- low rank --------------------------------------------------------------------------------------------------------


class LoraNet(nn.Module):
    """The same network with every matrix as the sum of two branches, W_0 z + B (A z)."""

    def __init__(self, net: Net, rank: int, seed: int) -> None:
        super().__init__()
        self.net, self.r = net.requires_grad_(False), rank
        net.head.requires_grad_(True)
        rng = np.random.default_rng([seed, 0x10AA])
        self.conv_a, self.conv_b = self.factors(rng, 4, 9)
        self.body_a, self.body_b = self.factors(rng, 6, 16)

    def factors(self, rng: np.random.Generator, outputs: int, rest: int) -> tuple[nn.Parameter, nn.Parameter]:
        r = min(self.r, outputs, rest)
        drawn = rng.uniform(-1 / np.sqrt(rest), 1 / np.sqrt(rest), (r, rest))
        return nn.Parameter(torch.from_numpy(drawn)), nn.Parameter(torch.zeros(outputs, r, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        inner = F.conv2d(images, self.conv_a.view(-1, 1, 3, 3))
        maps = self.net.conv(images) + F.conv2d(inner, self.conv_b[:, :, None, None])
        features = torch.tanh(self.net.bn(maps)).flatten(1)
        hidden = self.net.body(features) + (features @ self.body_a.T) @ self.body_b.T
        logits: Tensor = self.net.head(torch.tanh(hidden))
        return logits


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_low_rank_is_a_literal_lora_module_and_its_update_has_that_rank(rank: int) -> None:
    run = spec(trained="low_rank", rank=rank, precision="float64", steps=10, momentum=0.5, weight_decay=0.02)
    model = LoraNet(Net().double(), rank, run.seed)
    model.net.bn.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, run.learning_rate, 0.5, weight_decay=0.02)
    for images, labels in recorded(run, sample()):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    state = train_run(run, Net(), start_of(Net()), sample()).states[10]
    with torch.no_grad():
        expected = start_of(model.net)
        expected["conv.weight"] += (model.conv_b @ model.conv_a).view(4, 1, 3, 3)
        expected["body.weight"] += model.body_b @ model.body_a
    assert_same(state, expected, 1e-12)
    for name, sides in (("conv.weight", (4, 9)), ("body.weight", (6, 16))):
        update = (state[name] - start_of(Net())[name]).reshape(sides)
        assert int(torch.linalg.matrix_rank(update, rtol=1e-9)) == min(rank, *sides)


@pytest.mark.parametrize("architecture", ["vit", "resnet_bn"])
def test_low_rank_starts_at_the_base_and_takes_every_matrix_of_the_backbone(architecture: str) -> None:
    model = build_model(architecture, seed=1)
    start = start_of(model)
    net = trained_network(spec(trained="low_rank", rank=3), model, start, torch.device("cpu"))
    assert_same(net.state(), start)
    head = head_tensors(model)
    wanted = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and f"{name}.weight" not in head
    }
    assert set(matrices(model, head)) == wanted
    assert net.x.numel() == sum(p.numel() for n, p in model.named_parameters() if n in head) + net.shared
    sizes = {n: p.shape for n, p in model.named_parameters()}
    assert net.shared == sum(
        min(3, sizes[n][0], sizes[n].numel() // sizes[n][0]) * (sizes[n][0] + sizes[n].numel() // sizes[n][0])
        for n in wanted
    )


def test_a_network_without_matrices_takes_no_low_rank_update() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    with pytest.raises(MergeboundError, match="no matrix outside its head"):
        low_rank(model, ("1.weight", "1.bias"), 1, 0)


def test_a_network_that_is_all_head_has_no_backbone_to_train() -> None:
    with pytest.raises(MergeboundError, match="trained = backbone: Bare has no parameter there"):
        train_run(spec(trained="backbone"), Bare(), start_of(Bare()), sample())
    head, full = (train_run(spec(trained=part), Bare(), start_of(Bare()), sample()) for part in ("head", "full"))
    assert_same(head.states[30], full.states[30])


# --- divergence ------------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    """Logits W z."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, CLASSES, bias=False)
        nn.init.constant_(self.head.weight, 0.5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_weights_overflow_at_the_step_that_arithmetic_says(optimizer: Any) -> None:
    """Black images have no gradient, so decay alone acts: x_k = (1 - eta omega)^k x_0 = (-10)^k / 2, up to 3.4e38."""
    black = Split(torch.zeros(6, 1, 4, 4), torch.zeros(6, dtype=torch.int64), np.arange(6))
    run = spec(
        optimizer=optimizer, learning_rate=1.1e21, weight_decay=1e-20, steps=60, checkpoints=(7, 50, 60), batch_size=3
    )
    result = train_run(run, Bare(), start_of(Bare()), black)
    assert result.outcome == "diverged"
    assert not result.log.finite
    assert list(result.states) == [7, 38]
    for step, state in result.states.items():
        torch.testing.assert_close(
            state["head.weight"], torch.full((CLASSES, 16), 0.5 * (-10.0) ** step), rtol=1e-4, atol=0
        )
    assert len(result.log.batch_loss) == 38


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "sam"])
def test_a_loss_that_is_no_number_ends_the_run_at_the_state_before_it(optimizer: Any, precision: Any) -> None:
    run = spec(optimizer=optimizer, precision=precision, steps=9, momentum=0.5, data_share=1.0)
    data = sample()
    last = int((recorded(run, Split(data.images, torch.arange(23), data.source))[3][1])[0])
    data.images[last, 0, 0, 0] = float("nan")  # an image of the fourth batch, which nothing shows before
    result = train_run(run, Net(), start_of(Net()), data)
    short = train_run(run.model_copy(update={"steps": 3, "checkpoints": (3,)}), Net(), start_of(Net()), sample())
    assert (result.outcome, short.outcome) == ("diverged", "finished")
    assert list(result.states) == [3]
    assert_same(result.states[3], short.states[3])
    assert result.log.batch_loss.tolist() == short.log.batch_loss.tolist()


def test_a_run_that_diverges_at_once_keeps_its_start() -> None:
    data = sample()
    data.images.fill_(float("inf"))
    result = train_run(spec(), Net(), start_of(Net()), data)
    assert result.outcome == "diverged"
    assert_same(result.states[0], start_of(Net()))
    assert result.log.batch_loss.shape == (0,)


def test_statistics_that_overflow_are_a_divergence_and_a_mask_of_infinities_is_none() -> None:
    """Images of 1e20 have an infinite variance in float32, which normalises everything to zero: a finite loss."""
    data = sample()
    data.images.mul_(1e20)
    model = Net()
    loss = F.cross_entropy(model(data.images), data.labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (loss, *gradients)), "nothing else shows it"
    result = train_run(spec(), Net(), start_of(Net()), data)
    assert result.outcome == "diverged"
    assert_same(result.states[0], start_of(Net()))
    model = Net()
    model.register_buffer("mask", torch.full((2,), -float("inf")))
    assert train_run(spec(steps=2), model, start_of(model), sample()).outcome == "finished"
