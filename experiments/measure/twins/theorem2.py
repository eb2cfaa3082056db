"""Theorem 2 next to measured twins (theory.md section 5), its constants measured where the twins ran.

* *gap*: u_j = |grad f(x; z_j) - grad f(x; z'_j)| of the exchanged pairs at states that the base run visited.  Its rms
  over j is D_2 at that state; the rms of each pair's largest is the envelope, its largest D_inf: lower estimates, since
  few states are looked at.
* *kappa*: how fast a small difference grows under common batches, from twins that are kicked once.
* *clock*: with momentum, ``w_k = w_hat_k exp(kappa sum_{l>k} eta_l/(1 - beta))``, the response to x-independent
  gradients with the measured growth: *estimated* (theory.md section 4, trap).  ``w_hat_k`` is the step that one
  gradient makes in the end (:func:`theory.drift.buffer_weights`): at a constant rate
  ``eta (1 - beta^(K-k))/(1 - beta)`` for heavy ball, ``eta (1 - beta^(K-k+1))/(1 - beta)`` for Nesterov's form.

With kappa = 0 the bound is one of hyperparameters and gap alone, in which a neural network's expansion is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from experiments.finetune.trained import trains
from experiments.grid.run_spec import RunSpec
from experiments.inputs.training_data import TrainingData
from experiments.measure.noise.recipe import learning_rates
from experiments.measure.twins.pairs import Pairs
from experiments.measure.twins.train import TwinRun
from experiments.models.parts import head_tensors
from theory.clocks import write_out
from theory.drift import buffer_weights
from theory.recipe import Expert
from theory.stability import epsilon_cap, epsilon_rms, epsilon_sup, gamma_of_weights


@dataclass(frozen=True)
class Theorem2:
    """Theorem 2 for one run with measured constants; every number is *estimated*.

    Attributes:
        form: ``rms`` (D_2, independent batches only), ``envelope`` or ``sup``.
        value: of the bound on eps_i; NaN where the form does not apply (AdamW, clipping; rms under reshuffling).
        gap: the constant behind it.
        kappa: growth rate that was put in.
        tau, gamma: of the clock.
        tier: always ``estimated``.
    """

    form: str
    value: float
    gap: float
    kappa: float
    tau: float
    gamma: float
    tier: str = "estimated"


def gradient_gaps(
    run: RunSpec,
    network: nn.Module,
    state: Mapping[str, Tensor],
    sample: TrainingData,
    exchanged: TrainingData,
    pairs: Pairs,
) -> np.ndarray:
    """u_j at one state, (T,): norms over the trained parameters, network in evaluation mode.

    Args:
        state: full state dict.
        sample: S; ``exchanged``: the fresh image of each pair (:func:`~.pairs.fresh_rows`).
    """
    head = set(head_tensors(network))
    names = [name for name, _ in network.named_parameters() if trains(run.trained, name in head)]
    device = sample.labels.device
    dtype = torch.float64 if run.precision == "float64" else torch.float32
    placed = {n: t.to(device, dtype) if t.is_floating_point() else t.to(device) for n, t in state.items()}
    was = network.training
    network.eval()

    def gradient(image: Tensor, label: Tensor) -> Tensor:
        leaves = {name: placed[name].detach().requires_grad_() for name in names}
        logits = functional_call(network, {**placed, **leaves}, (image[None].to(dtype),))
        loss = F.cross_entropy(logits, label[None], label_smoothing=run.label_smoothing)
        parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return torch.cat([part.reshape(-1).double() for part in parts if part is not None])

    try:
        images, labels = sample.batch(pairs.samples, 0)
        others, classes = exchanged.batch(np.arange(len(pairs)), 0)
        rows = zip(images, labels, others, classes, strict=True)
        return np.array([float((gradient(a, b) - gradient(c, d)).norm()) for a, b, c, d in rows])
    finally:
        network.train(was)


def growth(kicked: TwinRun, run: RunSpec) -> float:
    """kappa from twins kicked once: mean of log(distance at the end / at an earlier checkpoint) per unit of time.

    Time is the sum of eta_k/(1 - beta) between the two; twins that were kicked after the earlier checkpoint do not
    count, and nothing is divided where the earlier distance is within ten times the rounding.  NaN without any.
    """
    times = np.concatenate([[0.0], np.cumsum(rates(run))])
    floor = 10 * np.nan_to_num(kicked.rounding, nan=0.0)
    found = []
    for k, step in enumerate(kicked.steps[:-1]):
        ready = (kicked.starts >= 0) & (kicked.starts < step)
        early, late = kicked.distances[ready, k, 0], kicked.distances[ready, -1, 0]
        good = (early > max(floor[k], 0.0)) & np.isfinite(late) & (late > 0)
        found += list(np.log(late[good] / early[good]) / (times[kicked.steps[-1]] - times[step]))
    return float(np.mean(found)) if found else float("nan")


def rates(run: RunSpec) -> np.ndarray:
    """(K,) eta_k/(1 - beta), the pace of the run's time."""
    return learning_rates(run) / (1 - run.momentum)


