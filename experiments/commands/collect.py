"""``mergebound collect``: statistics of data that some merging methods need, as files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

from experiments.commands.predict import SeveralValues, read_model_options, read_numbers
from merging.checkpoint import file_hash
from merging.config import expert_names
from merging.errors import CheckpointError, MethodError
from merging.statistics import Coefficients, save_coefficients, save_statistics
from merging.variances import stays_in_hull
from theory.errors import MergeboundError

if TYPE_CHECKING:
    from experiments.measure.layerwise import LayerGroup
    from experiments.predict_group import Group, SingleExpert

BATCH_VALUES = 2**22
METHODS = ("risk_optimal", "curvature_optimal", "adamerging", "adamerging_pp")
SCOPES = ("task", "layer", "tensor")
ANCHORS = {"own": ("own",), "base": ("base",), "both": ("own", "base")}

Checkpoint = Annotated[Path, typer.Option("--checkpoint", help="The expert.", show_default=False)]
Data = Annotated[
    Path,
    typer.Option(
        "--data",
        help="Images of its task: an `.npz` with `x_train` and `y_train` (or another split) or a folder with one "
        "sub-folder of images per class.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Where to write them (.safetensors).", show_default=False)]
Model = Annotated[
    str | None,
    typer.Option("--model", help="A timm model name, or vit/resnet_gn/resnet_bn; default: as the checkpoint says."),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option("--model-option", help="An option of timm's constructor, as `img_size=32`; repeatable."),
]
Private = Annotated[
    list[str] | None,
    typer.Option("--private", help="Glob pattern of tensors that are not merged; repeatable. Default: the classifier."),
]
SharedHead = Annotated[bool, typer.Option("--shared-head", help="The head is merged too (same-task soups).")]
Images = Annotated[int, typer.Option("--images", help="How many images, drawn at random.", min=1)]
Seed = Annotated[int, typer.Option("--seed", help="Names what is drawn at random.")]
Split = Annotated[
    str | None, typer.Option("--split", help="Which split; default: the first of val, test, train that exists.")
]
ImageSize = Annotated[int | None, typer.Option("--image-size", help="Pixels, where trained at another size.")]
Mean = Annotated[str | None, typer.Option("--mean", help="Normalisation, as `0.5` or `0.49,0.46,0.41`.")]
Std = Annotated[str | None, typer.Option("--std", help="Normalisation, as `0.5` or `0.23,0.22,0.23`.")]
Json = Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")]


def register(app: typer.Typer) -> None:
    """Add ``collect`` to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Collect statistics of data for `mergebound merge --statistics`.")
    group.command("fisher")(fisher)
    group.command("gram")(gram)
    group.command("coefficients", cls=SeveralValues)(coefficients)
    app.add_typer(group, name="collect")


def fisher(
    checkpoint: Checkpoint,
    data: Data,
    out: Out,
    mode: Annotated[
        str, typer.Option("--mode", help="expected (over all labels), sampled (one each), or empirical (true labels).")
    ] = "expected",
    model: Model = None,
    model_option: ModelOption = None,
    private: Private = None,
    shared_head: SharedHead = False,
    images: Images = 256,
    seed: Seed = 0,
    split: Split = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    as_json: Json = False,
) -> None:
    """The diagonal of one expert's Fisher information, for `--method fisher`."""
    from experiments.measure.fisher import FISHER_MODES, fisher_diagonal

    chosen = next((known for known in FISHER_MODES if known == mode), None)
    if chosen is None:
        raise MergeboundError(f"--mode {mode}: choose {', '.join(FISHER_MODES)}")

    def collect(expert: SingleExpert, names: list[str]) -> dict[str, Tensor]:
        return fisher_diagonal(expert.network, expert.state, batches(expert), mode=chosen, names=names, seed=seed)

    given = {
        "model": model,
        "model_options": read_model_options(model_option or []),
        "private": private,
        "shared_head": shared_head,
        "images": images,
        "seed": seed,
        "split": split,
        "image_size": image_size,
        "mean": _numbers("--mean", mean),
        "std": _numbers("--std", std),
    }
    _single("fisher", checkpoint, data, out, collect, given, {"mode": mode}, as_json)


def gram(
    checkpoint: Checkpoint,
    data: Data,
    out: Out,
    sums: Annotated[
        bool, typer.Option("--sums", help="Sums over inputs instead of means: experts weigh by their number of images.")
    ] = False,
    model: Model = None,
    model_option: ModelOption = None,
    private: Private = None,
    shared_head: SharedHead = False,
    images: Images = 256,
    seed: Seed = 0,
    split: Split = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    as_json: Json = False,
) -> None:
    """Gram matrices of the inputs of one expert's linear layers and convolutions, for `--method regmean`."""
    from experiments.measure.grams import input_grams

    def collect(expert: SingleExpert, names: list[str]) -> dict[str, Tensor]:
        return input_grams(expert.network, expert.state, batches(expert), names=names, mean=not sums)

    given = {
        "model": model,
        "model_options": read_model_options(model_option or []),
        "private": private,
        "shared_head": shared_head,
        "images": images,
        "seed": seed,
        "split": split,
        "image_size": image_size,
        "mean": _numbers("--mean", mean),
        "std": _numbers("--std", std),
    }
    _single("gram", checkpoint, data, out, collect, given, {"sums": sums}, as_json)


