"""The fine-tuning loop against torch's own SGD, and its log against the drift theorem."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments.finetune.loop import Hyperparameters, TrainingLog, batches, finetune, nested_subset, pretrain
from experiments.models import build_model, head_prefix
from experiments.tasks.digits8 import digits8
from experiments.tasks.types import Split
from theory.errors import MergeboundError

ARCHITECTURES = ("vit", "resnet_gn", "resnet_bn")
HYPER = Hyperparameters(learning_rate=0.05, steps=9, batch_size=7, data_share=0.75, momentum=0.6, weight_decay=0.01)
SEED = 11


@cache
def sample() -> Split:
    return (
        digits8(train_per_task=40, pretraining=64, calibration=16, calibration_per_task=8, test=8).tasks["flip"].train
    )


def start_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run(architecture: str, hyper: Hyperparameters = HYPER, **options: bool) -> tuple[dict[str, Tensor], ...]:
    """Start, end and log of a run."""
    model = build_model(architecture, seed=1)
    start = start_of(model)
    end, log = finetune(model, start, sample(), hyper, SEED, **options)  # type: ignore[arg-type]
    return start, end, log  # type: ignore[return-value]


def norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([t.reshape(-1).double() for t in tensors]).norm())


def recorded_batches(hyper: Hyperparameters) -> list[np.ndarray]:
    """The rows of ``sample()`` in each batch, from the documented streams."""
    rows = nested_subset(len(sample()), hyper.data_share, SEED)
    rng = np.random.default_rng([SEED, 0xBA7C])
    drawn = batches(len(rows), hyper.batch_size, hyper.steps, hyper.sampling, rng)
    return [rows[batch] for batch in drawn]


def reference(architecture: str, hyper: Hyperparameters, frozen: bool) -> tuple[dict[str, Tensor], np.ndarray]:
    """The same run by torch.optim.SGD: end state, and columns (loss, shared norm, head norm)."""
    model = build_model(architecture, seed=1).train()
    prefix = head_prefix(model)
    trained = {n: p for n, p in model.named_parameters() if not (frozen and n.startswith(prefix))}
    optimizer = torch.optim.SGD(
        trained.values(), lr=hyper.learning_rate, momentum=hyper.momentum, weight_decay=hyper.weight_decay
    )
    columns = []
    for batch in recorded_batches(hyper):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(sample().images[batch]), sample().labels[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        decayed = {n: p.grad + hyper.weight_decay * p.detach() for n, p in trained.items() if p.grad is not None}
        head = [g for n, g in decayed.items() if n.startswith(prefix)]
        columns.append(
            (
                float(loss.detach()),
                norm([g for n, g in decayed.items() if not n.startswith(prefix)]),
                norm(head) if head else 0.0,
            )
        )
        optimizer.step()
    return start_of(model), np.array(columns).T


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loop_is_torch_sgd_on_the_same_batches(architecture: str, frozen: bool) -> None:
    _, end, log = run(architecture, freeze_head=frozen)
    expected, (loss, shared, head) = reference(architecture, HYPER, frozen)
    assert end.keys() == expected.keys()
    for name, tensor in end.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert isinstance(log, TrainingLog)
    np.testing.assert_allclose(log.batch_loss, loss, rtol=1e-4)
    np.testing.assert_allclose(log.gradient_norm_shared, shared, rtol=1e-3)
    np.testing.assert_allclose(log.gradient_norm_head, head, rtol=1e-3)
    assert log.batch_size.tolist() == [len(batch) for batch in recorded_batches(HYPER)]
    assert log.finite


@pytest.mark.parametrize("sampling", ["reshuffle", "without_replacement", "with_replacement"])
@pytest.mark.parametrize("architecture", ["vit", "resnet_bn"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_drift_is_at_most_the_weighted_sum_of_logged_gradient_norms(
    architecture: str, momentum: float, sampling: str
) -> None:
    hyper = replace(HYPER, momentum=momentum, sampling=sampling)
    start, end, log = run(architecture, hyper)
    assert isinstance(log, TrainingLog)
    prefix = head_prefix(build_model(architecture))
    names = {n for n, _ in build_model(architecture).named_parameters()}
    eta, steps = hyper.learning_rate, hyper.steps
    weights = [sum(eta * momentum ** (last - k) for last in range(k, steps)) for k in range(steps)]
    for part, norms in ((False, log.gradient_norm_shared), (True, log.gradient_norm_head)):
        moved = norm([end[n] - start[n] for n in names if n.startswith(prefix) is part])
        assert 0 < moved <= np.dot(weights, norms) * (1 + 1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_step_moves_exactly_by_the_learning_rate_times_the_logged_norm(architecture: str) -> None:
    start, end, log = run(architecture, replace(HYPER, steps=1))
    assert isinstance(log, TrainingLog)
    prefix = head_prefix(build_model(architecture))
    names = {n for n, _ in build_model(architecture).named_parameters()}
    moved = norm([end[n] - start[n] for n in names if not n.startswith(prefix)])
    assert moved == pytest.approx(HYPER.learning_rate * log.gradient_norm_shared[0], rel=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_frozen_head_stays_put_and_the_model_is_released(architecture: str) -> None:
    model = build_model(architecture, seed=1)
    start = start_of(model)
    end, log = finetune(model, start, sample(), HYPER, SEED, freeze_head=True)
    prefix = head_prefix(model)
    for name in start:
        if name.startswith(prefix):
            assert torch.equal(end[name], start[name])
    assert (log.gradient_norm_head == 0).all()
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    pointers = {p.data_ptr() for p in model.parameters()}
    assert len(pointers) == len(list(model.parameters()))
    again, _ = finetune(model, start, sample(), HYPER, SEED, freeze_head=True)
    assert all(torch.equal(end[name], again[name]) for name in end), "a used model gives the same bits"


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_batches() -> None:
    _, first, _ = run("vit")
    _, again, _ = run("vit")
    assert all(torch.equal(first[name], again[name]) for name in first)
    model = build_model("vit", seed=1)
    other, _ = finetune(model, start_of(model), sample(), HYPER, SEED + 1)
    assert not torch.equal(first["blocks.0.mlp.fc1.weight"], other["blocks.0.mlp.fc1.weight"])


def test_a_schedule_scales_the_learning_rate_of_each_step() -> None:
    model = build_model("vit", seed=1)
    start = start_of(model)
    end, log = finetune(model, start, sample(), HYPER, SEED, schedule=lambda k: 1.0 if k < 3 else 0.0)
    stopped, _ = finetune(model, start, sample(), replace(HYPER, steps=3), SEED)
    assert all(torch.equal(end[name], stopped[name]) for name in end)
    assert len(log.batch_loss) == HYPER.steps


def test_batchnorm_statistics_move_and_count_batches() -> None:
    start, end, _ = run("resnet_bn")
    assert int(end["bn1.num_batches_tracked"]) == HYPER.steps
    assert not torch.equal(end["bn1.running_mean"], start["bn1.running_mean"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_divergence_is_reported_and_leaves_the_last_finite_state_and_a_finite_log(architecture: str) -> None:
    _, end, log = run(architecture, replace(HYPER, learning_rate=1e15, steps=60))
    assert isinstance(log, TrainingLog)
    assert not log.finite
    assert len(log.batch_loss) < 60
    for column in (log.batch_loss, log.gradient_norm_shared, log.gradient_norm_head):
        assert np.isfinite(column).all()
    assert [name for name, tensor in end.items() if not torch.isfinite(tensor).all()] == []


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size"), [(10, 3), (10, 5), (7, 7), (5, 1)])
def test_reshuffle_visits_every_sample_once_per_epoch_and_keeps_the_short_last_batch(n: int, size: int) -> None:
    per_epoch = -(-n // size)
    drawn = list(batches(n, size, 3 * per_epoch, "reshuffle", np.random.default_rng(0)))
    orders = []
    for epoch in range(3):
        part = drawn[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert [len(b) for b in part] == [size] * (n // size) + ([n % size] if n % size else [])
        order = np.concatenate(part)
        assert sorted(order.tolist()) == list(range(n))
        orders.append(tuple(order.tolist()))
    assert len(set(orders)) > 1, "the order changes from epoch to epoch"


def test_a_partial_last_epoch_stops_at_the_last_step() -> None:
    drawn = list(batches(10, 4, 5, "reshuffle", np.random.default_rng(0)))
    assert [len(batch) for batch in drawn] == [4, 4, 2, 4, 4]


def test_independent_batches_have_their_size_and_marginals() -> None:
    steps, n, size = 4000, 6, 4
    for sampling in ("without_replacement", "with_replacement"):
        drawn = list(batches(n, size, steps, sampling, np.random.default_rng(1)))  # type: ignore[arg-type]
        assert {len(batch) for batch in drawn} == {size}
        counts = Counter(np.concatenate(drawn).tolist())
        expected = steps * size / n
        assert all(abs(counts[i] - expected) < 6 * np.sqrt(expected) for i in range(n))
        distinct = all(len(set(batch.tolist())) == size for batch in drawn)
        assert distinct is (sampling == "without_replacement")


def test_subsets_of_one_seed_are_nested() -> None:
    parts = [set(nested_subset(40, share, 5).tolist()) for share in (0.01, 0.25, 0.5, 0.8, 1.0)]
    assert [len(part) for part in parts] == [1, 10, 20, 32, 40]
    assert all(small < large for small, large in pairwise(parts))
    assert parts[2] != set(nested_subset(40, 0.5, 6).tolist())


# --- pretraining -----------------------------------------------------------------------------------------------------


def test_pretraining_learns_is_reproducible_and_can_be_left_out() -> None:
    model = build_model("vit", seed=1)
    start = start_of(model)
    options = {"learning_rate": 0.005, "batch_size": 20, "seed": 2}

    def loss_of(state: dict[str, Tensor]) -> float:
        model.load_state_dict(state)
        model.eval()
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(sample().images), sample().labels))

    trained = pretrain(model, start, sample(), steps=30, **options)  # type: ignore[arg-type]
    again = pretrain(model, start, sample(), steps=30, **options)  # type: ignore[arg-type]
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    assert loss_of(trained) < 0.8 * loss_of(start)
    idle = pretrain(model, start, sample(), steps=0, **options)  # type: ignore[arg-type]
    assert all(torch.equal(idle[name], start[name]) for name in start)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(MergeboundError, match=r"batch_size = 31 .* 30 training samples"):
        run("vit", replace(HYPER, batch_size=31))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("steps", 0),
        ("batch_size", 0),
        ("data_share", 0.0),
        ("data_share", 1.01),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1e-9),
        ("sampling", "random"),
    ],
)
def test_hyperparameters_outside_their_domain_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(MergeboundError, match=f"^{field} = "):
        replace(HYPER, **{field: value})  # type: ignore[arg-type]
