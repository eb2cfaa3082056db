"""``mergebound predict`` against independent measurements of the merges that it does not form."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.cli import main
from experiments.commands.options import spread
from experiments.models import build_model
from experiments.predict import Group, Options, Report, load_group, predict
from experiments.predict.collecting import measured_smoothness
from merging.checkpoint import save_state_dict
from merging.merge import merge_state_dicts
from merging.partition import partition
from theory.errors import MergeboundError

torch.set_num_threads(1)
Build = Callable[..., nn.Module]


class Linear(nn.Module):
    """Logits that are affine in the body for a fixed head: tangent and secant are exact."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Linear(64, 6)
        self.head = nn.Linear(6, classes)

    def get_classifier(self) -> nn.Linear:
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(images.flatten(1)))
        return out


def images_file(path: Path, classes: int, seed: int, count: int = 40) -> Path:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 8, 8)).astype(np.float32)
    np.savez(path, x_val=x, y_val=rng.integers(0, classes, count))
    return path


def random_states(make: Callable[[int], nn.Module], scale: float, classes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """A base, and one expert per entry of ``classes``: the base's body plus noise, and a head of its own."""
    base = make(classes[0]).state_dict()
    states = [base]
    for number, outputs in enumerate(classes):
        generator = torch.Generator().manual_seed(number + 1)
        own = make(outputs).state_dict()
        for name, tensor in own.items():
            start = base[name] if base[name].shape == tensor.shape else tensor
            if tensor.is_floating_point():
                own[name] = start + scale * torch.randn(tensor.shape, generator=generator)
        states.append(own)
    return states


def write(folder: Path, states: list[dict[str, Tensor]], architecture: str) -> list[Path]:
    paths = [folder / f"{name}.safetensors" for name in ("base", *(f"e{i}" for i in range(1, len(states))))]
    for path, state in zip(paths, states, strict=True):
        save_state_dict(path, state, {"architecture": architecture})
    return paths


@pytest.fixture
def linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Base and three experts of the linear network, and their data (heads with 4, 3 and 5 classes)."""

    def build(architecture: str, classes: int = 4, seed: int = 0, **options: object) -> nn.Module:
        torch.manual_seed(seed)
        return Linear(classes)

    monkeypatch.setattr("experiments.predict_group.build_model", build)
    monkeypatch.chdir(tmp_path)
    classes = (4, 3, 5)
    paths = write(tmp_path, random_states(lambda c: build("vit", c), 0.3, classes), "vit")
    return [*paths, *(images_file(tmp_path / f"d{i}.npz", c, i) for i, c in enumerate(classes))]


def group_of(files: list[Path], **options: Any) -> Group:
    n = (len(files) - 1) // 2
    return load_group(files[0], files[1 : n + 1], files[n + 1 :], **options)


def measured(network: nn.Module, body: dict[str, Tensor], head: dict[str, Tensor], data: Path, private: str) -> float:
    """Loss of a merged body under an expert's head, by an ordinary forward pass."""
    state = {name: head[name] if name.startswith(private) else tensor for name, tensor in body.items()}
    state |= {name: tensor for name, tensor in head.items() if name.startswith(private)}
    network.load_state_dict(state)
    arrays = np.load(data)
    with torch.no_grad():
        logits = network.eval()(torch.from_numpy(arrays["x_val"])[:, None])
    return float(nn.functional.cross_entropy(logits.double(), torch.from_numpy(arrays["y_val"])))


def hits(network: nn.Module, body: dict[str, Tensor], head: dict[str, Tensor], data: Path, private: str) -> float:
    """Accuracy of a merged body under an expert's head."""
    network.load_state_dict({n: head[n] if n.startswith(private) else t for n, t in body.items()})
    arrays = np.load(data)
    with torch.no_grad():
        found = network.eval()(torch.from_numpy(arrays["x_val"])[:, None]).argmax(dim=1).numpy()
    return float((found == arrays["y_val"]).mean())


def merged_state(files: list[Path], method: str, alpha: tuple[float, ...], **settings: Any) -> dict[str, Tensor]:
    states = [load_file(path) for path in files[: (len(files) + 1) // 2]]
    names = [f"e{i}" for i in range(1, len(states))]
    parts = partition(states[0], ("head.*", "fc.*"))
    coefficients = alpha if method == "risk_optimal" else None
    experts = dict(zip(names, states[1:], strict=True))
    return merge_state_dicts(method, states[0], experts, partition=parts, coefficients=coefficients, **settings)


def test_exact_for_a_linear_network(linear: list[Path]) -> None:
    report = predict(group_of(linear), Options(alphas=((0.2, -0.7, 1.3),), bounds=(-1.0, 1.0)))
    assert {row.method for row in report.methods} == {"average", "task_arithmetic", "ties", "dare", "risk_optimal"}
    classes = (4, 3, 5)
    for row in report.methods:
        body = merged_state(linear, row.method, row.coefficients, **row.settings)
        for j, task in enumerate(row.tasks):
            truth = measured(Linear(classes[j]), body, load_file(linear[j + 1]), linear[j + 4], "head.")
            assert task.tangent is not None
            assert task.tangent.value == pytest.approx(truth, rel=1e-5)
            if row.linear:
                assert task.secant is not None
                assert task.secant.value == pytest.approx(truth, rel=1e-5)
        assert row.verdict in ("narrow", "wide") or not row.linear
        assert row.risk.value == pytest.approx(np.mean([t.middle.value for t in row.tasks if t.middle]))
        assert row.cost.value == pytest.approx(row.risk.value - report.expert_risk.value)


def test_dispersion_is_the_mean_squared_distance(linear: list[Path]) -> None:
    group = group_of(linear)
    for row in predict(group, Options(bound=False)).methods:
        vector = group.networks[0].vector(merged_state(linear, row.method, row.coefficients, **row.settings))
        truth = (group.vectors - vector).double().square().sum(dim=1).mean()
        assert row.dispersion == pytest.approx(float(truth), rel=1e-5)


def test_smoothness_against_the_dense_matrix(linear: list[Path]) -> None:
    group = group_of(linear)
    images, own = group.data[0].split.images[:32], group.private[0]
    network = Linear(4)

    def largest(vector: Tensor) -> float:
        state = {**group.networks[0].space.unflatten(vector), **own}
        flat = torch.cat([t.reshape(-1) for t in state.values()])

        def logits(v: Tensor) -> Tensor:
            pieces = torch.split(v, [t.numel() for t in state.values()])
            named = {n: p.view(t.shape) for (n, t), p in zip(state.items(), pieces, strict=True)}
            out: Tensor = torch.func.functional_call(network, named, (images,))
            return out

        J = torch.func.jacrev(logits)(flat)
        p = torch.softmax(logits(flat), dim=-1)
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        matrix = torch.einsum("ncp,ncd,ndq->pq", J, middle, J) / len(images)
        return float(torch.linalg.eigvalsh(matrix)[-1])

    truth = max(largest(group.base), largest(group.vectors[0]))
    assert 0.6 * truth <= measured_smoothness(group, 0, seed=0) <= truth * (1 + 1e-4)


def test_standard_error_counts_shared_images_once(linear: list[Path]) -> None:
    images_file(linear[4], 3, 0)
    files = [*linear[:4], linear[4], linear[5], linear[4]]
    report = predict(group_of(files), Options(methods=("average",), tangent=False))
    arrays = [np.load(path) for path in files[4:]]
    body = merged_state(linear, "average", ())
    losses = []
    for j, c in enumerate((4, 3, 5)):
        network, head = Linear(c), load_file(linear[j + 1])
        network.load_state_dict(body | {k: v for k, v in head.items() if k.startswith("head.")})
        with torch.no_grad():
            logits = network(torch.from_numpy(arrays[j]["x_val"]))
        losses.append(
            nn.functional.cross_entropy(logits, torch.from_numpy(arrays[j]["y_val"]), reduction="none").numpy()
        )
    shared, alone = (losses[0] + losses[2]) / 3, losses[1] / 3
    truth = np.sqrt(shared.var(ddof=1) / 40 + alone.var(ddof=1) / 40)
    assert report.methods[0].secant.standard_error == pytest.approx(truth, rel=1e-4)
    assert any("share calibration images" in note for note in report.notes)


def test_one_image_has_no_standard_error(linear: list[Path]) -> None:
    one = predict(group_of(linear, images=1), Options(methods=("average",)))
    two = predict(group_of(linear, images=2), Options(methods=("average",)))
    assert np.isnan(one.methods[0].secant.standard_error)
    assert one.methods[0].verdict == "unknown"
    assert two.methods[0].secant.standard_error > 0.0


# --- real networks ---------------------------------------------------------------------------------------------------


def digit_files(folder: Path, architecture: str, scale: float) -> list[Path]:
    states = random_states(lambda c: build_model(architecture, classes=c, seed=0), scale, (10, 10))
    if architecture == "resnet_bn":
        for state in states:
            for name in state:
                if name.endswith("running_var"):
                    state[name] = state[name].abs() + 0.1
    paths = write(folder, states, architecture)
    return [*paths, *(images_file(folder / f"d{i}.npz", 10, i, 32) for i in range(2))]


def test_identical_experts_cost_nothing(tmp_path: Path) -> None:
    files = digit_files(tmp_path, "vit", 0.1)
    files[2].write_bytes(files[1].read_bytes())
    files[4] = files[3]
    report = predict(group_of(files, images=20), Options(bound=False))
    row = next(row for row in report.methods if row.label == "average")
    assert row.secant.value == pytest.approx(report.expert_risk.value, rel=1e-9)
    assert row.secant.standard_error == pytest.approx(report.experts[0].risk.standard_error, rel=1e-9)


@pytest.mark.parametrize("architecture", ["vit", "resnet_gn", "resnet_bn"])
def test_nearby_experts_are_priced_closely(tmp_path: Path, architecture: str) -> None:
    files = digit_files(tmp_path, architecture, 0.01)
    report = predict(group_of(files), Options(methods=("average", "task_arithmetic", "ties")))
    prefix = "head." if architecture == "vit" else "fc."
    for row in report.methods:
        body = merged_state(files, row.method, row.coefficients, **row.settings)
        losses = [
            measured(build_model(architecture), body, load_file(files[j + 1]), files[j + 3], prefix) for j in (0, 1)
        ]
        assert row.tangent is not None
        low, high = sorted((row.secant.value, row.tangent.value))
        assert low * 0.99 <= np.mean(losses) <= high * 1.01
        right = [hits(build_model(architecture), body, load_file(files[j + 1]), files[j + 3], prefix) for j in (0, 1)]
        assert row.accuracy.value == pytest.approx(np.mean(right), abs=0.05)
        assert row.bound is not None
        assert row.bound.value >= np.mean(losses)
    verdicts = {item.name: item.verdict for item in report.assumptions}
    assert verdicts["A3"] == ("violated" if architecture == "resnet_bn" else "holds")
    assert verdicts["A1"] == "unknown"


@pytest.fixture
def extrapolating(tmp_path: Path) -> list[Path]:
    """A network with BatchNorm whose experts' variances fell to a tenth: a sum of coefficients above 10/9 is too much.

    The labels are what twice the experts' way would say, so that predictions ask for it.
    """
    files = digit_files(tmp_path, "resnet_bn", 0.01)
    base = load_file(files[0])
    states = [base]
    for path in files[1:3]:
        state = load_file(path)
        for name in state:
            if name.endswith("running_var"):
                state[name] = 0.1 * base[name]
        states.append(state)
    write(tmp_path, states, "resnet_bn")
    far = merge_state_dicts("task_arithmetic", base, {"a": states[1], "b": states[2]}, coefficient=0.5)
    for path, state in zip(files[3:], states[1:], strict=True):
        body = {name: state[name] if name.startswith("fc.") else tensor for name, tensor in far.items()}
        network = build_model("resnet_bn").eval()
        network.load_state_dict(body)
        images = np.load(path)["x_val"]
        with torch.no_grad():
            labels = network(torch.from_numpy(images)[:, None]).argmax(dim=1).numpy()
        np.savez(path, x_val=images, y_val=labels)
    return files


def test_merges_that_clamp_running_variances_are_flagged_and_never_advised(extrapolating: list[Path]) -> None:
    own = (0.7, 0.7)
    wanted = Options(methods=("average", "task_arithmetic", "risk_optimal"), coefficients=(0.3, 0.9), alphas=(own,))
    report = predict(group_of(extrapolating), wanted)
    rows = {row.label: row for row in report.methods}
    for label, share in (("average", 0.0), ("task_arithmetic(0.3)", 0.0), ("task_arithmetic(0.9)", 1.0)):
        assert rows[label].clamped == share
    (given,) = [row for row in report.methods if row.label.startswith("given")]
    for row in (given, rows["task_arithmetic(0.9)"]):
        assert row.verdict == "wide"
        assert np.isnan([row.risk.value, row.cost.value, row.accuracy.value]).all()
        assert "clamped" in row.advice
        states = [load_file(path) for path in extrapolating[:3]]
        made = merge_state_dicts(
            "risk_optimal", states[0], {"a": states[1], "b": states[2]}, coefficients=list(row.coefficients)
        )
        assert all(float(tensor.max()) == 0.0 for name, tensor in made.items() if name.endswith("running_var"))
    best = [row for row in report.methods if row.optimality_gap is not None]
    assert len(best) == 2  # the best scale and risk_optimal
    for row in best:
        assert row.clamped == 0.0
        assert sum(row.coefficients) <= 1.0 + 1e-9
    assert rows[report.best].clamped == 0.0
    assert any("--no-hull" in note for note in report.notes)

    free = predict(group_of(extrapolating), Options(methods=("risk_optimal",), hull=False))
    assert sum(free.methods[0].coefficients) > 1.1
    assert free.methods[0].clamped == 1.0
    assert np.isnan(free.methods[0].risk.value)
    with pytest.raises(MergeboundError, match="--bounds"):
        predict(group_of(extrapolating), Options(hull=True, bounds=(0.0, 2.0)))


# --- the command -----------------------------------------------------------------------------------------------------


def test_several_values_after_one_option() -> None:
    several = ("--experts", "--data")
    assert spread(["--experts", "a", "b", "--data", "c", "--seed", "1"], several) == [
        *("--experts", "a", "--experts", "b", "--data", "c", "--seed", "1")
    ]
    assert spread(["--experts", "a", "--experts", "b"], several) == ["--experts", "a", "--experts", "b"]
    assert spread(["--data=a", "b", "--json", "c"], several) == ["--data=a", "--data", "b", "--json", "c"]


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    digit_files(tmp_path, "vit", 0.05)
    monkeypatch.chdir(tmp_path)
    return tmp_path


EXPERTS = ("--experts", "e1.safetensors", "e2.safetensors")
DATA = ("--data", "d0.npz", "d1.npz")


def run(*arguments: str) -> int:
    try:
        main(["predict", "--base", "base.safetensors", *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(*EXPERTS, *DATA, "--json", *arguments) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("objective", ["secant", "tangent", "middle"])
def test_risk_optimal_is_below_the_grid(digits: Path, capsys: pytest.CaptureFixture[str], objective: str) -> None:
    grid = [f"--alpha={a},{b}" for a in (0, 0.25, 0.5, 0.75, 1) for b in (0, 0.25, 0.5, 0.75, 1)]
    options = ("--methods", "average,task_arithmetic,risk_optimal", "--no-bound", "--objective", objective)
    report = as_json(capsys, *options, *grid)
    key = "risk" if objective == "middle" else objective
    best = next(row for row in report["methods"] if row["label"] == "risk_optimal")
    assert len(report["methods"]) == 29
    assert all(best[key]["value"] <= row[key]["value"] + 1e-9 for row in report["methods"])
    assert 0 <= best["optimality_gap"] < 1e-4
    assert best["risk"]["tier"] == report["tier"] == "estimated"
    scales = [row[key]["value"] for row in report["methods"] if row["method"] == "task_arithmetic"]
    assert scales[1] <= scales[0] + 1e-9


def test_simplex_and_seed(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--methods", "risk_optimal", "--simplex", "--images", "16", "--no-bound")
    report = as_json(capsys, *options, "--seed", "1")
    assert sum(report["methods"][0]["coefficients"]) == pytest.approx(1.0)
    again = as_json(capsys, *options, "--seed", "1")
    other = as_json(capsys, *options, "--seed", "2")
    for result in (report, again, other):
        result.pop("seconds")
    assert report == again
    assert report["expert_risk"] != other["expert_risk"]


def test_the_printed_commands_make_the_merges(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--set", "ties.density=0.5", "--set", "dare.rescale=false", "--seed", "3", "--no-bound")
    report = as_json(capsys, *settings, "--out-coefficients", "best.yaml")
    states = [load_file(f"{name}.safetensors") for name in ("base", "e1", "e2")]
    experts = dict(zip(("e1", "e2"), states[1:], strict=True))
    for row in report["methods"]:
        words = shlex.split(row["command"])
        assert words[0] == "mergebound"
        Path("merged.safetensors").unlink(missing_ok=True)
        with pytest.raises(SystemExit) as stop:
            main(words[1:])
        assert not stop.value.code
        merged = load_file("merged.safetensors")
        alpha = tuple(row["coefficients"])
        expected = merge_state_dicts(
            row["method"],
            states[0],
            experts,
            partition=partition(states[0], ("head.*",)),
            coefficients=alpha if row["method"] == "risk_optimal" else None,
            seed=3,
            **row["settings"],
        )
        assert all(torch.equal(merged[name], expected[name]) for name in expected)
        if row["linear"]:
            direct = sum(
                a * (e["fc_norm.weight"] - states[0]["fc_norm.weight"]) for a, e in zip(alpha, states[1:], strict=True)
            )
            torch.testing.assert_close(merged["fc_norm.weight"], states[0]["fc_norm.weight"] + direct)
    saved = yaml.safe_load(Path("best.yaml").read_text())
    best = next(row for row in report["methods"] if row["label"] == report["risk_optimal"])
    assert [entry["alpha"] for entry in saved["coefficients"]] == best["coefficients"]
    assert saved["command"] == best["command"]
    with pytest.raises(SystemExit) as stop:  # the same merge from the file itself
        main(["merge", "--config", "best.yaml", "--out", "again.safetensors"])
    assert not stop.value.code
    main_words = shlex.split(best["command"])[1:]
    Path("merged.safetensors").unlink()
    with pytest.raises(SystemExit):
        main(main_words)
    merged, again = load_file("merged.safetensors"), load_file("again.safetensors")
    assert all(torch.equal(merged[name], again[name]) for name in merged)


def test_secant_only_and_text(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = as_json(capsys, "--no-tangent", "--no-bound")
    assert [row["method"] for row in report["methods"]] == [
        *("average", "task_arithmetic", "task_arithmetic", "risk_optimal")
    ]
    assert all(row["tangent"] is None and row["verdict"] == "unknown" for row in report["methods"])
    assert report["objective"] == "secant"
    assert run(*EXPERTS, *DATA) == 0
    text = capsys.readouterr().out
    for part in ("tier estimated", "seed 0", "merging cost", "master bound", "mergebound merge --method risk_optimal"):
        assert part in text


def test_large_networks_get_the_secant_alone(linear: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of(linear)
    assert group.work == 64 * 6 * 40 * 9 + 6 * 40 * 9  # parameters, images, experts^2
    assert predict(group).tangents
    monkeypatch.setattr("experiments.predict.options.TANGENT_LIMIT", group.work - 1)
    report = predict(group)
    assert not report.tangents
    assert all(row.bound is None for row in report.methods)
    assert predict(group, Options(methods=("ties",))).tangents


def test_heads_can_be_shared(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = as_json(capsys, "--shared-head", "--methods", "average", "--coefficients", "0.5", "--bound")
    assert report["private"] == []
    assert "--private ''" in report["methods"][0]["command"]
    assert report["parameters"] == sum(t.numel() for t in load_file("base.safetensors").values())


def test_a_timm_model_photographs_and_a_base_without_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def make(classes: int) -> nn.Module:
        return build_model("test_vit", classes=classes, seed=0, img_size=32)

    states = random_states(make, 0.005, (2, 3))
    states[0] = {name: tensor for name, tensor in states[0].items() if not name.startswith("head.")}
    for name, state in zip(("base", "e1"), states, strict=False):
        save_file(state, f"{name}.safetensors")
    torch.save({"state_dict": states[2]}, "e2.pth")
    rng = np.random.default_rng(0)
    for folder, classes in (("pets", "ab"), ("cars", "xyz")):
        for name in classes:
            (tmp_path / folder / name).mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / name / f"{number}.png")
    arguments = ("--experts", "e1.safetensors", "e2.pth", "--data", "pets", "cars", "--json", "--methods", "average")
    assert run(*arguments) == 2
    assert "pass --model with a timm model name" in flat(capsys)
    assert run(*arguments, "--model", "test_vit") == 2
    assert "'pos_embed' has shape (1, 5, 64) where the network has (1, 101, 64)" in flat(capsys)
    assert run(*arguments, "--model", "test_vit", "--model-option", "img_size=32") == 0
    report = json.loads(capsys.readouterr().out)
    assert [expert["classes"] for expert in report["experts"]] == [2, 3]
    assert [expert["images"] for expert in report["experts"]] == [6, 9]
    assert report["methods"][0]["verdict"] == "narrow"


# --- bad input -------------------------------------------------------------------------------------------------------


def flat(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def edit(name: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(name)
    change(state)
    save_state_dict(name, state, {"architecture": "vit"})


def spoil(state: dict[str, Tensor]) -> None:
    state["fc_norm.weight"][3] = float("nan")


BAD: dict[str, tuple[Callable[[], Any], tuple[str, ...], str]] = {
    "unknown method": (lambda: None, (*EXPERTS, *DATA, "--methods", "tise"), "'tise': did you mean ties"),
    "number of data sets": (lambda: None, (*EXPERTS, "--data", "d0.npz"), "--data: 1 data sets for 2 experts"),
    "one expert": (lambda: None, ("--experts", "e1.safetensors", "--data", "d0.npz"), "give two or more"),
    "missing tensor": (
        lambda: edit("e2.safetensors", lambda s: s.pop("fc_norm.weight")),
        (*EXPERTS, *DATA),
        "e2.safetensors: tensor 'fc_norm.weight' of the base is missing",
    ),
    "mis-shaped tensor": (
        lambda: edit("e1.safetensors", lambda s: s.update({"fc_norm.weight": torch.ones(3)})),
        (*EXPERTS, *DATA),
        "e1.safetensors: tensor 'fc_norm.weight' has shape (3,) where the base has (40,)",
    ),
    "missing head": (
        lambda: edit("e1.safetensors", lambda s: s.pop("head.bias")),
        (*EXPERTS, *DATA),
        "e1.safetensors: the private tensor 'head.bias' is missing",
    ),
    "NaN weights": (lambda: edit("e2.safetensors", spoil), (*EXPERTS, *DATA), "'fc_norm.weight' holds 1 NaN"),
    "NaN base": (
        lambda: edit("base.safetensors", spoil),
        (*EXPERTS, *DATA),
        "base.safetensors: tensor 'fc_norm.weight'",
    ),
    "NaN head": (
        lambda: edit("e2.safetensors", lambda s: s["head.bias"].fill_(float("inf"))),
        (*EXPERTS, *DATA),
        "e2.safetensors: tensor 'head.bias' holds NaN or infinite",
    ),
    "labels": (lambda: images_file(Path("d1.npz"), 30, 0), (*EXPERTS, *DATA), "d1.npz: label 29 is out of range"),
    "unreadable data": (lambda: Path("d0.npz").write_bytes(b"x"), (*EXPERTS, *DATA), "d0.npz: cannot be read as .npz"),
    "empty folder": (lambda: Path("none").mkdir(), (*EXPERTS, "--data", "none", "d1.npz"), "none: no images"),
    "unknown model": (lambda: None, (*EXPERTS, *DATA, "--model", "vitt_tiny"), "timm has no model 'vitt_tiny'"),
    "another model": (lambda: None, (*EXPERTS, *DATA, "--model", "resnet_gn"), "is missing; name the network"),
    "another base": (
        lambda: save_state_dict(
            "base.safetensors", build_model("resnet_gn").state_dict(), {"architecture": "resnet_gn"}
        ),
        (*EXPERTS, *DATA),
        "e1.safetensors: tensor",
    ),
    "model option": (
        lambda: None,
        (*EXPERTS, *DATA, "--model", "test_vit", "--model-option", "foo=1"),
        "cannot build it",
    ),
    "two shares": (lambda: None, (*EXPERTS, *DATA, "--private", "head.*", "--shared-head"), "exclude each other"),
    "ties untangled": (lambda: None, (*EXPERTS, *DATA, "--methods", "ties", "--no-tangent"), "needs Jacobian products"),
    "alpha": (lambda: None, (*EXPERTS, *DATA, "--alpha", "1,2,3"), "one finite number for each of the 2 experts"),
    "bounds": (lambda: None, (*EXPERTS, *DATA, "--bounds", "1,0"), "--bounds"),
    "setting": (lambda: None, (*EXPERTS, *DATA, "--set", "ties.density=7"), "outside its domain"),
    "objective": (lambda: None, (*EXPERTS, *DATA, "--objective", "best"), "choose secant, tangent, middle"),
    "same expert": (
        lambda: None,
        ("--experts", "e1.safetensors", "e1.safetensors", *DATA),
        "e1.safetensors is given 2 times",
    ),
    "no such data": (lambda: None, (*EXPERTS, "--data", "d0.npz", "no.npz"), "no.npz: there is no such file"),
    "image size": (
        lambda: None,
        (*EXPERTS, *DATA, "--image-size", "16"),
        "does not run on images of shape (1, 16, 16)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(digits: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    prepare, arguments, message = BAD[case]
    prepare()
    assert run(*arguments, "--out-coefficients", "best.yaml") == 2
    captured = capsys.readouterr()
    text = " ".join(captured.err.split())
    assert message in text
    assert text.startswith("error: ")
    assert "Traceback" not in text
    assert not captured.out
    assert not Path("best.yaml").exists()


def test_targets_that_cannot_be_written(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*EXPERTS, *DATA, "--out-coefficients", "best.txt") == 2
    assert "change the suffix of --out-coefficients" in flat(capsys)
    assert run(*EXPERTS, *DATA, "--out-coefficients", "none/best.yaml") == 2
    assert "create it first" in flat(capsys)


def test_default_options_are_those_of_the_command(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [Path(f"{name}.safetensors") for name in ("base", "e1", "e2")]
    report: Report = predict(load_group(files[0], files[1:], [Path("d0.npz"), Path("d1.npz")]))
    printed = as_json(capsys)
    assert [row.label for row in report.methods] == [row["label"] for row in printed["methods"]]
    assert [row.risk.value for row in report.methods] == [row["risk"]["value"] for row in printed["methods"]]