def coefficients(
    base: Annotated[Path, typer.Option("--base", help="The checkpoint the experts were fine-tuned from.")],
    experts: Annotated[list[Path], typer.Option("--experts", help="Fine-tuned checkpoints: `--experts E1 E2 ...`.")],
    data: Annotated[list[Path], typer.Option("--data", help="One data set per expert, in order.")],
    out: Out,
    method: Annotated[str, typer.Option("--method", help=", ".join(METHODS))] = "risk_optimal",
    scope: Annotated[
        str, typer.Option("--scope", help="One coefficient per expert and: task (nothing else), layer, or tensor.")
    ] = "task",
    objective: Annotated[
        str, typer.Option("--objective", help="risk_optimal minimises: tangent, secant or middle (the last two: task).")
    ] = "tangent",
    anchor: Annotated[
        str, typer.Option("--anchor", help="Where curvature_optimal measures the curvature: own, base, or both.")
    ] = "own",
    bounds: Annotated[str, typer.Option("--bounds", help="Lowest and highest coefficient of the two solvers.")] = "0,1",
    simplex: Annotated[bool, typer.Option("--simplex", help="Coefficients sum to one (in each layer).")] = False,
    hull: Annotated[
        bool | None,
        typer.Option(
            "--hull/--no-hull",
            help="Nonnegative coefficients of sum at most one (in each layer). Default: if the network has BatchNorm, "
            "whose running variances larger sums make negative.",
        ),
    ] = None,
    density: Annotated[float, typer.Option("--density", help="Share kept by adamerging_pp.")] = 0.2,
    steps: Annotated[int, typer.Option("--steps", help="Steps of adamerging.", min=1)] = 500,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate of adamerging.")] = 1e-3,
    batch: Annotated[int, typer.Option("--batch", help="Images per task and step of adamerging.", min=1)] = 16,
    model: Model = None,
    model_option: ModelOption = None,
    private: Private = None,
    shared_head: SharedHead = False,
    images: Images = 128,
    seed: Seed = 0,
    split: Split = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    as_json: Json = False,
) -> None:
    """Solve for the coefficients of a group of experts: `mergebound collect coefficients --method risk_optimal
    --base B.safetensors --experts E1.safetensors E2.safetensors --data D1.npz D2.npz --out C.safetensors`.

    No merge is evaluated by risk_optimal and curvature_optimal; adamerging uses no label.
    """
    from experiments.predict_group import load_group

    for option, value, known in (
        ("--method", method, METHODS),
        ("--scope", scope, SCOPES),
        ("--objective", objective, ("tangent", "secant", "middle")),
        ("--anchor", anchor, tuple(ANCHORS)),
    ):
        if value not in known:
            raise MergeboundError(f"{option} {value}: choose {', '.join(known)}")
    if method == "risk_optimal" and scope != "task" and objective != "tangent":
        raise MergeboundError(
            f"--objective {objective}: has one coefficient per expert; use tangent with --scope {scope}"
        )
    if not 0.0 < density <= 1.0:
        raise MethodError(f"--density {density}: choose a number in (0, 1]")
    limits = read_numbers("--bounds", bounds)
    if len(limits) != 2 or not limits[0] < limits[1]:
        raise MergeboundError(f"--bounds {bounds}: give two numbers, the lower first, as 0,1")
    _check_target(out, [base, *experts])
    names = expert_names(experts)
    group = load_group(
        base,
        experts,
        data,
        names=names,
        model=model,
        model_options=read_model_options(model_option or []),
        private=private,
        shared_head=shared_head,
        images=images,
        seed=seed,
        split=split,
        image_size=image_size,
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
    )
    shared = (limits[0], limits[1])
    if method.startswith("adamerging"):
        found, details = _adapted(group, method, scope, density, steps, rate, batch, seed)
    else:
        found, details = _solved(group, method, scope, objective, anchor, shared, simplex, hull)
    details |= {"scope": scope, "images": images, "seed": seed, "model": group.architecture}
    hashes = [file_hash(path) for path in experts]
    save_coefficients(out, found, method=method, sources=hashes, **details)
    record = {"out": str(out), "method": method, "experts": list(names), **details, **found.settings()}
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    shown = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, found.default, strict=True))
    mean_of = f"mean over {len(found.groups)} groups of tensors: " if found.groups else ""
    typer.echo(f"{method} ({scope}): {mean_of}{shown}")
    numbers = ", ".join(f"{key} {value:.4g}" for key, value in details.items() if isinstance(value, float))
    typer.echo(f"{numbers}\nwritten: {out}")


