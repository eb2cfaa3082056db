"""Recipes that the rest of a budget affords, by the response of a pilot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.advise.pilot import Pilot
from experiments.advise.response import Response, features

CHEAPEST = 0.01
"""Of recipes within this relative distance of the smallest cautious prediction, the cheapest is recommended."""
LENGTHS = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""Shares of the affordable steps that are considered."""
RATES = 33
FINE_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


def considered(pilot: Pilot, risk: Response, samples: float, caution: float) -> pd.DataFrame:
    """Recipes that the rest of the budget affords, by cautious prediction, the cheapest of the best first.

    Training time is kept within what the pilot saw, and the effective learning rate at most at the largest that stayed
    finite in the pilot with any of its tasks.
    """
    usable = pilot.rows[pilot.rows["finite"]]
    effective = usable["learning_rate"] / (1.0 - usable["momentum"])
    rates = np.geomspace(pilot.spec.rates[0], float(effective.max()), RATES)
    least = min(pilot.images)
    scales = [s for s in FINE_SCALES if s <= max(pilot.spec.scales) and not (pilot.hull and s > 1.0)]
    rows = []
    for batch in sorted({min(b, least) for b in pilot.spec.batch_sizes}):
        for share in LENGTHS:
            steps = int(share * samples / batch)
            if steps < 1:
                continue
            for rate in rates:
                for decay in pilot.spec.decays:
                    for scale in scales:
                        rows.append((batch, steps, rate, decay, scale))
    table = pd.DataFrame(rows, columns=["batch_size", "steps", "effective", "weight_decay", "scale"])
    table["time"] = table["effective"] * table["steps"]
    table["noise"] = table["effective"] / table["batch_size"]
    table["shrink"] = table["weight_decay"] * table["time"]
    table["experts"] = len(pilot.tasks)
    log_time = np.log(table["time"].to_numpy(dtype=float))
    table = table.loc[(log_time >= risk.low[0] - 1e-9) & (log_time <= risk.high[0] + 1e-9)]
    if table.empty:
        return pd.DataFrame(table)
    points = features(table)
    mean, deviation = risk.mean_and_deviation(points)
    value, low, high = risk.predict(points)
    table = table.assign(
        predicted=value, low=low, high=high, cautious=np.exp(mean + caution * deviation),
        samples=table["steps"] * table["batch_size"], tier="calibrated", seed=pilot.spec.seed,
    )  # fmt: skip
    best = float(table["cautious"].min())
    close = (table["cautious"] <= best * (1.0 + CHEAPEST)).to_numpy()
    near = table.loc[close].sort_values(["samples", "cautious"])
    rest = table.loc[~close].sort_values("cautious")
    ordered: pd.DataFrame = pd.concat([near, rest], ignore_index=True).head(200)
    momenta = [_momentum(pilot, row) for row in ordered.to_dict("records")]
    ordered["momentum"] = momenta
    ordered["learning_rate"] = [float(f"{e * (1 - m):.4g}") for e, m in zip(ordered["effective"], momenta, strict=True)]
    return ordered


def _momentum(pilot: Pilot, row: Mapping[Any, Any]) -> float:
    """The momentum of the pilot's finite recipe that is nearest in training time and noise."""
    return float(nearest(pilot.rows, row)["momentum"])


def nearest(rows: pd.DataFrame, row: Mapping[Any, Any] | pd.Series) -> pd.Series:
    """Of a pilot's finite rows the one that is nearest in training time and noise."""
    usable = rows[rows["finite"]]
    distance = (np.log(usable["time"] / row["time"])) ** 2 + (np.log(usable["noise"] / row["noise"])) ** 2
    found: pd.Series = usable.loc[distance.idxmin()]
    return found
