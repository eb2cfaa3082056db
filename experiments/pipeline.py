"""The main job for one architecture: fine-tune, collect, merge, predict, measure.

Every finished expert and every finished group is on disk before the next starts, so an interrupted run continues.
Predictions are made from calibration images; test images are used for measurements only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.bounds import expert_table
from experiments.coefficients import line_rows, optimal_rows, sweep_rows
from experiments.collected import collect_pool
from experiments.experts import Progress, make_base, make_pool
from experiments.measure.backbone import Backbone
from experiments.merges import Bench, Row, form_merges, merge_rows
from experiments.models import build_model
from experiments.pool import PlannedGroup, draw_groups, draw_pool
from experiments.spec import ValidationSpec
from experiments.tasks.digits8 import digits8
from experiments.tasks.types import Family
from theory.errors import MergeboundError


@dataclass(frozen=True)
class Frames:
    """Result tables; the columns are those that :mod:`experiments.validation` reads."""

    merges: pd.DataFrame
    experts: pd.DataFrame
    coefficients: pd.DataFrame
    lines: pd.DataFrame
    optimal: pd.DataFrame


def run_regime(
    spec: ValidationSpec, architecture: str, regime: str, family: Family, folder: Path, progress: Progress
) -> Frames:
    """Fine-tune the pool of one regime, merge every group with every method, predict and measure.

    Raises:
        MergeboundError: so many experts diverged that no group is left.
    """
    progress("pretrain", 0, 1)
    base = make_base(spec, architecture, family, folder)
    progress("pretrain", 1, 1)
    place = folder / regime
    plans = draw_pool(spec, regime)
    experts = make_pool(spec, architecture, family, base, plans, place / "experts", progress)
    diverged = {i for i, e in enumerate(experts) if not e.log.finite}
    groups = [g for g in draw_groups(spec, regime, plans) if not diverged & set(g.members)]
    if not groups:
        raise MergeboundError(f"regimes.{regime}: every group holds a diverged expert; lower learning_rate")
    model = build_model(architecture, classes=10, seed=spec.seed)
    backbone = Backbone.of(model, base, shared_head=spec.heads == "shared")
    pool = collect_pool(backbone, base, experts, family, [g.members for g in groups], progress)
    table = expert_table(spec, architecture, regime, experts, pool, base)
    bench = Bench(spec, pool, experts, table, model, base)
    common = {"regime": regime, "architecture": architecture, "seed": spec.seed}

    def stage(name: str, keys: Sequence[str], make: Callable[[int], list[Row]]) -> pd.DataFrame:
        """Rows of one stage: one JSON line per key, appended as soon as it is done."""
        path = place / f"{name}.jsonl"
        done = read_finished(path)
        for number, key in enumerate(keys):
            if key not in done:
                done[key] = [{**common, **row} for row in make(number)]
                with path.open("a") as handle:
                    handle.write(json.dumps({"key": key, "rows": done[key]}) + "\n")
            progress(name, number + 1, len(keys))
        return pd.DataFrame([row for key in keys for row in done[key]])

    finished = read_finished(place / "merges.jsonl")
    formed = form_merges(bench, [g for g in groups if str(g.number) not in finished], progress)
    merges = stage("merges", [str(g.number) for g in groups], lambda k: merge_rows(bench, groups[k], formed))
    chosen = spread(groups, spec.sweep_groups)
    coefficients = stage("coefficients", [str(g.number) for g in chosen], lambda k: sweep_rows(bench, chosen[k]))
    pairs = line_pairs(groups, spec.lines)
    lines = stage("lines", [f"{a}-{b}" for a, b in pairs], lambda k: line_rows(bench, *pairs[k]))
    picked = spread(groups, spec.optimal_groups)
    optimal = stage("optimal", [str(g.number) for g in picked], lambda k: optimal_rows(bench, picked[k]))
    return Frames(merges, table, coefficients, lines, optimal)


def read_finished(path: Path) -> dict[str, list[Row]]:
    """Finished keys of a stage; a last line cut short by an interruption is ignored."""
    done: dict[str, list[Row]] = {}
    if not path.exists():
        return done
    lines = path.read_bytes().split(b"\n")
    whole = b"".join(line + b"\n" for line in lines[:-1])
    if lines[-1]:
        path.write_bytes(whole)
    for line in whole.splitlines():
        entry = json.loads(line)
        done[entry["key"]] = entry["rows"]
    return done


def spread(groups: Sequence[PlannedGroup], count: int) -> list[PlannedGroup]:
    """``count`` groups, as evenly as possible over group sizes and halves, first drawn first."""
    ranks: dict[tuple[int, str], int] = {}
    order = []
    for group in groups:
        kind = (len(group.members), group.half)
        ranks[kind] = ranks.get(kind, 0) + 1
        order.append((ranks[kind], group.half, len(group.members), group))
    chosen = sorted(order, key=lambda item: item[:3])[:count]
    return sorted((item[3] for item in chosen), key=lambda group: group.number)


def line_pairs(groups: Sequence[PlannedGroup], count: int) -> list[tuple[int, int]]:
    """Pairs of experts for the loss along a line: the first two members of the first groups."""
    pairs = dict.fromkeys((group.members[0], group.members[1]) for group in groups)
    return list(pairs)[:count]


def run_architecture(spec: ValidationSpec, architecture: str, folder: Path, progress: Progress) -> Frames:
    """All regimes of one architecture."""
    folder.mkdir(parents=True, exist_ok=True)
    family = digits8(seed=spec.seed, **spec.family.model_dump())
    parts = []
    for regime in spec.regimes:

        def named(stage: str, done: int, total: int, regime: str = regime) -> None:
            progress(f"{regime}: {stage}", done, total)

        parts.append(run_regime(spec, architecture, regime, family, folder, named))
    return join_frames(parts)


def join_frames(parts: Sequence[Frames]) -> Frames:
    """Stack the tables of several regimes or architectures."""
    stacked = {
        name: pd.concat([getattr(part, name) for part in parts], ignore_index=True)
        for name in ("merges", "experts", "coefficients", "lines", "optimal")
    }
    return Frames(**stacked)
