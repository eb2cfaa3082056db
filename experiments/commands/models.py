"""``mergebound models``: networks that can be built by name, and what one of them is made of."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any

import typer
from torch import nn

from theory.errors import MergeboundError

_Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
_Size = Annotated[int | None, typer.Option("--image-size", help="Side of the images, pixels.", show_default=False)]
_Channels = Annotated[int | None, typer.Option("--channels", help="Channels of the images.", show_default=False)]
_Classes = Annotated[int, typer.Option("--classes", help="Outputs of the head.")]


def register(app: typer.Typer) -> None:
    """Add ``models`` to the command line."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
    group.command("list")(list_command)
    group.command("show")(show)
    group.command("family")(show_family)
    app.add_typer(group, name="models", help="Networks by name: list them, and look at one.")


def list_command(
    pattern: Annotated[str, typer.Argument(help="Part of the name, or a pattern such as 'vit_s*'.")] = "*",
    as_json: _Json = False,
) -> None:
    """List the networks that can be built by name, the toolkit's own first."""
    from experiments.models import list_models

    names = list_models(pattern)
    if not names:
        raise MergeboundError(f"no network is called like {pattern!r}; `mergebound models list` lists them all")
    typer.echo(json.dumps(list(names), indent=2) if as_json else "\n".join(names))


def show(
    name: Annotated[str, typer.Argument(help="A name of `mergebound models list`.")],
    image_size: _Size = None,
    channels: _Channels = None,
    classes: _Classes = 10,
    as_json: _Json = False,
) -> None:
    """Show a network: parameters, operations, head, normalisation layers and the images that it takes."""
    facts = describe_model(name, image_size=image_size, channels=channels, classes=classes)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    form, head = facts["input"], facts["head"]
    typer.echo(f"{name}: {facts['class']}")
    typer.echo(f"parameters  {facts['parameters']:,} (backbone {facts['backbone_parameters']:,})")
    flops = facts["flops"]
    typer.echo("operations  " + (f"{flops / 1e6:,.1f} million per image" if isinstance(flops, int) else flops))
    typer.echo(
        f"input       {form['channels']} x {form['height']} x {form['width']}, mean {_numbers(form['mean'])}, "
        f"std {_numbers(form['std'])}, {form['interpolation']}, crop {form['crop']:g}"
    )
    typer.echo(f"head        {head['says']}")
    for kind, count in facts["norms"].items():
        typer.echo(f"norms       {count['layers']} x {kind} ({count['channels']} channels)")
    typer.echo(f"            {facts['advice']}")


def show_family(
    kind: Annotated[str, typer.Argument(help="vit or resnet.")],
    image_size: Annotated[int, typer.Option("--image-size", help="Side of the images, pixels.")] = 32,
    channels: Annotated[int, typer.Option("--channels", help="Channels of the images.")] = 3,
    classes: _Classes = 10,
    norm: Annotated[str, typer.Option("--norm", help="bn or gn, for ResNets.")] = "bn",
    as_json: _Json = False,
) -> None:
    """Show the sizes of a family: width, depth, parameters and operations of each member."""
    from experiments.models import describe_family

    rows = describe_family(kind, img_size=image_size, in_chans=channels, classes=classes, norm=norm)
    if as_json:
        found = [
            {
                "name": row.member.name,
                "width": row.member.width,
                "depth": row.member.depth,
                "parameters": row.parameters,
                "flops": row.flops,
            }
            for row in rows
        ]
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"{'name':<10} {'width':>6} {'depth':>6} {'parameters':>12} {'million operations':>19}")
    for row in rows:
        member = row.member
        line = f"{member.name:<10} {member.width:>6} {member.depth:>6} {row.parameters:>12,} {row.flops / 1e6:>19,.1f}"
        typer.echo(line)


def describe_model(
    name: str, *, image_size: int | None = None, channels: int | None = None, classes: int = 10
) -> dict[str, Any]:
    """A network as plain data.

    Raises:
        MergeboundError: an unknown name, or images that it does not take.
    """
    from experiments.models import (
        count_flops,
        count_parameters,
        head_tensors,
        input_format,
        normalisation_layers,
        statistics_advice,
    )

    model, size = _build(name, image_size, channels, classes)
    form = input_format(model, size)
    try:
        own = set(head_tensors(model))
        head = {"tensors": sorted(own), "says": _head(model)}
    except MergeboundError as error:
        own, head = set(), {"tensors": [], "says": f"not found: {error}"}
    try:
        flops: int | str = count_flops(model, size)
    except MergeboundError as error:
        flops = f"not counted: {error}"
    layers = normalisation_layers(model)
    counts, sums = Counter(layer.kind for layer in layers), Counter[str]()
    for layer in layers:
        sums[layer.kind] += layer.channels
    total = count_parameters(model)
    return {
        "name": name,
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "parameters": total,
        "backbone_parameters": total - sum(p.numel() for n, p in model.named_parameters() if n in own),
        "flops": flops,
        "input": {
            "channels": form.channels,
            "height": form.height,
            "width": form.width,
            "mean": list(form.mean),
            "std": list(form.std),
            "interpolation": form.interpolation,
            "crop": form.crop,
        },
        "head": head,
        "norms": {kind: {"layers": count, "channels": sums[kind]} for kind, count in counts.items()},
        "advice": statistics_advice(layers),
    }


def _build(name: str, image_size: int | None, channels: int | None, classes: int) -> tuple[nn.Module, int | None]:
    """The network, and the size to run it at where it is not told at building."""
    try:
        return _made(name, classes, img_size=image_size, in_chans=channels), image_size
    except MergeboundError as error:
        if image_size is None or "no option 'img_size'" not in str(error):
            raise
    return _made(name, classes, in_chans=channels), image_size


def _made(name: str, classes: int, **options: Any) -> nn.Module:
    from experiments.models.build import build_model, build_shapes

    try:
        return build_shapes(name, classes, **options)
    except MergeboundError as error:
        if "cannot build it" not in str(error) or "there is no option" in str(error):
            raise
    return build_model(name, classes, **options)  # a few constructors need numbers


def _head(model: nn.Module) -> str:
    """The head in words."""
    from experiments.models import feature_dim
    from experiments.models.parts import head_units

    units = head_units(model)
    if not units:
        return "none"
    kinds = []
    for unit in units:
        module = model.get_submodule(unit)
        inner = [type(m).__name__ for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
        kinds.append(f"{unit} ({' + '.join(inner)})")
    try:
        reads = f", reads {feature_dim(model)} features"
    except MergeboundError:
        reads = ""
    return ", ".join(kinds) + reads


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
