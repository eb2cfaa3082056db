"""One pool from its experts to its rows: collected once, then group by group, each kept as soon as it is done."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.measure.opening import from_store
from experiments.measured import Measured
from experiments.pipeline import read_finished
from experiments.prediction.accuracies import accuracy_rows
from experiments.prediction.bank import Progress, build_bank
from experiments.prediction.compare import Collected, compare_rows
from experiments.prediction.curve import curve_rows, price_rows
from experiments.prediction.draws import Pool, StudyGroup
from experiments.prediction.hull import hull_layer_rows, hull_rows
from experiments.prediction.material import Material
from experiments.prediction.measuring import linear_coefficients
from experiments.prediction.opening import open_pool
from experiments.prediction.rows import merge_rows
from experiments.prediction.spec import ComparisonSpec, StudySpec, label
from experiments.store import Store
from merging.variances import clamped_share

Row = dict[str, Any]
STAGES = ("merges", "variances", "accuracies", "prices", "comparison", "hull", "hull_layers", "curve")
"""Files of a pool, ``<stage>.jsonl``, one line per group."""


def stage_groups(spec: StudySpec, pool: Pool, stage: str) -> list[StudyGroup]:
    """The groups that take part in a stage."""
    groups = list(pool.groups)
    if stage in ("merges", "variances", "accuracies"):
        return groups
    if stage == "prices":
        return _first(groups, list(spec.groups), 1)
    if stage in ("comparison", "hull", "hull_layers"):
        return [] if spec.comparison is None else [g for g in groups if len(g.members) in spec.comparison.sizes]
    return [] if spec.curve is None else _first(groups, spec.curve.sizes, spec.curve.groups)


def _first(groups: Sequence[StudyGroup], sizes: Sequence[int], count: int) -> list[StudyGroup]:
    return [g for size in sizes for g in [h for h in groups if len(h.members) == size][:count]]


def progress_of(spec: StudySpec, pool: Pool, folder: Path) -> tuple[int, int]:
    """Groups done and in all, over all stages, from what is on disk."""
    done, total = 0, 0
    for stage in STAGES:
        total += len(stage_groups(spec, pool, stage))
        path = folder / f"{stage}.jsonl"
        done += path.read_bytes().count(b"\n") if path.exists() else 0
    return done, total


def run_pool(
    spec: StudySpec,
    pool: Pool,
    store: Path,
    folder: Path,
    *,
    root: str | Path | None = None,
    stages: Sequence[str] = STAGES,
    progress: Progress | None = None,
) -> None:
    """Do what is missing of one pool.

    Args:
        spec: the study.
        pool: from :func:`experiments.prediction.draws.study_pools`.
        store: folder of its regime's grid.
        folder: of this pool's results; a later call continues there.
        root: folder of the data sets.
        stages: which of :data:`STAGES`; the others need ``merges``.
        progress: called with the stage, steps done and their number.
    """
    tell = progress or (lambda stage, done, total: None)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {stage: read_finished(folder / f"{stage}.jsonl") for stage in STAGES}
    missing = {
        stage: [g for g in stage_groups(spec, pool, stage) if str(g.number) not in kept[stage]] for stage in stages
    }
    if not any(missing.values()):
        return
    with Store.open(store, "r") as opened:
        material = open_pool(
            opened, pool, calibration=spec.calibration_images, test=spec.test_images, seed=spec.seed, root=root
        )
        bank = build_bank(material, pool, folder, tell, spec.own_tangents)
        known: dict[int, Measured] = {}
        collected = Collected(bank.material, spec.comparison or ComparisonSpec(), spec.seed)
        makers: dict[str, Callable[[StudyGroup], list[Row]]] = {
            "merges": lambda group: merge_rows(spec, pool, bank, group, known),
            "variances": lambda group: variance_rows(spec, pool, bank.material, group),
            "prices": lambda group: price_rows(spec, pool, bank, group),
            "comparison": lambda group: compare_rows(
                spec, pool, bank, group, collected, kept["merges"].get(str(group.number), [])
            ),
            "accuracies": lambda group: accuracy_rows(spec, pool, bank, group),
            "hull": lambda group: hull_rows(spec, pool, bank, group),
            "hull_layers": lambda group: hull_layer_rows(spec, pool, bank, group, collected),
            "curve": _curve(spec, pool, material, opened, kept, root),
        }
        for stage in STAGES:
            for done, group in enumerate(missing.get(stage, [])):
                rows = [_plain(row) for row in makers[stage](group)]
                kept[stage][str(group.number)] = rows
                with (folder / f"{stage}.jsonl").open("a") as handle:
                    handle.write(json.dumps({"key": str(group.number), "rows": rows}) + "\n")
                tell(stage, done + 1, len(missing[stage]))


def variance_rows(spec: StudySpec, pool: Pool, material: Material, group: StudyGroup) -> list[Row]:
    """Share of running variances that every merge clamps at zero (methods that are not linear average them)."""
    members = list(group.members)
    rows = []
    for method in spec.methods:
        if method.merges(len(members)):
            alpha = linear_coefficients(method, len(members))
            space, deltas = material.backbone.space, material.deltas[members]
            share = 0.0 if alpha is None else clamped_share(space, material.origin, deltas, alpha)
            name = f"{pool.key.folder}-{group.number}"
            rows.append({"group": name, "settings": label(method), "clamped": share, "tier": "measured"})
    return rows


def _curve(
    spec: StudySpec,
    pool: Pool,
    material: Material,
    store: Store,
    kept: dict[str, dict[str, list[Row]]],
    root: str | Path | None,
) -> Callable[[StudyGroup], list[Row]]:
    from experiments.tasks.types import Split

    many: dict[str, Split] = {}

    def make(group: StudyGroup) -> list[Row]:
        assert spec.curve is not None
        if not many:
            digests = {expert.task: expert.digest for expert in pool.experts}
            most = max(spec.curve.images)
            subject = from_store(store, list(digests.values()), images=most, seed=spec.seed, root=root)
            many.update(zip(digests, subject.calibration, strict=True))
        table = kept["merges"].get(str(group.number), [])
        return curve_rows(spec, pool, material, many, group, table)

    return make


def _plain(row: Row) -> Row:
    """Numbers that JSON knows; what is not finite becomes ``null``."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
