"""Experts with written-out backward passes against the sequential reference loop (autograd)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from experiments.bases.spec import BaseSpec
from experiments.finetune.cohort.chain import Chain, read_chain
from experiments.finetune.cohort.feeding import Feed
from experiments.finetune.cohort.train import train_cohort
from experiments.finetune.loop import batches
from experiments.finetune.reference import train_run
from experiments.grid.result import Cohort, RunResult
from experiments.grid.run_spec import RunSpec
from experiments.inputs.augment import augmentation
from experiments.inputs.order import with_epochs
from experiments.inputs.resident_data import Resident
from experiments.inputs.shares import nested_subset
from experiments.inputs.training_data import TrainingData
from experiments.models import build_model, replace_head
from experiments.tasks.form import InputFormat
from experiments.tasks.types import Split
from theory.errors import MergeboundError

ENGINES = ("compiled", "batched")


def run(architecture: str = "mlp_6", **fields: Any) -> RunSpec:
    base = BaseSpec(kind="random", architecture=architecture, classes=3, options={"img_size": 4})
    values = dict(task="none", base=base, learning_rate=0.1, steps=20, batch_size=5, precision="float64")
    return RunSpec.model_validate(values | fields)


def sample(n: int, seed: int, augment: str = "none") -> Resident:
    rng = np.random.default_rng([seed, 0x7E57])
    form = InputFormat(1, 4, 4, (0.5,), (0.5,), "bilinear", 1.0)
    pixels = torch.from_numpy(rng.integers(0, 256, (n, 1, 4, 4)).astype(np.uint8))
    labels = torch.from_numpy(rng.integers(0, 3, n))
    return Resident(pixels, labels, np.arange(n), form, augmentation(augment), seed, "t", torch.float64)


def network(architecture: str = "mlp_6") -> nn.Module:
    return build_model(architecture, 3, 0, img_size=4).double()


def start(architecture: str, seed: int) -> dict[str, Tensor]:
    model = build_model(architecture, 3, seed, img_size=4).double()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def both(runs: list[RunSpec], data: list[TrainingData], engine: str, chunk: int = 99) -> list[RunResult]:
    """Trains the runs and checks all that they leave against the reference."""
    architecture = runs[0].architecture
    starts = [start(architecture, m) for m in range(len(runs))]
    cohort = Cohort("c", tuple(map(str, range(len(runs)))), "written", chunk, {"engine": engine})
    found = train_cohort(runs, network(architecture), starts, data, cohort)
    for each, result, x_0, d in zip(runs, found, starts, data, strict=True):
        agree(result, train_run(each, network(architecture), x_0, d), each)
    return found


def agree(found: RunResult, wanted: RunResult, each: RunSpec) -> None:
    assert found.outcome == wanted.outcome
    assert list(found.states) == list(wanted.states)
    for step, state in wanted.states.items():
        assert list(found.states[step]) == list(state)
        for name, tensor in state.items():
            assert found.states[step][name].dtype == tensor.dtype
            np.testing.assert_allclose(found.states[step][name], tensor, rtol=1e-10, atol=1e-10, err_msg=name)
    fields = ["batch_size", "batch_loss", "gradient_norm_shared", "gradient_norm_head"]
    fields += ["clip_factor", "used_norm_shared", "used_norm_head"] if each.clip_norm else []
    for name in fields:
        np.testing.assert_allclose(getattr(found.log, name), getattr(wanted.log, name), atol=1e-10, err_msg=name)
    assert found.log.finite == wanted.log.finite
    assert found.seconds > 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("architecture", ["logistic", "mlp_6", "mlp_7_5_gelu", "mlp_4_tanh"])
def test_same_numbers_as_the_reference_after_twenty_steps(engine: str, architecture: str) -> None:
    runs = [
        run(architecture, learning_rate=0.3, momentum=0.9, weight_decay=0.01, seed=1, checkpoints=(7, 20)),
        run(architecture, steps=13, schedule="cosine", warm_up=3, label_smoothing=0.1, seed=2),
        run(architecture, batch_size=3, data_share=0.5, momentum=0.5, seed=3, clip_norm=0.2, weight_decay=0.1),
        run(architecture, steps=20, sampling="with_replacement", seed=4, checkpoints=(13, 20)),
    ]
    shared = sample(23, 0)
    found = both(runs, [shared, sample(17, 1), shared, shared], engine)
    assert found[2].log.clip_factor is not None
    assert found[2].log.clip_factor.min() < 1.0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "adamw", "momentum": 0.8, "beta2": 0.9, "weight_decay": 0.1, "learning_rate": 0.01},
        {"optimizer": "sam", "momentum": 0.9, "sam_radius": 0.1},
        {"nesterov": True, "momentum": 0.9, "weight_decay": 0.02},
        {"trained": "head", "weight_decay": 0.1},
        {"trained": "backbone", "momentum": 0.9, "clip_norm": 0.1},
    ],
)
def test_other_rules_and_parts(engine: str, fields: dict[str, Any]) -> None:
    runs = [run(seed=1, **fields), run(seed=2, **{**fields, "learning_rate": 0.05}, batch_size=7, steps=11)]
    both(runs, [sample(20, 0), sample(15, 1)], engine, chunk=1 + (fields.get("trained") == "head"))


@pytest.mark.parametrize("engine", ENGINES)
def test_augmented_samples_are_those_of_the_reference(engine: str) -> None:
    data = [sample(12, 5, "light"), sample(12, 6, "light")]
    both([run(seed=5, batch_size=5, steps=9), run(seed=6, batch_size=4, steps=7)], list(data), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_diverges_stops_alone_at_its_last_finite_state(engine: str) -> None:
    runs = [run(seed=1), run(seed=2, learning_rate=1e90, weight_decay=1e60), run(seed=3, steps=30)]
    found = both(runs, [sample(20, 0)] * 3, engine)
    assert [result.outcome for result in found] == ["finished", "diverged", "finished"]
    (step,) = found[1].states
    assert len(found[1].log.batch_loss) == step < 20


@given(st.integers(1, 30), st.integers(1, 12), st.floats(0.2, 1.0), st.integers(0, 99), st.sampled_from([1, 3, 500]))
@settings(max_examples=40, deadline=None)
def test_the_order_of_batches_is_the_loops(n: int, size: int, share: float, seed: int, longest: int) -> None:
    rows = nested_subset(n, share, seed)
    size = min(size, len(rows))
    one = run(batch_size=size, data_share=share, seed=seed, steps=11)
    feed = Feed(
        [one], [Split(torch.zeros(n, 1), torch.zeros(n, dtype=torch.int64), np.arange(n))], [4, 11], torch.float64
    )
    seen = [block.index[0, step, : block.counts[0, step]] for block in feed for step in range(block.counts.shape[1])]
    order = batches(len(rows), size, 11, "reshuffle", np.random.default_rng([seed, 0xBA7C]))
    wanted = [rows[batch] for batch, _ in with_epochs(order, len(rows))]
    assert len(seen) == 11
    for found, batch in zip(seen, wanted, strict=True):
        np.testing.assert_array_equal(found, batch)


def test_float32_within_rounding() -> None:
    runs = [run("mlp_6", precision="float32", momentum=0.9, seed=s) for s in range(3)]
    starts = [{k: v.float() for k, v in start("mlp_6", m).items()} for m in range(3)]
    for engine in ENGINES:
        cohort = Cohort("c", ("a", "b", "c"), "written", 3, {"engine": engine})
        found = train_cohort(runs, network(), starts, [sample(20, 0)] * 3, cohort)
        for each, result, x_0 in zip(runs, found, starts, strict=True):
            wanted = train_run(each, network().float(), x_0, sample(20, 0))
            for name, tensor in wanted.states[20].items():
                assert result.states[20][name].dtype == torch.float32
                np.testing.assert_allclose(result.states[20][name], tensor, rtol=1e-4, atol=2e-6)


class Sequence(nn.Sequential):
    def get_classifier(self) -> nn.Module:
        return self[-1]


def test_what_is_a_chain() -> None:
    plain = Sequence(nn.Flatten(), nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Identity(), nn.Linear(8, 3))
    chain = read_chain(plain)
    assert isinstance(chain, Chain)
    assert (chain.size, chain.shared) == (16 * 8 + 27, 128)
    state = {name: tensor.detach() for name, tensor in plain.state_dict().items()}
    row = chain.rows([state], torch.float32, torch.device("cpu"))
    back = chain.state(row[0], state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    images = torch.randn(5, 16)
    by_hand = (images @ chain.matrix(row[0], chain.layers[0])).relu() @ chain.matrix(row[0], chain.layers[1])
    torch.testing.assert_close(by_hand + row[0, -3:], plain(images))
    for wrong, word in (
        (nn.Sequential(nn.Linear(4, 3)), "no classifier"),
        (Sequence(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), "BatchNorm1d"),
        (Sequence(nn.ReLU(), nn.Linear(4, 3)), "does not follow"),
        (Sequence(nn.Linear(4, 4), nn.GELU("tanh"), nn.Linear(4, 3)), "approximated"),
        (nn.Conv2d(1, 3, 1), "Conv2d"),
    ):
        reason = read_chain(wrong)
        assert isinstance(reason, str)
        assert word in reason


def test_what_cannot_be_trained_is_refused() -> None:
    data, cohort = [sample(9, 0)], Cohort("c7", ("a",), "written")
    with pytest.raises(MergeboundError, match=r"c7.*Conv2d.*take 'loop'"):
        train_cohort([run()], Sequence(nn.Conv2d(1, 3, 1), nn.Linear(3, 3)), [{}], list(data), cohort)
    with pytest.raises(MergeboundError, match="precision bfloat16"):
        train_cohort([run(precision="bfloat16")], network(), [start("mlp_6", 0)], list(data), cohort)
    with pytest.raises(MergeboundError, match="batch_size = 12"):
        train_cohort([run(batch_size=12)], network(), [start("mlp_6", 0)], list(data), cohort)
    logistic = run("logistic", trained="backbone")
    with pytest.raises(MergeboundError, match="nothing to train"):
        train_cohort([logistic], network("logistic"), [start("logistic", 0)], list(data), cohort)
    with pytest.raises(MergeboundError, match="0 samples"):
        train_cohort([run()], network(), [start("mlp_6", 0)], [], cohort)
    with pytest.raises(MergeboundError, match=r"layers\.0\.weight.*\(6, 16\)"):
        train_cohort([run()], network(), [start("mlp_7_5_gelu", 0)], list(data), cohort)


def test_names_of_small_networks() -> None:
    small = build_model("mlp_64", 10, 0)
    assert sum(p.numel() for p in small.parameters()) == 64 * 64 + 64 + 650
    assert isinstance(replace_head(build_model("mlp_9_8_tanh", 4, 0, img_size=5, in_chans=3), 2), nn.Module)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(small(x), small.head(torch.relu(small.layers[0](x.flatten(1)))))  # type: ignore[operator,index,union-attr]
    with pytest.raises(MergeboundError, match="mlp_64"):
        build_model("mlp_0", 10)
    with pytest.raises(MergeboundError, match="no option 'depth'"):
        build_model("mlp_8", 10, depth=3)
