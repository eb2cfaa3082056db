"""``mergebound merge``: its options; the work is in :mod:`experiments.merge_job`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.commands.merge_settings import read_spec
from experiments.commands.merge_showing import (
    Bar,
    print_plan,
    print_report,
    progress_line,
    speed_in_words,
    speed_of,
    summary_of,
)
from experiments.merge_job import (
    Resources,
    describe,
    execute,
    interrupted,
    outline,
    prepare,
    record_of,
    route,
)
from merging.config import (
    ExpertEntry,
    MergeFile,
)
from merging.errors import MethodError
from merging.partition import DEFAULT_PRIVATE
from merging.remote_path import shown as shown_path
from merging.shards import parse_size


def register(app: typer.Typer) -> None:
    """Add ``merge`` to the command line."""
    app.command("merge")(merge_command)


def merge_command(
    context: typer.Context,
    experts: Annotated[
        list[Path] | None,
        typer.Argument(help="Fine-tuned checkpoints of one base: files, or folders.", show_default=False),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            help="The checkpoint they were fine-tuned from. Methods that do not depend on it (`average`, `weighted`, "
            "`slerp`, ...) do without.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Where to write: a `.safetensors` file, or a folder, into which configuration and tokenizer files are "
            "carried along.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="See `mergebound methods`; or `FILE.py:METHOD`. Default: average."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A parameter of the method, as `density=0.2`; for the tensors whose whole name matches a regular "
            "expression, as `density@REGEX=0.1`. A number may be `gradient(0.1,0.5)` (spread over the depth) or "
            "`layers(0.1,0.2,...)` (one per layer). Repeatable; of several that match, the first counts.",
        ),
    ] = None,
    coefficients: Annotated[
        list[str] | None,
        typer.Option(
            "--coef",
            help="Coefficients of the tensors whose whole name matches, as `REGEX=0.3` (the method's scale) or "
            "`REGEX=0.3,0.7` (one per expert). Repeatable.",
        ),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(
            "--alpha",
            help="One coefficient per expert, in their order, as `0.3,0.7`; or `@FILE.yaml`, as predict writes it.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="A YAML file with any of these options, what `mergebound predict --out-coefficients` wrote, or a "
            "mergekit configuration. Options given here come first.",
        ),
    ] = None,
    statistics: Annotated[
        list[Path] | None,
        typer.Option(
            "--statistics", help="Statistics that `mergebound collect` wrote: once per expert, in their order."
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            help="Tensors that not all checkpoints have: `strict` (an error, the default), `union` or `intersection`.",
        ),
    ] = None,
    private: Annotated[
        list[str] | None,
        typer.Option(
            "--private",
            help="Glob pattern of tensors that are not merged but taken from the base (heads); repeatable; `''` for "
            f"none. Default: {', '.join(f'`{pattern}`' for pattern in DEFAULT_PRIVATE)}.",
        ),
    ] = None,
    private_from: Annotated[
        str | None, typer.Option("--private-from", help="The expert whose private tensors the merge carries.")
    ] = None,
    for_expert: Annotated[
        str | None,
        typer.Option("--for-expert", help="Write the model that a compressing method (EMR, TALL masks) gives back."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="For methods that draw random numbers. Default: 0.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Floating type to store in, as `float16`. Default: the base's types.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", help="Split larger checkpoints into shards, as `5GB`.")
    ] = None,
    copy_files_from: Annotated[
        Path | None,
        typer.Option("--copy-files-from", help="Folder whose configuration and tokenizer go to `--out`."),
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Replace an existing target.", show_default=False)
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, max=1024, help="How many compute at the same time; no bit depends on it. Default: all."
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory",
            help="Buffers at most, as `2GB`; a merge that needs more is refused before anything is read.",
        ),
    ] = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Keep nothing to go on from when interrupted, and begin anew.")
    ] = False,
    no_map: Annotated[
        bool,
        typer.Option(
            "--no-map", help="Read inputs into buffers instead of mapping them, for disks on which mapping is slow."
        ),
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="Where tensors are merged that are merged as a whole (by spectral methods, say): `cpu`, `cuda` or "
            "`cuda:1`.",
        ),
    ] = "cpu",
    hashing: Annotated[
        str | None,
        typer.Option(
            "--hash",
            help="What is recorded of the inputs: `full`, SHA-256 of every byte, or `quick`, of headers and samples, "
            "which takes no time. Default: full up to 1 GiB of inputs.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the plan, with bytes, memory and time; read headers only, write nothing."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Merge checkpoints: `mergebound merge --method ties --base B.safetensors E1.safetensors E2.safetensors
    --out O.safetensors --set density=0.2 --coef 'blocks.*=0.3'`.

    Reads .safetensors, shards with their index, folders, and .pt/.pth/.pth.tar/.bin/.ckpt (plain tensors only). The
    result appears under its name only when it is complete, and records how it was made.
    """
    if not experts and config is None:
        raise typer.BadParameter("name the experts to merge, or --config FILE", ctx=context, param_hint="'EXPERTS...'")
    given = MergeFile(
        method=method,
        base=base,
        experts=[ExpertEntry(file=path) for path in experts or ()],
        out=out,
        policy=_policy(policy),
        private=private,
        private_from=private_from,
        for_expert=for_expert,
        seed=seed,
        dtype=dtype,
        max_shard_size=max_shard_size,
        copy_files_from=copy_files_from,
        overwrite=overwrite,
        statistics=statistics or [],
    )
    spec = read_spec(given, config, settings or [], coefficients or [], alpha)
    if spec.out is None and not dry_run:
        raise typer.BadParameter("name the file or folder to write", ctx=context, param_hint="'--out'")
    if hashing not in (None, "full", "quick"):
        raise MethodError(f"--hash {hashing}: choose between full and quick")
    resources = Resources(
        threads=_cores() if threads is None else threads,
        max_memory=None if max_memory is None else parse_size(max_memory, "--max-memory"),
        resume=not no_resume,
        mapped=not no_map,
        device=device,
    )
    with progress_line() as progress:
        bar = Bar(progress)
        job = prepare(spec, bar.stage)
        bar.stage("planning")
        chosen = route(job, resources, timed=dry_run)
        plan = outline(job, chosen)
        speed: dict[str, Any] = {}
        if not dry_run:
            record = record_of(job, bar.stage, hashing, chosen.device)
            begin = time.perf_counter()
            execute(job, record, resources, bar.stage, bar.counter(plan["read"] + plan["written"]), chosen)
            speed = speed_of(plan, time.perf_counter() - begin, bar.begun)
        else:
            record = describe(job)
    left = interrupted(job) if dry_run else []
    if as_json:
        summary = summary_of(job, record, dry_run=dry_run) | {"plan": plan} | speed
        summary |= {"interrupted": [str(path) for path in left]} if dry_run else {}
        typer.echo(json.dumps(summary, indent=2, default=str))
    else:
        print_report(job, record)
        if dry_run:
            print_plan(plan, left)
            typer.echo("dry run: nothing was written")
        else:
            typer.echo(f"written: {'' if spec.out is None else shown_path(spec.out)} ({speed_in_words(speed)})")


def _policy(text: str | None) -> Any:
    if text not in (None, "strict", "union", "intersection"):
        raise MethodError(f"--policy {text}: choose among strict, union, intersection")
    return text


def _cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
