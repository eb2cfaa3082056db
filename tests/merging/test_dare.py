"""DARE's masks: unbiased, independent, and keyed by names alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from merging.flat import FlatSpace
from merging.methods.dare import dare
from merging.random_masks import keep_mask, philox, uniform_words

SPACE = FlatSpace.of({"a": torch.zeros(40, 25), "b": torch.zeros(501)})


def test_mean_over_seeds_is_the_task_vector() -> None:
    tau = {"x": torch.linspace(-1.0, 2.0, 64)}
    seeds, drop = 4000, 0.7
    draws = torch.stack([dare([tau], names=["e"], seed=s, drop=drop, coefficient=1.0)["x"] for s in range(seeds)])
    error = tau["x"].abs() * (drop / (1 - drop) / seeds) ** 0.5
    z = ((draws.double().mean(dim=0) - tau["x"]) / error.clamp(min=1e-12)).numpy()
    assert np.abs(z).max() < 4.5  # 64 coordinates
    assert 0.6 < np.mean(z**2) < 1.5  # as spread out as independent draws are


def test_without_rescaling_the_mean_shrinks() -> None:
    tau = {"x": torch.ones(20000)}
    merged = dare([tau], names=["e"], drop=0.25, rescale=False, coefficient=1.0)["x"]
    assert abs(float(merged.mean()) - 0.75) < 0.02
    assert set(merged.tolist()) == {0.0, 1.0}


def test_no_drop_is_task_arithmetic() -> None:
    taus = [{"x": torch.randn(9)} for _ in range(3)]
    merged = dare(taus, names=["a", "b", "c"], drop=0.0, coefficient=0.5)["x"]
    torch.testing.assert_close(merged, 0.5 * sum(t["x"] for t in taus))


def test_masks_of_experts_tensors_and_seeds_are_independent() -> None:
    def mask(seed: int, expert: str, tensor: str) -> Tensor:
        return keep_mask(FlatSpace.of({tensor: torch.zeros(20000)}), seed, expert, 0.5).double()

    masks = [mask(0, "e1", "w"), mask(0, "e2", "w"), mask(0, "e1", "v"), mask(1, "e1", "w")]
    correlation = np.corrcoef(torch.stack(masks).numpy())
    assert np.abs(correlation - np.eye(4)).max() < 4.5 / 20000**0.5
    assert all(abs(float(m.mean()) - 0.5) < 0.02 for m in masks)


def test_names_cannot_run_into_each_other() -> None:
    assert not np.array_equal(uniform_words(0, "ab", "c", 8), uniform_words(0, "a", "bc", 8))
    assert not np.array_equal(uniform_words(1, "0", "c", 8), uniform_words(10, "", "c", 8))


def test_masks_do_not_depend_on_position() -> None:
    taus = {name: {"a": torch.randn(40, 25), "b": torch.randn(501)} for name in ("p", "q", "r")}
    forward = dare(list(taus.values()), names=list(taus), seed=3)
    names = ["r", "p", "q"]
    reordered = [dict(reversed(taus[name].items())) for name in names]
    backward = dare(reordered, names=names, seed=3)
    for tensor in ("a", "b"):
        assert torch.equal(forward[tensor] == 0.0, backward[tensor] == 0.0)
        torch.testing.assert_close(forward[tensor], backward[tensor])
    one = keep_mask(SPACE, 3, "p", 0.5)
    other = keep_mask(FlatSpace.of({"b": torch.zeros(501)}), 3, "p", 0.5)
    assert torch.equal(one[1000:], other)


def test_a_prefix_of_a_stream_is_the_stream() -> None:
    assert np.array_equal(uniform_words(0, "e", "t", 101)[:50], uniform_words(0, "e", "t", 50))


def test_the_stream_is_frozen() -> None:
    """A change here changes every published DARE merge."""
    assert uniform_words(7, "expert", "block.weight", 4).tolist() == [3314262911, 1897247160, 2641326355, 3461717909]


def test_the_generator_gives_its_published_words() -> None:
    """Known answers of Philox4x32-10 (Salmon et al. 2011, the reference implementation's test vectors)."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones), (ones, ones, ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for key, counter, expected in cases:
        block = np.array([counter[0] + (counter[1] << 32)], dtype=np.uint64)
        found = philox(np.array([*key, *counter[2:]], dtype=np.uint32), block)
        assert tuple(found.tolist()) == expected
