"""Any local file of weights as a base: names matched with the network's, the head kept or made anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from experiments.bases.base import Base, BaseError, Provenance, build, first_few, make_base, mismatch
from experiments.bases.known_hashes import check_hash
from experiments.bases.reading import read_weights, without_prefixes
from experiments.models import head_tensors
from merging.checkpoint import file_hash

Head = Literal["auto", "keep", "new"]

HEADS = ("head", "head_dist", "heads", "fc", "classifier", "linear", "logits", "last_linear", "projector", "predictor")
"""Names of modules that are taken for a head which the network does not have."""
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Matching:
    """How the tensors of a file were matched with those of a network.

    Attributes:
        matched: tensors that were taken.
        prefix: what was removed before the file's names.
        head: ``kept`` or ``new``.
        filled: tensors of the network that the file need not hold (counters of BatchNorm).
        unused: tensors of the file that the network has no place for.
        converted: tensors whose floating type was changed to the network's.
    """

    matched: int
    prefix: str
    head: str
    filled: tuple[str, ...]
    unused: tuple[str, ...]
    converted: tuple[str, ...]

    def notes(self) -> tuple[str, ...]:
        """The same in sentences."""
        found = [f"{self.matched} tensors were matched" + (f" without {self.prefix!r}" if self.prefix else "")]
        found.append(f"the head was {self.head}" if self.head == "kept" else "the head is new")
        if self.filled:
            found.append(f"not in the file, so at their start: {first_few(self.filled)}")
        if self.unused:
            found.append(f"not used: {first_few(self.unused)}")
        if self.converted:
            found.append(f"{len(self.converted)} tensors were converted to the network's type")
        return tuple(found)


def load_checkpoint_base(
    architecture: str,
    path: Path,
    *,
    classes: int,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    head: Head = "auto",
    ema: bool = False,
    sha256: str | None = None,
    allow_unused: bool = False,
) -> Base:
    """A base from a checkpoint of any format that :mod:`merging.checkpoint` reads (LoRA adapters excluded).

    Args:
        architecture: of the network that the weights are of.
        path: the file or folder.
        classes: outputs of the head.
        options: of the network (``img_size``, ``in_chans``, ...).
        seed: names the initial weights of a new head.
        head: ``auto`` keeps the file's head where it fits; ``keep`` insists on it; ``new`` makes a new one.
        ema: the averaged weights of a training checkpoint.
        sha256: expected SHA-256 of the file (its beginning is enough).
        allow_unused: accept tensors in the file that the network has no place for (beside those of a head).

    Raises:
        MergeboundError: unknown architecture, unreadable file, another hash, or tensors that do not fit.
    """
    path = Path(path)
    found = file_hash(path)
    if sha256 is not None:
        check_hash(found, sha256, path)
    network = build(architecture, classes, options or {}, seed)
    state, matching = match(
        read_weights(path, ema=ema),
        network.state_dict(),
        head_tensors(network),
        source=path,
        fits=architecture,
        head=head,
        allow_unused=allow_unused,
    )
    notes = (*(["averaged (EMA) weights"] if ema else []), *matching.notes())
    provenance = Provenance("checkpoint", str(path), sha256=found, seed=seed, notes=notes)
    return make_base(state, architecture, classes, options or {}, provenance)


def match(
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    heads: Sequence[str],
    *,
    source: object,
    fits: str = "the network",
    head: Head = "auto",
    allow_unused: bool = False,
) -> tuple[dict[str, Tensor], Matching]:
    """Give a network's state dict the tensors of a file.

    Args:
        given: tensors of the file.
        wanted: the network's initial state dict, whose types are kept.
        heads: names of the tensors of the network's head, of whatever layers it consists.
        source: the file, for messages.
        fits: the network's name, for messages.
        head: see :func:`load_checkpoint_base`.
        allow_unused: see :func:`load_checkpoint_base`.

    Returns:
        The state dict, in the network's order, and how it was matched.

    Raises:
        BaseError: names the first few tensors that are missing, of another shape, or have no place.
    """
    try:
        renamed, removed = without_prefixes(tuple(given), wanted)
    except BaseError as error:
        raise BaseError(f"{source}: {error}") from error
    present = {renamed[name]: tensor for name, tensor in given.items()}
    heads = [name for name in wanted if name in set(heads)]
    fitting = all(name in present and present[name].shape == wanted[name].shape for name in heads)
    if head == "keep" and not fitting:
        what = ", ".join(f"{name} {tuple(present[name].shape)}" if name in present else f"no {name}" for name in heads)
        raise BaseError(
            f"{source}: its head does not fit {fits} (it has {what}; {_shapes(wanted, heads)} is needed); set the "
            "number of classes to the file's, or take a new head"
        )
    keep = fitting and head != "new"
    needed = [name for name in wanted if keep or name not in heads]
    filled = [name for name in needed if name not in present and name.rpartition(".")[2] == COUNTER]
    missing = [name for name in needed if name not in present and name not in filled]
    shapes = [
        f"{name} is {tuple(present[name].shape)} where {tuple(wanted[name].shape)} is needed"
        for name in needed
        if name in present and present[name].shape != wanted[name].shape
    ]
    spare = [name for name in present if name not in wanted]
    own = tuple({f"{name.rpartition('.')[0]}." for name in heads})
    foreign = [name for name in spare if not _of_a_head(name, own)]
    message = mismatch(missing, [] if allow_unused else foreign, shapes)
    if message:
        raise BaseError(
            f"{source}: does not fit {fits}: {message}; check the architecture and its options (img_size, in_chans); "
            "kind pretrained resizes position embeddings and adapts the first convolution of timm's models"
        )
    state: dict[str, Tensor] = {}
    converted = []
    for name, tensor in wanted.items():
        if name in filled or name not in needed:
            state[name] = tensor.detach().clone()
            continue
        state[name] = present[name].to(tensor.dtype)
        if present[name].dtype != tensor.dtype:
            converted.append(name)
    unused = (*spare, *(name for name in heads if not keep and name in present))
    taken = len(needed) - len(filled)
    return state, Matching(taken, removed, "kept" if keep else "new", tuple(filled), unused, tuple(converted))


def _of_a_head(name: str, own: tuple[str, ...]) -> bool:
    return name.startswith(own) or name.partition(".")[0] in HEADS


def _shapes(wanted: Mapping[str, Tensor], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {tuple(wanted[name].shape)}" for name in names)
