"""Fast paths: close, never slower than what was measured, plain where nothing is; many networks in the same buffers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments.evaluate import fast as module
from experiments.evaluate.cpu import cpu
from experiments.evaluate.evaluate import evaluate, evaluate_tasks
from experiments.evaluate.fast import ALLOWED, Closeness, closeness, fast_evaluator, plain_evaluator, reuse
from experiments.evaluate.many import evaluate_many
from experiments.evaluate.paths import build, paths, prepared
from experiments.evaluate.predictions import Features
from experiments.evaluate.results import EvaluationSet
from experiments.measure.backbone import Readout
from experiments.models import build_model, head_prefix
from experiments.tasks.digits8 import digits8
from theory.errors import MergeboundError

HAVE = bool(cpu().bf16)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return digits8().tasks["identity"].test.images[:64]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Speeds by path instead of a race, so that tests do not depend on the machine."""
    speeds: dict[str, float] = {}
    monkeypatch.setattr(module, "seconds_of", lambda model, images: 1e-3)

    def race(models: dict[str, nn.Module], images: Tensor, seconds: float) -> dict[str, list[float]]:
        return {path: [1.0 / speeds.get(path, 1.0)] * 3 for path in models}

    monkeypatch.setattr(module, "race", race)
    monkeypatch.setattr(module, "paths", lambda model, allow, foldable, device: list(speeds) or ["fp32+fold"])
    return speeds


def statistics(model: nn.Module, seed: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def test_closeness_by_hand() -> None:
    reference = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    other = torch.tensor([[1.0, -1.5], [-2.0, 2.0]])
    found = closeness(reference, other)
    assert found.difference == pytest.approx(4.0 / math.sqrt(2.5))
    assert found.agreement == 0.5
    assert closeness(reference, reference) == Closeness(0.0, 1.0)
    assert not closeness(reference, torch.full((2, 2), torch.nan)).holds("bf16")
    assert Closeness(5e-5, 1.0).holds("fp32+fold")
    assert not Closeness(5e-3, 1.0).holds("fp32+fold")
    assert Closeness(5e-3, 0.96).holds("bf16+fold")
    assert not Closeness(5e-3, 0.9).holds("bf16")
    heads = [Readout(torch.eye(2), None), Readout(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), None)]
    worst = closeness(reference, other, heads)
    assert worst.agreement == min(closeness(reference, other, [head]).agreement for head in heads)


def test_the_fastest_close_path_is_taken(quick: dict[str, float], images: Tensor) -> None:
    model = statistics(build_model("resnet_bn"))
    quick |= {"fp32+fold": 1.5, "fp32+fold+channels_last": 2.0}
    found = fast_evaluator(model, images)
    assert (found.path, found.ratio) == ("fp32+fold+channels_last", 2.0)
    assert found.difference < 1e-4
    assert found.agreement == 1.0
    assert torch.allclose(found(images), model(images), atol=1e-4)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in found.model.modules())
    assert any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    assert {one.path: one.ratio for one in found.candidates} == quick
    assert found.machine == str(cpu())


def test_chunks_take_other_weights_too(quick: dict[str, float], images: Tensor) -> None:
    quick |= {"fp32+fold+channels_last+chunk32": 2.0}
    first, second = (statistics(build_model("resnet_bn", seed=seed), seed) for seed in (0, 1))
    found = fast_evaluator(first, images[:50])
    assert torch.allclose(found(images), first(images), atol=1e-4)
    found.load(second.state_dict())
    assert torch.allclose(found(images), second(images), atol=1e-4)
    assert torch.allclose(reuse(found, first)(images[:33]), first(images[:33]), atol=1e-4)


def test_plain_where_nothing_is_faster(quick: dict[str, float], images: Tensor) -> None:
    quick |= {"fp32+fold": 1.02, "fp32+fold+channels_last": 0.7}
    found = fast_evaluator(build_model("resnet_bn"), images)
    assert (found.path, found.ratio, found.difference) == ("fp32", 1.0, 0.0)
    assert torch.equal(found(images), found.plain(images))


