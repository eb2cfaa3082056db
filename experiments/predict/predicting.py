"""All merges of a group: what is decided, collected, planned and priced, in this order."""

from __future__ import annotations

import time

import numpy as np

from experiments.measure.function_space import GroupStatistics
from experiments.predict.collecting import collect_group, smoothness_of_tasks
from experiments.predict.options import Options, decide, tangents_rule
from experiments.predict.plans import plans_of
from experiments.predict.pricing import NARROW, WIDE, joint_estimate, priced, task_estimate
from experiments.predict.report import ExpertSummary, Objective, Report
from experiments.predict_group import Group, Progress
from merging.registry import get
from theory.assumptions import Assumption
from theory.errors import MergeboundError
from theory.function_space import cross_entropy


def predict(group: Group, options: Options | None = None, progress: Progress | None = None) -> Report:
    """Predict the joint risk of merging the group, for every method, without forming a merge that is linear.

    TIES and DARE are formed as vectors (not evaluated): their predictions need M - x_0.

    Raises:
        MergeboundError: options that do not fit, or a network without the derivatives asked for.
    """
    started = time.perf_counter()
    wanted = options or Options()
    tell = progress or (lambda stage, done, total: None)
    methods, tangent, with_bound, notes = decide(group, wanted)
    try:
        stats = collect_group(group, tangent, tell)
    except MergeboundError as error:
        if wanted.tangent is not None or not str(error).startswith("--tangent"):
            raise
        notes.append(f"tangents were left out: {error}")
        methods = tuple(name for name in methods if get(name).linear)
        tangent = False
        with_bound = bool(wanted.bound)
        stats = collect_group(group, False, tell)
    objective: Objective = wanted.objective or ("middle" if tangent else "secant")
    if objective != "secant" and not tangent:
        raise MergeboundError(f"--objective {objective}: it needs tangents; pass --tangent, or --objective secant")
    stiffness = smoothness_of_tasks(group, wanted.seed, tell) if with_bound else None
    plans = plans_of(group, stats, methods, wanted, objective)
    own = [cross_entropy(stats.own_logits(j), stats.labels[j]) for j in range(group.size)]
    base = [cross_entropy(h, y) for h, y in zip(stats.base_logits, stats.labels, strict=True)]
    base_risk = joint_estimate(group, base)
    rows = tuple(priced(group, stats, plan, own, base_risk.value, stiffness, wanted.seed) for plan in plans)
    notes.extend(_notes(group, stats))
    drift = np.sqrt(np.diag(stats.gram))
    experts = tuple(
        ExpertSummary(
            group.names[j],
            str(group.expert_paths[j]),
            str(group.data_paths[j]),
            group.data[j].name,
            len(group.data[j].split),
            group.data[j].total,
            group.classes[j],
            task_estimate(own[j]),
            float((stats.own_logits(j).argmax(axis=1) == stats.labels[j]).mean()),
            task_estimate(base[j]),
            float(drift[j]),
            None if stiffness is None else float(stiffness[j]),
        )
        for j in range(group.size)
    )
    return Report(
        tier="estimated",
        seed=wanted.seed,
        architecture=group.architecture,
        parameters=group.base.numel(),
        base=str(group.base_path),
        private=group.patterns,
        tangents=tangent,
        tangents_rule=tangents_rule(group, wanted),
        objective=objective,
        verdict_rule=(
            f"wide: largest of secant, tangent and middle at least {WIDE} x the smallest and above the base's "
            f"risk, or all above it, or running variances clamped; narrow: largest at most {NARROW} x the smallest, or "
            "within a standard error; medium otherwise"
        ),
        experts=experts,
        expert_risk=joint_estimate(group, own),
        base_risk=base_risk,
        methods=rows,
        best=min(rows, key=lambda row: (row.clamped > 0.0, row.risk.value)).label,
        risk_optimal=next(
            (plan.label for plan in plans if plan.gap is not None and plan.method == "risk_optimal"), None
        ),
        assumptions=_assumptions(group, tangent),
        notes=tuple(notes),
        seconds=time.perf_counter() - started,
    )


def _assumptions(group: Group, tangent: bool) -> tuple[Assumption, ...]:
    used = ", ".join(dict.fromkeys(item.name or "the only split" for item in group.data))
    return (
        Assumption(
            "A1", "samples of different tasks are independent", "unknown", "how the experts were trained is unknown"
        ),
        Assumption(
            "A2",
            "coefficients do not depend on the images they are judged on",
            "violated",
            "risk_optimal, the best scale and their predictions use the same calibration images; judge on others",
        ),
        Assumption(
            "A3",
            "the loss is a per-sample loss (no BatchNorm in train mode)",
            "violated" if group.batch_norm else "holds",
            "the network has BatchNorm" if group.batch_norm else "the network has no BatchNorm",
        ),
        Assumption("4-6", "experts were trained by SGD", "unknown", "how the experts were trained is unknown"),
        Assumption(
            "held out",
            "calibration images were not trained on",
            "violated" if any(item.name == "train" for item in group.data) else "unknown",
            f"split: {used}",
        ),
        Assumption(
            "8",
            "logits are close to linear in the coefficients",
            "unknown",
            "the bracket's width shows it" if tangent else "not checked: no tangents were collected",
        ),
    )


def _notes(group: Group, stats: GroupStatistics) -> list[str]:
    notes = []
    splits = {item.name for item in group.data}
    if "train" in splits:
        notes.append(
            "calibrated on images of the split 'train': if the experts were trained on them, risks come out too low"
        )
    if "test" in splits:
        notes.append("calibrated on images of the split 'test': judge the merge on other images")
    for j, risk in enumerate(stats.own_risks()):
        if risk >= np.log(group.classes[j]):
            notes.append(
                f"{group.names[j]} is no better than chance on {group.data_paths[j].name}: check the order of --data, "
                "the order of classes, --mean and --std"
            )
    if len(set(group.sources)) < group.size:
        notes.append("tasks share calibration images; standard errors account for it")
    return notes
