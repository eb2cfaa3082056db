"""``mergebound finetune``: experts of several tasks from one base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from experiments.commands.options import BaseCheckpoint, BaseClasses, DataRoot, NetworkName
from theory.errors import MergeboundError


def register(app: typer.Typer) -> None:
    """Add ``finetune`` to the command line."""
    app.command("finetune")(run)


def run(
    tasks: Annotated[
        list[str], typer.Argument(help="Data sets of `mergebound data list`, npz8, npz8:NAME, .npz files or folders.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for base, experts and the table.")],
    model: NetworkName = "cifar_resnet20",
    base: BaseCheckpoint = None,
    classes: BaseClasses = 10,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Pixels, where the network takes them.")
    ] = None,
    root: DataRoot = None,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="eta.")] = 0.05,
    batch_size: Annotated[int, typer.Option("--batch-size", help="b.")] = 64,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the training images.")] = 8.0,
    steps: Annotated[int | None, typer.Option("--steps", help="K, instead of epochs.")] = None,
    data_share: Annotated[float, typer.Option("--data-share", help="Share of the training images.")] = 1.0,
    momentum: Annotated[float, typer.Option("--momentum", help="beta of momentum; adamw: its beta1.")] = 0.9,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="omega; coupled, decoupled for adamw.")] = 1e-4,
    schedule: Annotated[str, typer.Option("--schedule", help="constant, cosine or linear.")] = "cosine",
    warm_up: Annotated[int, typer.Option("--warm-up", help="Steps of linear growth.")] = 0,
    augment: Annotated[str, typer.Option("--augment", help="none, light or flip_shift.")] = "light",
    precision: Annotated[str, typer.Option("--precision", help="float32 or bfloat16.")] = "float32",
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd, adamw or sam.")] = "sgd",
    nesterov: Annotated[bool, typer.Option("--nesterov", help="Nesterov's momentum instead of heavy ball.")] = False,
    beta2: Annotated[float, typer.Option("--beta2", help="adamw: rate of the second moment.")] = 0.999,
    sam_radius: Annotated[float, typer.Option("--sam-radius", help="sam: rho, length of the ascent step.")] = 0.05,
    label_smoothing: Annotated[float, typer.Option("--label-smoothing", help="Share of uniform labels.")] = 0.0,
    clip_norm: Annotated[
        float | None, typer.Option("--clip-norm", help="Largest norm of a batch gradient (default: no clipping).")
    ] = None,
    trained: Annotated[str, typer.Option("--trained", help="full, backbone, head or low_rank.")] = "full",
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of the updates of low_rank.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Names batches, augmentation and new heads.")] = 0,
    split_seed: Annotated[int, typer.Option("--split-seed", help="Names the splits.")] = 0,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes (default: one per core).")] = None,
) -> None:
    """Fine-tune one expert per task and measure it on the task's test images; finished experts are kept.

    Each expert becomes TASK.safetensors with its record TASK.json; experts.csv has one row per task. The files go into
    `mergebound predict` and `mergebound merge`.
    """
    from experiments.bases.base import random_base
    from experiments.bases.checkpoint import load_checkpoint_base
    from experiments.finetune.many_tasks import finetune_tasks
    from experiments.finetune.task_expert import FinetuneSpec
    from experiments.tasks.named import expand

    spec = FinetuneSpec(
        learning_rate=learning_rate,
        batch_size=batch_size,
        steps=steps,
        epochs=epochs,
        data_share=data_share,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,  # type: ignore[arg-type]
        warm_up=warm_up,
        augment=augment,
        precision=precision,  # type: ignore[arg-type]
        seed=seed,
        optimizer=optimizer,  # type: ignore[arg-type]
        nesterov=nesterov,
        beta2=beta2,
        sam_radius=sam_radius,
        label_smoothing=label_smoothing,
        clip_norm=clip_norm,
        trained=trained,  # type: ignore[arg-type]
        rank=rank,
    )
    spec.check()
    names = expand(tasks)
    if out.exists() and not out.is_dir():
        raise MergeboundError(f"{out}: is a file; give a folder with --out")
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    start = (
        random_base(model, classes=classes, options=options, seed=seed)
        if base is None
        else load_checkpoint_base(model, base, classes=classes, options=options, seed=seed)
    )
    console = Console(stderr=True)

    def watch(row: dict[str, Any], kept: bool) -> None:
        how = "kept from before" if kept else f"{row['seconds']:.0f} s"
        console.print(f"{row['task']}: accuracy {row['accuracy']:.4f} on {row['n']} test images ({how})")

    rows = finetune_tasks(start, names, spec, out, root=root, split_seed=split_seed, workers=workers, watch=watch)
    _table(rows, out)


def _table(rows: list[dict[str, Any]], out: Path) -> None:
    """Write ``experts.csv``, of these experts and then of others in the folder; show the main columns of these."""
    import pandas as pd

    from experiments.atomic import write_atomically
    from experiments.finetune.task_expert import records

    these = {(row["task"], row["split_digest"]) for row in rows}
    kept = [dict(record["row"]) for record in records(out)]
    frame = pd.DataFrame([*rows, *(row for row in kept if (row["task"], row["split_digest"]) not in these)])
    write_atomically(out / "experts.csv", frame.to_csv(index=False).encode())
    table = Table("task", "test images", "accuracy", "95 %", "loss", "steps", "seconds", title="measured")
    for row in rows:
        table.add_row(
            row["task"],
            str(row["n"]),
            f"{row['accuracy']:.4f}",
            f"{row['accuracy_low']:.3f} to {row['accuracy_high']:.3f}",
            f"{row['loss']:.4f}",
            str(row["steps"]) + ("" if row["finite"] else " (diverged)"),
            f"{row['seconds']:.0f}",
        )
    console = Console()
    console.print(table) if console.is_terminal else Console(width=100).print(table)
