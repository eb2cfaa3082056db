"""Networks by name, with seeded weights: the toolkit's own, and every architecture that timm knows."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from experiments.models.cifar_resnet import CIFAR_DEPTHS, CifarResNet
from experiments.models.digits import DIGIT_ARCHITECTURES, digit_resnet, digit_vit
from experiments.models.families import KINDS, build_member, family
from experiments.models.mlp import MLP_EXAMPLES, is_mlp, mlp
from theory.errors import MergeboundError

_CIFAR = re.compile(r"cifar_resnet(\d+)(_gn)?")
_MEMBER = re.compile(r"(vit|resnet)_s(\d+)(_gn)?")
_NOT_HERE = {
    "num_classes": "give the number of outputs as classes=",
    "pretrained": "networks are built with initial weights; read pretrained ones from a file or make a base of them",
    "checkpoint_path": "networks are built with initial weights; load the file's tensors afterwards",
}


def build_model(architecture: str, classes: int = 10, seed: int = 0, **options: Any) -> nn.Module:
    """Build a network with seeded initial weights.

    Args:
        architecture: ``vit``, ``resnet_gn``, ``resnet_bn`` (embedded digits, 8x8 grey); ``cifar_resnet20`` (32, 44,
            56); ``vit_s1`` ... ``vit_s7`` and ``resnet_s1`` ... ``resnet_s7`` (:mod:`experiments.models.families`);
            ``_gn`` at the end of a ResNet's name replaces BatchNorm by GroupNorm; ``logistic``, ``mlp_64``,
            ``mlp_128_64_tanh`` (:mod:`experiments.models.mlp`); or any architecture of timm.
        classes: outputs of the head; 0 for none.
        seed: names the initial weights.
        options: ``img_size``, ``in_chans`` and whatever else the architecture takes; ``None`` leaves the default.

    Raises:
        MergeboundError: an unknown name (with suggestions), or an option that the architecture does not take (with
            those that it takes).
    """
    chosen = {name: value for name, value in options.items() if value is not None}
    for name, remedy in _NOT_HERE.items():
        if name in chosen:
            raise MergeboundError(f"{architecture}: option {name!r} is not given here; {remedy}")
    if classes < 0:
        raise MergeboundError(f"classes = {classes}: give the number of outputs")
    make = _own(architecture, classes) or _of_timm(architecture, classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(chosen)


def build_shapes(architecture: str, classes: int = 10, **options: Any) -> nn.Module:
    """The network without numbers, on PyTorch's meta device: instant for any size, for counting and looking.

    Raises:
        MergeboundError: as :func:`build_model`.
    """
    with torch.device("meta"):
        return build_model(architecture, classes, **options)


def list_models(pattern: str = "*") -> tuple[str, ...]:
    """Names that :func:`build_model` takes, the toolkit's own first.

    Args:
        pattern: with ``*`` and ``?``; without them, a part of the name.
    """
    import timm

    wanted = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    own = own_models()
    known = (*own, *(name for name in timm.list_models() if name not in own))
    return tuple(name for name in known if fnmatch.fnmatch(name, wanted))


def own_models() -> tuple[str, ...]:
    """The toolkit's own networks."""
    cifar = [f"cifar_resnet{depth}{end}" for end in ("", "_gn") for depth in CIFAR_DEPTHS]
    members = [member.name for kind in KINDS for member in family(kind)]
    grouped = [f"{member.name}_gn" for member in family("resnet")]
    return (*DIGIT_ARCHITECTURES, *MLP_EXAMPLES, *cifar, *members, *grouped)


Maker = Callable[[dict[str, Any]], nn.Module]


def _own(architecture: str, classes: int) -> Maker | None:
    """How a network of the toolkit's own is made; nothing if it is not one."""
    if is_mlp(architecture):
        return _checked(
            architecture, lambda options: mlp(architecture, classes, **_squared(options)), "in_chans", "img_size"
        )
    if architecture not in own_models():
        return None
    if architecture == "vit":
        return _checked(architecture, lambda options: digit_vit(classes))
    if architecture in DIGIT_ARCHITECTURES:
        return _checked(architecture, lambda options: digit_resnet(architecture.removeprefix("resnet_"), classes))
    if match := _CIFAR.fullmatch(architecture):
        depth, grouped = int(match[1]), bool(match[2])
        return _checked(
            architecture,
            lambda options: _cifar(depth, classes, **_normed(grouped, options)),
            *(("in_chans", "img_size") if grouped else ("in_chans", "img_size", "norm")),
        )
    match = _MEMBER.fullmatch(architecture)
    assert match is not None
    member, grouped = family(match[1])[int(match[2]) - 1], bool(match[3])
    further = ("patch_size",) if member.kind == "vit" else () if grouped else ("norm",)
    takes = ("in_chans", "img_size", *further)
    return _checked(
        architecture, lambda options: build_member(member, classes, **_normed(grouped, _squared(options))), *takes
    )


