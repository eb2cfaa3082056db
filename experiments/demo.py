"""The main job end to end: run the validation spec, compute the tables, write the report."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.pipeline import Frames
from experiments.report import Tables, compute_tables, write_atomically, write_report
from experiments.runner import Status, run_validation
from experiments.spec import ValidationSpec
from experiments.tasks.digits8 import digits8
from experiments.validation import Settings


@dataclass(frozen=True)
class Outcome:
    """What a validation run produced."""

    frames: Frames
    tables: Tables
    report: Path


def run_demo(
    spec: ValidationSpec,
    out: Path,
    *,
    workers: int | None = None,
    watch: Callable[[Status], None] | None = None,
    command: str = "mergebound demo",
) -> Outcome:
    """Run (or continue) the validation run ``spec`` under ``out`` and write tables, figures and the report there.

    Raises:
        MergeboundError: see :func:`experiments.runner.run_validation`.
    """
    out.mkdir(parents=True, exist_ok=True)
    frames = run_validation(spec, out / "work", workers=workers, watch=watch)
    export_data(spec, out / "data")
    settings = Settings(resamples=200, seed=spec.seed)
    if watch is not None:
        watch(Status("report", "tables and figures", 0.1))
    tables = compute_tables(frames.merges, frames.optimal, settings)
    meta = {
        "title": f"Predicted against measured risk of merged models: {spec.name}",
        "command": command,
        "seed": spec.seed,
        "versions": versions(),
        "hashes": {"specification": spec.digest()},
        "settings": flat_settings(spec),
        "assumptions": assumptions(spec),
        "notes": notes(spec),
    }
    page = write_report(
        out,
        frames.merges,
        frames.experts,
        frames.coefficients,
        frames.lines,
        frames.optimal,
        meta,
        settings=settings,
        tables=tables,
    )
    if watch is not None:
        watch(Status("report", "done", 1.0))
    return Outcome(frames, tables, page)


def export_data(spec: ValidationSpec, folder: Path) -> None:
    """Write every task's calibration and test images as ``.npz``, for trying ``mergebound predict`` on them."""
    import io

    family = digits8(seed=spec.seed, **spec.family.model_dump())
    for name, task in family.tasks.items():
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            x_calibration=task.calibration.images.numpy(),
            y_calibration=task.calibration.labels.numpy(),
            x_test=task.test.images.numpy(),
            y_test=task.test.labels.numpy(),
            class_names=np.array([str(k) for k in range(task.classes)]),
        )
        write_atomically(folder / f"{name}.npz", buffer.getvalue())


def versions() -> dict[str, str]:
    """Versions that results may depend on."""
    packages = ("mergebound", "torch", "timm", "numpy", "scipy", "pandas")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "processor": platform.machine(), **found}


def flat_settings(spec: ValidationSpec) -> dict[str, str]:
    """The spec as name-value pairs for the report."""
    rows: dict[str, str] = {}
    for key, value in spec.model_dump(mode="json").items():
        if isinstance(value, dict):
            for inner, content in value.items():
                rows[f"{key}.{inner}"] = str(content)
        else:
            rows[key] = str(value)
    return rows


def assumptions(spec: ValidationSpec) -> list[tuple[str, str, str]]:
    """Assumptions of the bounds with verdicts (theory.md section 1)."""
    batch_norm = "resnet_bn" in spec.architectures
    shared = spec.family.share_images
    return [
        (
            "A1 samples are independent across tasks",
            "violated" if shared else "holds",
            "all tasks train on the same images" if shared else "every task trains on images of its own",
        ),
        (
            "A2 base, hyperparameters, stopping and coefficients do not depend on the samples",
            "holds",
            "all are drawn from seeds beforehand; tuned and risk-optimal coefficients use calibration images only",
        ),
        (
            "A3 the loss is a per-sample loss",
            "violated" if batch_norm else "holds",
            "resnet_bn trains with batch statistics (vit and resnet_gn do not)"
            if batch_norm
            else "LayerNorm and GroupNorm",
        ),
        (
            "A4 smoothness",
            "unknown",
            "a network has no global L: it is estimated from below by power iteration at base and expert, so the "
            "master bound is estimated, never certified",
        ),
        (
            "Heads",
            "holds",
            {
                "trained": "each task's own trained head; its drift enters as private stability",
                "frozen": "heads frozen: no private stability",
                "shared": "one head, merged like the rest (soups of one task)",
            }[spec.heads],
        ),
    ]


def notes(spec: ValidationSpec) -> list[str]:
    """What a reader must know to read the numbers."""
    return [
        "Predictions and every tuned coefficient use calibration images; test images are used for measurements only.",
        "Prediction: function-space risk (tier estimated). Certificates: upper bounds with an estimated remainder.",
        "For TIES and DARE the secant is taken at the projection of the merge on the experts' span; tangents use the "
        "whole direction.",
        "The master bound for TIES uses a local sensitivity at fixed support and signs; TIES is discontinuous.",
        "base_loss puts each expert's final head on the base; the collapse label is: merged loss above it.",
    ]
