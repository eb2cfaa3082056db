"""Lines, planes and merges as points, against direct computations on tiny networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments.measure.backbone import Backbone
from experiments.measure.landscape.intervals import Curve, banded, curves, height, standard_error
from experiments.measure.landscape.lines import barriers, line, shared_size, usual_lines
from experiments.measure.landscape.marks import merge_points
from experiments.measure.landscape.planes import plane_through, principal_plane, surface
from experiments.measure.landscape.running import clamped, reestimated, with_batchnorm
from experiments.measure.landscape.scores import Panel, Scores, evaluator, panel, shared_sources
from experiments.measure.subject import Subject
from experiments.models import build_model
from experiments.tasks.types import Split
from merging.flat import FlatSpace
from merging.merge import flat_space
from merging.partition import partition
from merging.registry import methods
from theory.errors import MergeboundError

torch.set_num_threads(1)
State = dict[str, Tensor]


class Net(nn.Module):
    """Two layers and a head on 12 inputs; without activation it is linear in each layer."""

    def __init__(self, relu: bool = True) -> None:
        super().__init__()
        self.one = nn.Linear(12, 5)
        self.act = nn.ReLU() if relu else nn.Identity()
        self.head = nn.Linear(5, 3)

    def get_classifier(self) -> nn.Linear:
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.act(self.one(images.flatten(1))))
        return out


def subject_of(model: nn.Module, states: Sequence[State], splits: Sequence[Split], dtype: torch.dtype) -> Subject:
    """The first state is the base; heads are private."""
    base, *experts = ({n: t.to(dtype) if t.is_floating_point() else t for n, t in s.items()} for s in states)
    parts = partition(base, private=("head.*", "fc.*"))
    layout = flat_space(base, parts)
    space = FlatSpace(layout.names, layout.shapes, layout.offsets, dtype)
    whole = Backbone.of(model.to(dtype), base, shared_head=True)
    constants = {n: base[n] for n in parts.constants}
    heads = [{n: state[n] for n in parts.private} for state in experts]
    networks = tuple(
        replace(
            whole,
            space=space,
            partition=parts,
            constants={f"model.{n}": t for n, t in {**constants, **head}.items()},
        )
        for head in heads
    )
    names = tuple(f"e{i}" for i in range(len(experts)))
    tasks = tuple(f"set{i}:x" for i in range(len(experts)))
    rows = torch.stack([space.flatten(state) for state in experts])
    return Subject(
        names, tasks, "net", model.eval(), networks, space.flatten(base), rows, tuple(heads), tuple(splits)
    )  # fmt: skip


def data(count: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Split:
    rng = np.random.default_rng(seed)
    images = torch.as_tensor(rng.standard_normal((count, *shape)), dtype=dtype)
    return Split(images, torch.as_tensor(rng.integers(0, 3, count)), np.arange(count))


def small(relu: bool = True, experts: int = 2, scale: float = 0.4) -> Subject:
    torch.manual_seed(0)
    model = Net(relu)
    states: list[State] = [dict(model.state_dict())]
    for number in range(experts):
        generator = torch.Generator().manual_seed(number)
        states.append({n: t + scale * torch.randn(t.shape, generator=generator) for n, t in states[0].items()})
    splits = [data(20 + 5 * j, (1, 3, 4), j, torch.float64) for j in range(experts)]
    return subject_of(model, states, splits, torch.float64)


def by_hand(subject: Subject, x: Tensor, j: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses and errors by matrix products in numpy."""
    pieces = {n: t.numpy() for n, t in subject.networks[0].space.unflatten(x).items()}
    head = {n: t.numpy() for n, t in subject.heads[j].items()}
    split = subject.calibration[j]
    hidden = split.images.flatten(1).numpy() @ pieces["one.weight"].T + pieces["one.bias"]
    if isinstance(subject.model.act, nn.ReLU):
        hidden = np.maximum(hidden, 0.0)
    logits = hidden @ head["head.weight"].T + head["head.bias"]
    labels = split.labels.numpy()
    top = logits.max(axis=1)
    losses = top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    return losses, (logits.argmax(axis=1) != labels).astype(float)


