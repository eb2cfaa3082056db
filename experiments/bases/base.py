"""What a base is: tensors, the network that they belong to, and where they come from; and how it is stored."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any, Literal

import torch
from torch import Tensor, nn

from merging.checkpoint import load_state_dict, open_checkpoint, save_state_dict
from theory.errors import MergeboundError

Kind = Literal["pretrained", "checkpoint", "pretrain", "clip", "random"]
_PLAIN = (torch.float32, torch.int64, torch.float64)
CLIP_PREFIX = "clip:"
"""Architectures whose names start so are CLIP image towers with a zero-shot head."""


class BaseError(MergeboundError):
    """A base cannot be found, read, made, or does not fit its network."""


@dataclass(frozen=True)
class Provenance:
    """Where a base comes from.

    Attributes:
        kind: how it was made.
        source: the file, the published name, or the data in words.
        sha256: of the weights file as it was read, 64 hexadecimal digits; None where there was no file.
        licence: of the weights as their source states it; None where it states none or nobody looked.
        quality: ``none``, ``weak``, ``strong``, ``custom`` (kind ``pretrain``); None elsewhere.
        accuracy: measured validation accuracy in [0, 1]; None where nothing was measured.
        images: validation images behind ``accuracy``.
        seed: names the initial weights of what the source does not hold (a new head, or everything).
        notes: what was adapted, dropped or filled in, one sentence each.
        details: everything else that was recorded (JSON).
    """

    kind: Kind
    source: str
    sha256: str | None = None
    licence: str | None = None
    quality: str | None = None
    accuracy: float | None = None
    images: int | None = None
    seed: int = 0
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """A base x_0.

    Attributes:
        state: the full state dict (backbone and head), on the CPU.
        architecture: as :func:`experiments.models.build_model` knows it, or ``clip:`` and open_clip's name.
        classes: outputs of the head.
        options: options of the network (``img_size``, ``in_chans``, ...).
        provenance: where it comes from.
        digest: SHA-256 of the tensors (:func:`tensors_digest`).
    """

    state: Mapping[str, Tensor]
    architecture: str
    classes: int
    options: Mapping[str, Any]
    provenance: Provenance
    digest: str

    def model(self) -> nn.Module:
        """A new network with these weights, in evaluation mode."""
        network = build(self.architecture, self.classes, self.options, self.provenance.seed)
        check_fits(self.state, network.state_dict(), self.provenance.source)
        network.load_state_dict(dict(self.state))
        return network.eval()

    def describe(self) -> dict[str, Any]:
        """What :func:`save_base` records beside the tensors."""
        return {
            "architecture": self.architecture,
            "classes": self.classes,
            "options": dict(self.options),
            "digest": self.digest,
            "names": list(self.state),
            "provenance": asdict(self.provenance),
        }


def make_base(
    state: Mapping[str, Tensor],
    architecture: str,
    classes: int,
    options: Mapping[str, Any],
    provenance: Provenance,
) -> Base:
    """A base from tensors, which are detached and digested."""
    kept = {name: tensor.detach().cpu() for name, tensor in state.items()}
    return Base(kept, architecture, classes, dict(options), provenance, tensors_digest(kept))


def build(architecture: str, classes: int, options: Mapping[str, Any], seed: int) -> nn.Module:
    """A network with seeded initial weights, CLIP image towers included.

    Raises:
        MergeboundError: unknown architecture, or an option that it does not take.
    """
    if architecture.startswith(CLIP_PREFIX):
        from experiments.bases.clip import build_classifier

        return build_classifier(architecture.removeprefix(CLIP_PREFIX), classes, seed=seed, **options)
    from experiments.models import build_model

    try:
        return build_model(architecture, classes=classes, seed=seed, **options)
    except (TypeError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        given = ", ".join(f"{key}={value}" for key, value in options.items()) or "no options"
        raise BaseError(f"{architecture}: cannot be built with {given} ({reason}); change the options") from error


def random_base(architecture: str, *, classes: int, options: Mapping[str, Any] | None = None, seed: int = 0) -> Base:
    """The seeded initial weights themselves.

    Raises:
        MergeboundError: unknown architecture or option.
    """
    network = build(architecture, classes, options or {}, seed)
    provenance = Provenance("random", f"initial weights of seed {seed}", seed=seed)
    return make_base(network.state_dict(), architecture, classes, options or {}, provenance)


def tensors_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, types and values of tensors, whatever their order; 64 hexadecimal digits."""
    digest = sha256(b"mergebound tensors 1")
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        if tensor.dtype in _PLAIN:  # the same bytes, without three views of them
            digest.update(tensor.numpy().data)
        elif tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_fits(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    source: object,
    remedy: str = "",
    fits: str = "the network",
) -> None:
    """Check that a state dict has exactly the tensors of a network.

    Args:
        state: what there is.
        wanted: the network's own state dict.
        source: what to blame in the message.
        remedy: what to do, where the caller knows better.
        fits: what the network is called in the message.

    Raises:
        BaseError: names the first few tensors that are missing, too many, or of another shape.
    """
    shapes = [
        f"{name} is {tuple(state[name].shape)} where {tuple(tensor.shape)} is needed"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    message = mismatch([n for n in wanted if n not in state], [n for n in state if n not in wanted], shapes)
    if message:
        remedy = remedy or "check the architecture and its options (classes, img_size, in_chans)"
        raise BaseError(f"{source}: does not fit {fits}: {message}; {remedy}")


def mismatch(missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[str]) -> str:
    """Tensors that do not fit, in words; empty if there are none."""
    parts = (("missing ", list(missing)), ("not part of it ", list(unexpected)), ("", list(shapes)))
    return "; ".join(f"{word}{first_few(names)}" for word, names in parts if names)


def first_few(names: Iterable[str], few: int = 4) -> str:
    """The first names of a list, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - few} more" if len(found) > few else ""
    return ", ".join(found[:few]) + more


def save_base(path: str | os.PathLike[str], base: Base) -> None:
    """Write a base as one safetensors file, atomically, with its record in the metadata.

    Raises:
        CheckpointError: wrong suffix, missing folder, or the disk refuses.
    """
    save_state_dict(path, base.state, {"base": base.describe()})


def read_base(path: str | os.PathLike[str]) -> Base:
    """Read what :func:`save_base` wrote; the tensors are checked against their recorded digest.

    Raises:
        MergeboundError: not such a file, damaged, or its tensors were changed.
    """
    record = open_checkpoint(path).metadata.get("base")
    try:
        fields = dict(record)  # type: ignore[arg-type]
        provenance = dict(fields["provenance"])
        provenance["notes"] = tuple(provenance.get("notes", ()))
        known = Provenance(**provenance)
        names, digest = list(fields["names"]), str(fields["digest"])
        architecture, classes, options = str(fields["architecture"]), int(fields["classes"]), dict(fields["options"])
    except (TypeError, KeyError, ValueError) as error:
        raise BaseError(
            f"{path}: holds no record of a base (or one that another version wrote); read it as a checkpoint, with the "
            "architecture that it belongs to"
        ) from error
    stored = load_state_dict(path)
    state = {name: stored[name] for name in names if name in stored}
    if tensors_digest(stored) != digest or set(names) != set(stored):
        raise BaseError(f"{path}: the tensors are not those that were recorded; make or copy the base again")
    return Base(state, architecture, classes, options, known, digest)
