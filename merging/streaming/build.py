"""From methods and settings to programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from merging.election import Election
from merging.layers import layers_of
from merging.lazy import specs
from merging.linear_form import LinearForm
from merging.method import Method, check_coefficients
from merging.methods.karcher import karcher_coefficients, shares
from merging.methods.model_stock import interpolation, warn_beyond
from merging.methods.slerp import slerp_coefficients
from merging.random_masks import check_names
from merging.settings import Resolved
from merging.span import Array, cosines
from merging.streaming.programs import (
    ByDefinition,
    Dropped,
    Elected,
    Largest,
    Linear,
    Mask,
    Program,
    Span,
    numbers,
    refuse_weighted_mean,
)
from merging.streaming.selection import Domain
from merging.tensorwise import Stream
from merging.types import StateDict


@dataclass(frozen=True)
class Batch:
    """Tensors that one program merges; ``None``: each as a whole, by the method's definition."""

    names: tuple[str, ...]
    program: Program | None


def ordered_experts(stream: Stream) -> dict[str, StateDict]:
    """The experts in the order in which sums are taken: by name, unless the order is part of the method."""
    if not stream.method.permutation_invariant:
        return dict(stream.experts)
    return {name: stream.experts[name] for name in sorted(stream.experts)}


def build(stream: Stream) -> list[Batch] | None:
    """The programs of a merge, or ``None`` where some part of it needs all tensors in memory at once.

    Raises:
        MethodError: settings that do not fit the experts.
    """
    parts = stream.parts
    described = specs(stream.reference)
    states = [stream.reference, *stream.experts.values()]
    wide = {name for name in parts.coordinates if any(specs(s)[name].dtype == torch.float64 for s in states)}
    if wide and len(wide) < len(parts.coordinates):
        return None  # accumulation is float64 throughout then
    everything = stream.method.linear or stream.method.merges_buffers
    covered = [*sorted(parts.shared), *(sorted(parts.buffers) if everything else ())]
    domain = [(name, described[name].numel) for name in covered]
    layers = layers_of([name for group in stream.groups for name in group.names])
    labels = tuple(ordered_experts(stream))
    batches: list[Batch] = []
    for group in stream.groups:
        tensorwise = stream.method.is_tensorwise(group.settings) and not stream.method.needs_data
        program = None
        if not wide:
            arguments = _arguments(stream, group, labels)
            if "layers" in stream.method.extras and arguments.get("layers") is None:
                arguments["layers"] = layers
            program = _program(stream, group, arguments, labels, domain)
        if program is None and not tensorwise:
            return None
        batches.append(Batch(group.names, program))
    if not everything and parts.buffers:
        forms = {name: LinearForm(divisor=len(labels)) for name in parts.buffers}
        batches.append(Batch(parts.buffers, None if wide else Linear(forms)))
    return batches


def _arguments(stream: Stream, group: Resolved, labels: Sequence[str]) -> dict[str, Any]:
    """Settings with everything that is per expert in the order of ``labels``."""
    given = tuple(stream.experts)
    arguments = dict(group.settings)
    if group.coefficients is not None:
        by_name = dict(zip(given, group.coefficients, strict=True))
        arguments["coefficients"] = check_coefficients([by_name[label] for label in labels], len(labels))
    if arguments.get("groups"):
        place = {name: index for index, name in enumerate(given)}
        arguments["groups"] = {
            pattern: [values[label] for label in labels]
            if isinstance(values, Mapping)
            else [values[place[label]] for label in labels]
            for pattern, values in arguments["groups"].items()
        }
    return arguments


def _program(
    stream: Stream, group: Resolved, arguments: dict[str, Any], labels: Sequence[str], domain: Domain
) -> Program | None:
    method = stream.method
    if method.linear_form is not None:
        forms = {name: method.linear_form(len(labels), name, **arguments) for name in group.names}
        return Linear(forms)
    maker = _MAKERS.get(method.name) if _is_shipped(method) else None
    if maker is not None:
        return maker(stream, arguments, labels, domain)
    further = any(arguments.get(extra) is not None for extra in method.extras)
    plain = method.deterministic and not method.needs_base and not method.needs_data and not further
    return ByDefinition(method, arguments) if method.elementwise and plain else None