def curve(table: np.ndarray, resamples: int = 300, seed: int = 0) -> Curve:
    """The curve of an (n, K) table of losses."""
    n = len(table)
    empty = Split(torch.zeros(n, 1), torch.zeros(n, dtype=torch.int64), np.arange(n))
    on = Panel("test", seed, (empty,), (None,))
    points = [Scores({0: column}, {0: column}) for column in table.T]
    return curves(points, on, (0,), "loss", resamples=resamples)[0]


# --- lines -----------------------------------------------------------------------------------------------------------


def test_a_line_is_the_loss_at_its_points() -> None:
    subject = small()
    judge = evaluator(subject, panel(subject, images=100))
    found = line(judge, ("e0", subject.vectors[0]), ("e1", subject.vectors[1]), points=5, resamples=50)
    for k, t in enumerate(found.t):
        x = (1 - t) * subject.vectors[0] + t * subject.vectors[1]
        both = [by_hand(subject, x, j) for j in range(2)]
        for j, name in enumerate(subject.names):
            assert found[name].loss.value[k] == pytest.approx(both[j][0].mean(), rel=1e-12)
            assert found[name].error.value[k] == pytest.approx(both[j][1].mean(), abs=1e-12)
        assert found.joint.loss.value[k] == pytest.approx(np.mean([b[0].mean() for b in both]), rel=1e-12)
    loss = found.joint.loss.value
    rise = max(0.0, float((loss - np.linspace(loss[0], loss[-1], 5)).max()))
    assert found.joint.loss_barrier.value == pytest.approx(rise, abs=1e-12)
    assert found.length == pytest.approx(float((subject.vectors[0] - subject.vectors[1]).norm()))
    assert len(found.to_frame()) == 15
    assert set(barriers([found])["task"]) == {"e0", "e1", "joint"}


def test_no_barrier_where_the_loss_is_convex() -> None:
    """Cross-entropy of logits that are affine along the line: also every resample is convex, so nothing is unclear."""
    subject = small(relu=False)
    judge = evaluator(subject, panel(subject))
    for start, end, tasks in usual_lines(subject, {"average": subject.vectors.mean(dim=0)}):
        found = line(judge, start, end, tasks, points=7, resamples=50)
        for profile in found.profiles:
            assert profile.loss_barrier.value == 0.0
            assert profile.loss_barrier.low == 0.0
            assert (np.diff(profile.loss.value, 2) > -1e-12).all()


@pytest.mark.parametrize("curvature", [2.0, -3.0])
def test_barrier_of_a_quadratic(curvature: float) -> None:
    """f_z(t) = c t^2 / 2 + z t: the chord's excess is c t (t - 1) / 2, whatever z: -c/8 at the middle, exactly."""
    t = np.linspace(0.0, 1.0, 9)
    z = np.random.default_rng(0).standard_normal(30)
    found = height(curve(0.5 * curvature * t**2 + z[:, None] * t), t)
    expected = max(0.0, -curvature / 8)
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert (found.low, found.high) == (pytest.approx(expected, abs=1e-9), pytest.approx(expected, abs=1e-9))
    if expected:
        assert found.at == 0.5


def test_intervals_of_barriers_cover() -> None:
    """True barrier 0.3 at the middle, or none, with noise that differs from point to point: nine in ten at least."""
    t = np.linspace(0.0, 1.0, 7)
    rng = np.random.default_rng(1)
    for truth in (0.0, 0.3):
        path = truth * np.sin(np.pi * t)
        hits = lower = 0
        for trial in range(120):
            noise = rng.standard_normal((60, 7)) * 0.8
            found = height(curve(path + noise, 200, trial), t)
            hits += found.low <= truth <= found.high
            lower += found.low > 0.0
        assert hits >= 106  # binomial(120, 0.95): fewer with probability 0.1 %
        assert lower <= 14 if truth == 0.0 else lower >= 30