def test_a_path_that_is_not_close_is_not_taken(
    quick: dict[str, float], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick |= {"fp32+fold": 9.0, "fp32+channels_last": 3.0}
    real = build

    def wrong(plain: nn.Module, path: str, *rest: object) -> nn.Module:
        twin = real(plain, path, *rest)  # type: ignore[arg-type]
        if "fold" in path:
            with torch.no_grad():
                next(iter(twin.parameters())).mul_(1.01)
        return twin

    monkeypatch.setattr(module, "build", wrong)
    found = fast_evaluator(build_model("resnet_bn"), images)
    assert found.path == "fp32+channels_last"
    assert {one.path: one.dropped for one in found.candidates} == {
        "fp32+fold": "not close",
        "fp32+channels_last": "",
    }

    def broken(plain: nn.Module, path: str, *rest: object) -> nn.Module:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(module, "build", broken)
    found = fast_evaluator(build_model("resnet_bn"), images)
    assert found.path == "fp32"
    assert {one.dropped for one in found.candidates} == {"no kernel for this"}


def test_a_real_race_is_never_lost(images: Tensor) -> None:
    found = fast_evaluator(build_model("vit"), images, seconds=0.05)
    assert found.path == "fp32" or found.ratio >= module.MARGIN
    assert [one.path for one in found.candidates] == (["bf16", "bf16+unfused"] if HAVE else [])


def test_candidates() -> None:
    cpu_device = torch.device("cpu")
    conv = paths(build_model("resnet_bn"), ALLOWED, True, cpu_device)
    assert conv[:3] == ["fp32+fold", "fp32+fold+channels_last", "fp32+fold+channels_last+chunk32"]
    assert conv[3:] == (["bf16+fold", "bf16+fold+channels_last"] if HAVE else [])
    assert paths(build_model("resnet_bn"), ("channels_last",), True, cpu_device) == ["fp32+channels_last"]
    assert paths(build_model("vit"), ("fold", "channels_last"), False, cpu_device) == []
    assert "bf16" in paths(nn.Linear(2, 2), ("bf16",), False, torch.device("cuda"))


@pytest.mark.parametrize("architecture", ["resnet_bn", "resnet_gn", "vit"])
def test_bfloat16_is_close_and_logits_are_not_rounded(architecture: str, images: Tensor) -> None:
    model = statistics(build_model(architecture)).requires_grad_(False)
    last = head_prefix(model).removesuffix(".")
    twin = build(model, "bf16", (), last)
    out = twin(prepared(images, "bf16"))
    assert out.dtype == torch.float32
    assert not torch.equal(out, out.bfloat16().float())
    found = closeness(model(images), out)
    assert 0 < found.difference < 0.1
    for part in twin.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean.dtype == part.weight.dtype == torch.float32
        elif isinstance(part, nn.Conv2d):
            assert part.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_attention_written_out_is_the_same(images: Tensor) -> None:
    model = build_model("vit").eval().requires_grad_(False)
    assert torch.allclose(build(model, "fp32+unfused", (), "")(images), model(images), atol=1e-5)


def test_other_weights_and_another_network(quick: dict[str, float], images: Tensor) -> None:
    quick |= {"fp32+fold+channels_last": 2.0}
    first, second = (statistics(build_model("resnet_bn", seed=seed), seed) for seed in (0, 1))
    found = fast_evaluator(first, images)
    again = reuse(found, second)
    found.load(second.state_dict())
    assert torch.allclose(found(images), second(images), atol=1e-4)
    assert torch.allclose(again(images), second(images), atol=1e-4)
    assert (again.path, again.ratio) == (found.path, 2.0)
    assert found.check().holds(found.path)
    assert torch.equal(found.as_plain()(images), found.plain(images))
    with torch.no_grad():
        next(iter(found.model.parameters())).mul_(1.1)
    assert not found.check().holds(found.path)
    lacking = dict(second.state_dict())
    lacking.pop("conv1.weight")
    with pytest.raises(MergeboundError, match=r"no tensor 'conv1\.weight'"):
        found.load(lacking)
    with pytest.raises(MergeboundError, match="unknown tensor 'x'"):
        found.load({**second.state_dict(), "x": torch.zeros(1)})
    with pytest.raises(MergeboundError, match="size mismatch"):
        found.load({**second.state_dict(), "conv1.weight": torch.zeros(1)})


def heads() -> dict[str, Readout]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: Readout(torch.randn(10, 40, generator=generator), torch.randn(10, generator=generator))
        for name in ("identity", "flip")
    }


def sets() -> list[EvaluationSet]:
    family = digits8(tasks=("identity", "flip"))
    return [EvaluationSet.of_split(name, task.test, 0) for name, task in family.tasks.items()]


