"""Gradient noise, gap, PL ratio, and whether constants at points stand for suprema (theory.md sections 5, 6 and 8)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.finetune.loop import TrainingLog
from experiments.measure.noise.at_point import PointNoise
from experiments.measure.noise.constant import Constant
from experiments.measure.verdicts.finding import ROUNDING, Evidence, Finding, Leaning, finding


def is_between(point: PointNoise) -> bool:
    """Whether a point lies on the chord, where training was not."""
    return point.point.startswith("between")


def noise_growth(points: Sequence[PointNoise]) -> Evidence | None:
    """Slope c of ``sigma^2 = a + c |grad F_S|^2`` over points, with a 95 % interval of least squares.

    A positive slope says that the noise grows with the gradient, so that no sigma bounds it far away.  ``None`` for
    fewer than three points or a gradient that does not change.
    """
    gradient = np.array([p["all"].gradient.value ** 2 for p in points])
    noise = np.array([p["all"].sigma.value ** 2 for p in points])
    if len(points) < 3 or np.ptp(gradient) <= ROUNDING * max(gradient.max(), 1e-300):
        return None
    from scipy.stats import linregress, t

    fit = linregress(gradient, noise)
    half = float(t.ppf(0.975, len(points) - 2) * fit.stderr)
    slope = float(fit.slope)
    covers = f"95 %, least squares over {len(points)} points"
    return Evidence("growth of sigma^2 per |grad|^2", slope, slope - half, slope + half, covers, points[0].loss.seed)


def judge_noise(
    name: str, points: Sequence[PointNoise], *, certified: float | None = None, stated: float | None = None
) -> tuple[Finding, Finding]:
    """Whether sigma bounds the noise on the path, and whether its value at the base does.

    Args:
        name: of the expert.
        points: in the order of the path, the base first; chord points count for the growth only.
        certified: a bound on sigma at every point, from a theorem.
        stated: sigma that is claimed.
    """
    visited = [p for p in points if not is_between(p)]
    sigmas = [p["all"].sigma for p in visited]
    top = max(sigmas, key=lambda s: s.value)
    start = Evidence.of("sigma_0 at the base", sigmas[0])
    largest = Evidence.of(f"largest sigma at {len(visited)} points", top)
    growth = noise_growth(points)
    evidence = [start, largest] + ([] if growth is None else [growth])
    return _on_path(name, top, evidence, growth, certified, stated), _at_base(name, sigmas, evidence, certified)


def _on_path(
    name: str,
    top: Constant,
    evidence: list[Evidence],
    growth: Evidence | None,
    certified: float | None,
    stated: float | None,
) -> Finding:
    key = "noise_on_path"
    if stated is not None:
        claim = Evidence.exact("stated sigma", stated, "claimed")
        if top.low > stated * (1 + ROUNDING):
            why = f"sigma = {stated:.4g} is stated, but {top.value:.4g} was measured"
            return finding(key, name, "violated", why, claim, *evidence, remedy="state a larger sigma")
        return finding(key, name, "holds", "stated, and no point refutes it", claim, *evidence)
    if certified is not None:
        bound = Evidence.exact("bound on sigma", certified, "theorem, given the images")
        return finding(key, name, "holds", "per-sample gradients are bounded everywhere", bound, *evidence)
    grows = growth is not None and growth.low > 0
    why = "measured at points of the path only"
    if grows:
        why += "; it grows with the gradient, so that no constant bounds it everywhere"
    return finding(
        key, name, "unknown", why, *evidence, seen="against" if grows else "for",
        remedy="measure more checkpoints, or take 6(b) (noise at the base only) or 6(d) (log)",
    )  # fmt: skip


def _at_base(name: str, sigmas: Sequence[Constant], evidence: list[Evidence], certified: float | None) -> Finding:
    key, first = "noise_at_base", sigmas[0]
    above = [s for s in sigmas[1:] if s.low > first.high * (1 + 1e-6)]
    if above:
        why = f"the noise grows to {max(s.value for s in above):.3g} on the path"
        return finding(key, name, "violated", why, *evidence, remedy="take the largest sigma on the path")
    if certified is not None and certified <= first.low * (1 + ROUNDING):
        return finding(key, name, "holds", "no point can have more noise than the base", *evidence)
    return finding(key, name, "unknown", "no visited point has clearly more noise", *evidence, seen="for")


def judge_pl(
    name: str,
    points: Sequence[PointNoise],
    *,
    certified: float | None = None,
    stated: float | None = None,
    least_known: bool = False,
) -> Finding:
    """The PL ratio ``|grad|^2 / (2 (F - F*))`` on the path, decay included.

    Args:
        name: of the expert.
        points: with their PL ratios, made with F* = 0 unless ``least_known``; with F* = 0 the ratio errs low.
        certified: mu > 0 that a theorem gives (convex with decay omega: mu = omega).
        stated: mu that is claimed.
        least_known: F* of the ratios is the true smallest value, so that a vanishing gradient above it refutes PL.
    """
    ratios = [p.pl_ratio for p in points]
    at, least = min(enumerate(ratios), key=lambda item: item[1].value)
    smallest = Evidence.of(f"smallest PL ratio (at {points[at].point or 'a point'})", least)
    start = Evidence.of("PL ratio at the base", ratios[0])
    if stated is not None:
        claim = Evidence.exact("stated mu", stated, "claimed")
        if least.high < stated * (1 - ROUNDING) and least_known:
            why = f"mu = {stated:.3g} is stated, but the ratio falls to {least.value:.3g}"
            return finding("pl", name, "violated", why, claim, smallest, start, remedy="state a smaller mu")
        if least.high < stated * (1 - ROUNDING):
            why = "the ratio with F* = 0 falls below the stated mu: it errs low, so that this does not decide"
            return finding("pl", name, "unknown", why, claim, smallest, start, seen="against", remedy="give F*")
        return finding("pl", name, "holds", "stated, and no point refutes it", claim, smallest, start)
    flat = [p for p in points if p["all"].objective_gradient.low <= 1e-9 and p.pl_ratio.low <= 0.0]
    stuck = [p for p in flat if p["all"].objective_gradient.high <= 1e-6 and np.isfinite(p.pl_ratio.value)]
    if stuck and least_known:
        why = f"the gradient vanishes at {stuck[0].point or 'a point'}, above the smallest value"
        return finding("pl", name, "violated", why, smallest, start, remedy="give the training risk itself")
    if certified is not None and certified > 0:
        bound = Evidence.exact("mu", certified, "theorem")
        return finding("pl", name, "holds", "convex with weight decay: mu = omega", bound, smallest, start)
    seen: Leaning = "against" if flat else "for"
    why = "measured at points of the path; the constant is an infimum over all points"
    remedy = "give training_risk itself: the PL bound is needed only without it"
    return finding("pl", name, "unknown", why, smallest, start, seen=seen, remedy=remedy)


def judge_lipschitz(
    name: str, largest: Constant, *, certified: float | None = None, stated: float | None = None
) -> Finding:
    """G: a stated or certified bound on per-sample gradients, held against the largest seen."""
    seen = Evidence.of("largest per-sample gradient seen", largest)
    share = Evidence.exact(
        "share of samples that may lie above (95 % confidence)", largest.exceeding, "order statistics"
    )
    if stated is not None:
        claim = Evidence.exact("stated G", stated, "claimed")
        if largest.value > stated * (1 + ROUNDING):
            why = f"G = {stated:.4g} is stated, but {largest.value:.4g} was seen"
            return finding("lipschitz", name, "violated", why, claim, seen, share, remedy="state a larger G")
        return finding("lipschitz", name, "holds", "stated, and no gradient seen is longer", claim, seen, share)
    if certified is not None:
        bound = Evidence.exact("G", certified, "theorem, given the images")
        return finding("lipschitz", name, "holds", "a linear classifier has bounded gradients", bound, seen, share)
    return finding("lipschitz", name, "unknown", "the largest seen is no bound", seen, share, remedy="state G")


def judge_fresh_gap(name: str, *, fresh: bool, overlapping: int | None) -> Finding:
    """D_2 needs held-out samples next to training samples.

    Args:
        name: of the expert.
        fresh: the gap compares training samples with others.
        overlapping: how many of the others were trained on; ``None`` where that is not known.
    """
    if not fresh:
        why = "the gap compares samples of one set, which is not enough"
        return finding("fresh_gap", name, "violated", why, remedy="open the grid's store, which knows S_i")
    if overlapping is None:
        return finding("fresh_gap", name, "unknown", "it is not known whether the others were trained on", seen="for")
    count = Evidence.exact("fresh samples that were trained on", overlapping, "pixel by pixel")
    if overlapping:
        return finding("fresh_gap", name, "violated", f"{overlapping} fresh samples were trained on", count,
                       remedy="draw calibration images from the validation part")  # fmt: skip
    return finding("fresh_gap", name, "holds", "no fresh sample was trained on", count)


def judge_suprema(name: str, points: Sequence[PointNoise]) -> Finding:
    """Whether values at the ends of the path stand for suprema: are they exceeded at the points between?

    ``holds`` never follows from points.
    """
    ends, inner = (points[0], points[-1]), points[1:-1]
    evidence, exceeded = [], []
    for field in ("sigma", "gap", "largest_gap", "largest_norm"):
        outside = [getattr(p["all"], field) for p in ends]
        top = max(outside, key=lambda c: c.value)
        if inner and top.value > 0:
            inside = max((getattr(p["all"], field) for p in inner), key=lambda c: c.value)
            ratio = inside.value / top.value
            if inside.lower_estimate or top.lower_estimate:  # of what was seen; the suprema have no upper limits
                low, high, covers = ratio, ratio, "the samples that were looked at, the same at every point"
            else:
                low, high = inside.low / max(top.high, 1e-300), inside.high / max(top.low, 1e-300)
                covers = "95 % each"
            evidence.append(Evidence(f"{field}, between over at the ends", ratio, low, high, covers, top.seed))
            if low > 1 + 1e-6:
                exceeded.append(field)
        if field.startswith("largest"):
            covers = "order statistics, 95 % confidence"
            evidence.append(Evidence.exact(f"share of samples above {field}", top.exceeding, covers))
    if exceeded:
        why = f"{', '.join(exceeded)} exceed their values at the ends: more points would find more"
        return finding("suprema", name, "unknown", why, *evidence, seen="against", remedy="measure more checkpoints")
    seen: Leaning = "for" if inner else "nothing"
    why = f"{len(points)} points were looked at; nothing between the ends exceeds them" if inner else "ends only"
    return finding("suprema", name, "unknown", why, *evidence, seen=seen, remedy="measure more checkpoints")


def judge_risk(
    name: str,
    points: Sequence[PointNoise],
    log: TrainingLog | None = None,
    epoch: int = 0,
    *,
    descends: bool = False,
) -> Finding:
    """Whether the training risk stays below its value at the base.

    Args:
        name: of the expert.
        points: visited ones, the base first.
        log: batch losses; ``epoch`` steps are averaged to stand for the risk.
        epoch: steps of an epoch, 0 for none.
        descends: every step descends surely (whole-sample steps without momentum or decay, eta <= 2/L by a theorem).
    """
    visited = [p for p in points if not is_between(p)]
    start = visited[0].loss
    evidence = [Evidence.of("F_S at the base", start)]
    top = max(visited[1:], key=lambda p: p.loss.value, default=None)
    if top is not None:
        evidence.append(Evidence.of(f"largest F_S at visited points ({top.point})", top.loss))
    above = top is not None and top.loss.low > start.high * (1 + 1e-6)
    leaning: Leaning = "for"
    if log is not None and len(log.batch_loss):
        length = max(1, min(epoch or 1, len(log.batch_loss)))
        parts = np.array_split(np.asarray(log.batch_loss, dtype=np.float64), max(1, len(log.batch_loss) // length))
        means = [float(part.mean()) for part in parts]
        evidence.append(Evidence.exact(f"largest mean of {length} logged batch losses", max(means), "every step"))
        leaning = "against" if max(means) > start.high else "for"
    if above:
        assert top is not None
        why = f"the risk rises to {top.loss.value:.3g} at {top.point}"
        return finding("risk_below_start", name, "violated", why, *evidence, remedy="lower the learning rate")
    if descends:
        why = "whole-sample steps with eta <= 2/L never raise the risk"
        return finding("risk_below_start", name, "holds", why, *evidence)
    why = "no visited point is above the base" if leaning == "for" else "logged batch losses rise above the base"
    return finding("risk_below_start", name, "unknown", why, *evidence, seen=leaning)
