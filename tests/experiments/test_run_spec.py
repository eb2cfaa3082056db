"""What names a run: everything that changes its bits, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from experiments.grid.run_spec import RunSpec

CONTENT: dict[str, Any] = {
    "task": "digits8:flip",
    "base": {"kind": "random", "architecture": "resnet_gn", "classes": 10},
    "learning_rate": 0.1,
    "steps": 10,
    "batch_size": 4,
}


def digest(**changes: Any) -> str:
    return RunSpec(**{**CONTENT, **changes}).digest(base="b", split="s")


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.2},
        {"steps": 11},
        {"batch_size": 5},
        {"data_share": 0.5},
        {"momentum": 0.5},
        {"weight_decay": 0.1},
        {"optimizer": "adamw"},
        {"optimizer": "sam"},
        {"schedule": "cosine"},
        {"warm_up": 2},
        {"label_smoothing": 0.1},
        {"clip_norm": 1.0},
        {"augment": "light"},
        {"sampling": "with_replacement"},
        {"precision": "bfloat16"},
        {"trained": "backbone"},
        {"checkpoints": (5, 10)},
        {"seed": 1},
        {"split_seed": 1},
    ],
)
def test_what_changes_bits_changes_the_name(change: dict[str, Any]) -> None:
    assert digest(**change) != digest()


@pytest.mark.parametrize("change", [{"beta2": 0.9}, {"epsilon": 1e-4}, {"sam_radius": 0.1}, {"checkpoints": (10,)}])
def test_what_the_optimizer_does_not_read_does_not(change: dict[str, Any]) -> None:
    assert digest(**change) == digest()
    assert RunSpec(**{**CONTENT, **change}) == RunSpec(**CONTENT)


def test_what_the_optimizer_reads_does() -> None:
    assert digest(optimizer="adamw", beta2=0.9) != digest(optimizer="adamw")
    assert digest(optimizer="sam", sam_radius=0.1) != digest(optimizer="sam")


def test_the_base_and_the_split_name_the_run_and_their_paths_do_not() -> None:
    run = RunSpec(**CONTENT)
    assert len({run.digest(base=b, split=s) for b in "ab" for s in "ab"}) == 4
    file = {"kind": "checkpoint", "architecture": "resnet_gn", "classes": 10}
    here, there = ({**CONTENT, "base": {**file, "weights": f"{name}/base.safetensors"}} for name in ("here", "there"))
    assert RunSpec(**here).digest(base="b", split="s") == RunSpec(**there).digest(base="b", split="s")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"checkpoints": (10, 5)}, "must ascend"),
        ({"checkpoints": (5,)}, "end with steps"),
        ({"warm_up": 10}, "none of the 10 steps"),
        ({"nesterov": True}, "momentum above 0"),
        ({"rank": 2}, "low_rank"),
        ({"trained": "low_rank"}, "low_rank"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RunSpec(**{**CONTENT, **change})