def test_many_networks_are_those_evaluated_one_by_one(quick: dict[str, float], images: Tensor) -> None:
    quick |= {"fp32+fold+channels_last": 2.0}
    models = [statistics(build_model("resnet_bn", seed=seed), seed) for seed in range(2)]
    own, tasks = heads(), sets()
    states = [{n: t for n, t in m.state_dict().items() if not n.startswith("fc.")} for m in models]
    before = {n: t.clone() for n, t in models[0].state_dict().items()}
    chosen = fast_evaluator(models[0], images, heads=tuple(own.values()))
    assert isinstance(chosen.plain, Features)
    for fast in (None, chosen):
        for memory in (1 << 30, 150_000):
            found = list(evaluate_many(states, models[0], tasks, heads=own, fast=fast, memory=memory, batch_size=64))
            for one, model in zip(found, models, strict=True):
                wanted = evaluate_tasks(model, own, tasks, resamples=0)
                assert one.path == ("fp32" if fast is None else "fp32+fold+channels_last")
                assert one.joint["loss"].value == pytest.approx(wanted.joint["loss"].value, rel=1e-4)
                assert one.joint["accuracy"].value == pytest.approx(wanted.joint["accuracy"].value, abs=0.003)
                assert len(one.tasks[0].scores) == 0
                assert one.tasks[0].digest == tasks[0].digest
    assert all(torch.equal(before[n], t) for n, t in models[0].state_dict().items())


def test_many_with_the_networks_own_head_and_intervals() -> None:
    models = [statistics(build_model("resnet_bn", seed=seed), seed) for seed in range(2)]
    tasks = sets()
    found = list(evaluate_many((m.state_dict() for m in models), models[0], tasks, resamples=50, keep_scores=True))
    for one, model in zip(found, models, strict=True):
        wanted = evaluate(model, tasks[1], resamples=50)
        assert one["flip"].metrics == wanted.metrics
        assert len(one["flip"].scores) == 400
        assert one.joint["accuracy"].low <= one.joint["accuracy"].value


def test_a_network_that_is_not_close_falls_back(
    quick: dict[str, float], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick |= {"fp32+fold": 2.0}
    model = statistics(build_model("resnet_bn"))
    fast = fast_evaluator(model, images)
    verdicts = iter([Closeness(0.0, 1.0), Closeness(0.5, 1.0), Closeness(0.0, 1.0)])
    monkeypatch.setattr(module.FastModel, "check", lambda self: next(verdicts))
    found = list(evaluate_many([model.state_dict()] * 3, model, sets(), fast=fast))
    assert [one.path for one in found] == ["fp32+fold", "fp32", "fp32+fold"]
    assert found[1]["flip"].metrics == evaluate(model, sets()[1], resamples=0).metrics


def test_results_carry_the_path(quick: dict[str, float], images: Tensor) -> None:
    quick |= {"fp32+fold": 2.0}
    fast = fast_evaluator(statistics(build_model("resnet_bn")), images)
    assert evaluate(fast, sets()[0], resamples=0).to_row()["path"] == "fp32+fold"
    assert evaluate(plain_evaluator(build_model("vit")), sets()[0], resamples=0).path == "fp32"
    assert evaluate(build_model("vit").double(), double(sets()[0]), resamples=0).path == "fp64"


def double(data: EvaluationSet) -> EvaluationSet:
    from experiments.tasks.types import Split

    split = data.data
    assert isinstance(split, Split)
    return EvaluationSet.of_split("t", Split(split.images.double(), split.labels, np.asarray(split.source)))


def test_errors(images: Tensor) -> None:
    model = build_model("resnet_bn")
    with pytest.raises(MergeboundError, match="'int8' is no part"):
        fast_evaluator(model, images, allow=("int8",))
    with pytest.raises(MergeboundError, match="probe of 1 images"):
        fast_evaluator(model, images[:1])
    with pytest.raises(MergeboundError, match="'flip' has no head"):
        evaluate_many([], model, sets(), heads={"identity": heads()["identity"]})
    with pytest.raises(MergeboundError, match="made with heads"):
        evaluate_many([], model, sets(), heads=heads(), fast=plain_evaluator(model))


def test_processor(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name\t: Some  CPU @ 2GHz\nflags : fpu avx512_bf16 amx_bf16\n")
    found = cpu(file)
    assert found.name == "Some CPU @ 2GHz"
    detected = {name for name, there in torch.cpu.get_capabilities().items() if there is True}
    assert set(found.bf16) <= detected
    assert found.known
    assert cpu(tmp_path / "missing").name
    assert str(found).startswith("Some CPU @ 2GHz (")
