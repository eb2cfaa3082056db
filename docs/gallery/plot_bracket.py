"""
Predicted against measured merges
=================================

Two small perceptrons are fine-tuned on digits under two transformations. Every mixture of the two is
predicted from logits, without forming it, by the secant and by the tangent at the base; then all mixtures
are made and measured on the same images. The secant is exact at both experts and too low between them. The
tangent knows the neighbourhood of the base only: here it is right at the average and far off at the experts.
Which of the two is right is not known beforehand; their distance says how far to trust either.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits

from theory import minimise_risk, predict_risk, secant, tangent

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
digits = load_digits()
upright = torch.tensor(digits.images / 16.0)
labels = torch.tensor(digits.target)
views = (upright, upright.flip(2))  # two tasks: the digits, and the digits mirrored
train, held_out = slice(0, 400), slice(1200, 1600)

# %%
# A base, and two experts of it.


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))


def fit(start: dict, images: torch.Tensor, targets: torch.Tensor, steps: int, rate: float) -> dict:
    """Full-batch gradient descent from ``start``."""
    model = network()
    model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


both = torch.cat([view[train] for view in views])
base = fit(network().state_dict(), both, labels[train].repeat(2), 60, 0.05)
experts = [fit(base, view[train], labels[train], 150, 0.1) for view in views]

# %%
# Logits of base and experts on held-out images, and Jacobian products with both task vectors at the base.


def logits(state: dict, images: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(network(), state, (images,))


deltas = [{name: expert[name] - base[name] for name in base} for expert in experts]
secants, tangents = [], []
for view in views:
    images, targets = view[held_out], labels[held_out].numpy()
    at_base = logits(base, images)
    at_experts = torch.stack([logits(expert, images) for expert in experts])
    pushed = [torch.func.jvp(lambda state, x=images: logits(state, x), (base,), (delta,))[1] for delta in deltas]
    secants.append(secant(at_base.numpy(), at_experts.numpy(), targets))
    tangents.append(tangent(at_base.numpy(), torch.stack(pushed).numpy(), targets))

# %%
# Every mixture, predicted and measured.

mixtures = np.linspace(0.0, 1.0, 21)
low = np.array([predict_risk(secants, [a, 1 - a]).risk for a in mixtures])
high = np.array([predict_risk(tangents, [a, 1 - a]).risk for a in mixtures])


def measured(a: float, b: float) -> float:
    merged = {name: base[name] + a * deltas[0][name] + b * deltas[1][name] for name in base}
    losses = [torch.nn.functional.cross_entropy(logits(merged, view[held_out]), labels[held_out]) for view in views]
    return float(sum(losses) / 2)


truth = np.array([measured(a, 1 - a) for a in mixtures])
best = minimise_risk(secants, bounds=(0.0, 1.0))  # any two coefficients in [0, 1]
at_best = measured(*best.alpha)
print(
    f"average {truth[10]:.3f}, predicted best {best.alpha.round(2)}: predicted {best.risk:.3f}, measured {at_best:.3f}"
)

# %%
# The claims of this page.

assert abs(low[0] - truth[0]) < 1e-9, "a secant is exact where the merge is an expert"
assert abs(low[-1] - truth[-1]) < 1e-9
assert np.all(low <= truth + 1e-9), "and too low between"
assert abs(high[10] - truth[10]) < 0.05, "the tangent is close at the average"
assert high[0] < truth[0] - 0.1, "and far off at an expert"
assert at_best < truth[10], "the coefficients that the prediction chose beat averaging"

# %%
# The figure.

figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
axes.plot(mixtures, truth, color="#222222", marker="o", ms=4, label="measured")
axes.plot(mixtures, low, color="#0072B2", label="secant (predicted)")
axes.plot(mixtures, high, color="#D55E00", ls="--", label="tangent at the base (predicted)")
axes.set_xlabel("coefficient of the first expert (the second has the rest)")
axes.set_ylabel("joint risk, nats")
axes.set_title("Two digit experts, seed 0, 400 held-out images a task")
axes.legend()
plt.show()