def test_unequal_ends_have_instability_without_barrier() -> None:
    t = np.linspace(0.0, 1.0, 5)
    flat = banded(t.copy(), np.tile(t, (10, 1)), 0.95)
    assert height(flat, t).value == 0.0
    assert height(flat, t, reference="mean").value == pytest.approx(0.5)


def test_infinite_losses_have_no_interval() -> None:
    t = np.linspace(0.0, 1.0, 3)
    table = np.ones((4, 3))
    table[0, 1] = np.inf
    found = height(curve(table), t)
    assert found.value == np.inf
    assert found.at == 0.5
    assert np.isnan(found.low)


def test_images_in_several_tasks_are_resampled_together() -> None:
    one = data(12, (1, 3, 4), 0, torch.float64)
    other = data(12, (1, 3, 4), 1, torch.float64)
    sources = shared_sources(("digits8:flip", "digits8:roll", "npz8:mnist"), (one, one, one))
    assert sources[0] is not None
    assert np.array_equal(sources[0], sources[1])
    assert sources[2] is None
    assert shared_sources(("digits8:flip", "digits8:roll"), (one, other)) == (None, None)


def test_standard_errors_count_shared_images_once() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 50))
    same = np.arange(50)
    assert standard_error([a, b], [None, None]) == pytest.approx(np.sqrt(a.var(ddof=1) + b.var(ddof=1)) / 2 / 50**0.5)
    assert standard_error([a, b], [same, same]) == pytest.approx(((a + b) / 2).std(ddof=1) / 50**0.5)


# --- planes ----------------------------------------------------------------------------------------------------------


def test_three_points_lie_in_their_plane() -> None:
    rng = np.random.default_rng(0)
    points = torch.as_tensor(rng.standard_normal((3, 40)))
    for measured in (40, 25):
        plane = plane_through(*points, measured=measured)
        axes = plane.axes[:, :measured]
        assert torch.allclose(axes @ axes.T, torch.eye(2, dtype=torch.float64), atol=1e-12)
        for point, (u, v) in zip(points, plane.coordinates(points), strict=True):
            assert torch.allclose(plane.point(u, v), point, atol=1e-12)
        away = torch.as_tensor(rng.standard_normal((1, 40)))
        basis = (points[1:] - points[0])[:, :measured].numpy().T
        target = (away - points[0])[0, :measured].numpy()
        rest = target - basis @ np.linalg.lstsq(basis, target, rcond=None)[0]
        assert plane.distances(away)[0] == pytest.approx(np.linalg.norm(rest), rel=1e-10)
    with pytest.raises(MergeboundError, match="one line"):
        plane_through(points[0], points[1], 2 * points[1] - points[0])


def test_principal_plane_is_the_svd() -> None:
    points = torch.as_tensor(np.random.default_rng(0).standard_normal((6, 30)))
    plane = principal_plane(points)
    centred = (points - points.mean(dim=0)).numpy()
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(np.abs(plane.axes.numpy() @ rows[:2].T), np.eye(2), atol=1e-10)
    assert plane.explained == pytest.approx(float((singular[:2] ** 2).sum() / (singular**2).sum()))
    assert (plane.distances(points) ** 2).sum() == pytest.approx(float((singular[2:] ** 2).sum()))
    assert (plane.coordinates(points)[0] > 0).all()


