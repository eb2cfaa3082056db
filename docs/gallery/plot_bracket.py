"""
Predicted against measured merges
=================================

Two small perceptrons are fine-tuned on digits under two transformations. Every mixture of the two is
predicted from logits, without forming it, by the secant and by the tangent; then all mixtures are made and
measured on the same images. The two predictions bracket the truth where merging hurts.
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


def measured(a: float) -> float:
    merged = {name: base[name] + a * deltas[0][name] + (1 - a) * deltas[1][name] for name in base}
    losses = [torch.nn.functional.cross_entropy(logits(merged, view[held_out]), labels[held_out]) for view in views]
    return float(sum(losses) / 2)


truth = np.array([measured(a) for a in mixtures])
best = minimise_risk(secants, bounds=(0.0, 1.0))

# %%
# The claims of this page. A secant is exact where the merge is an expert.

assert abs(low[0] - truth[0]) < 1e-9
assert abs(low[-1] - truth[-1]) < 1e-9
middle = slice(5, 16)
assert np.all(low[middle] <= truth[middle] + 0.02), "the secant is not above the measurement by more than 0.02"
assert measured(float(best.alpha[0])) < max(truth[0], truth[-1]) or best.risk <= low.min() + 1e-6

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
