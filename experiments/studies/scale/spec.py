"""The specification of the study of scale: networks, bases, experts, merges, baselines and draws, on a page of YAML."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.evaluate.transfer import METHODS as TRANSFERS
from experiments.spec import MethodSpec
from experiments.spec_pages import pages_in, read_page
from merging.registry import get
from theory.errors import MergeboundError, nearest

FOLDER = "experiments.presets.studies"
PREFIX = "scale-"

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FamilySpec(_Strict):
    """One family of networks, small to large, with the recipe of its experts.

    Attributes:
        name: of the family.
        architectures: small to large; at least two.
        options: of the networks (``img_size``, ``in_chans``).
        bases: names of the study's bases that this family takes; default all.
        qualities: of pretrained bases by name, where this family needs other numbers than ``bases`` say to learn: they
            are added to, or stand instead of, the base's own ``quality``.
        recipe: hyperparameters of a grid (:class:`experiments.grid.spec.GridSpec`): ``learning_rate``, ``steps``,
            ``batch_size`` and so on; the same for every size and base.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][_a-z0-9]*$")]
    architectures: Annotated[tuple[str, ...], Field(min_length=2)]
    options: dict[str, Any] = {}
    bases: tuple[str, ...] | None = None
    qualities: dict[str, dict[str, Any]] = {}
    recipe: dict[str, Any]

    @model_validator(mode="after")
    def _complete(self) -> FamilySpec:
        for name in ("learning_rate", "steps", "batch_size"):
            if not isinstance(self.recipe.get(name), int | float):
                raise ValueError(f"recipe.{name}: give one number")
        return self


class MultitaskSpec(_Strict):
    """The multitask baseline, trained twice.

    ``fixed``: as many steps as all experts together, one task's batch per step, the experts' learning rate.
    ``optimised``: every rate of ``rates`` (factors on the experts' learning rate) for at most ``budget`` times as many
    steps, measured on validation images every ``every`` rounds over the tasks, stopped after ``patience`` measurements
    without a smaller validation loss; the best measurement of all rates is taken.

    Attributes:
        bases: for which bases it is trained.
        images: validation images of each task.
    """

    bases: Annotated[tuple[str, ...], Field(min_length=1)]
    rates: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0, 0.3)
    budget: Positive = 2.0
    every: Count = 5
    patience: Count = 3
    images: Count = 64


class TermsSpec(_Strict):
    """The theory's terms: which bases, and images per task for losses, derivatives and gradient noise."""

    bases: Annotated[tuple[str, ...], Field(min_length=1)]
    images: Annotated[int, Field(ge=8)] = 24
    noise_images: Annotated[int, Field(ge=4)] = 24


class LandscapeSpec(_Strict):
    """Barriers between experts and flatness: bases, images per task, points of a line, pairs of experts, draws."""

    bases: Annotated[tuple[str, ...], Field(min_length=1)]
    images: Annotated[int, Field(ge=8)] = 64
    points: Annotated[int, Field(ge=3)] = 7
    pairs: Count = 8
    draws: Count = 4
    filter_noise: Positive = 0.05
    sam_radius: Positive = 0.05


class LawSpec(_Strict):
    """Scaling laws in the number k of experts: the method whose merges are fitted, and k that are held out in turn."""

    method: str = "average"
    held_out: tuple[Count, ...] = (4, 6, 8)
    bootstrap: Annotated[int, Field(ge=2)] = 100


class RuleSpec(_Strict):
    """How verdicts are given.

    Attributes:
        chance_times: an effect is *not testable* where, on some side of its comparison (a base, a network), the 95 %
            interval of the experts' own test accuracy does not lie above this many times chance: then merged and
            unmerged networks are both guesses, and their ratio says nothing.
        borderline: an interval whose end nearest to zero is closer to it than this share of the interval's width is
            *borderline*: with a few hundred resamples the ends move by about as much.
    """

    chance_times: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    borderline: Annotated[float, Field(ge=0, lt=1)] = 0.1


