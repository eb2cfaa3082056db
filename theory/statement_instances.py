"""Attaining and worst known instances of further statements (labelled in :mod:`theory.statement_labels`).

Each returns ``(exact, upper)``: both recomputed, the upper value by the shipped calculator.
"""

from __future__ import annotations

from dataclasses import replace
from math import exp, expm1, log1p, sqrt
from typing import Any

import numpy as np

from theory.certificate import output_bound, output_bound_labelled
from theory.function_space import cross_entropy
from theory.heads import head_split
from theory.linearization_error import loss_interval
from theory.master import sharpest_side, task_stability
from theory.operators.masks import mask_sensitivity_formula
from theory.quadratic import QuadraticTask, expert_moments, merge_moments, with_true_constants
from theory.recipe import Expert, Schedule
from theory.stability import epsilon_recursion_from_losses
from theory.symbolic import evaluate
from theory.training import descent_training_risk, distance_training_risk


def _pair(exact: Any, upper: Any) -> tuple[float, float]:
    return float(np.asarray(exact)), float(np.asarray(upper))


def _line(**run: Any) -> tuple[QuadraticTask, Expert]:
    task = QuadraticTask(np.eye(1), np.array([2.0]), np.eye(1))
    recipe: dict[str, Any] = {"n": 6, "batch_size": 2, "learning_rate": 1.7, "steps": 5, "sampling": "with_replacement"}
    recipe |= {"curvature": "strongly_convex", "mu": 1.0, "L": 1.0}
    return task, with_true_constants(task, [0.0], Expert("a", **(recipe | run)))


def distance() -> tuple[float, float]:
    """One curvature, a step between 1/L and 2/L: every inequality of the proof is an equality."""
    task, expert = _line()
    return _pair(expert_moments(task, [0.0], expert).training_risk, distance_training_risk(expert))


def descent() -> tuple[float, float]:
    """One curvature and a step of 2/L, a reflection: the gradient term vanishes and the noise adds up."""
    task, expert = _line(learning_rate=2.0)
    return _pair(expert_moments(task, [0.0], expert).training_risk, descent_training_risk(expert))


def shared_samples() -> tuple[float, float]:
    """Four experts of one task on the same single sample: they move together."""
    task, expert = _line(n=1, batch_size=1, learning_rate=1.0, steps=1, sampling="without_replacement")
    experts = [replace(expert, name=f"e{i}") for i in range(4)]
    alpha = np.full(4, 0.25)
    exact = merge_moments([task] * 4, [0.0], experts, alpha, alpha, shared_samples=True)
    epsilon = expert_moments(task, [0.0], expert).epsilon * np.ones(4)
    return _pair(exact.stability, np.asarray(task_stability(alpha, epsilon, shared_samples=True)).max())


def heads() -> tuple[float, float]:
    """Linear losses whose slopes are corners of a simplex of 1e9 corners (pairwise distance one), one step."""
    run = Expert("a", 1, 1, 0.1, 1, curvature="convex", L=0.0, head="trained", D_inf_shared=1.0, D_inf_private=0.0)
    return _pair(0.1 * sqrt(1 - 1e-9), head_split(run)[0])


def output() -> tuple[float, float]:
    """Rise of the root of the loss for a small range, at the loss where ``(1-e^-l)/sqrt(l)`` is largest."""
    loss, rho = 1.2564312086261697, 1e-5
    moved = log1p(expm1(loss) * exp(rho))
    change = np.array([[0.0, rho]])
    return _pair((moved - loss) / (sqrt(moved) + sqrt(loss)), sqrt(float(output_bound(loss, change))) - sqrt(loss))


def output_sharp() -> tuple[float, float]:
    """The range on all wrong classes."""
    logits, y = np.array([[0.3, -0.2, 0.1]]), np.array([0])
    change = np.array([[0.0, 1.5, 1.5]])
    return _pair(cross_entropy(logits + change, y)[0], np.ravel(loss_interval(cross_entropy(logits, y), 1.5)[1])[0])


def output_labelled() -> tuple[float, float]:
    """Two classes of equal logits: the variance of the change is a quarter of its squared range."""
    logits, y, change = np.zeros((1, 2)), np.array([0]), np.array([[0.0, 1e-2]])
    return _pair(cross_entropy(logits + change, y)[0], output_bound_labelled(logits, y, change))


def loss_log() -> tuple[float, float]:
    """One sample, one step: two centred samples are sqrt(2) and not 2 standard deviations apart."""
    task = QuadraticTask(np.eye(1), np.zeros(1), np.eye(1))
    run = Expert("a", 1, 1, 0.5, 1, curvature="convex", L=1.0, batch_losses=Schedule(np.array([0.5])))
    return _pair(expert_moments(task, [0.0], run).epsilon, epsilon_recursion_from_losses(run))


def held_out_log() -> tuple[float, float]:
    """One centred sample, fitted at once: its loss is then 0 and that of a fresh one 1, and sqrt(2) is remembered."""
    task = QuadraticTask(np.eye(1), np.zeros(1), np.eye(1))
    run = Expert("a", 1, 1, 1.0, 2, curvature="strongly_convex", L=1.0, mu=1.0)
    run = replace(run, batch_losses=Schedule(np.array([0.5, 0.0])), held_out_losses=Schedule(np.array([0.5, 1.0])))
    return _pair(expert_moments(task, [0.0], run).epsilon, epsilon_recursion_from_losses(run))


def aggregation() -> tuple[float, float]:
    """Two tasks, each with its own curvature, moved straight away from its minimiser, the second from the base."""
    root = np.array([sqrt(0.5) * 3.0, sqrt(0.5 * 4.0) * 5.0])  # sqrt risks of the merge: L = 1 at 3, L = 4 at 5
    bound, _, _ = sharpest_side([0.5, 9e9], [0.5, 0.5], [1.0, 4.0], [4.0, 9.0], [9e9, 0.5 * 4.0 * 9.0], 4.0)
    return _pair(np.sqrt(0.5 * (root**2).sum()), bound)


def dare() -> tuple[float, float]:
    """Every pair of experts: the mean square over masks."""
    alpha, drop = 0.7, 0.4
    kept = alpha / (1 - drop)
    return _pair(sqrt((1 - drop) * kept**2), evaluate(mask_sensitivity_formula, alpha, drop))
