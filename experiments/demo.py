"""The main job end to end: run the validation spec, compute the tables, write the report."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.atomic import write_atomically
from experiments.pipeline import Frames
from experiments.report import Tables, compute_tables, write_report
from experiments.runner import Status, run_validation
from experiments.spec import ValidationSpec
from experiments.tasks.digits8 import digits8
from experiments.validation import Settings
from theory.errors import MergeboundError


@dataclass(frozen=True)
class Outcome:
    """What a validation run produced."""

    frames: Frames
    tables: Tables
    report: Path
    example: str


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
    prepare_folder(out)
    frames = run_validation(spec, out / "work", workers=workers, watch=watch)
    export_data(spec, out / "data")
    settings = Settings(resamples=300, seed=spec.seed)
    if watch is not None:
        watch(Status("report", "tables", 0.05))
    tables = compute_tables(frames.merges, frames.optimal, settings)
    if watch is not None:
        watch(Status("report", "figures", 0.4))
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
    return Outcome(frames, tables, page, predict_example(spec, frames, out))


def predict_example(spec: ValidationSpec, frames: Frames, out: Path) -> str:
    """A ``mergebound predict`` command for the first group's experts, which the run has left on disk."""
    first = frames.merges.iloc[0]
    place = out / "work" / spec.digest() / str(first["architecture"])
    names, tasks = str(first["experts"]).split(";"), str(first["tasks"]).split(";")
    experts = " ".join(str(place / str(first["regime"]) / "experts" / f"{name}.safetensors") for name in names)
    data = " ".join(str(out / "data" / f"{task}.npz") for task in tasks)
    return f"mergebound predict --base {place / 'base.safetensors'} --experts {experts} --data {data}"


def prepare_folder(out: Path) -> None:
    """Create the output folder.

    Raises:
        MergeboundError: it cannot be created or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise MergeboundError(
            f"--out {out}: not a folder that can be written to ({error.strerror}); choose another"
        ) from error


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
    shared = spec.family.share_images or spec.heads == "shared"
    return [
        (
            "A1 samples are independent across tasks",
            "violated" if shared else "holds",
            "experts of different tasks, or of one soup, train on the same images"
            if shared
            else "every task trains on images of its own",
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
    found = [
        "Predictions and every tuned coefficient use calibration images; test images are used for measurements only.",
        f"All tasks draw their {spec.family.calibration_per_task} calibration images from the same "
        f"{spec.family.calibration} digits, so a lucky draw moves all predictions together: the error on test images "
        "is that of linearisation plus that of sampling. The columns named 'same images' leave linearisation alone.",
        "A bracket narrower than the sampling error cannot hold a measurement on other images, however good it is; "
        "widened by twice its standard error (known before merging) it should.",
        "base_loss puts each expert's final head on the base. Worse than the base is not the same as collapsed: in "
        "gentle regimes merges that hardly move can lie just above it, with a narrow bracket, so the width is no "
        "warning of that. It does warn of lost accuracy.",
        "For TIES and DARE the secant is taken at the projection of the merge on the experts' span; tangents use the "
        "whole direction. TIES leaves the span, where the secant knows nothing, and misses its bracket most often.",
        "The master bound for TIES uses a local sensitivity at fixed support and signs; TIES is discontinuous.",
        "For averaging the secant is the loss of the experts' mean logits (logit mean).",
        "Pricing one merge from scratch costs more than evaluating it; it pays when many coefficients are priced.",
    ]
    if spec.base.turns > 0:
        found.append(
            "The base was pretrained on turned and mirrored digits, that is, on views that several tasks are made of; "
            "rolled and checkerboard digits are new to it. The preset digits8-weak-base pretrains on upright ones only."
        )
    return found