def test_a_surface_is_the_loss_on_its_grid_and_marks_are_the_points_themselves() -> None:
    subject = small(experts=3)
    judge = evaluator(subject, panel(subject))
    plane = plane_through(subject.base, subject.vectors[0], subject.vectors[1])
    cut = surface(judge, plane, {"average": subject.vectors.mean(dim=0)}, grid=4)
    x = plane.point(cut.u[2], cut.v[1])
    direct = [by_hand(subject, x, j)[0].mean() for j in range(3)]
    assert np.allclose(cut.task_loss[:, 1, 2], direct, rtol=1e-12)
    assert cut.loss[1, 2] == pytest.approx(np.mean(direct), rel=1e-12)
    marks = {mark.name: mark for mark in cut.marks}
    assert marks["e0"].distance == pytest.approx(0.0, abs=1e-10)
    assert marks["e0"].loss == pytest.approx(marks["e0"].foot_loss)
    own = [by_hand(subject, subject.vectors[2], j)[0].mean() for j in range(3)]
    assert marks["e2"].loss == pytest.approx(np.mean(own), rel=1e-12)
    assert marks["e2"].distance > 0.1
    assert cut.u[0] < min(m.u for m in cut.marks)
    assert cut.u[-1] > max(m.u for m in cut.marks)
    assert len(cut.to_frame()) == cut.loss.size
    from experiments.measure.landscape.figures import contour_figure

    axes = contour_figure(cut).figure.axes[0]
    drawn = {(float(np.asarray(o.get_xdata())[0]), o.get_markerfacecolor()) for o in axes.lines}
    assert {u for u, _ in drawn} == {mark.u for mark in cut.marks}
    assert {u for u, shade in drawn if shade == "white"} == {mark.u for mark in cut.marks if mark.relative > 0.1}


# --- running statistics, fast paths, merges --------------------------------------------------------------------------


def batchnorm_subject() -> Subject:
    model = build_model("resnet_bn", classes=3, seed=0)
    states: list[State] = [{n: t.clone() for n, t in model.state_dict().items()}]
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        moved = {}
        for name, tensor in states[0].items():
            noise = 0.1 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else 0
            moved[name] = tensor * torch.exp(noise) if name.endswith("running_var") else tensor + noise
        states.append(moved)
    splits = [data(24, (1, 8, 8), j, torch.float32) for j in range(2)]
    return subject_of(model, states, splits, torch.float32)


def test_fast_path_and_running_statistics() -> None:
    subject = batchnorm_subject()
    on = panel(subject)
    x = subject.vectors.mean(dim=0)
    plain = evaluator(subject, on, path="plain").score(x)
    exact = evaluator(subject, on, path="exact")
    assert exact.fast is not None
    for j in range(2):
        assert np.allclose(exact.score(x).loss[j], plain.loss[j], atol=1e-4)
    beyond = x.clone()
    names = dict(subject.networks[0].space.segments())
    piece = next(piece for name, piece in names.items() if name.endswith("running_var"))
    beyond[piece] = -1.0
    assert (clamped(subject, beyond)[piece] == 0).all()
    assert clamped(subject, x) is x
    assert np.isfinite(evaluator(subject, on, path="plain").score(beyond).mean_loss())
    first = next(name for name in names if name.endswith("running_mean"))
    pooled, own = reestimated(subject, x), reestimated(subject, x, 1)
    for found, chosen in ((pooled, (0, 1)), (own, (1,))):  # the first layer's inputs, by a convolution written out
        model = with_batchnorm(subject.model)
        convolution = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        place = next(n for n, module in model.named_modules() if module is convolution)
        weight = subject.networks[0].space.unflatten(x)[f"{place}.weight"]
        means = []
        for j in chosen:
            out = nn.functional.conv2d(subject.calibration[j].images, weight, None, convolution.stride,
                                       convolution.padding)  # fmt: skip
            means.append(out.mean(dim=(0, 2, 3)))
        assert torch.allclose(found[names[first]], torch.stack(means).mean(dim=0), atol=1e-5)
    size = shared_size(subject)
    assert torch.equal(pooled[:size], x[:size])
    checkpoint = replace(subject, model=subject.networks[0].module.model)  # BatchNorm as its affine map
    assert torch.allclose(reestimated(checkpoint, x), pooled, atol=1e-6)


