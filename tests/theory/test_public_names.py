"""Public names: no function hides a module, everything exported exists, and exports are sorted without repetition."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

import theory

PACKAGES = ["theory", *(found.name for found in pkgutil.walk_packages(theory.__path__, "theory.") if found.ispkg)]


def test_no_function_hides_a_module() -> None:
    """``import theory.design`` gave a function or a module, depending on what was imported first."""
    hidden = []
    for name in PACKAGES:
        package = import_module(name)
        for module in pkgutil.iter_modules(package.__path__):
            import_module(f"{name}.{module.name}")
            if not isinstance(getattr(package, module.name), ModuleType):
                hidden.append(f"{name}.{module.name}")
    assert hidden == []


def test_exports_exist_once_and_in_order() -> None:
    names = list(theory.__all__)
    assert len(names) == len(set(names))
    assert names == sorted(names, key=lambda name: (not name[0].isupper(), name))
    assert [name for name in names if not hasattr(theory, name)] == []
