"""Results as one file for other programs."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.store.blobs import disk_error, remove
from experiments.store.errors import StoreError

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet")


def export(frame: pd.DataFrame, path: Path) -> int:
    """Write a table as ``.csv`` or ``.parquet``, whole or not at all; returns the rows.

    In CSV, NaN is written as ``nan`` and what was not measured is empty.

    Raises:
        StoreError: another suffix, pyarrow is missing, or the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise StoreError(
            f"{path}: unknown format {path.suffix!r}; name the file {' or '.join('*' + s for s in SUFFIXES)}"
        )
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise StoreError(
                f"{path}: Parquet needs pyarrow; install it with `pip install 'mergebound[parquet]'`, or write .csv"
            ) from error
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        if path.suffix == ".csv":
            frame.to_csv(temporary, index=False, na_rep="")
        else:
            frame.to_parquet(temporary, index=False, engine="pyarrow")
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        remove(temporary)
    return len(frame)