class ScaleSpec(_Strict):
    """Everything that a study of scale draws and does.

    Attributes:
        name, seed: every draw is named by the seed.
        held_in: tasks of the experts.
        held_out: tasks that nobody is trained on, scored with frozen features.
        bases: weakest first; content of a :class:`~experiments.bases.spec.BaseSpec` without architecture and options
            (``architecture``: a pattern where ``{}`` stands for the family's member).
        families: the first is the study's own, the others the check with another family.
        experts: numbers of merged experts, ascending.
        chains: random orders of the held-in tasks; a group of N experts is the beginning of one, so that groups of
            one chain are nested.
        seeds: of fine-tuning; chain c takes the experts of seed c mod S.
        methods: merging methods with settings; a coefficient ``1/N`` follows the number of experts.
        transfers: how frozen features are scored; the first one is the study's main number.
        neighbours, probe_l2: settings of k-NN and linear probe.
        test_images: of every held-in and held-out task.
        fit_images, validation_images: of held-out tasks, for class means, neighbours and probe.
        multitask, terms, landscape, laws: further parts; ``None`` leaves one out.
        rule: of the verdicts.
        scope: what the size is, and what it leaves out compared with the paper; printed in the report.
    """

    name: str
    seed: Annotated[int, Field(ge=0)] = 0
    held_in: Annotated[tuple[str, ...], Field(min_length=2)]
    held_out: Annotated[tuple[str, ...], Field(min_length=1)]
    bases: Annotated[dict[str, dict[str, Any]], Field(min_length=2)]
    families: Annotated[tuple[FamilySpec, ...], Field(min_length=1)]
    experts: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = (2, 4, 6, 8)
    chains: Count = 3
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    methods: Annotated[tuple[MethodSpec, ...], Field(min_length=1)]
    transfers: Annotated[tuple[str, ...], Field(min_length=1)] = ("ncm_cosine", "knn_majority", "linear_probe")
    neighbours: Count = 10
    probe_l2: Positive = 0.1
    test_images: Annotated[int, Field(ge=8)] = 80
    fit_images: Annotated[int, Field(ge=8)] = 80
    validation_images: Annotated[int, Field(ge=8)] = 24
    multitask: MultitaskSpec | None = None
    terms: TermsSpec | None = None
    landscape: LandscapeSpec | None = None
    laws: LawSpec = LawSpec()
    rule: RuleSpec = RuleSpec()
    scope: str = ""

    @model_validator(mode="after")
    def _fits(self) -> ScaleSpec:
        for field, names in (("held_in", self.held_in), ("held_out", self.held_out)):
            if len(set(names)) < len(names):
                raise ValueError(f"{field}: a task is named twice")
        if set(self.held_in) & set(self.held_out):
            raise ValueError(f"held_out: {sorted(set(self.held_in) & set(self.held_out))[0]!r} is held in as well")
        if list(self.experts) != sorted(set(self.experts)) or self.experts[-1] > len(self.held_in):
            raise ValueError(f"experts: {list(self.experts)} must ascend up to the {len(self.held_in)} held-in tasks")
        if len({family.name for family in self.families}) < len(self.families):
            raise ValueError("families: two have one name")
        for name in self.transfers:
            if name not in TRANSFERS:
                raise ValueError(f"transfers: {name!r}: {nearest(name, TRANSFERS)}")
        for family in self.families:
            for name in family.bases or ():
                if name not in self.bases:
                    raise ValueError(f"families.{family.name}.bases: {name!r}: {nearest(name, tuple(self.bases))}")
            for name in family.qualities:
                if not isinstance(self.bases.get(name, {}).get("quality"), dict):
                    raise ValueError(f"families.{family.name}.qualities: {name!r} is no base with numbers as quality")
        for field, part in (("multitask", self.multitask), ("terms", self.terms), ("landscape", self.landscape)):
            for name in part.bases if part is not None else ():
                if name not in self.bases:
                    raise ValueError(f"{field}.bases: {name!r} is no base; {nearest(name, tuple(self.bases))}")
        labels = [label(method) for method in self.methods]
        if len(set(labels)) < len(labels):
            raise ValueError("methods: two entries are the same; leave one out")
        for place, method in enumerate(self.methods):
            try:
                get(method.name).settings(settings_for(method, 2))
            except MergeboundError as error:
                raise ValueError(f"methods.{place}: {error}") from error
        if self.laws.method not in labels:
            raise ValueError(f"laws.method: {self.laws.method!r} is not merged; {nearest(self.laws.method, labels)}")
        return self

    def bases_of(self, family: FamilySpec) -> tuple[str, ...]:
        """Names of a family's bases, weakest first."""
        return tuple(name for name in self.bases if family.bases is None or name in family.bases)

    def digest(self) -> str:
        """Content hash of what is run, 12 hexadecimal digits.

        The rule of verdicts and ``scope`` do not count, nor do ``qualities`` that a family does not give.
        """
        content = self.model_dump(mode="json", exclude={"scope", "rule"})
        for family in content["families"]:
            if not family["qualities"]:
                del family["qualities"]
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def label(method: MethodSpec) -> str:
    """A method's name in tables: its registered name, with settings only where they were given."""
    inner = " ".join(f"{key}={value}" for key, value in sorted(method.settings.items()))
    return f"{method.name} {inner}".strip()


def settings_for(method: MethodSpec, experts: int) -> dict[str, Any]:
    """Settings of a method for N experts: the coefficient ``1/N`` becomes a number."""
    return {key: 1.0 / experts if value == "1/N" else value for key, value in method.settings.items()}


def study_sizes() -> tuple[str, ...]:
    """Sizes that come with the package, smallest first."""
    order: tuple[Literal["tiny"], Literal["small"], Literal["paper"]] = ("tiny", "small", "paper")
    found = set(pages_in(FOLDER, PREFIX))
    return tuple(name for name in order if name in found) + tuple(sorted(found - set(order)))


def read_scale(source: str | Path) -> ScaleSpec:
    """Read a study of scale: a size (``tiny``, ``small``, ``paper``) or a YAML file.

    Raises:
        MergeboundError: no such file or size, or an entry that is not valid (named with its place).
    """
    return read_page(source, ScaleSpec, FOLDER, PREFIX, names=study_sizes(), called="size of the study")
