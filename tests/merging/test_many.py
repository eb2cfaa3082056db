"""Many merges at once have the bits of one merge at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merging.errors import CheckpointError, MethodError
from merging.flat import FlatSpace
from merging.many import merge_many
from merging.many_run import ranks_of
from merging.merge import merge_flat
from merging.method import Method, Parameter
from merging.methods.ties import trim
from merging.partition import Partition
from merging.settings import Gradient

NAMES = ("e3", "e1", "e10", "b", "c")  # not in the order of their names
COUNT = 12
SHAPES = {"layers.0.w": (40, 33), "layers.1.b": (1100,), "empty": (0,), "scalar": (), "layers.2.k": (7,)}
BUFFERS = {"n.running_mean": (7,), "n.running_var": (9,)}
Family = tuple[Tensor, Tensor, FlatSpace, Partition]


def family(dtype: torch.dtype = torch.float32, seed: int = 0) -> Family:
    """A base and five task vectors with many equal magnitudes, whose merged variances can become negative."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {**SHAPES, **BUFFERS}
    base = {name: torch.randn(shape, generator=draw, dtype=dtype) for name, shape in shapes.items()}
    space = FlatSpace.of(base)
    deltas = torch.round(8.0 * torch.randn(len(NAMES), space.size, generator=draw, dtype=dtype)) / 80.0
    return space.flatten(base), deltas, space, Partition(tuple(SHAPES), (), tuple(BUFFERS))


