"""``--methods`` and ``--set`` of the measuring commands, and what is said of sensitivities above the theory's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from experiments.commands.measure_settings import listed, method_settings
from experiments.commands.measure_twins import _above_theory, _choices, _chosen
from theory.errors import MergeboundError


def test_settings_are_read_and_put_over_what_a_method_has() -> None:
    assert listed(" average, ties ,") == ["average", "ties"]
    texts = ("ties.density=0.3", "weighted.normalize=true", "ties.sign=mass")
    given = method_settings(["weighted", "ties"], texts)
    assert given == {"weighted": {"normalize": True}, "ties": {"density": 0.3, "sign": "mass"}}
    choices = _choices(2, given)
    assert choices is not None
    assert {one.method: one.settings for one in choices} == {
        "weighted": {"coefficients": [0.5, 0.5], "normalize": True},
        "ties": {"density": 0.3, "sign": "mass"},
    }
    assert _chosen(None, ()) is None


@pytest.mark.parametrize(
    ("methods", "texts", "message"),
    [
        ("ties", ("ties.density",), "write method.parameter=value"),
        ("ties", ("average.x=1",), "'average' is not among the methods"),
        (None, ("ties.density=1",), "name its method with --methods"),
        ("average, nosuch", (), "'nosuch': choose among average"),
        ("avrage", (), "did you mean average"),
    ],
)
def test_what_cannot_be_set_is_refused(methods: str | None, texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(MergeboundError, match=message):
        _chosen(methods, texts)


def test_only_sensitivities_that_surely_exceed_the_theory_are_remarked_on() -> None:
    def one(method: str, low: float, guarantee: str = "local") -> Any:
        number = SimpleNamespace(low=low)
        return SimpleNamespace(method=method, theory=1.0, sensitivity=number, guarantee=guarantee, reason="jumps; more")

    nan = float("nan")
    merges = (one("ties", 1.77), one("dare_ties", 0.9), one("sce", nan), one("dare", 1.2, "mean square"))
    notes = _above_theory([SimpleNamespace(merges=merges), SimpleNamespace(merges=(one("ties", 1.5),))])  # type: ignore[list-item]
    assert [note.partition(":")[0] for note in notes] == ["dare", "ties"]
    assert "in the mean over the method's draws" in notes[0]
    assert "local" in notes[1]
    assert "jumps" in notes[1]