def _is_shipped(method: Method) -> bool:
    """Whether a method is this package's own (one of the same name may be a user's)."""
    return method.function.__module__ == f"merging.methods.{method.name}"


def _ties(stream: Stream, given: dict[str, Any], labels: Sequence[str], domain: Domain) -> Program:
    return _elected(given, domain if given["scope"] == "global" else None, given["density"], None, given["coefficient"])


def _dare_ties(stream: Stream, given: dict[str, Any], labels: Sequence[str], domain: Domain) -> Program | None:
    if given["density"] < 1.0 or round(given["drop"] * 2**32) >= 2**32:
        return None
    mask, factor, match = _mask(stream, given, labels)
    return _elected(given | {"rounding": "up"}, None, 1.0, mask, given["coefficient"] / factor, match)


def _elected(
    given: dict[str, Any], domain: Domain | None, density: float, mask: Mask | None, factor: float, match: bool = False
) -> Elected:
    weights: Sequence[float] | None = given.get("coefficients")
    election: Election = given["election"]
    mean = given["aggregation"] == "mean"
    refuse_weighted_mean(weights, mean)
    votes, turns = None, None
    if election == "weighted" and weights is not None:
        if mean:
            votes = weights
        else:  # what votes is what is summed
            turns, weights = weights, None
    return Elected(
        domain,
        density,
        given["rounding"],
        numbers(votes),
        numbers(turns),
        numbers(weights),
        mean,
        factor,
        mask,
        match,
    )


def _dare(stream: Stream, given: dict[str, Any], labels: Sequence[str], domain: Domain) -> Program | None:
    if round(given["drop"] * 2**32) >= 2**32:
        return None
    mask, factor, match = _mask(stream, given, labels)
    return Dropped(mask, numbers(given.get("coefficients")), given["coefficient"] / factor, match)


def _mask(stream: Stream, given: dict[str, Any], labels: Sequence[str]) -> tuple[Mask | None, float, bool]:
    """The masks, what survivors are divided by, and whether L1 norms are matched instead."""
    check_names("DARE", labels, len(labels))
    mask = None
    if given["drop"] > 0.0:
        mask = Mask(stream.seed, tuple(labels), round(given["drop"] * 2**32))
    match = given["rescale"] and given["rescaling"] != "probability" and mask is not None
    return mask, 1.0 - given["drop"] if given["rescale"] and not match else 1.0, match


def _magmax(stream: Stream, given: dict[str, Any], labels: Sequence[str], domain: Domain) -> Program:
    return Largest(given["coefficient"])


def _slerp(stream: Stream, given: dict[str, Any], labels: Sequence[str], domain: Domain) -> Program | None:
    if len(labels) != 2:
        return None

    def solve(name: str, matrix: Array) -> Array:
        return slerp_coefficients(matrix, given["t"], given["magnitude"], given["threshold"])

    return Span(solve, given["on"] == "weights", domain if given["scope"] == "global" else None)


def _karcher(stream: Stream, given: dict[str, Any], labels: Sequence[str], domain: Domain) -> Program | None:
    if given["max_iter"] != int(given["max_iter"]):
        return None
    weights = shares(given.get("coefficients"), len(labels), "the Karcher mean")

    def solve(name: str, matrix: Array) -> Array:
        return karcher_coefficients(matrix, weights, int(given["max_iter"]), given["tolerance"])

    return Span(solve, given["on"] == "weights", domain if given["scope"] == "global" else None)


def _model_stock(stream: Stream, given: dict[str, Any], labels: Sequence[str], domain: Domain) -> Program | None:
    if given["scope"] not in ("tensor", "global") or len(labels) < 2:
        return None

    def solve(name: str, matrix: Array) -> Array:
        ratio = float(interpolation(cosines(matrix), given["average"], given["clamp"]))
        warn_beyond({name: ratio})
        return np.full(len(labels), ratio / len(labels))

    return Span(solve, on_weights=False, domain=domain if given["scope"] == "global" else None)


_Maker = Callable[[Stream, dict[str, Any], Sequence[str], Domain], Program | None]
_MAKERS: Mapping[str, _Maker] = {
    "ties": _ties,
    "dare": _dare,
    "dare_ties": _dare_ties,
    "magmax": _magmax,
    "slerp": _slerp,
    "karcher": _karcher,
    "model_stock": _model_stock,
}