def subsets(least: int = 1, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(least, len(NAMES) + 1, COUNT)
    return [rng.permutation(len(NAMES))[:size].tolist() for size in sizes]


def one_by_one(
    method: Any,
    group: Family,
    members: Sequence[Sequence[int]],
    coefficients: np.ndarray | None = None,
    each: dict[str, Any] | None = None,
    seed: Any = 0,
    **given: Any,
) -> Tensor:
    """The same merges by a loop over the definition."""
    base, deltas, space, parts = group
    merged = []
    for index, who in enumerate(members):
        weights = None if coefficients is None else [float(coefficients[index, i]) for i in who]
        local = {name: values[index] for name, values in (each or {}).items()}
        merged.append(
            merge_flat(
                method,
                base,
                [deltas[i] for i in who],
                space,
                parts,
                names=[NAMES[i] for i in who],
                coefficients=weights,
                seed=seed if isinstance(seed, int) else seed[index],
                **local,
                **given,
            )
        )
    return torch.stack(merged)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


DENSITIES = {"density": [0.1, 0.2, 1.0, 0.37] * 3}
SEEDS = [1, 1, 2] * 4
CASES: list[tuple[str, dict[str, Any]]] = [
    ("average", {}),
    ("uniform_soup", {}),
    ("wise_ft", {"each": {"alpha": np.linspace(0.0, 1.0, COUNT).tolist()}}),
    ("task_arithmetic", {"each": {"coefficient": np.linspace(-1.0, 2.0, COUNT).tolist()}}),
    ("task_arithmetic", {"weights": "any"}),
    ("weighted", {"weights": "positive"}),
    ("weighted", {"weights": "any", "normalize": False}),
    ("risk_optimal", {"weights": "any"}),
    ("curvature_optimal", {"weights": "any"}),
    ("adamerging", {"weights": "any"}),
    ("magmax", {}),
    ("emr", {}),
    ("consensus_ta", {"least": 2, "each": {"mask_lambda": [0.2, 0.4, 0.6] * 4}}),
    ("consensus_ta", {"least": 3, "threshold": 3.0, "weights": "any"}),
    ("consensus_ties", {"least": 2, "each": DENSITIES}),
    ("consensus_ties", {"least": 2, "weights": "positive", "aggregation": "mean", "scope": "tensor", "density": 0.3}),
    *(
        ("dare", {"seed": SEEDS, "drop": 0.3, "rescaling": rescaling, "weights": weights})
        for rescaling, weights in itertools.product(("probability", "l1"), (None, "any"))
    ),
    ("dare", {"seed": SEEDS, "each": {"drop": [0.0, 0.5, 0.9] * 4}, "rescale": False}),
    ("dare_ties", {"seed": SEEDS, "each": {"drop": [0.0, 0.3] * 6, "density": [1.0, 0.5, 0.2] * 4}}),
    ("dare_ties", {"seed": 3, "rescaling": "l1", "weights": "positive", "density": 0.5, "scope": "global"}),
    *(
        (
            "ties",
            {
                "scope": scope,
                "aggregation": aggregation,
                "election": election,
                "rounding": rounding,
                "weights": weights,
                "each": DENSITIES,
                "coefficient": 0.7,
            },
        )
        for scope, aggregation, election, rounding, weights in [
            ("global", "mean", "plain", "up", None),
            ("tensor", "mean", "plain", "down", None),
            ("global", "sum", "plain", "down", None),
            ("tensor", "mean", "plain", "up", "positive"),
            ("global", "mean", "weighted", "up", "positive"),
            ("global", "sum", "plain", "up", "any"),
            ("tensor", "sum", "weighted", "up", "any"),
        ]
    ),
]


@pytest.mark.parametrize(("method", "given_case"), CASES)
def test_every_fast_path_has_the_bits_of_the_definition(method: str, given_case: dict[str, Any]) -> None:
    case = dict(given_case)
    members, weights = subsets(case.pop("least", 1)), case.pop("weights", None)
    rng = np.random.default_rng(5)
    shape = (COUNT, len(NAMES))
    coefficients = None if weights is None else rng.normal(size=shape) if weights == "any" else 0.1 + rng.random(shape)
    base, deltas, space, parts = group = family()
    merges = merge_many(
        method, base, deltas, space, parts, names=NAMES, subsets=members, coefficients=coefficients, **case
    )
    assert merges.plan is not None
    assert same_bits(merges.stack(), one_by_one(method, group, members, coefficients, **case))


@pytest.mark.parametrize(("method", "given_case"), [("task_arithmetic", {}), ("ties", {}), ("dare", {"drop": 0.4})])
def test_float64(method: str, given_case: dict[str, Any]) -> None:
    base, deltas, space, parts = group = family(torch.float64)
    coefficients = 0.1 + np.random.default_rng(5).random((COUNT, len(NAMES)))
    merges = merge_many(method, base, deltas, space, parts, names=NAMES, coefficients=coefficients, **given_case)
    assert merges.plan is not None
    everybody = [list(range(len(NAMES)))] * COUNT
    assert same_bits(merges.stack(), one_by_one(method, group, everybody, coefficients, **given_case))


ENTRIES = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-40, -1e-40, 3e38, 0.1, -0.3)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(sum),
    count=st.integers(2, 5),
    method=st.sampled_from(("average", "task_arithmetic", "weighted", "ties", "dare_ties", "consensus_ties")),
    densities=st.lists(st.sampled_from([0.01, 0.3, 0.5, 1.0]), min_size=3, max_size=3),
    scope=st.sampled_from(["global", "tensor"]),
    aggregation=st.sampled_from(["mean", "sum"]),
)
def test_ties_zeros_and_denormals(
    seed: int, lengths: list[int], count: int, method: str, densities: list[float], scope: str, aggregation: str
) -> None:
    shapes = {f"t{i}": (length,) for i, length in enumerate(lengths)}
    space, parts = FlatSpace.of({name: torch.empty(shape) for name, shape in shapes.items()}), Partition(tuple(shapes))
    rng = np.random.default_rng(seed)
    drawn = rng.choice(ENTRIES, (count + 1, space.size)) / (4.0 * count)  # sums stay finite
    base, *deltas = torch.from_numpy(drawn.astype(np.float32)).unbind(0)
    coefficients = 0.5 + rng.random((3, count)) if method == "weighted" else None
    trims = "ties" in method
    case: dict[str, Any] = {"scope": scope, "aggregation": aggregation} if trims else {}
    varying = [{"density": density} if trims else {} for density in densities]
    merges = merge_many(
        method,
        base,
        deltas,
        space,
        parts,
        subsets=[range(count)] * 3,
        coefficients=coefficients,
        each={"density": densities} if trims else None,
        **case,
    )
    assert merges.plan is not None
    for index, merged in enumerate(merges.stack()):
        weights = None if coefficients is None else coefficients[index].tolist()
        expected = merge_flat(method, base, deltas, space, parts, coefficients=weights, **case, **varying[index])
        assert same_bits(merged, expected)


def test_threads_and_blocks_change_no_bit() -> None:
    base, deltas, space, parts = family()
    chosen = subsets()
    everything = []
    for threads, size in ((1, None), (2, 5), (3, 1), (2, COUNT)):
        merges = merge_many("ties", base, deltas, space, parts, subsets=chosen, each=DENSITIES, threads=threads)
        blocks = list(merges.blocks(size))
        assert [start for start, _ in blocks] == list(range(0, COUNT, size or COUNT))
        everything.append(torch.cat([block for _, block in blocks]))
    assert all(same_bits(everything[0], other) for other in everything[1:])


