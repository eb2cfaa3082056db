"""``mergebound merge``: options and reports; the work is in :mod:`experiments.merge_job`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from experiments.merge_job import (
    Job,
    Resources,
    describe,
    execute,
    group_settings,
    interrupted,
    outline,
    prepare,
    record_of,
    route,
)
from merging.config import (
    ExpertEntry,
    MergeFile,
    MergeSpec,
    ReadConfig,
    build,
    coefficient_rule,
    expert_names,
    per_expert,
    read_alpha_file,
    read_config,
)
from merging.config_values import Coefficient, read_setting, shown, split_list, written
from merging.errors import MethodError
from merging.method import Method
from merging.partition import DEFAULT_PRIVATE
from merging.registry import get
from merging.remote_path import shown as shown_path
from merging.settings import Gradient, PerLayer, Rule, Varying
from merging.shards import parse_size

_LISTED = 4


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
    with _progress() as progress:
        bar = _Bar(progress)
        job = prepare(spec, bar.stage)
        bar.stage("planning")
        chosen = route(job, resources, timed=dry_run)
        plan = outline(job, chosen)
        speed: dict[str, Any] = {}
        if not dry_run:
            record = record_of(job, bar.stage, hashing, chosen.device)
            begin = time.perf_counter()
            execute(job, record, resources, bar.stage, bar.counter(plan["read"] + plan["written"]), chosen)
            speed = _speed(plan, time.perf_counter() - begin, bar.begun)
        else:
            record = describe(job)
    left = interrupted(job) if dry_run else []
    if as_json:
        summary = _summary(job, record, dry_run=dry_run) | {"plan": plan} | speed
        summary |= {"interrupted": [str(path) for path in left]} if dry_run else {}
        typer.echo(json.dumps(summary, indent=2, default=str))
    else:
        _report(job, record)
        if dry_run:
            _print_plan(plan, left)
            typer.echo("dry run: nothing was written")
        else:
            typer.echo(f"written: {'' if spec.out is None else shown_path(spec.out)} ({_told(speed)})")


def read_spec(
    given: MergeFile, config: Path | None, settings: Sequence[str], coefficients: Sequence[str], alpha: str | None
) -> MergeSpec:
    """Put command line and configuration file together; what is typed wins, and its rules come first.

    Args:
        given: the options that were typed.
        config: the file, if any.
        settings: as typed after ``--set``.
        coefficients: as typed after ``--coef``.
        alpha: as typed after ``--alpha``.

    Raises:
        MethodError: names the option or the file's key, and the remedy.
    """
    read = ReadConfig(Path(), MergeFile()) if config is None else read_config(config)
    if read.mergekit is not None:
        return _with_mergekit(given, read, [*settings, *coefficients, *([alpha] if alpha is not None else [])])
    content = read.content
    if given.experts and content.experts:
        raise MethodError(f"{config}: experts are listed there and on the command line: name them in one place")
    written_for = content.method
    if given.method and written_for and given.method != written_for and (content.settings or content.rules):
        raise MethodError(
            f"--method {given.method}: {config} sets parameters of '{written_for}': change the method there, or "
            "remove them"
        )
    typed = {key: value for key, value in given if value not in (None, [], {})}
    content = content.model_copy(update=typed)
    if not content.experts:
        raise MethodError(f"{config}: no experts are listed: add 'experts:', or name their checkpoints")
    method = get(content.method or "average")
    count = len(content.experts)
    whole, rules = read_settings_and_rules(method, settings)
    content = content.model_copy(update={"settings": {**content.settings, **whole}})
    scales = [read_coefficient_rule(method, text, content.settings, count) for text in coefficients]
    if alpha is not None:
        entries = [entry.model_copy(update={"alpha": None}) for entry in content.experts]
        content = content.model_copy(update={"experts": entries, "alpha": _alpha(method, alpha, entries)})
    return build(content, source="" if config is None else str(config), rules=(*scales, *rules))


def _with_mergekit(given: MergeFile, read: ReadConfig, typed: Sequence[str]) -> MergeSpec:
    """A mergekit file says what is merged and how; the command line, where it goes and what it is stored in."""
    taken = [name for name in ("method", "base", "experts", "statistics") if getattr(given, name)]
    if taken or typed:
        what = f"--{taken[0]}" if taken else "--set, --coef and --alpha"
        raise MethodError(f"{read.path}: this mergekit file says what is merged and how: leave {what} out, or edit it")
    changes = {key: value for key, value in given if value not in (None, [], {})}
    return build(
        read.content.model_copy(update=changes), source=str(read.path), mergekit=read.mergekit, notes=read.notes
    )


def read_settings_and_rules(method: Method, texts: Sequence[str]) -> tuple[dict[str, Varying], list[Rule]]:
    """Parse ``name=value`` and ``name@REGEX=value`` against a method's parameters.

    Raises:
        MethodError: malformed, unknown, repeated or out of domain.
    """
    whole: dict[str, Varying] = {}
    rules: list[Rule] = []
    for text in texts:
        left, equals, value = text.rpartition("=")
        name, at, pattern = left.partition("@")
        if not equals or not name or (at and not pattern):
            raise MethodError(f"--set {text}: write name=value, or name@REGEX=value for some tensors")
        try:
            read = read_setting(method, name, value)
            if at:
                rules.append(Rule(pattern, {name: read}))
                _ = rules[-1].expression
            elif name in whole:
                raise MethodError(f"'{name}' is set twice: keep one")
            else:
                whole[name] = read
        except MethodError as error:
            raise MethodError(f"--set {text}: {error}") from None
    return whole, rules


def read_coefficient_rule(method: Method, text: str, settings: dict[str, Any], experts: int) -> Rule:
    """Parse ``REGEX=0.3`` or ``REGEX=0.3,0.7``, see :func:`merging.config.coefficient_rule`.

    Raises:
        MethodError: malformed, or the method has no coefficients.
    """
    pattern, equals, values = text.rpartition("=")
    if not equals or not pattern or not values.strip():
        raise MethodError(f"--coef {text}: write REGEX=0.3, or REGEX=0.3,0.7 with one number per expert")
    try:
        rule = coefficient_rule(method, pattern, split_list(values), settings, experts)
        _ = rule.expression
    except MethodError as error:
        raise MethodError(f"--coef {text}: {error}") from None
    return rule


def read_settings(method: Method, pairs: Sequence[str]) -> dict[str, float | str | bool]:
    """Parse ``name=value`` pairs against a method's parameters, for commands where one value holds everywhere.

    Raises:
        MethodError: malformed, unknown, repeated or out of domain.
    """
    whole, rules = read_settings_and_rules(method, pairs)
    plain = {name: value for name, value in whole.items() if not isinstance(value, Gradient | PerLayer)}
    if rules or len(plain) < len(whole):
        raise MethodError(
            "--set: settings that change from tensor to tensor are for `mergebound merge`: give one value"
        )
    return plain


def _alpha(method: Method, text: str, experts: Sequence[ExpertEntry]) -> list[Coefficient]:
    paths = [entry.file for entry in experts]
    if text.startswith("@"):
        names = [entry.name or name for entry, name in zip(experts, expert_names(paths), strict=True)]
        values: Sequence[Any] = read_alpha_file(Path(text[1:]), paths, names)
    else:
        values = split_list(text)
    try:
        return list(per_expert(method, values, len(experts)))
    except MethodError as error:
        raise MethodError(f"--alpha {text}: {error}") from None


def _policy(text: str | None) -> Any:
    if text not in (None, "strict", "union", "intersection"):
        raise MethodError(f"--policy {text}: choose among strict, union, intersection")
    return text


def _cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[moved]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@dataclass
class _Bar:
    """A line that says what is done, and, of merges in chunks, how far and how fast.

    Attributes:
        begun: the share of the merge that an interrupted one had done.
    """

    progress: Progress
    begun: float = 0.0
    task: Any = None

    def stage(self, what: str) -> None:
        """Say what is done now."""
        if self.task is None:
            self.task = self.progress.add_task(what, total=None, moved="")
        self.progress.update(self.task, description=what)

    def counter(self, total: int) -> Callable[[int, int], None]:
        """What :func:`~experiments.merge_job.execute` is given; ``total``: bytes read and written."""
        start: float | None = None

        def count(done: int, of: int) -> None:
            nonlocal start
            share = done / of if of else 1.0
            if start is None:
                self.begun, start = share, time.perf_counter()
            if self.task is not None:
                speed = (share - self.begun) * total / 1e9 / max(time.perf_counter() - start, 1e-3)
                text = f"{share:.0%} of {_bytes(total)}, {speed:.2f} GB/s"
                self.progress.update(self.task, moved=text)

        return count


def _speed(plan: Mapping[str, Any], seconds: float, begun: float) -> dict[str, Any]:
    """Time and speed of a merge, of which an interrupted one had done the share ``begun``."""
    moved = (plan["read"] + plan["written"]) * (1.0 - begun)
    return {"seconds": seconds, "gigabytes_per_second": moved / 1e9 / max(seconds, 1e-9), "resumed_at": begun or None}


def _told(speed: Mapping[str, Any]) -> str:
    begun = "" if speed["resumed_at"] is None else f", gone on from {speed['resumed_at']:.0%}"
    return f"{speed['seconds']:.2f} s, {speed['gigabytes_per_second']:.2f} GB/s{begun}"


def _print_plan(plan: Mapping[str, Any], left: Sequence[Path]) -> None:
    where = f" of {plan['chunk']:,} entries, {_count(plan['threads'], 'thread')}" if "chunk" in plan else ""
    if plan["device"] != "cpu":
        where += f", whole tensors on {plan['device']}"
    typer.echo(f"merged {plan['how']}{where}:")
    for entry in plan["programs"]:
        passes = f", {_count(entry['passes'], 'pass', 'es')}"
        typer.echo(f"  {entry['program']}: {_count(entry['tensors'], 'tensor')}, {entry['entries']:,} entries{passes}")
    after = "" if plan["seconds"] is None else f", about {plan['seconds']:.2g} s if reading keeps up"
    bound = "up to" if "chunk" in plan else "at least"
    typer.echo(
        f"  {_bytes(plan['read'])} read, {_bytes(plan['written'])} written, {bound} {_bytes(plan['memory'])} of "
        f"memory{after}"
    )
    if left:
        names = _few([path.name for path in left])
        typer.echo(f"left by interrupted merges, to go on from, or removed when a merge is complete: {names}")


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}" + ("" if number == 1 else plural)


def _bytes(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def _summary(job: Job, record: dict[str, Any], *, dry_run: bool) -> dict[str, Any]:
    return {
        "out": None if job.spec.out is None else shown_path(job.spec.out),
        "written": not dry_run,
        "bytes": sum(spec.nbytes for spec in job.specs.values()),
        "tensors": {kind: len(getattr(job.parts, kind)) for kind in ("shared", "private", "buffers", "constants")},
        "notes": list(job.spec.notes),
        "groups": group_settings(job),
        **record,
    }


def _report(job: Job, record: dict[str, Any]) -> None:
    spec, parts = job.spec, job.parts
    size = sum(entry.nbytes for entry in job.specs.values())
    given = "" if spec.mergekit is not None else ", ".join(f"{k}={shown(v)}" for k, v in record["parameters"].items())
    alpha = "".join(f", {name} {_number(value)}" for name, value in (record["coefficients"] or {}).items())
    stored = f"{size / 2**20:.1f} MiB" + (f", {spec.dtype}" if spec.dtype else "")
    experts = "1 expert" if len(spec.experts) == 1 else f"{len(spec.experts)} experts"
    typer.echo(f"{record['method']}{f'({given})' if given else ''} of {experts}{alpha}, {stored}")
    groups = group_settings(job)
    if len(groups) > 1:
        for group in groups:
            _print_group(group, groups)
    typer.echo(f"merged: {len(parts.shared)} shared tensors and {len(parts.buffers)} running statistics")
    if parts.private or parts.constants:
        private = f" ({_few(parts.private)})" if parts.private else ""
        kept = spec.for_expert or spec.private_from or ("the base" if spec.base is not None else min(spec.names))
        typer.echo(f"not merged: {len(parts.private)} private from {kept}{private}, {len(parts.constants)} constants")
    for line in _key_lines(job):
        typer.echo(line)
    for note in spec.notes:
        typer.echo(f"note: {note}")


def _print_group(group: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    first = groups[0]["settings"]
    varying = [key for key in first if any(other["settings"].get(key) != first[key] for other in groups)]
    parts = [f"{key}={shown(group['settings'][key])}" for key in varying]
    parts += [f"{name} {_number(value)}" for name, value in (group["coefficients"] or {}).items()]
    count = len(group["tensors"])
    settings = ", ".join(parts) or "no coefficients"
    typer.echo(f"  {count} tensor{'s' if count > 1 else ''} with {settings}: {_few(group['tensors'])}")


def _key_lines(job: Job) -> list[str]:
    report = job.states.report
    lines = []
    if report.kept:
        lines.append(f"kept as the base has them: {len(report.kept)} ({_few(report.kept)})")
    if report.added:
        lines.append(f"added, since the base lacks them: {len(report.added)} ({_few(tuple(report.added))})")
    lines += [f"left out of {who}: {len(names)} ({_few(names)})" for who, names in report.dropped.items()]
    lines += [f"not in {who}, taken as unmoved: {len(names)} ({_few(names)})" for who, names in report.unmoved.items()]
    if job.aliases:
        lines.append(f"tied: {', '.join(f'{a} = {b}' for a, b in list(job.aliases.items())[:_LISTED])}")
    return lines


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(written(value))


__all__ = ["expert_names", "read_settings", "register"]
