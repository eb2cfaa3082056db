"""
What averaging does to instability
==================================

Twins: two training runs that see the same batches, but one sample differs. How far apart do they end, and how
much of that is left after merging? For averaging N experts, exactly one N-th; measured here on ridge-free
least squares by SGD, and compared with the exact stability of the quadratic family.
"""

import matplotlib.pyplot as plt
import numpy as np

from theory import Expert, QuadraticTask, expert_moments

steps, n, b, rate, repeats = 40, 30, 5, 0.1, 4_000
task = QuadraticTask(np.array([[1.0]]), np.array([1.0]), np.array([[0.5]]))
run = Expert("a", n=n, batch_size=b, learning_rate=rate, steps=steps, sampling="without_replacement")
exact = expert_moments(task, np.zeros(1), run)

# %%
# The same by simulation: samples z, twins that exchange sample 0 for a fresh one, identical batches.

rng = np.random.default_rng(0)
z = 1.0 + np.sqrt(0.5) * rng.normal(size=(repeats, n))
twin = z.copy()
twin[:, 0] = 1.0 + np.sqrt(0.5) * rng.normal(size=repeats)
x, y = np.zeros(repeats), np.zeros(repeats)
apart = []
for _ in range(steps):
    batch = np.argsort(rng.random((repeats, n)), axis=1)[:, :b]  # b distinct samples
    x += rate * (np.take_along_axis(z, batch, 1).mean(1) - x)
    y += rate * (np.take_along_axis(twin, batch, 1).mean(1) - y)
    apart.append(np.sqrt(np.mean((x - y) ** 2)))

measured = apart[-1]
spread = np.std((x - y) ** 2) / np.sqrt(repeats) / (2 * measured)

# %%
# Merged with N - 1 other experts that do not change, the twins are 1/N as far apart.

others = rng.normal(size=(7, repeats))
numbers = (1, 2, 4, 8)
merged = [np.sqrt(np.mean(((x + others[: N - 1].sum(0)) / N - (y + others[: N - 1].sum(0)) / N) ** 2)) for N in numbers]

# %%
# The claims of this page.

epsilon = float(exact.epsilon)
assert abs(measured - epsilon) < 4 * spread, (measured, epsilon, spread)
assert np.allclose(merged, measured / np.array(numbers))
assert apart[0] < apart[-1]

# %%
# The figure.

figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.6), layout="constrained")
left.plot(range(1, steps + 1), apart, color="#0072B2", label="twins, simulated")
left.axhline(epsilon, color="#222222", ls="--", lw=1, label="exact, at the end")
left.set_xlabel("step")
left.set_ylabel("stability of one expert, param")
left.legend()
right.loglog(numbers, merged, "o-", color="#D55E00", label="after averaging")
right.loglog(numbers, epsilon / np.array(numbers), ls="--", color="#222222", lw=1, label="exact / N")
right.set_xticks(numbers, [str(N) for N in numbers])
right.minorticks_off()
right.set_xlabel("number of experts")
right.legend()
plt.show()