def response(run: RunSpec, kappa: float = 0.0) -> np.ndarray:
    """w_k, (K,): see the module's docstring."""
    pace = rates(run)
    after = pace[::-1].cumsum()[::-1] - pace
    settled = buffer_weights(learning_rates(run), run.momentum, nesterov=run.nesterov)
    with np.errstate(over="ignore"):
        return np.asarray(settled * np.exp(kappa * after))


def as_expert(run: RunSpec, n: int) -> Expert:
    """What was run, for the theory; no constant of the loss."""
    return Expert(
        "expert",
        n=n,
        batch_size=run.batch_size,
        learning_rate=run.learning_rate,
        steps=run.steps,
        momentum=run.momentum,
        weight_decay=run.weight_decay,
        sampling=run.sampling,
        optimizer="sgd" if run.optimizer == "sgd" else run.optimizer,
        nesterov=run.nesterov,
        gradient_clipping=run.clip_norm is not None,
    )


def theorem2(run: RunSpec, n: int, gaps: np.ndarray, kappa: float = 0.0) -> tuple[Theorem2, ...]:
    """The bound's forms from gaps (T, A) of T pairs at A visited states."""
    size = gaps.reshape(len(gaps), -1)
    constants = {
        "rms": float(np.sqrt((size**2).mean(0)).max()),
        "envelope": float(np.sqrt((size.max(1) ** 2).mean())),
        "sup": float(size.max()),
    }
    return with_constants(run, n, constants, kappa)


def with_constants(run: RunSpec, n: int, constants: Mapping[str, float], kappa: float = 0.0) -> tuple[Theorem2, ...]:
    """The bound's forms from known constants: of each form (``rms``: D_2, ``envelope``, ``sup``: D_inf) its gap."""
    if run.optimizer != "sgd" or run.clip_norm is not None or not np.isfinite(kappa):
        nan = float("nan")
        return tuple(Theorem2(form, nan, gap, kappa, nan, nan) for form, gap in constants.items())
    w = response(run, kappa)
    steps = write_out(as_expert(run, n))
    tau = float(w.sum())
    spread = float(gamma_of_weights(w, steps.batch_size, n, run.sampling, steps.position))
    found = []
    for form, gap in constants.items():
        value = epsilon_rms(gap, tau, n, spread) if form == "rms" else epsilon_sup(gap, tau, n, spread)
        if form == "rms" and run.sampling == "reshuffle":
            value = np.asarray(float("nan"))
        found.append(Theorem2(form, float(value), gap, kappa, tau, spread))
    return tuple(found)


def elasticities(run: RunSpec, n: int, kappa: float = 0.0) -> dict[str, float]:
    """Theory's elasticities of the envelope form (gap constant) in eta, K, b and n, by central differences.

    K and b are whole numbers, so the step is a tenth of them, and at least one.
    """
    one = np.ones((1, 1))

    def value(changed: RunSpec, samples: int) -> float:
        return theorem2(changed, samples, one, kappa)[1].value

    def slope(low: tuple[RunSpec, int], high: tuple[RunSpec, int], a: float, b: float) -> float:
        return float(np.log(value(*high) / value(*low)) / np.log(b / a))

    def changed(**fields: object) -> RunSpec:
        return RunSpec(**{**run.model_dump(), **fields, "checkpoints": ()})

    eta, steps, batch = run.learning_rate, run.steps, run.batch_size
    dk, db, dn = max(1, steps // 10), max(1, batch // 10), max(1, n // 10)
    few, small = max(1, steps - dk), max(1, batch - db)
    return {
        "learning_rate": slope(
            (changed(learning_rate=eta * 0.99), n), (changed(learning_rate=eta * 1.01), n), eta * 0.99, eta * 1.01
        ),
        "steps": slope((changed(steps=few, warm_up=0), n), (changed(steps=steps + dk), n), few, steps + dk),
        "batch_size": slope((changed(batch_size=small), n), (changed(batch_size=batch + db), n), small, batch + db),
        "n": slope((run, n - dn), (run, n + dn), n - dn, n + dn),
    }


def cap(twins: Sequence[TwinRun]) -> float:
    """sqrt(2) times the rms drift at the last step: bounds eps_i for any algorithm (theory.md section 5)."""
    drift = np.sqrt(np.mean([each.drift[-1, 0] ** 2 for each in twins]))
    return float(epsilon_cap(drift))
