"""Every random draw comes from a named seed: hypothesis derives its examples from the name of each test.

Files that take long come first, so that workers end together (`pytest -n 2 --dist loadfile --no-loadscope-reorder`).
"""

import signal

import pytest
from hypothesis import settings

settings.register_profile("named_seeds", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("named_seeds")

LONG = (
    "test_engines_local.py",
    "test_combine_store.py",
    "test_finetune_tasks.py",
    "test_bases_pretraining.py",
    "test_engines.py",
    "test_store_faults.py",
    "test_store_tallies.py",
    "test_unpack.py",
    "test_engines_ray.py",
    "test_pipeline.py",
    "test_predict.py",
    "test_report.py",
    "test_cohort_agreement.py",
    "test_design.py",
    "test_operators_shipped.py",
    "test_merge_command_streaming.py",
)
"""Those before the one of Ray fork this process, and do so before it has threads that hold locks."""


def pytest_configure() -> None:
    """Jobs in the background ignore Ctrl-C; processes that tests interrupt would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
