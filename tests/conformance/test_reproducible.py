"""Across processes, hash seeds, thread counts and orders: bit for bit, except for decompositions of matrices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merging.registry import builtin_methods
from tests.conformance.fingerprints import fingerprints

ROOT = Path(__file__).parents[2]


def elsewhere(hash_seed: str, threads: int, experts: int, tensors: int) -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONHASHSEED": hash_seed,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
    }
    command = [sys.executable, "-m", "tests.conformance.fingerprints", str(threads), str(experts), str(tensors)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True)
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    """Everything changes at once: what differs then is sought by changing one thing at a time, by hand."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = dict(json.loads(json.dumps(fingerprints(1, 1))))
    finally:
        torch.set_num_threads(threads)
    other = "123" if os.environ.get("PYTHONHASHSEED") != "123" else "124"
    return [here, elsewhere(other, 2, -1, -1)]


DECOMPOSING = ("tsv_m", "iso_c", "iso_cts", "knots", "wudi", "regmean")
"""Methods whose linear algebra may round differently with another number of threads."""


@pytest.mark.parametrize("name", builtin_methods())
def test_same_bits(runs: list[dict[str, Any]], name: str) -> None:
    """Hash seeds, threads and order of experts; order of tensors (many magnitudes are equal here)."""
    first, *others = (run[name] for run in runs)
    for other in others:
        if name in DECOMPOSING:
            np.testing.assert_allclose(other["sample"], first["sample"], rtol=2e-5, atol=2e-6)
        else:
            assert other["digest"] == first["digest"]
