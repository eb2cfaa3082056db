"""A base as a specification writes it, and how one is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.bases.base import CLIP_PREFIX, Base, BaseError, Kind, random_base
from experiments.bases.checkpoint import Head, load_checkpoint_base
from experiments.bases.pretrained import load_pretrained
from experiments.bases.pretraining import Report, measured, pretrain_base
from experiments.bases.training import PretrainSpec
from experiments.inputs.training_data import TrainingData


class BaseSpec(BaseModel):
    """Which base experts are fine-tuned from.

    ``pretrained``: timm's weights of ``architecture`` (``weights``: a local file instead of timm's source);
    ``checkpoint``: the local file ``weights`` for any architecture; ``pretrain``: made on the spot at a ``quality``;
    ``clip``: open_clip's ``architecture`` from ``weights`` or ``tag``, with a zero-shot head of ``class_names``;
    ``random``: the seeded start.  ``data`` names the task whose class names a CLIP base has, or (in grids) the task
    that a base is pretrained on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    architecture: str
    classes: Annotated[int, Field(ge=1)] | None = None
    options: dict[str, Any] = {}
    seed: Annotated[int, Field(ge=0)] = 0
    weights: Path | None = None
    sha256: str | None = None
    ema: bool = False
    head: Head = "auto"
    quality: Literal["none", "weak", "strong"] | PretrainSpec = "strong"
    tag: str | None = None
    class_names: tuple[str, ...] = ()
    data: str = ""

    @model_validator(mode="after")
    def _complete(self) -> BaseSpec:
        needs = {
            "checkpoint": (("weights", self.weights), ("classes", self.classes)),
            "random": (("classes", self.classes),),
            "clip": (("class_names", self.class_names), ("weights or tag", self.weights or self.tag)),
        }
        for name, value in needs.get(self.kind, ()):
            if not value:
                raise ValueError(f"{name}: a base of kind {self.kind} needs it")
        only = {
            "weights": ("pretrained", "checkpoint", "clip"),
            "sha256": ("pretrained", "checkpoint", "clip"),
            "ema": ("pretrained", "checkpoint"),
            "head": ("checkpoint",),
            "quality": ("pretrain",),
            "tag": ("clip",),
            "class_names": ("clip",),
            "data": ("clip", "pretrain"),
        }
        for name, kinds in only.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: means nothing for a base of kind {self.kind}; leave it out")
        if self.kind == "clip" and self.classes not in (None, len(self.class_names)):
            raise ValueError(f"classes: {self.classes}, but there are {len(self.class_names)} class_names")
        return self


def load_base(
    spec: BaseSpec,
    *,
    data: TrainingData | None = None,
    validation: TrainingData | None = None,
    data_digest: str | None = None,
    cache: Path | None = None,
    download: bool = False,
    record: Path | None = None,
    device: str = "cpu",
    report: Report | None = None,
) -> Base:
    """The base of a specification.

    Args:
        spec: what is wanted.
        data: the pretraining sample (kind ``pretrain``).
        validation: images to measure accuracy on, for every kind whose head was made for them.
        data_digest: what identifies ``data`` (kind ``pretrain``).
        cache: folder of pretrained bases and text embeddings.
        download: allow the network (kinds ``pretrained`` and ``clip``).
        record: where hashes of weights are recorded; default: ``bases.lock.json`` in the cache folder of the user.
        device: where pretraining and measuring run.
        report: is told the progress of pretraining.

    Raises:
        MergeboundError: unknown architecture, no or unfit weights, no data; see the functions of each kind.
    """
    base = _load(spec, data, data_digest, cache, download, record, device, report)
    return base if validation is None else measured(base, validation, device=device)


def _load(
    spec: BaseSpec,
    data: TrainingData | None,
    data_digest: str | None,
    cache: Path | None,
    download: bool,
    record: Path | None,
    device: str,
    report: Report | None,
) -> Base:
    if spec.kind == "pretrained":
        return load_pretrained(
            spec.architecture,
            weights=spec.weights,
            classes=spec.classes,
            options=spec.options,
            seed=spec.seed,
            sha256=spec.sha256,
            download=download,
            ema=spec.ema,
            record=record,
        )
    if spec.kind == "checkpoint":
        assert spec.weights is not None  # both checked by the specification
        assert spec.classes is not None
        return load_checkpoint_base(
            spec.architecture,
            spec.weights,
            classes=spec.classes,
            options=spec.options,
            seed=spec.seed,
            head=spec.head,
            ema=spec.ema,
            sha256=spec.sha256,
        )
    if spec.kind == "clip":
        from experiments.bases.clip import load_clip

        name = spec.architecture.removeprefix(CLIP_PREFIX)
        wrong = sorted(set(spec.options) - {"image_size", "quick_gelu"})
        if wrong:
            raise BaseError(f"{name}: option {wrong[0]!r} is unknown; a CLIP base takes image_size and quick_gelu")
        clip = load_clip(name, spec.weights, download, tag=spec.tag, sha256=spec.sha256, record=record, **spec.options)
        return clip.base(spec.class_names, data=spec.data, cache=cache)
    if spec.kind == "pretrain":
        if data is None:
            raise BaseError(f"{spec.architecture}: a base of kind pretrain needs training data; give data")
        return pretrain_base(
            spec.architecture,
            data,
            spec.quality,
            classes=spec.classes,
            options=spec.options,
            seed=spec.seed,
            data_digest=data_digest,
            cache=cache,
            device=device,
            report=report,
        )
    assert spec.classes is not None  # checked by the specification
    return random_base(spec.architecture, classes=spec.classes, options=spec.options, seed=spec.seed)
