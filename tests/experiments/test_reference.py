"""The reference loop against torch's own optimizers, a literal SAM, and the demo's loop bit by bit."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.finetune.loop import Hyperparameters, TrainingLog, finetune
from experiments.finetune.reference import train_run
from experiments.finetune.schedules import schedule
from experiments.grid.run_spec import RunSpec
from experiments.models import build_model, head_prefix
from experiments.tasks.types import Split
from tests.experiments.reference_nets import Net, assert_same, length, recorded, sample, spec, start_of
from theory.errors import MergeboundError

SGD = {"momentum": 0.8, "weight_decay": 0.03}
ADAM = {"optimizer": "adamw", "learning_rate": 0.01, "momentum": 0.9, "beta2": 0.95, "weight_decay": 0.1}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "heavy ball": SGD | {"schedule": "cosine", "warm_up": 4},
    "nesterov": SGD | {"nesterov": True, "schedule": "linear"},
    "adamw": ADAM | {"schedule": "cosine"},
    "adamw without first moment": ADAM | {"momentum": 0.0, "epsilon": 1e-3},
    "smoothed": SGD | {"label_smoothing": 0.2},
    "clipped": SGD | {"clip_norm": 0.6, "schedule": "linear", "warm_up": 2},
    "clipped adamw": ADAM | {"clip_norm": 0.7, "label_smoothing": 0.1, "epsilon": 1e-4},
}


def torch_optimizer(run: RunSpec, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if run.optimizer == "adamw":
        betas = (run.momentum, run.beta2)
        return torch.optim.AdamW(parameters, run.learning_rate, betas, run.epsilon, run.weight_decay)
    return torch.optim.SGD(
        parameters, run.learning_rate, run.momentum, weight_decay=run.weight_decay, nesterov=run.nesterov
    )


def with_torch(run: RunSpec, data: Split) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """The loop that anybody would write, in float64, with the columns of its log."""
    model = Net().double().train()
    parameters = list(model.parameters())
    optimizer = torch_optimizer(run, parameters)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(run.schedule, run.steps, warm_up=run.warm_up))
    decay = 0.0 if run.optimizer == "adamw" else run.weight_decay
    head = list(model.head.parameters())
    columns: dict[str, list[float]] = {field: [] for field in LOGGED}

    def norms(ends: str) -> None:
        parts = {"shared": [p for p in parameters if all(p is not h for h in head)], "head": head}
        for part, members in parts.items():
            columns[f"{ends}_{part}"].append(length([p.grad + decay * p for p in members if p.grad is not None]))

    for images, labels in recorded(run, data):
        optimizer.zero_grad()
        logs = model(images).log_softmax(1)
        wanted = (1 - run.label_smoothing) * F.one_hot(
            labels, logs.shape[1]
        ).double() + run.label_smoothing / logs.shape[1]
        loss = -(wanted * logs).sum(1).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        norms("gradient_norm")
        whole = length([p.grad for p in parameters if p.grad is not None])
        if run.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, run.clip_norm)
        norms("used_norm")
        columns["clip_factor"].append(length([p.grad for p in parameters if p.grad is not None]) / whole)
        columns["batch_loss"].append(float(loss.detach()))
        columns["batch_size"].append(len(labels))
        optimizer.step()
        scheduler.step()
    return start_of(model), {name: np.array(column) for name, column in columns.items()}


LOGGED = tuple(f.name for f in dataclasses.fields(TrainingLog) if f.name not in ("seconds", "finite"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_what_torch_does_on_the_same_batches_and_its_log_says_what_happened(name: str) -> None:
    run = spec(precision="float64", **RUNS[name])
    result = train_run(run, Net(), start_of(Net()), sample())
    expected, log = with_torch(run, sample())
    assert result.outcome == "finished"
    assert result.states.keys() == {30}
    assert_same(result.states[30], expected, 1e-12)
    for column in LOGGED[:4] if run.clip_norm is None else LOGGED:
        np.testing.assert_allclose(getattr(result.log, column), log[column], rtol=1e-10, err_msg=column)
    if run.clip_norm is None:
        assert [getattr(result.log, column) for column in LOGGED[4:]] == [None] * 3
    else:
        assert 0 < (log["clip_factor"] < 0.99).sum() < 30, "some batches are clipped and some are not"


def literal_sam(run: RunSpec, data: Split) -> dict[str, Tensor]:
    model = Net().double().train()
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for k, (images, labels) in enumerate(recorded(run, data)):
        first = torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()))
        size = torch.sqrt(sum((g**2).sum() for g in first))  # type: ignore[arg-type]
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p, g in zip(other.parameters(), first, strict=True):
                p += run.sam_radius * g / size
        second = torch.autograd.grad(F.cross_entropy(other(images), labels), list(other.parameters()))
        if run.clip_norm is not None:
            clip = min(1.0, run.clip_norm / (length(list(second)) + 1e-6))
            second = tuple(clip * g for g in second)
        with torch.no_grad():
            for p, v, g in zip(model.parameters(), velocity, second, strict=True):
                v.copy_(run.momentum * v + g + run.weight_decay * p)
                p -= run.learning_rate * schedule(run.schedule, run.steps)(k) * v
    return start_of(model)


@pytest.mark.parametrize("changes", [{}, {"clip_norm": 0.7, "schedule": "cosine"}])
def test_sam_is_its_literal_definition_and_batchnorm_counts_one_pass(changes: dict[str, Any]) -> None:
    run = spec(optimizer="sam", sam_radius=0.3, precision="float64", **SGD, **changes)
    result = train_run(run, Net(), start_of(Net()), sample())
    assert_same(result.states[30], literal_sam(run, sample()), 1e-12)
    assert int(result.states[30]["bn.num_batches_tracked"]) == 30
    plain = train_run(run.model_copy(update={"optimizer": "sgd"}), Net(), start_of(Net()), sample())
    assert float((plain.states[30]["body.weight"] - result.states[30]["body.weight"]).abs().max()) > 1e-3
    assert plain.log.batch_loss[0] == result.log.batch_loss[0], "the logged loss is that before the ascent"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("trained", ["full", "backbone"])
@pytest.mark.parametrize("architecture", ["vit", "resnet_bn"])
def test_the_bits_are_those_of_the_demos_loop(architecture: str, trained: str, precision: Any) -> None:
    rng = np.random.default_rng([0, 2])
    images = torch.from_numpy(rng.standard_normal((20, 1, 8, 8), dtype=np.float32))
    data = Split(images, torch.from_numpy(rng.integers(0, 10, 20)), np.arange(20))
    hyper = Hyperparameters(0.05, steps=5, batch_size=6, data_share=0.75, momentum=0.6, weight_decay=0.01)
    model = build_model(architecture, seed=1)
    start = start_of(model)
    state, log = finetune(
        model,
        start,
        data,
        hyper,
        11,
        freeze_head=trained == "backbone",
        schedule=schedule("cosine", 5),
        precision=precision,
    )
    run = spec(**dataclasses.asdict(hyper), seed=11, schedule="cosine", precision=precision, trained=trained)
    result = train_run(run, model, start, data)
    assert_same(result.states[5], state)
    for column in LOGGED[:4]:
        np.testing.assert_array_equal(getattr(result.log, column), getattr(log, column))


def test_checkpoints_are_the_ends_of_shorter_runs_and_stay_as_they_were() -> None:
    run = spec(steps=9, checkpoints=(2, 5, 9), **SGD)
    states = train_run(run, Net(), start_of(Net()), sample()).states
    assert list(states) == [2, 5, 9]
    for step, state in states.items():
        short = train_run(spec(steps=step, **SGD), Net(), start_of(Net()), sample())
        assert_same(state, short.states[step])
    assert len({tensor.data_ptr() for state in states.values() for tensor in state.values()}) == 3 * len(states[9])


def test_bfloat16_is_close_to_float32_and_not_the_same() -> None:
    results = {p: train_run(spec(precision=p), Net(), start_of(Net()), sample()) for p in ("float32", "bfloat16")}
    exact, rough = results["float32"].states[30], results["bfloat16"].states[30]
    moved = length([exact[n] - start_of(Net())[n] for n in ("conv.weight", "body.weight", "head.weight")])
    apart = length([exact[n] - rough[n] for n in ("conv.weight", "body.weight", "head.weight")])
    assert 0 < apart < 0.03 * moved
    assert {t.dtype for t in rough.values()} == {torch.float32, torch.int64}
    np.testing.assert_allclose(results["bfloat16"].log.batch_loss, results["float32"].log.batch_loss, rtol=0.02)


@pytest.mark.parametrize("name", ["heavy ball", "clipped"])
def test_drift_is_at_most_the_weighted_sum_of_the_norms_that_were_used(name: str) -> None:
    run = spec(precision="float64", **RUNS[name])
    result = train_run(run, Net(), start_of(Net()), sample())
    eta = [run.learning_rate * schedule(run.schedule, run.steps, warm_up=run.warm_up)(k) for k in range(run.steps)]
    weight = [sum(eta[j] * run.momentum ** (j - k) for j in range(k, run.steps)) for k in range(run.steps)]
    log = result.log
    used = {False: log.gradient_norm_shared, True: log.gradient_norm_head}
    if run.clip_norm is not None:
        assert log.used_norm_shared is not None
        assert log.used_norm_head is not None
        used = {False: log.used_norm_shared, True: log.used_norm_head}
    for part, norms in used.items():
        names = [n for n, _ in Net().named_parameters() if n.startswith(head_prefix(Net())) is part]
        moved = length([result.states[30][n] - start_of(Net())[n] for n in names])
        assert 0 < moved <= np.dot(weight, norms) * (1 + 1e-12)


def test_nothing_of_the_callers_changes_and_what_is_dropped_out_is_named_by_the_seed() -> None:
    model = Net(drop=0.5)
    start, before = start_of(model), torch.get_rng_state()
    run = spec(steps=6)
    first = train_run(run, model, start, sample())
    torch.rand(3)
    again = train_run(run, model, start, sample())
    assert_same(first.states[6], again.states[6])
    torch.set_rng_state(before)
    drawn = torch.rand(3)
    torch.set_rng_state(before)
    train_run(run, model, start, sample())
    assert torch.equal(torch.rand(3), drawn)
    assert_same(start_of(model), start)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    plain = train_run(run, Net(), start, sample())
    assert not torch.equal(plain.states[6]["body.weight"], first.states[6]["body.weight"])


def test_sam_drops_the_same_units_in_both_passes() -> None:
    """With a vanishing radius SAM is SGD only if both passes compute the same function."""
    run = spec(optimizer="sam", sam_radius=1e-9, precision="float64", steps=6)
    model = Net(drop=0.5)
    sam = train_run(run, model, start_of(model), sample())
    sgd = train_run(run.model_copy(update={"optimizer": "sgd"}), model, start_of(model), sample())
    assert_same(sam.states[6], sgd.states[6], 1e-6)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(MergeboundError, match=r"batch_size = 19 .* 18 training samples"):
        train_run(spec(batch_size=19), Net(), start_of(Net()), sample())
