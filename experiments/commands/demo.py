"""``mergebound demo``: the main job on the embedded digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def demo(
        out: Annotated[Path, typer.Option(help="Folder for the report, tables, figures, experts and data.")] = Path(
            "out/demo"
        ),
        spec: Annotated[
            str,
            typer.Option(
                "--spec",
                help="YAML file or preset: digits8, digits8-{bn, full, smoke, soups, weak-base}.",
            ),
        ] = "digits8",
        workers: Annotated[
            int | None,
            typer.Option(min=1, help="Worker processes, one thread each (default: one per core and architecture)."),
        ] = None,
    ) -> None:
        """Fine-tune experts, predict the risk of their merges, merge, measure, and report.

        Everything runs on images that come with scikit-learn.  Finished experts and merges are kept under OUT/work:
        stop with Ctrl-C whenever you like, and the same command continues.
        """
        from experiments.demo import prepare_folder, run_demo
        from experiments.report import headline
        from experiments.runner import Status
        from experiments.spec import load_spec
        from experiments.validation import rich_table, summary

        console = Console()
        if not console.is_terminal:
            console = Console(width=150)
        chosen = load_spec(spec)
        prepare_folder(out)
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[name]:<10}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[stage]}"),
            console=Console(stderr=True),
        ) as progress:
            bars = {
                name: progress.add_task(name, total=1.0, name=name, stage="waiting", start=False)
                for name in (*chosen.architectures, "report")
            }

            def watch(status: Status) -> None:
                bar = bars[status.architecture]
                progress.start_task(bar)
                progress.update(bar, completed=status.fraction, stage=status.stage)

            outcome = run_demo(
                chosen, out, workers=workers, watch=watch, command=f"mergebound demo --spec {spec} --out {out.name}"
            )
        table = summary(outcome.tables.validation, wide=console.width >= 140)
        console.print(
            rich_table(
                table,
                f"Predicted against measured joint test risk, seed {chosen.seed} (Cost/eval: time against evaluating)",
            )
        )
        for sentence in headline(outcome.frames.merges, outcome.tables):
            console.print(f"• {sentence}", markup=False, highlight=False)
        console.print(rich_table(outcome.tables.aims, f"Aims, and what was reached (seed {chosen.seed})"))
        console.print(f"Try: {outcome.example}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"Report: {outcome.report}", markup=False, highlight=False, soft_wrap=True)