def _checked(architecture: str, make: Maker, *takes: str) -> Maker:
    def checked(options: dict[str, Any]) -> nn.Module:
        for name in options:
            if name not in takes:
                raise MergeboundError(
                    f"{architecture}: there is no option {name!r}; it takes {', '.join(takes) or 'none'}"
                )
        return make(options)

    return checked


def _normed(grouped: bool, options: Mapping[str, Any]) -> dict[str, Any]:
    return {**options, **({"norm": "gn"} if grouped else {})}


def _squared(options: Mapping[str, Any]) -> dict[str, Any]:
    """``img_size`` as one number."""
    size = options.get("img_size")
    if size is None or isinstance(size, int):
        return dict(options)
    sides = tuple(size) if isinstance(size, list | tuple) else ()
    if not sides or len(set(sides)) != 1 or not isinstance(sides[0], int):
        raise MergeboundError(f"img_size = {size!r}: give one number of pixels; images are square here")
    return {**options, "img_size": sides[0]}


def _cifar(depth: int, classes: int, *, img_size: Any = None, in_chans: int = 3, norm: str = "bn") -> nn.Module:
    """A CIFAR ResNet takes images of any size; ``img_size`` is what it says that it expects."""
    model = CifarResNet(depth, classes, in_chans, norm)
    if img_size is not None:
        size = _squared({"img_size": img_size})["img_size"]
        model.pretrained_cfg["input_size"] = (in_chans, size, size)
    return model


def _of_timm(architecture: str, classes: int) -> Maker:
    import timm

    if not timm.is_model(architecture):
        raise MergeboundError(f"architecture: timm has no model {architecture!r}; {_similar(architecture)}")

    def make(options: dict[str, Any]) -> nn.Module:
        try:
            model: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=classes, **options)
        except Exception as error:  # timm's constructors raise whatever their options make them raise
            raise MergeboundError(_why(architecture, options, error)) from error
        taken = getattr(model, "in_chans", None)
        if "in_chans" in options and isinstance(taken, int) and taken != options["in_chans"]:
            raise MergeboundError(f"{architecture}: it takes images of {taken} channels only; leave out 'in_chans'")
        return model

    return make


def _similar(architecture: str) -> str:
    """Some names like it."""
    known = list_models()
    close = get_close_matches(architecture, known, n=5, cutoff=0.6)
    if not close:
        stem = re.split(r"[_\d]", architecture)[0]
        close = [name for name in known if stem and name.startswith(stem)][:5]
    return f"did you mean: {', '.join(close)}" if close else "see `mergebound models list`"


def _why(architecture: str, options: Mapping[str, Any], error: Exception) -> str:
    """One line about a network that timm would not build."""
    reason = (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".")
    unknown = re.search(r"unexpected keyword argument '(\w+)'", reason)
    if unknown is None or unknown[1] not in options:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{architecture}: timm cannot build it{f' with {given}' if given else ''} ({reason}); change its options"
    takes = timm_options(architecture)
    any_size = unknown[1] == "img_size" and "img_size" not in takes
    remark = "it runs on images of many sizes without being told; leave 'img_size' out; " if any_size else ""
    wrong = f"{architecture}: timm cannot build it: there is no option {unknown[1]!r}"
    return f"{wrong}; {remark}it takes {', '.join(takes) or 'others'}"


def timm_options(architecture: str) -> tuple[str, ...]:
    """Names of the options of an architecture's class in timm, as its constructor lists them."""
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(architecture, pretrained=False)
    except Exception:  # some constructors need numbers
        model = timm.create_model(architecture, pretrained=False)
    known = inspect.signature(type(model).__init__).parameters.values()
    hidden = {"self", "cfg", "device", "dtype", "num_classes"}
    return tuple(p.name for p in known if p.name not in hidden and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
