"""Which runs ``when``, ``overrides`` and ``exclude`` are for where values are given by expressions."""

from __future__ import annotations

import hashlib
import itertools

import pytest

from experiments.grid.errors import GridError
from experiments.grid.expand import count, expand, expansion
from experiments.grid.spec import GridSpec
from experiments.grid.yaml_source import parse_grid

PLAIN = {
    "name": "g",
    "tasks": ["digits8:flip"],
    "base": {"kind": "random", "architecture": "mlp_4", "classes": 10},
    "learning_rate": [0.1, "0.8 / batch_size"],
    "steps": 10,
    "batch_size": [8, 16],
}


def _found(**changes: object) -> set[tuple[float, int, float, float]]:
    runs = expand(GridSpec.model_validate({**PLAIN, **changes}))
    return {(run.learning_rate, run.batch_size, run.weight_decay, run.momentum) for run in runs}


def test_overrides_are_for_numbers_wherever_they_come_from() -> None:
    """Against the literal rule: numbers first, then overrides, then the numbers that change with them."""
    found = _found(
        overrides=[
            {"match": {"learning_rate": 0.1}, "set": {"weight_decay": 0.5}},
            {"match": {"learning_rate": 0.05}, "set": {"batch_size": 32}},  # its expression gives 0.8 / 32 then
        ]
    )
    wanted = set()
    for rate, batch in itertools.product((lambda b: 0.1, lambda b: 0.8 / b), (8, 16)):
        changed = 32 if rate(batch) == 0.05 else batch
        wanted.add((rate(changed), changed, 0.5 if rate(batch) == 0.1 else 0.0, 0.0))
    assert found == wanted == {(0.1, 8, 0.5, 0.0), (0.1, 16, 0.5, 0.0), (0.025, 32, 0.0, 0.0)}
    with pytest.raises(GridError, match="no run of the grid is matched"):
        _found(  # no run has 32 before the overrides
            overrides=[
                {"match": {"batch_size": 16}, "set": {"batch_size": 32}},
                {"match": {"batch_size": 32}, "set": {"momentum": 0.9}},
            ]
        )


def test_conditions_are_for_numbers_too() -> None:
    spec = GridSpec.model_validate(
        {**PLAIN, "when": [{"match": {"learning_rate": 0.05}, "set": {"momentum": [0.5, 0.9]}}]}
    )
    found = expansion(spec)
    assert count(spec) == 5
    assert {(r.learning_rate, r.batch_size, r.momentum) for r in found.runs} == {
        *((0.1, 8, 0.0), (0.1, 16, 0.0), (0.05, 16, 0.5), (0.05, 16, 0.9))  # 0.1 with batches of 8 comes twice
    }
    content = {**PLAIN, "random": [{"count": 4, "axes": {"learning_rate": ["0.8 / batch_size", 0.3]}}]}
    content |= {"when": [{"match": {"learning_rate": 0.1}, "set": {"momentum": 0.7}}]}
    content.pop("learning_rate")
    runs = expand(GridSpec.model_validate(content))
    assert {(run.learning_rate == 0.1, run.momentum) for run in runs} == {(True, 0.7), (False, 0.0)}


def test_numbers_that_rounding_sets_apart_are_the_same() -> None:
    assert 0.1 * 3 != 0.3
    found = _found(learning_rate=["0.1 * data_share * 3", 0.5], exclude=[{"learning_rate": 0.3}])
    assert {rate for rate, *_ in found} == {0.5}


def test_an_expression_without_a_value_matches_nothing_and_may_be_replaced() -> None:
    found = _found(
        learning_rate=["0.8 / momentum", 0.1],
        overrides=[
            {"match": {"momentum": 0.0}, "set": {"learning_rate": 0.2}},
            {"match": {"learning_rate": 0.1}, "set": {"weight_decay": 0.5}},
        ],
    )
    assert found == {(0.2, batch, decay, 0.0) for batch in (8, 16) for decay in (0.0, 0.5)}


@pytest.mark.parametrize(
    ("entry", "line", "said"),
    [
        ('overrides:\n- match: {learning_rate: "0.8 / batch_size"}\n  set: {seed: 1}', 8, "matches compare numbers"),
        ("when:\n- match: {learning_rate: 0.1}\n  set: {batch_size: 4}", 9, "is read by an expression whose number"),
    ],
)
def test_what_has_no_meaning_is_refused_with_its_line(entry: str, line: int, said: str) -> None:
    page = (
        "name: g\ntasks: [digits8:flip]\nbase: {kind: random, architecture: mlp_4, classes: 10}\n"
        f'learning_rate: [0.1, "0.8 / batch_size"]\nbatch_size: [8, 16]\nsteps: 10\n{entry}\n'
    )
    with pytest.raises(GridError, match=said) as error:
        parse_grid(page, "g.yaml")
    assert error.value.line == line


def test_pages_without_expressions_in_matches_keep_their_runs() -> None:
    """Hashed by the version before numbers were compared."""
    content = {
        **PLAIN,
        "learning_rate": {"log_uniform": {"low": 0.001, "high": 0.1, "samples": 2}},
        "warm_up": ["steps // 5", 0],
        "seeds": 2,
        "when": [{"match": {"batch_size": 16}, "set": {"momentum": [0.5, 0.9]}}],
        "overrides": [{"match": {"seed": 1, "momentum": [0.0, 0.9]}, "set": {"weight_decay": 0.1, "steps": 20}}],
        "exclude": [{"momentum": 0.9, "seed": 0}],
    }
    lines = "\n".join(run.model_dump_json() for run in expand(GridSpec.model_validate(content)))
    assert lines.count("\n") == 19
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "22716a4030e8b4da"
