"""Certificates of the prediction study are chosen and judged on every merge, whatever a certificate leaves out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.prediction.aims import aims_table
from experiments.prediction.judged import with_certificate
from experiments.validation import Settings

VALID = "best certificate valid in 95 %"


def frame() -> pd.DataFrame:
    """Per half 10 merges of losses 1: six pairs and four groups of seven, one of which breaks (loss 100).

    ``sharp`` (1.1) exists for pairs only, ``loose`` (3) and ``far`` (2.5) everywhere; neither holds where the merge
    breaks.
    """
    rows = []
    for half in "AB":
        for k in range(10):
            loss = 100.0 if k == 9 else 1.0
            rows.append(
                {
                    "regime": "mild", "architecture": "net", "half": half, "N": 2 if k < 6 else 7, "state": "collapsed",
                    "measured_loss": loss, "measured_loss_calibration": loss, "merging_cost": 0.0,
                    "expert_loss_calibration": 1.0, "cert_sharp": 1.1 if k < 6 else np.nan, "cert_loose": 3.0,
                    "cert_far": 2.5, "pred_best": np.nan, "pred_best_no_merge": np.nan,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def judged(merges: pd.DataFrame, name: str = "best") -> dict[str, pd.Series]:
    table = aims_table(merges, pd.DataFrame(), pd.DataFrame(), Settings(), name)
    return {str(row["aim"]): row for _, row in table.iterrows()}


def test_a_certificate_that_leaves_hard_merges_out_is_judged_on_them() -> None:
    found = with_certificate(frame())
    assert set(found["chosen_cert_best"]) == {"sharp"}  # as valid as the others once completed, and sharper
    assert set(found["chosen_cert_best_else"]) == {"far"}
    assert found["cert_best"].tolist() == [1.1] * 6 + [2.5] * 4 + [1.1] * 6 + [2.5] * 4
    rows = judged(found)
    line = rows[f"{VALID} (20 of 20 merges have one)"]
    assert (line["value"], line["met"], line["merges"]) == (0.9, False, 20)
    assert rows["best certificate: median ratio"]["value"] == 1.1


def test_merges_without_a_certificate_count_as_not_bounded() -> None:
    found = with_certificate(frame().drop(columns=["cert_loose", "cert_far"]))
    assert found["cert_best"].notna().sum() == 12
    rows = judged(found)
    line = rows[f"{VALID} (12 of 20 merges have one)"]
    assert (line["value"], line["met"], line["merges"]) == (pytest.approx(0.6), False, 20)
    few = judged(found.assign(cert_best=found["cert_best"].where(found.index < 3)))
    assert few["best certificate: median ratio"]["value"] == np.inf


def test_certificates_from_averages_of_pairs_are_passes_at_merges() -> None:
    found = with_certificate(frame().assign(cert_output_pairs=1.05, cert_remainder_x=1.01))
    assert set(found["chosen_cert_best"]) == {"remainder_x"}
    assert set(found["chosen_cert_best_no_merge"]) == {"sharp"}
    assert judged(found, "best_no_merge")["best certificate: median ratio"]["value"] == 1.1
    assert judged(found)["best certificate: median ratio"]["value"] == 1.01
