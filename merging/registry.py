"""Methods by name.

A method of one's own needs no registration: pass the :class:`~merging.method.Method` itself wherever a name is taken.
For the command line, name it as ``package.module:ATTRIBUTE`` (or ``path/to/file.py:ATTRIBUTE``), or let a distribution
announce it under the entry-point group ``mergebound.methods``, which makes it known by its name.
"""

from __future__ import annotations

import importlib
import importlib.util
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from merging.errors import MethodError
from merging.method import Method
from merging.methods import (
    adamerging,
    adamerging_pp,
    average,
    breadcrumbs,
    consensus_ta,
    consensus_ties,
    curvature_optimal,
    dare,
    dare_ties,
    della,
    emr,
    fisher,
    greedy_soup,
    iso_c,
    iso_cts,
    karcher,
    knots,
    lines,
    magmax,
    model_stock,
    multi_slerp,
    pcb,
    regmean,
    risk_optimal,
    sce,
    slerp,
    task_arithmetic,
    ties,
    tsv_m,
    uniform_soup,
    weighted,
    wise_ft,
    wudi,
)

ENTRY_POINTS = "mergebound.methods"


def builtin_methods() -> dict[str, Method]:
    """Every method of the package, by name."""
    modules: tuple[ModuleType, ...] = (
        average,
        weighted,
        task_arithmetic,
        ties,
        dare,
        dare_ties,
        della,
        breadcrumbs,
        sce,
        consensus_ta,
        consensus_ties,
        magmax,
        emr,
        pcb,
        risk_optimal,
        curvature_optimal,
        adamerging,
        adamerging_pp,
        fisher,
        regmean,
        uniform_soup,
        greedy_soup,
        wise_ft,
        lines,
        model_stock,
        slerp,
        multi_slerp,
        karcher,
        tsv_m,
        iso_c,
        iso_cts,
        knots,
        wudi,
    )
    return {module.METHOD.name: module.METHOD for module in modules}


def methods() -> dict[str, Method]:
    """Every method of the package and of installed distributions, by name; the package's own come first and win."""
    return {**_announced(), **builtin_methods()} if _announced() else builtin_methods()


def get(name: str) -> Method:
    """The method of that name, or at ``module:ATTRIBUTE`` or ``file.py:ATTRIBUTE``.

    Raises:
        MethodError: there is none; the message lists close matches.
    """
    known = builtin_methods()
    if name in known:
        return known[name]
    if ":" in name:
        return _located(name)
    known = methods()
    if name in known:
        return known[name]
    if name.endswith(".py"):
        raise MethodError(f"'{name}' is a file: name the Method in it too, as {name}:METHOD")
    close = get_close_matches(name.lower().replace("-", "_"), known, n=3, cutoff=0.56)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose among {', '.join(known)}"
    raise MethodError(f"unknown merging method '{name}': {hint}")


@cache
def _announced() -> dict[str, Method]:
    return {point.name: _load(point) for point in entry_points(group=ENTRY_POINTS)}


def _load(point: EntryPoint) -> Method:
    try:
        return _method(point.load(), point.value)
    except (ImportError, AttributeError) as error:
        raise MethodError(f"the installed method '{point.name}' ({point.value}) cannot be loaded: {error}") from error


def _located(name: str) -> Method:
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            path = Path(place)
            if not path.is_file():
                raise MethodError(f"'{name}': there is no file {place}: check the path")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            if spec is None or spec.loader is None:
                raise MethodError(f"'{name}': {place} is not a Python file that can be read: check it")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except ImportError as error:
        raise MethodError(f"'{name}': the module cannot be imported ({error}): check name and search path") from error
    if not hasattr(module, attribute):
        raise MethodError(f"'{name}': the module has no '{attribute}': name the Method object in it")
    return _method(getattr(module, attribute), name)


def _method(found: object, name: str) -> Method:
    if not isinstance(found, Method):
        raise MethodError(f"'{name}' is a {type(found).__name__}, not a merging.method.Method: name the Method object")
    return found
