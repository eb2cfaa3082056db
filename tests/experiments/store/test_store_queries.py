"""Expressions mean what Python says they mean; the commands print what the store holds."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from experiments.cli import build_app
from experiments.grid.result import Cohort, Plan
from experiments.grid.run_spec import RunSpec
from experiments.store import QueryError, Store, StoreError, leases, open_results
from experiments.store.columns import SPEC_COLUMNS
from experiments.store.journal import file_system
from tests.experiments.store.samples import BASE, digest, result, spec

RUNS = [
    spec(0, learning_rate=0.1, task="digits:0"),
    spec(1, learning_rate=0.01, task="digits:1", momentum=0.9, nesterov=True, clip_norm=1.0),
    spec(2, learning_rate=0.001, task="digits:1", momentum=0.5, trained="low_rank", rank=2),
    spec(3, learning_rate=0.5, task="it's; DROP TABLE runs", momentum=0.9, clip_norm=0.25),
]
VALUES = (0.25, float("nan"), float("inf"), 0.75)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "s"
    with Store.create(path, {"name": "test"}, durable=False) as store:
        store.add_base(BASE)
        store.add_runs({digest(run): run for run in RUNS}, BASE.digest, "s")
        store.freeze(Plan((Cohort("all", tuple(map(digest, RUNS))),)))
        for number, run in enumerate(RUNS):
            store.commit(digest(run), result(number, value=VALUES[number]))
    return path


def seeds(store: Store, text: str) -> list[int]:
    return store.query(text, final=True)["seed"].tolist()


NUMBERS = st.sampled_from(["0.1", "0.01", "0.5", "0.9", "2", "3", "-1", "0"])
NAMES = st.sampled_from(["learning_rate", "momentum", "seed", "batch_size"])
OPERATORS = st.sampled_from(["<", "<=", "==", "!=", ">", ">="])
LEAVES = st.one_of(
    st.builds("{} {} {}".format, NAMES, OPERATORS, NUMBERS),
    st.builds("{} {} {}".format, NUMBERS, OPERATORS, NAMES),
    st.builds("{} <= {} < {}".format, NUMBERS, NAMES, NUMBERS),
    st.builds("test_accuracy {} {}".format, OPERATORS, NUMBERS),
    st.builds("{} in ({}, {})".format, NAMES, NUMBERS, NUMBERS),
    st.builds("{} not in [{}]".format, NAMES, NUMBERS),
    st.builds("{} * 2 {} {} + 1".format, NAMES, OPERATORS, NAMES),
    st.sampled_from(["nesterov", "task == 'digits:1'", "clip_norm is None", "rank is not None", "step == steps"]),
)
TREES = st.recursive(
    LEAVES,
    lambda part: st.one_of(
        st.builds("({}) and ({})".format, part, part),
        st.builds("({}) or ({})".format, part, part),
        st.builds("not ({})".format, part),
    ),
    max_leaves=4,
)


@settings(max_examples=40, deadline=None)
@given(TREES)
def test_expressions_agree_with_python(folder: Path, text: str) -> None:
    names = [run.model_dump() | {"step": 4, "test_accuracy": v} for run, v in zip(RUNS, VALUES, strict=True)]
    wanted = [n["seed"] for n in names if eval(text, {"__builtins__": {}}, n)]
    with Store.open(folder, "r") as store:
        assert seeds(store, text) == wanted


def test_functions_words_and_keywords(folder: Path) -> None:
    with Store.open(folder, "r") as store:
        assert seeds(store, "between(learning_rate, 0.01, 0.1)") == [0, 1]
        assert seeds(store, "startswith(task, 'digits')") == [0, 1, 2]
        assert seeds(store, "isnan(accuracy) or test_accuracy == inf") == [1, 2]
        assert seeds(store, "test_accuracy_low is None and clip_norm < 1") == [3]
        assert seeds(store, 'task == "it\'s; DROP TABLE runs"') == [3]
        assert store.query(task="it's; DROP TABLE runs", final=True)["seed"].tolist() == [3]
        assert store.query(seed=[1, 3], nesterov=False, final=True)["seed"].tolist() == [3]
        assert len(store.query(limit=3)) == 3
        assert set(SPEC_COLUMNS) < set(store.columns())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat < 1", "did you mean 'learning_rate'"),
        ("task < 1", "put it in quotes"),
        ("seed == 'a'", "leave the quotes out"),
        ("__import__('os').system('x')", "is not known"),
        ("seed", "neither true nor false"),
        ("seed < ", "is not an expression"),
        ("1 < 2", "name a column"),
        ("(lambda: 1)() == seed", "cannot be compared"),
        ("seed.real == 1", "cannot be compared"),
        ("seed in 'abc'", "takes a list"),
        ("not " * 3000 + "nesterov", "longer than|nested"),
    ],
)
def test_what_is_no_expression_is_explained(folder: Path, text: str, said: str) -> None:
    with Store.open(folder, "r") as store, pytest.raises(QueryError, match=said):
        store.query(text)


def test_every_field_of_a_run_has_a_column(folder: Path) -> None:
    with Store.open(folder, "r") as store:
        columns = {row["name"] for row in store._database.read("SELECT name FROM pragma_table_info('runs')")}
        assert set(RunSpec.model_fields) <= columns
        assert [store.spec(digest(run)) for run in RUNS] == RUNS
    assert open_results(folder).shape[0] == 8


def test_fields_that_all_runs_share(folder: Path, tmp_path: Path) -> None:
    with Store.open(folder, "r") as store:
        found = store.constants()
    content = [run.model_dump(mode="json") for run in RUNS]
    names = [n for n in content[0] if n not in ("base", "checkpoints") and len({str(c[n]) for c in content}) == 1]
    alike = {n: content[0][n] for n in names}
    assert {n: v for n, v in found.items() if n not in ("architecture", "base_kind", "base_digest")} == alike
    assert found["base_digest"] == BASE.digest
    with Store.create(tmp_path / "s") as store:  # two bases that architecture and kind do not tell apart
        runs = {run.digest(base=name, split="s"): run for name, run in zip("ab", RUNS, strict=False)}
        store.add_runs(runs, dict(zip(runs, "ab", strict=True)), "s")
        assert "base_digest" not in store.constants()


def test_leases_end_are_renewed_and_survive_a_clock_that_jumps(tmp_path: Path, monkeypatch) -> None:
    with Store.create(tmp_path / "s", durable=False) as store:
        store.add_runs({digest(RUNS[0]): RUNS[0]}, BASE.digest, "s")
        store.freeze(Plan((Cohort("c", (digest(RUNS[0]),)),)))
        assert store.lease("a", 0.3) is not None
        with store.keep_lease("a", "c", 0.3) as heart:
            time.sleep(0.7)
            assert store.lease("b", 10) is None
            assert not heart.lost.is_set()
            store.release("a", "c")
            assert heart.lost.wait(5)
        monkeypatch.setattr(leases, "now", lambda: 2e9)
        assert store.lease("a", 10) is not None
        monkeypatch.setattr(leases, "now", lambda: 1e9)  # the clock of a was far ahead
        assert store.lease("b", 10) is not None


def test_rows_about_merges(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s", durable=False) as store:
        assert store.add_merges([{"key": "k", "accuracy": float("nan")}, {"x": 1}]) == 2
        assert store.add_merges([{"key": "k", "accuracy": 0.5}, {"x": 1}]) == 0
        assert store.merges()["key"][0] == "k"
        assert "k" in store.merge_keys()
        with pytest.raises(StoreError, match="no JSON data"):
            store.add_merges([{"x": object()}])


def test_network_file_systems_are_told_apart(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n")
    assert file_system(tmp_path / "deep", mounts) == "nfs4"
    assert file_system(Path("/"), mounts) == "ext4"


def test_without_shared_memory_a_rollback_journal_is_used(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("experiments.store.journal.file_system", lambda folder: "nfs4")
    with Store.create(tmp_path / "s") as store:
        assert store.journal == "delete"
        assert store._database.read("PRAGMA synchronous")[0][0] == 2
    assert "lies on nfs4" in caplog.text


def test_commands(folder: Path, tmp_path: Path) -> None:
    def call(*words: object) -> str:
        answer = CliRunner().invoke(build_app(), ["grid", *map(str, words)])
        assert answer.exit_code == 0, answer.output
        return answer.output

    assert "4, 4 done (100.0 %)" in call("status", folder)
    assert json.loads(call("status", folder, "--json"))["finished"] == 4
    rows = json.loads(call("query", folder, "isnan(accuracy)", "--final", "--json", "--columns", "seed,test_accuracy"))
    assert rows == [{"seed": 1, "test_accuracy": "nan"}]
    assert call("query", folder, "seed == 3", "--csv", "--columns", "seed,step").split() == ["seed,step", "3,2", "3,4"]
    shown = call("query", folder)
    table, _, same = shown.partition("8 rows")
    assert "clip_norm" in table
    assert "batch_size" not in table
    assert f"the same in all runs: architecture {RUNS[0].architecture}, " in same
    assert f"batch_size {RUNS[0].batch_size}, " in " ".join(same.split())
    assert "clip_norm" not in same
    assert "0 problems" in call("verify", folder, "--deep")
    assert "0 files would be deleted" in call("gc", folder, "--dry-run", "--older-than", 0)
    pytest.importorskip("pyarrow")
    import pandas as pd

    call("export", folder, tmp_path / "x.parquet")
    assert pd.read_parquet(tmp_path / "x.parquet")["seed"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    with Store.open(folder, "r") as store, pytest.raises(StoreError, match="unknown format"):
        store.export(tmp_path / "x.xlsx")