def test_subsets_as_flags_and_coefficients_for_all() -> None:
    base, deltas, space, parts = group = family()
    flags = np.zeros((COUNT, len(NAMES)), dtype=bool)
    for row, who in zip(flags, subsets(), strict=True):
        row[who] = True
    weights = dict(zip(NAMES, (0.1, -0.2, 0.3, 0.4, 0.5), strict=True))
    for given_flags in (flags, torch.from_numpy(flags)):
        merges = merge_many(
            "risk_optimal", base, deltas, space, parts, names=NAMES, subsets=given_flags, coefficients=weights
        )
        table = np.tile(list(weights.values()), (COUNT, 1))
        assert same_bits(merges.stack(), one_by_one("risk_optimal", group, subsets(), table))


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_ranks_choose_what_trimming_keeps(scope: str) -> None:
    _, deltas, space, _ = family(seed=3)
    pieces = [slice(0, space.size)] if scope == "global" else [piece for _, piece in space.segments()]
    for rows in (deltas, deltas.double()):
        ranks = ranks_of(rows.numpy(), pieces)
        for density in (0.001, 0.2, 0.6, 1.0):
            kept = trim(rows, pieces, density) != 0.0
            for piece in pieces:
                place, mask = ranks[:, piece], kept[:, piece].numpy()
                counts = np.ceil(density * (piece.stop - piece.start) - 1e-9)
                assert ((place < counts) & (rows[:, piece].numpy() != 0.0) == mask).all()


def test_results_stream_through_one_buffer() -> None:
    base, deltas, space, parts = family()
    merges = merge_many("average", base, deltas, space, parts, subsets=subsets())
    whole = merges.stack()
    buffer = torch.empty(5, space.size)
    seen = []
    for start, block in merges.blocks(out=buffer):
        assert block.data_ptr() == buffer.data_ptr()
        seen.append(block.clone())
        assert same_bits(block, whole[start : start + len(block)])
    assert len(torch.cat(seen)) == len(merges) == COUNT
    found = merges.evaluate(lambda block: block.square().sum(dim=1), size=5)
    np.testing.assert_allclose(found, whole.square().sum(dim=1).numpy(), rtol=1e-6)
    with pytest.raises(MethodError, match="one entry per merge"):
        merges.evaluate(lambda block: block.sum())
    with pytest.raises(MethodError, match="give contiguous"):
        merges.blocks(out=torch.empty(5, 3))
    with pytest.raises(MethodError, match="at least one"):
        merges.blocks(0)


def test_the_matrix_product_keeps_its_stated_rounding() -> None:
    base, deltas, space, parts = family()
    alphas = np.random.default_rng(0).normal(size=(40, len(NAMES)))
    arguments: dict[str, Any] = {"names": NAMES, "coefficients": alphas, "coefficient": 0.3}
    exact = merge_many("task_arithmetic", base, deltas, space, parts, **arguments).stack()
    product = merge_many("task_arithmetic", base, deltas, space, parts, exact=False, **arguments).stack()
    size = base.double().abs() + 0.3 * torch.from_numpy(np.abs(alphas)) @ deltas.double().abs()
    assert ((exact - product).double().abs() <= (2 * len(NAMES) + 4) * 2.0**-24 * size).all()
    for method in ("ties", "magmax", "dare"):
        with pytest.raises(MethodError, match="no matrix product"):
            merge_many(method, base, deltas, space, parts, exact=False)


def median(task_vectors: Sequence[dict[str, Tensor]], *, coefficient: float = 1.0) -> dict[str, Tensor]:
    names = task_vectors[0]
    return {n: coefficient * torch.stack([v[n] for v in task_vectors]).median(dim=0).values for n in names}


OWN = Method("average", median, None, "", "", parameters=(Parameter("coefficient", 1.0, ""),))  # not the average


@pytest.mark.parametrize(
    ("method", "case"),
    [
        (OWN, {"each": {"coefficient": np.linspace(0.1, 1.0, COUNT)}}),
        ("lines", {}),
        ("slerp", {"pairs": True}),
        ("ties", {"density": Gradient((0.1, 0.9))}),
    ],
)
def test_what_has_no_fast_path_is_made_by_the_definition(method: Any, case: dict[str, Any]) -> None:
    case = dict(case)
    base, deltas, space, parts = group = family()
    members = [[3, 0], [0, 3], [4, 2]] * 4 if case.pop("pairs", False) else subsets(2)
    merges = merge_many(method, base, deltas, space, parts, names=NAMES, subsets=members, **case)
    assert merges.plan is None
    assert same_bits(merges.stack(), one_by_one(method, group, members, **case))