def test_every_method_is_a_point_or_has_a_reason() -> None:
    subject = small(experts=2)
    found = merge_points(subject)
    assert set(found.vectors) | set(found.left_out) == set(methods())
    assert torch.allclose(found.vectors["average"], subject.vectors.mean(dim=0))
    scores = [1 - np.mean([by_hand(subject, v, j)[1].mean() for j in range(2)]) for v in subject.vectors]
    soup = 1 - np.mean([by_hand(subject, subject.vectors.mean(dim=0), j)[1].mean() for j in range(2)])
    kept = subject.vectors.mean(dim=0) if soup >= max(scores) else subject.vectors[int(np.argmax(scores))]
    assert torch.allclose(found.vectors["greedy_soup"], kept)
    assert torch.allclose(found.vectors["fisher"], fisher_by_hand(subject), atol=1e-9)
    with pytest.raises(MergeboundError, match="merges 2 to 2"):
        merge_points(small(experts=3), ["slerp"])


def fisher_by_hand(subject: Subject) -> Tensor:
    """Expected Fisher information, image by image and class by class, with the floor of the method's default."""
    rows = []
    for j in range(subject.size):
        total = torch.zeros_like(subject.base)
        images = subject.calibration[j].images
        for image in images:
            x = subject.vectors[j].clone().requires_grad_(True)
            log_p = torch.log_softmax(subject.networks[j].call(x, image[None])[0], dim=-1)
            for value in log_p:
                (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
                total += value.exp().detach() * gradient.square() / len(images)
        rows.append(total.clamp(min=1e-6))
    weights = torch.stack(rows)
    return subject.base + (weights * subject.deltas).sum(dim=0) / weights.sum(dim=0)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_gives_what_python_gives(tmp_path: Path, capsys: Any) -> None:
    import json

    from experiments.cli import main
    from experiments.measure.opening import from_checkpoints
    from merging.checkpoint import save_state_dict

    subject = batchnorm_subject()
    files = []
    for name in ("base", "a", "b"):
        model = build_model("resnet_bn", classes=3, seed=0)
        i = {"base": None, "a": 0, "b": 1}[name]
        state = {n: t.clone() for n, t in model.state_dict().items()}
        if i is not None:
            state |= subject.networks[0].space.unflatten(subject.vectors[i]) | dict(subject.heads[i])
        files.append(tmp_path / f"{name}.safetensors")
        save_state_dict(files[-1], state, {"architecture": "resnet_bn"})
    sets = []
    for j, split in enumerate(subject.calibration):
        sets.append(tmp_path / f"d{j}.npz")
        np.savez(sets[-1], x_val=split.images[:, 0].numpy(), y_val=split.labels.numpy())
    options = ["--images", "12", "--points", "3", "--grid", "3", "--methods", "average"]
    named = ["--base", str(files[0]), "--experts", *map(str, files[1:]), "--data", *map(str, sets)]
    command = ["measure", "landscape", *named, *options, "--resamples", "20", "--no-flatness", "--json"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert not stop.value.code
    answer = json.loads(capsys.readouterr().out)
    same = from_checkpoints(files[0], files[1:], sets, images=12)
    judge = evaluator(same, panel(same, images=12), path="plain")
    direct = line(judge, ("a", same.vectors[0]), ("b", same.vectors[1]), points=3, resamples=20)
    row = next(r for r in answer["barriers"] if r["line"] == "a to b" and r["task"] == "joint")
    assert row["loss_barrier"] == pytest.approx(direct.joint.loss_barrier.value, abs=1e-4)
    assert row["error_barrier"] == pytest.approx(direct.joint.error_barrier.value, abs=1e-9)
    assert {mark["name"] for mark in answer["marks"]} == {"base", "a", "b", "average"}
    for bad, why in ((["--store", "x"], "say what to measure"), (["--runs", "abc"], "--runs does not go with")):
        with pytest.raises(SystemExit) as stop:
            main([*command, *bad])
        assert stop.value.code == 2
        assert why in capsys.readouterr().err
