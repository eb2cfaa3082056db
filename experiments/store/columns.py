"""From a run's specification to the columns of the table ``runs``, and back."""

from __future__ import annotations

import json
from typing import Any

from experiments.grid.run_spec import RunSpec

SPEC_COLUMNS = tuple(RunSpec.model_fields)
"""Every field of a specification is a column of its own; ``base`` and ``checkpoints`` as JSON."""
RUN_COLUMNS = ("digest", "architecture", "base_kind", "base_digest", "split_digest", *SPEC_COLUMNS)
_JSON = ("base", "checkpoints")
BOOLEANS = ("nesterov",)
OTHER = "-"
"""Between the digest of a base's tensors and what tells apart networks with the same tensors."""


def run_row(digest: str, run: RunSpec, base: str, split: str) -> tuple[Any, ...]:
    """Values of :data:`RUN_COLUMNS`.

    Args:
        digest: names the run.
        run: its specification.
        base: digest of the base's tensors.
        split: digest of the split.
    """
    content = run.model_dump(mode="json")
    values = {name: json.dumps(content[name], sort_keys=True) if name in _JSON else content[name] for name in content}
    known = {"digest": digest, "architecture": run.architecture, "base_kind": run.base.kind}
    values |= known | {"base_digest": base, "split_digest": split}
    return tuple(values[name] for name in RUN_COLUMNS)


def base_text(run: RunSpec) -> str:
    """The column ``base`` of a run."""
    return json.dumps(run.base.model_dump(mode="json"), sort_keys=True)


def spec_of(row: dict[str, Any]) -> RunSpec:
    """The specification that a row of ``runs`` was made of."""
    values = {name: json.loads(row[name]) if name in _JSON else row[name] for name in SPEC_COLUMNS}
    return RunSpec.model_validate(values)