def test_structures_per_expert_follow_the_subset() -> None:
    base, deltas, space, parts = family()
    lambdas = [0.1, 0.2, 0.3, 0.4, 0.5]
    merges = merge_many(
        "consensus_ta", base, deltas, space, parts, names=NAMES, subsets=[[4, 0], [1, 2, 3]], mask_lambdas=lambdas
    )
    for merged, who in zip(merges.stack(), [[4, 0], [1, 2, 3]], strict=True):
        own = {"names": [NAMES[i] for i in who], "mask_lambdas": [lambdas[i] for i in who]}
        assert same_bits(merged, merge_flat("consensus_ta", base, deltas[who], space, parts, **own))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subsets": [[0], [1]], "seed": [1, 2, 3]}, "different lengths"),
        ({"subsets": [[0, 0]]}, r"merge 0: the subset \[0, 0\]"),
        ({"subsets": [[1], [5]]}, "merge 1: the subset"),
        ({"subsets": np.ones((3, 4), dtype=bool)}, "do not fit 5 experts"),
        ({"subsets": [[0], []]}, "merge 1: no expert takes part"),
        ({"subsets": np.zeros((2, 5), dtype=bool)}, "merge 0: no expert takes part"),
        ({"subsets": [[True, False]]}, "subsets are no lists of experts' indices"),
        ({"subsets": [[torch.tensor(True)]]}, "subsets are no lists of experts' indices"),
        ({"subsets": [[0.7, 1]]}, "subsets are no lists of experts' indices"),
        ({"subsets": [["a"]]}, "subsets are no lists of experts' indices"),
        ({"subsets": [0, 1]}, "subsets are no lists of experts' indices"),
        ({"each": {"density": 0.3}}, r"each\['density'\] is 0.3: give one value per merge"),
        ({"each": {"scope": "global"}}, r"each\['scope'\] is 'global': give one value per merge"),
        ({"seed": "x"}, "seed is 'x': give one whole number"),
        ({"seed": 1.5}, "seed is 1.5: give one whole number"),
        ({"threads": 2.5}, "threads is 2.5: give a whole number"),
        ({"each": {"density": [0.2, 1.5]}}, "merge 1: method 'ties': parameter 'density' is 1.5"),
        ({"each": {"density": [0.2]}, "density": 0.3}, "'density' was given for all merges and in each="),
        ({"dens": 0.3}, "merge 0: method 'ties' has no parameter 'dens'"),
        ({"coefficients": [[1.0] * 5, [1.0, -1.0, 1.0, 1.0, 1.0]]}, "merge 1: the weighted disjoint mean"),
        ({"coefficients": [[1.0] * 5, [1.0, float("nan"), 1.0, 1.0, 1.0]]}, "merge 1: coefficient 2 is nan"),
        ({"coefficients": [1.0, 2.0]}, "do not fit 5 experts"),
        ({"coefficients": "high"}, "no table of numbers"),
        ({"coefficients": {"a": 1.0}}, "but the experts are"),
        ({"threads": 0}, "at least one"),
        ({"names": ["a"] * 5}, "one distinct name each"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(arguments: dict[str, Any], message: str) -> None:
    base, deltas, space, parts = family()
    with pytest.raises(MethodError, match=message):
        merge_many("ties", base, deltas, space, parts, **arguments)


def test_inputs_are_checked_once() -> None:
    base, deltas, space, parts = family()
    broken = deltas.clone()
    broken[2, 1400] = float("nan")
    with pytest.raises(CheckpointError, match=r"e10: tensor 'layers.1.b' holds 1 NaN"):
        merge_many("average", base, broken, space, parts, names=NAMES)
    with pytest.raises(CheckpointError, match="does not fit the layout"):
        merge_many("average", base, deltas[:, :-1], space, parts)
    with pytest.raises(MethodError, match=r"task vectors come as torch\.bfloat16: convert them"):
        merge_many("average", base, deltas.bfloat16(), space, parts)
    before = deltas.clone()
    merge_many("ties", base, deltas, space, parts).stack()
    assert same_bits(before, deltas)