def _solved(
    group: Group,
    method: str,
    scope: str,
    objective: str,
    anchor: str,
    bounds: tuple[float, float],
    simplex: bool,
    hull: bool | None,
) -> tuple[Coefficients, dict[str, Any]]:
    from experiments.measure.backbone import Readout
    from experiments.measure.layerwise import (
        collect_layers,
        curvature_optimal_coefficients,
        risk_optimal_coefficients,
    )

    wanted: Any = ANCHORS[anchor] if method == "curvature_optimal" else () if objective == "secant" else ("base",)
    statistics = collect_layers(
        group.networks,
        [Readout()] * group.size,
        group.base,
        list(group.vectors),
        [item.split.images for item in group.data],
        [item.split.labels for item in group.data],
        groups=_groups(group, scope),
        anchors=wanted,
        names=group.names,
        batch=_batch(group.data[0].split.images),
    )
    if method == "curvature_optimal":
        found, optimum = curvature_optimal_coefficients(statistics, wanted, bounds=bounds, simplex=simplex, hull=hull)
        details: dict[str, Any] = {"anchor": anchor}
    else:
        kind: Any = objective
        found, optimum = risk_optimal_coefficients(statistics, kind, bounds=bounds, simplex=simplex, hull=hull)
        details = {"objective": objective}
    details["hull"] = not simplex and stays_in_hull(statistics.tensors(), hull, bounds)
    return found, details | {"predicted_risk": optimum.risk, "optimality_gap": optimum.gap}


def _adapted(
    group: Group, method: str, scope: str, density: float, steps: int, rate: float, batch: int, seed: int
) -> tuple[Coefficients, dict[str, Any]]:
    from experiments.measure.entropy import adapt_coefficients
    from merging.methods.adamerging_pp import without_conflicts

    base, vectors = group.base, list((group.vectors - group.base).unbind(0))
    if method == "adamerging_pp":  # running statistics are averaged, whatever the coefficients
        shared = group.networks[0].space.offsets[len(group.networks[0].partition.shared)]
        base = torch.cat((base[:shared], group.vectors[:, shared:].mean(dim=0)))
        rows = without_conflicts([vector[:shared] for vector in vectors], density)
        vectors = [torch.cat((row, torch.zeros_like(base[shared:]))) for row in rows]
    result = adapt_coefficients(
        [network.call for network in group.networks],
        base,
        vectors,
        group.networks[0].space,
        [item.split.images for item in group.data],
        groups=_groups(group, scope),
        names=group.names,
        rate=rate,
        steps=steps,
        batch=batch,
        seed=seed,
    )
    details: dict[str, Any] = {"entropy_before": result.entropies[0], "entropy_after": result.entropies[-1]}
    if method == "adamerging_pp":
        details["density"] = density
    return result.coefficients, details | {"steps": steps, "rate": rate, "batch": batch}


def _groups(group: Group, scope: str) -> tuple[LayerGroup, ...]:
    from experiments.measure.layerwise import by_layer, by_tensor, whole_model

    names = group.networks[0].space.names
    return {"task": whole_model, "layer": by_layer, "tensor": by_tensor}[scope](names)


def batches(expert: SingleExpert) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of an expert's data, in parts that fit in memory."""
    images, labels = expert.data.split.images, expert.data.split.labels
    size = _batch(images)
    yield from zip(torch.split(images, size), torch.split(labels, size), strict=True)


def _batch(images: Tensor) -> int:
    return max(1, min(256, BATCH_VALUES // max(1, images[0].numel())))


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    return None if text is None else tuple(read_numbers(option, text))


def _check_target(out: Path, inputs: Sequence[Path]) -> None:
    if out.suffix != ".safetensors":
        raise CheckpointError(f"{out}: statistics are written as .safetensors: change the suffix of --out")
    if not out.parent.is_dir():
        raise CheckpointError(f"{out}: the folder '{out.parent}' does not exist: create it first")
    if any(path.resolve() == out.resolve() for path in inputs):
        raise CheckpointError(f"{out}: the target is one of the inputs, which are never changed: choose another --out")


def _single(
    kind: str,
    checkpoint: Path,
    data: Path,
    out: Path,
    collect: Callable[[SingleExpert, list[str]], dict[str, Tensor]],
    given: Mapping[str, Any],
    details: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Read one expert, collect, write, report."""
    from experiments.predict_group import load_expert

    _check_target(out, [checkpoint])
    expert = load_expert(checkpoint, data, **given)
    private = set(expert.private)
    names = [name for name, p in expert.network.named_parameters() if name not in private and p.is_floating_point()]
    found = {name: tensor.float() for name, tensor in collect(expert, names).items()}
    record = {
        **details,
        "model": expert.architecture,
        "images": len(expert.data.split),
        "split": expert.data.name,
        "seed": given["seed"],
        "checkpoint": checkpoint.name,
        "data": data.name,
    }
    digest = file_hash(checkpoint)
    save_statistics(out, kind, found, source=digest, **record)
    if as_json:
        typer.echo(
            json.dumps({"out": str(out), "kind": kind, "tensors": len(found), "source": digest, **record}, indent=2)
        )
        return
    part = f" ({expert.data.name})" if expert.data.name else ""
    what = "Fisher information" if kind == "fisher" else "Gram matrices"
    typer.echo(
        f"{what} of {checkpoint.name} ({expert.architecture}): {len(found)} tensors from {len(expert.data.split)} of "
        f"{expert.data.total} images of {data.name}{part}\nwritten: {out}"
    )
