"""What to predict, and whether a group allows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiments.predict.report import Objective
from experiments.predict_group import Group
from merging.errors import MethodError
from merging.registry import get
from merging.variances import stays_in_hull
from theory.errors import MergeboundError

TANGENT_LIMIT = 3e11
"""Tangents are collected by default up to this much work (:attr:`Group.work`): about a minute or two on one core."""


@dataclass(frozen=True)
class Options:
    """What to predict.

    Attributes:
        methods: merging methods; ``None``: average, task_arithmetic, risk_optimal; with tangents also ties, dare.
        settings: settings by method.
        coefficients: scales lambda of task arithmetic.
        alphas: coefficient vectors of the user's own, (N,) each.
        bounds: of every coefficient of risk_optimal, and of lambda.
        simplex: risk_optimal with nonnegative coefficients that sum to one.
        hull: risk_optimal and the best scale with nonnegative coefficients of sum at most one.  ``None``: where the
            network has BatchNorm and ``bounds`` is as it comes, for there larger sums make running variances negative.
        objective: which prediction is minimised; ``None``: the middle of the bracket, or the secant without tangents.
        tangent, bound: collect tangents; compute the master bound (both need derivatives).  ``None``: if
            ``Group.work`` is at most :data:`TANGENT_LIMIT`.
        seed: for methods that draw random numbers, and for the measured smoothness.
    """

    methods: tuple[str, ...] | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    coefficients: tuple[float, ...] = (0.3,)
    alphas: tuple[tuple[float, ...], ...] = ()
    bounds: tuple[float, float] = (0.0, 1.0)
    simplex: bool = False
    hull: bool | None = None
    objective: Objective | None = None
    tangent: bool | None = None
    bound: bool | None = None
    seed: int = 0


def decide(group: Group, options: Options) -> tuple[tuple[str, ...], bool, bool, list[str]]:
    """Methods, whether tangents are collected, whether the bound is computed, and what to tell about it."""
    cheap = group.work <= TANGENT_LIMIT
    named = [get(name) for name in options.methods or ()]
    for method in named:
        if method.needs_data:
            raise MethodError(f"method '{method.name}' needs statistics of data, which cannot be priced; leave it out")
    curved = [method.name for method in named if not method.linear]
    if curved and options.tangent is False:
        raise MethodError(f"method '{curved[0]}' is not linear and needs Jacobian products; drop --no-tangent, or it")
    tangent = options.tangent if options.tangent is not None else cheap or bool(curved)
    usual = ("average", "task_arithmetic", "ties", "dare", "risk_optimal")
    methods = options.methods or tuple(name for name in usual if tangent or get(name).linear)
    for name in options.settings:
        if name not in methods:
            raise MethodError(
                f"--set: method '{name}' is not among --methods {','.join(methods)}; add it, or drop --set"
            )
    for alpha in options.alphas:
        if len(alpha) != group.size or not np.isfinite(alpha).all():
            raise MethodError(
                f"--alpha {','.join(map(str, alpha))}: give one finite number for each of the {group.size} experts"
            )
    if "weighted" in methods and not options.alphas:
        raise MethodError(
            f"method 'weighted' needs coefficients: add --alpha with {group.size} comma-separated numbers"
        )
    if not np.isfinite(options.coefficients).all():
        raise MethodError(f"--coefficients {options.coefficients}: give finite numbers")
    if not np.isfinite(options.bounds).all() or not options.bounds[0] < options.bounds[1]:
        raise MethodError(f"--bounds {options.bounds[0]},{options.bounds[1]}: give two finite numbers, the lower first")
    if options.hull and options.bounds != Options().bounds:
        raise MergeboundError("--hull keeps coefficients between 0 and 1 with a sum of at most 1; drop it, or --bounds")
    notes = []
    if not tangent:
        notes.append("secant only: an under-estimate where merging hurts; --tangent adds the other end of the bracket")
    if in_hull(group, options) and options.hull is None and not options.simplex:
        notes.append(
            "BatchNorm: risk_optimal and the best scale keep their coefficients nonnegative with sum at most 1, beyond "
            "which running variances can become negative; --no-hull allows all of --bounds"
        )
    return methods, tangent, cheap if options.bound is None else options.bound, notes


def in_hull(group: Group, options: Options) -> bool:
    """Whether chosen coefficients are kept nonnegative with a sum of at most one."""
    return stays_in_hull(group.networks[0].space.names, options.hull, options.bounds)


def tangents_rule(group: Group, options: Options) -> str:
    """In words, what decides by default whether tangents are collected."""
    images = max(len(item.split) for item in group.data)
    comparison = "at most" if group.work <= TANGENT_LIMIT else "above"
    return (
        f"parameters x positions x images x experts^2 = {group.base.numel()} x {group.positions:g} x {images} x "
        f"{group.size}^2 = {group.work:.2g}, "
        f"{comparison} {TANGENT_LIMIT:.0e}" + ("" if options.tangent is None else "; the choice was given")
    )
