"""Verdicts where the truth is known by construction: each assumption both ways."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments.finetune.loop import TrainingLog
from experiments.measure.noise.at_point import PointNoise, noise_at
from experiments.measure.noise.constant import exactly, largest
from experiments.measure.noise.objective import Objective
from experiments.measure.noise.smoothness import ends
from experiments.measure.verdicts.finding import ASSUMPTIONS, Evidence, Finding, finding
from experiments.measure.verdicts.images import (
    digests_of,
    judge_choices,
    judge_fresh,
    judge_independence,
)
from experiments.measure.verdicts.loss import (
    coupling,
    judge_bounded,
    judge_nonnegative,
    judge_per_sample,
    judge_trained_loss,
    kinks,
)
from experiments.measure.verdicts.noise import (
    judge_fresh_gap,
    judge_lipschitz,
    judge_noise,
    judge_pl,
    judge_risk,
    judge_suprema,
)
from experiments.measure.verdicts.smooth import (
    judge_convex,
    judge_smooth,
    judge_steps,
    momentum_limit,
    secant_smoothness,
)
from experiments.measure.verdicts.statements import STATEMENTS, judge_statements
from experiments.measure.verdicts.training import judge_recipe
from experiments.measure.verdicts.vectors import cosines, judge_orthogonal
from experiments.tasks.types import Split
from tests.experiments.reference_nets import Net, spec
from theory import Expert
from theory.clocks import heavy_ball_convex_response
from theory.drift import drift_energy, drift_losses, drift_noise, finite_batch_factor
from theory.errors import AssumptionError

# --- A1, A2 ----------------------------------------------------------------------------------------------------------


def _images(seed: int, n: int = 12, first: int = 0) -> Split:
    pixels = torch.from_numpy(np.random.default_rng([seed, 7]).standard_normal((n, 1, 4, 4), dtype=np.float32))
    return Split(pixels, torch.zeros(n, dtype=torch.int64), np.arange(first, first + n))


def test_shared_images_are_found_by_pixels_rows_and_rearrangement() -> None:
    a, b = _images(0), _images(1)
    apart = judge_independence(("a", "b"), (digests_of(a, "a"), digests_of(b, "b")))
    assert apart.verdict == "holds"
    assert apart.evidence[0].value == 0.0
    mixed = Split(torch.cat([b.images, a.images[:3]]), torch.zeros(15, dtype=torch.int64), np.arange(15))
    found = judge_independence(("a", "b"), (digests_of(a, "a"), digests_of(mixed, "b")))
    assert found.verdict == "violated"
    assert found.covered  # sensitivities add up
    assert found.evidence[1].value == 3.0
    turned = replace(a, images=torch.rot90(a.images, 1, (2, 3)))
    rotated = judge_independence(("a", "b"), (digests_of(a, "a"), digests_of(turned, "b")))
    assert rotated.verdict == "violated"
    assert rotated.evidence[1].value == 0.0
    assert rotated.evidence[2].value == 1.0
    rows = judge_independence(("a", "b"), (digests_of(a, "digits8"), digests_of(b, "digits8")))  # same rows, one source
    assert rows.verdict == "violated"
    unknown = judge_independence(("a", "b"), (digests_of(a, "a"), digests_of(b, "b")), training=False)
    assert (unknown.verdict, unknown.seen) == ("unknown", "for")
    seen = judge_independence(("a", "b"), (digests_of(a, "a"), digests_of(mixed, "b")), training=False)
    assert (seen.verdict, seen.seen) == ("unknown", "against")


def test_judged_images_that_were_seen_before() -> None:
    train, calibration, test = (digests_of(_images(s, first=100 * s), "t") for s in (0, 1, 2))
    assert judge_fresh("a", train, calibration, test).verdict == "holds"
    assert judge_fresh("a", train, calibration, train).verdict == "violated"
    assert judge_fresh("a", train, calibration, calibration).verdict == "violated"
    assert judge_fresh("a", None, calibration, test).verdict == "unknown"
    assert judge_fresh("a", train, calibration, None, judged_on="calibration").verdict == "holds"


def test_choices_of_coefficients() -> None:
    assert judge_choices("nothing", recipes_known=True, last_checkpoint=True).verdict == "holds"
    assert judge_choices("held-out", recipes_known=True).verdict == "holds"
    assert judge_choices("train", recipes_known=True).verdict == "violated"
    assert judge_choices("nothing", recipes_known=False).verdict == "unknown"
    assert judge_choices("nothing", recipes_known=True, last_checkpoint=False).seen == "against"


# --- A3 --------------------------------------------------------------------------------------------------------------


def test_batch_statistics_and_dropout_are_found_by_trying() -> None:
    images = _images(3, 8).images
    mixed = coupling(Net(), images)
    assert judge_per_sample("a", mixed).verdict == "violated"
    hidden = Net()
    nn.init.zeros_(hidden.head.weight)  # logits do not depend on anything yet
    assert judge_per_sample("a", coupling(hidden, images)).verdict == "violated"
    assert judge_per_sample("a", coupling(Net(), images, trained="head")).verdict == "holds"  # frozen statistics
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
    assert judge_per_sample("a", coupling(plain, images)).verdict == "holds"
    assert judge_trained_loss("a", coupling(plain, images), spec()).verdict == "holds"
    dropped = coupling(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)), images)
    assert judge_per_sample("a", dropped).verdict == "holds"  # twins share their masks
    assert judge_trained_loss("a", dropped, spec()).verdict == "violated"
    quiet = coupling(plain, images)
    for change in ({"augment": "light"}, {"label_smoothing": 0.1}, {"optimizer": "sam"}):
        assert judge_trained_loss("a", quiet, spec(**change)).verdict == "violated", change
    assert judge_trained_loss("a", quiet, None).verdict == "unknown"


def test_sign_and_bound_of_losses() -> None:
    low, high = Evidence.exact("smallest", -0.5), Evidence.exact("largest", 2.5)
    assert judge_nonnegative("a", low).verdict == "violated"
    assert judge_nonnegative("a", by_form=True).verdict == "holds"
    assert judge_nonnegative("a", Evidence.exact("smallest", 0.5)).verdict == "unknown"
    assert judge_bounded("a", high, stated=3.0).verdict == "holds"
    assert judge_bounded("a", high, stated=2.0).verdict == "violated"
    assert judge_bounded("a", high).verdict == "unknown"


# --- A4 and step sizes -----------------------------------------------------------------------------------------------


def _quadratic(H: np.ndarray, x: np.ndarray, decay: float = 0.0) -> Objective:
    matrix = torch.from_numpy(np.ascontiguousarray(H))

    def losses(theta: Tensor, z: Tensor, labels: Tensor) -> Tensor:
        away = theta - z
        return 0.5 * ((away @ matrix) * away).sum(dim=-1)

    return Objective(losses, torch.from_numpy(np.array(x, dtype=np.float64)), len(x), decay)


def _split(z: np.ndarray) -> Split:
    return Split(torch.from_numpy(np.array(z)), torch.zeros(len(z), dtype=torch.int64), np.arange(len(z)))


def _spectrum(H: np.ndarray) -> tuple[Evidence, Evidence]:
    z = _split(np.zeros((4, len(H))))
    low, _, high, _ = ends(_quadratic(H, np.ones(len(H))), z.images, z.labels)
    return Evidence.exact("lowest", low), Evidence.exact("largest", high)


def test_smoothness_is_refuted_by_curvature_at_points_and_by_gradients_between_them() -> None:
    H = np.diag([0.5, 1.0, 4.0])
    _, top = _spectrum(H)
    assert judge_smooth("a", curvature=top, stated=4.0).verdict == "holds"
    assert judge_smooth("a", curvature=top, stated=3.9).verdict == "violated"
    assert judge_smooth("a", curvature=top).verdict == "unknown"
    assert judge_smooth("a", curvature=top, certified=4.0).verdict == "holds"
    z = _split(np.zeros((2, 3)))
    path = [_quadratic(H, x) for x in (np.zeros(3), np.array([0.0, 0.0, 2.0]))]
    assert secant_smoothness(path, z.images, z.labels).value == pytest.approx(4.0)

    def huber(theta: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:  # flat curvature at both ends, L between
        return 8.0 * nn.functional.huber_loss(theta[:1].expand(len(labels)), inputs[:, 0], reduction="none", delta=0.5)

    flat = [Objective(huber, torch.tensor([x], dtype=torch.float64), 1) for x in (-2.0, 2.0)]
    hidden = secant_smoothness(flat, torch.zeros(3, 1, dtype=torch.float64), z.labels.repeat(2)[:3], pieces=8)
    assert hidden.value == pytest.approx(8.0)
    nothing = Evidence.exact("curvature at the ends", 0.0)
    assert judge_smooth("a", curvature=nothing, secant=hidden).seen == "against"
    assert judge_smooth("a", curvature=nothing, secant=hidden, stated=1.0).verdict == "violated"
    weight, image = torch.randn(3, 4), torch.ones(4)
    jumps = kinks(lambda theta: torch.relu(theta.view(3, 4) @ image).sum(), weight.flatten())
    assert judge_smooth("a", curvature=top, kinks=jumps).verdict == "violated"
    assert not kinks(lambda theta: torch.tanh(theta.view(3, 4) @ image).sum(), weight.flatten())
    assert not kinks(lambda theta: (theta.view(3, 4) @ torch.relu(image)).sum(), weight.flatten())  # of inputs only


def test_convexity() -> None:
    low, high = _spectrum(np.diag([0.1, 2.0]))
    assert judge_convex("a", low, high).verdict == "unknown"
    assert judge_convex("a", low, high, stated=True).verdict == "holds"
    low, high = _spectrum(np.diag([-0.1, 2.0]))
    assert judge_convex("a", low, high, stated=True).verdict == "violated"


@pytest.mark.parametrize(("rate", "expected"), [(0.24, "hh"), (0.26, "vh"), (0.49, "vh"), (0.51, "vv")])
def test_step_conditions_decide_at_one_and_two_over_L(rate: float, expected: str) -> None:
    top = _spectrum(np.diag([0.5, 4.0]))[1]
    found = judge_steps("a", spec(learning_rate=rate), top, certified=4.0)
    assert [f.verdict[0] for f in found[:2]] == list(expected)
    lower = judge_steps("a", spec(learning_rate=rate), top)  # without a theorem a step size is never proven
    assert [f.verdict[0] for f in lower[:2]] == list(expected.replace("h", "u"))


def test_decay_schedules_and_momentum_enter_the_step_conditions() -> None:
    top = Evidence.exact("L", 4.0)
    assert judge_steps("a", spec(learning_rate=0.24, weight_decay=0.5), top, certified=4.0)[0].verdict == "violated"
    assert judge_steps("a", spec(learning_rate=0.24, schedule="cosine"), top, certified=4.0)[2].verdict == "unknown"
    assert all(f.verdict == "unknown" for f in judge_steps("a", None, top))
    for beta in (0.0, 0.5, 0.9):
        for eta in (0.9, 1.1):
            rate = eta * momentum_limit(beta) / 4.0
            found = judge_steps("a", spec(learning_rate=rate, momentum=beta), top, certified=4.0)[2]
            expert = Expert("a", n=9, batch_size=3, learning_rate=rate, steps=5, momentum=beta, curvature="convex", L=4)
            assert (found.verdict == "holds") == bool(heavy_ball_convex_response(expert)[1]), (beta, eta)


# --- gradients -------------------------------------------------------------------------------------------------------


def _points(objective: Objective, sample: Split, places: list[np.ndarray], **options: Any) -> list[PointNoise]:
    at = [objective.at(torch.from_numpy(np.array(x, dtype=np.float64))) for x in places]
    return [
        noise_at(o, sample, None, population=len(sample), pairs=4, point=f"p{i}", step=i, **options)
        for i, o in enumerate(at)
    ]


def _scaled() -> tuple[Objective, Split, float]:
    """Losses a_j x^2/2: sigma^2 = Var(a) x^2 and |grad|^2 = mean(a)^2 x^2, so that the growth is their ratio."""
    a = np.array([0.5, 1.0, 1.5, 3.0])

    def losses(theta: Tensor, z: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * z[:, 0] * theta[0] ** 2

    return Objective(losses, torch.zeros(1, dtype=torch.float64), 1), _split(a[:, None]), float(a.var() / a.mean() ** 2)


def test_noise_that_grows_with_the_gradient_and_noise_that_does_not() -> None:
    objective, sample, slope = _scaled()
    away = _points(objective, sample, [np.array([x]) for x in (1.0, 2.0, 3.0)])
    on_path, at_base = judge_noise("a", away)
    growth = next(e for e in on_path.evidence if e.name.startswith("growth"))
    assert growth.value == pytest.approx(slope)
    assert growth.low > 0
    assert (on_path.verdict, on_path.seen) == ("unknown", "against")
    assert at_base.verdict == "violated"
    home = judge_noise("a", away[::-1])[1]
    assert (home.verdict, home.seen) == ("unknown", "for")
    z = np.random.default_rng(0).standard_normal((6, 2))
    additive = _points(_quadratic(np.diag([1.0, 2.0]), np.zeros(2)), _split(z), [np.ones(2) * k for k in (1, 2, 4)])
    sigma = additive[0]["all"].sigma.value
    assert sigma == pytest.approx(np.sqrt(((z - z.mean(0)) ** 2 @ np.array([1.0, 4.0])).mean()))
    on_path, at_base = judge_noise("a", additive, certified=sigma)
    assert on_path.verdict == at_base.verdict == "holds"
    assert judge_noise("a", additive)[1].seen == "for"
    assert judge_noise("a", away, stated=away[-1]["all"].sigma.value)[0].verdict == "holds"
    assert judge_noise("a", away, stated=away[0]["all"].sigma.value)[0].verdict == "violated"


def test_pl_ratio_against_the_smallest_eigenvalue_and_at_a_hill() -> None:
    H = np.diag([0.5, 3.0])
    ways = [np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([1.0, 1.0])]
    points = _points(_quadratic(H, np.zeros(2)), _split(np.zeros((3, 2))), ways)
    assert points[0].pl_ratio.value == pytest.approx(0.5)  # the smallest eigenvalue, along its own direction
    assert judge_pl("a", points, stated=0.5, least_known=True).verdict == "holds"
    assert judge_pl("a", points, stated=0.6, least_known=True).verdict == "violated"
    assert judge_pl("a", points, stated=0.6).verdict == "unknown"  # F* = 0 makes the ratio err low
    assert judge_pl("a", points).seen == "for"
    assert judge_pl("a", points, certified=0.1).verdict == "holds"

    def wells(theta: Tensor, z: Tensor, labels: Tensor) -> Tensor:
        return 0.25 * (theta[0] ** 2 - 1.0) ** 2 + 0.0 * z[:, 0]

    hill = Objective(wells, torch.zeros(1, dtype=torch.float64), 1)
    stuck = _points(hill, _split(np.zeros((3, 1))), [np.array([0.5]), np.array([0.0])])
    assert judge_pl("a", stuck, least_known=True).verdict == "violated"
    assert judge_pl("a", stuck).seen == "against"


def test_risk_at_the_base_bounds_and_suprema() -> None:
    objective, sample, _ = _scaled()
    falling, rising = ([np.array([x]) for x in way] for way in ((3.0, 1.0, 0.1), (1.0, 2.0, 1.5)))
    down, up = _points(objective, sample, falling), _points(objective, sample, rising)
    assert (judge_risk("a", down).verdict, judge_risk("a", down).seen) == ("unknown", "for")
    assert judge_risk("a", down, descends=True).verdict == "holds"
    assert judge_risk("a", up).verdict == "violated"
    zeros = np.zeros(4)
    log = TrainingLog(zeros, np.array([1.0, 99.0, 98.0, 1.0]), zeros, zeros, 0.0, True)
    assert judge_risk("a", down, log, epoch=2).seen == "against"
    assert judge_suprema("a", up).seen == "against"  # the middle exceeds both ends
    assert judge_suprema("a", down).seen == "for"
    seen = largest([1.0, 2.0], 0)
    assert judge_lipschitz("a", seen, stated=2.0).verdict == "holds"
    assert judge_lipschitz("a", seen, stated=1.9).verdict == "violated"
    assert judge_lipschitz("a", exactly(1.0, 2, 0)).verdict == "unknown"
    assert judge_fresh_gap("a", fresh=True, overlapping=0).verdict == "holds"
    assert judge_fresh_gap("a", fresh=True, overlapping=2).verdict == "violated"
    assert judge_fresh_gap("a", fresh=False, overlapping=None).verdict == "violated"


# --- recipes ---------------------------------------------------------------------------------------------------------


def _log(sizes: list[int], norms: float = 1.0, clip: list[float] | None = None) -> TrainingLog:
    k = len(sizes)
    ones = np.ones(k)
    factor = None if clip is None else np.array(clip)
    used = None if clip is None else norms * ones
    return TrainingLog(np.array(sizes, float), ones, norms * ones, 0 * ones, 0.0, True, factor, used, used)


def _recipe(log: TrainingLog | None = None, n: int = 8, drift: float = 0.1, **changes: Any) -> dict[str, Finding]:
    run = spec(**{"steps": 4, "batch_size": 3, "learning_rate": 0.1, **changes})
    return {f.key: f for f in judge_recipe("a", run, log, n=n, drift=drift)}


def test_recipes_against_what_the_theory_covers() -> None:
    plain = _recipe(_log([3, 3, 3, 3]), sampling="without_replacement", trained="backbone")
    assert {f.verdict for f in plain.values()} == {"holds"}
    cases: list[tuple[str, dict[str, Any], bool]] = [
        ("sgd", {"optimizer": "adamw"}, True),
        ("sgd", {"optimizer": "sam"}, True),
        ("no_momentum", {"momentum": 0.9}, False),
        ("heavy_ball", {"momentum": 0.9, "nesterov": True}, True),
        ("no_decay", {"weight_decay": 0.1}, False),
        ("coupled_decay", {"optimizer": "adamw", "weight_decay": 0.1}, True),
        ("unbiased_batches", {"sampling": "reshuffle"}, False),
        ("same_coordinates", {"trained": "low_rank", "rank": 2}, False),
        ("frozen_head", {"trained": "full"}, True),
    ]
    for key, change, covered in cases:
        found = _recipe(**change)[key]
        assert (found.verdict, found.covered) == ("violated", covered), key
    assert _recipe(_log([8] * 4), sampling="reshuffle", batch_size=8)["unbiased_batches"].verdict == "holds"
    assert all(f.verdict == "unknown" for f in judge_recipe("a", None, None))


def test_clipping_is_judged_by_what_it_did() -> None:
    active = _recipe(_log([3, 3, 2, 3], clip=[1.0, 0.5, 1.0, 1.0]), clip_norm=1.0)["no_clipping"]
    assert active.verdict == "violated"
    assert active.evidence[0].value == 0.25
    idle = _recipe(_log([3, 3, 2, 3], clip=[1.0] * 4), clip_norm=1.0)["no_clipping"]
    assert (idle.verdict, idle.seen) == ("unknown", "for")


def test_logs_are_held_against_scheme_and_drift() -> None:
    shuffled = _recipe(_log([3, 3, 2, 3]))  # n = 8: the short last batch is kept
    assert shuffled["known_sampling"].verdict == "holds"
    assert _recipe(_log([3, 3, 3, 3]))["known_sampling"].verdict == "violated"
    assert shuffled["log"].verdict == "holds"  # reach: four steps of 0.1
    assert _recipe(_log([3, 3, 2, 3]), drift=0.41)["log"].verdict == "violated"
    assert _recipe(_log([3, 3, 2]))["log"].verdict == "violated"
    assert _recipe()["log"].verdict == "unknown"


# --- task vectors ----------------------------------------------------------------------------------------------------


def test_task_vectors_that_are_orthogonal_shared_or_random() -> None:
    units = torch.arange(60) // 3
    apart = torch.zeros(2, 60)
    apart[0, :30], apart[1, 30:] = 1.0, 2.0
    assert judge_orthogonal(apart, cosines(apart, units, ("a", "b"))).verdict == "holds"
    rng = np.random.default_rng([5, 1])
    common = torch.from_numpy(rng.standard_normal(60))
    alike = torch.stack([common + 0.3 * torch.from_numpy(rng.standard_normal(60)) for _ in range(3)])
    pairs = cosines(alike, units, ("a", "b", "c"))
    average = judge_orthogonal(alike, pairs)
    assert average.verdict == "violated"
    assert average.covered  # positive cosines: the average is nearer than the formula says
    added = judge_orthogonal(alike, pairs, coefficients=np.ones(3))
    assert (added.verdict, added.covered) == ("violated", False)
    assert added.evidence[3].value == pytest.approx(float(((alike.sum(0) - alike) ** 2).sum(dim=1).mean()))


def test_random_signs_raise_few_alarms_and_intervals_cover() -> None:
    """Units of very different sizes: the false alarm rate stays below the level, whatever the spectrum; intervals of
    exchangeable units cover the cosine of their population."""
    rng, units = np.random.default_rng([6, 1]), torch.arange(80) // 2
    alarms, inside, draws = 0, 0, 300
    size = np.exp(2 * rng.standard_normal(40))[np.arange(80) // 2]
    for _ in range(draws):
        plain = rng.standard_normal((2, 80))
        vectors = torch.from_numpy(plain * size)
        alarms += judge_orthogonal(vectors, cosines(vectors, units, ("a", "b"))).verdict == "violated"
        drawn = np.exp(0.5 * rng.standard_normal(40))[np.arange(80) // 2]
        mixed = torch.from_numpy(np.stack([plain[0], 0.5 * plain[0] + plain[1]]) * drawn)
        (angle,) = cosines(mixed, units, ("a", "b"))
        inside += angle.low <= 0.5 / np.sqrt(1.25) <= angle.high
    assert alarms / draws <= 0.02
    assert inside / draws > 0.9


# --- statements ------------------------------------------------------------------------------------------------------


OF_THE_MERGE = ("independent_samples", "independent_choices", "independent_base", "orthogonal")


def _all_hold(experts: tuple[str, ...] = ("a", "b")) -> list[Finding]:
    owners = {key: ("merge",) if key in OF_THE_MERGE else experts for key in ASSUMPTIONS}
    return [finding(key, owner, "holds", "by construction") for key, names in owners.items() for owner in names]


def test_every_statement_names_a_function_and_known_assumptions() -> None:
    for statement in STATEMENTS:
        module, _, name = statement.function.partition(".")
        found = importlib.import_module(f"theory.{module}")
        assert not name or hasattr(found, name), statement.function
        assert {*statement.needs, *statement.covers} <= set(ASSUMPTIONS), statement.name
    needed = {key for statement in STATEMENTS for key in statement.needs}
    assert set(ASSUMPTIONS) - needed == {"noise_at_base", "risk_below_start"}  # judged, needed by no statement alone


def test_one_broken_assumption_breaks_exactly_the_statements_that_need_it() -> None:
    names = ("a", "b")
    whole = judge_statements(_all_hold(), names)
    assert {item.standing for item in whole} == {"holds"}
    certified = {i.statement.name for i in whole if i.tier == "certified"}
    assert {"training clock, convex (kappa = 0)", "Theorem 3 (d), gradient log", "Theorem 3 (d), loss log"} <= certified
    assert "Theorem 2, rms" not in certified  # D_2 is measured
    for key in ASSUMPTIONS:
        for verdict, standing in (("violated", "broken"), ("unknown", "open")):
            found = [
                finding(key, f.about, verdict, "") if f.key == key and f.about in ("a", "merge") else f  # type: ignore[arg-type]
                for f in _all_hold()
            ]
            for item in judge_statements(found, names):
                touched = key in item.statement.needs and (item.about != "b" or key in OF_THE_MERGE)
                assert item.standing == (standing if touched else "holds"), (key, item.statement.name)
                assert not (touched and item.tier == "certified")
    covered = [
        finding("frozen_head", f.about, "violated", "", covered=True) if f.key == "frozen_head" else f
        for f in _all_hold()
    ]
    standing = {i.statement.name: i.standing for i in judge_statements(covered, names)}
    assert standing["master bound"] == "holds"
    assert standing["Theorem 1, high probability"] == "broken"
    missing = [f for f in _all_hold() if f.key != "smooth"]
    assert {i.standing for i in judge_statements(missing, names) if i.statement.name == "Theorem 3 (c)"} == {"open"}


@pytest.mark.parametrize(
    "change",
    [{}, {"momentum": 0.5}, {"sampling": "reshuffle"}, {"learning_rate": 0.3}, {"weight_decay": 0.1}, {"clip_norm": 1}],
)
def test_broken_statements_are_those_that_the_theory_refuses(change: dict[str, Any]) -> None:
    """Independent of our table: ``theory`` itself refuses these recipes by its own checks."""
    settings = {"sampling": "without_replacement", "learning_rate": 0.2, "trained": "backbone", **change}
    run = spec(**{"steps": 4, "batch_size": 3, **settings})
    clipped = [0.5] * 4 if run.clip_norm else None
    found = [f for f in _all_hold(("a",)) if f.about == "merge"]
    own = {f.key: f for f in _all_hold(("a",)) if f.about == "a"}
    own |= {f.key: f for f in judge_recipe("a", run, _log([3, 3, 3, 3], clip=clipped), n=8, drift=0.1)}
    own |= {f.key: f for f in judge_steps("a", run, Evidence.exact("L", 4.0), certified=4.0)}
    own["log"] = finding("log", "a", "holds", "not tried here")
    standing = {i.statement.name: i.standing for i in judge_statements([*found, *own.values()], ("a",))}
    constants: dict[str, Any] = {"L": 4.0, "sigma": 1.0, "initial_gradient_norm": 1.0, "initial_risk": 1.0}
    expert = Expert(
        "a", n=8, batch_size=3, learning_rate=run.learning_rate, steps=4, momentum=run.momentum, sampling=run.sampling,
        weight_decay=run.weight_decay, gradient_clipping=run.clip_norm is not None, base_norm=1.0,
        batch_losses=_schedule(), **constants,
    )  # fmt: skip
    from theory.clocks import clock

    forms = {
        "Theorem 3 (a)": lambda: drift_noise(expert, clock(expert)),
        "Theorem 3 (c)": lambda: drift_energy(expert),
        "Theorem 3 (d), loss log": lambda: drift_losses(expert),
    }
    for name, compute in forms.items():
        try:
            refused = not np.isfinite(compute())
        except AssumptionError:
            refused = True
        assert (standing[name] == "broken") == refused, (name, change)
    assert finite_batch_factor(8, 3, run.sampling) < 1


def _schedule() -> Any:
    from theory.recipe import Schedule

    return Schedule(np.ones(4))
