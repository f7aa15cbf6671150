"""`m3agiqa query`: SQL over scores, and over nothing else."""

import csv
import io
import json

import pyarrow.parquet as pq
import pytest

from m3agiqa.cli import main
from tests.scored import curate_by_hand, scored_folder


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    return scored_folder(tmp_path_factory.mktemp("query") / "run")


def answer(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["query", *args]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["query", *args]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1, err
    return err


def test_the_three_formats_say_the_same(capsys, scores):
    columns = "id, quality_rating, quality_rating_probs AS probs, quality_mos"
    sql = f"SELECT {columns} FROM scores WHERE id < 'row-0003' ORDER BY id"
    rows = json.loads(answer(capsys, str(scores), sql, "--format", "json"))
    table = list(csv.DictReader(io.StringIO(answer(capsys, str(scores), sql, "--format", "csv"))))
    shown = answer(capsys, str(scores), sql)
    truth = pq.read_table(scores / "scores").slice(0, 3).to_pylist()
    for row, line, true in zip(rows, table, truth, strict=True):
        assert row["id"] == line["id"] == true["id"]
        assert row["quality_mos"] == float(line["quality_mos"]) == pytest.approx(true["quality_mos"])
        assert row["probs"] == json.loads(line["probs"]) == pytest.approx(true["quality_rating_probs"])
        assert true["id"] in shown
        assert true["quality_rating"] in shown


def test_null_stays_null(capsys, scores):
    sql = "SELECT quality_mos, 'nan'::DOUBLE AS n FROM scores WHERE status = 'rejected'"
    assert json.loads(answer(capsys, str(scores), sql, "--format", "json")) == [{"quality_mos": None, "n": None}]
    assert answer(capsys, str(scores), sql, "--format", "csv") == "quality_mos,n\n,\n"


def test_decimals_are_numbers(capsys, scores):
    sql = "SELECT 1.25 AS a, 3::DECIMAL(30, 0) AS b, [0.5] AS c, DATE '2020-01-02' AS d"
    found = json.loads(answer(capsys, str(scores), sql, "--format", "json"))
    assert found == [{"a": 1.25, "b": 3, "c": [0.5], "d": "2020-01-02"}]
    assert answer(capsys, str(scores), sql, "--format", "csv") == "a,b,c,d\n1.25,3,[0.5],2020-01-02\n"


def test_two_columns_of_one_name_are_no_object(capsys, scores):
    sql = "SELECT id, prompt AS id FROM scores"
    assert "two columns are named 'id'" in refused(capsys, str(scores), sql, "--format", "json")
    assert answer(capsys, str(scores), sql, "--format", "csv").startswith("id,id\n")


def test_an_empty_result_is_valid(capsys, scores):
    sql = "SELECT id FROM scores WHERE false"
    assert json.loads(answer(capsys, str(scores), sql, "--format", "json")) == []
    assert answer(capsys, str(scores), sql, "--format", "csv") == "id\n"


def test_a_long_table_says_what_it_leaves_out(capsys, scores):
    assert "... and 10 more" in answer(capsys, str(scores), "SELECT range AS n FROM range(60)")


def test_what_a_curation_removed_is_a_view(capsys, tmp_path):
    folder = scored_folder(tmp_path / "run", 12)
    assert "'removed'" in refused(capsys, str(folder), "SELECT * FROM removed")
    curate_by_hand(folder, 12)
    sql = "SELECT rule, count(*) AS n FROM removed GROUP BY ALL ORDER BY rule"
    rows = json.loads(answer(capsys, str(folder), sql, "--format", "json"))
    assert rows == [{"rule": "near duplicates", "n": 1}, {"rule": "quality_mos > 3", "n": 1}]


def test_a_wrong_column_names_the_nearest(capsys, scores):
    line = refused(capsys, str(scores), "SELECT avg(qualty_mos) FROM scores")
    assert "'qualty_mos'" in line
    assert "did you mean quality_mos?" in line


@pytest.mark.parametrize(
    "sql",
    [
        "SELEC 1",
        "",
        "SELECT 1; SELECT 2",
        "SELECT CAST(prompt AS INTEGER) FROM scores",
        "SELECT * FROM nothing",
        "DELETE FROM scores",
        "CREATE TABLE t AS SELECT 1",
        "SET threads = 1",
        "ATTACH 'x.db'",
    ],
)
def test_what_is_no_question_is_refused_in_one_line(capsys, scores, sql):
    refused(capsys, str(scores), sql)


def test_no_other_file_can_be_read_or_written(capsys, scores, tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    for sql in (
        f"SELECT * FROM read_csv('{secret}')",
        f"SELECT * FROM '{secret}'",
        f"SELECT * FROM read_text('{secret}')",
        f"COPY (SELECT 1) TO '{tmp_path}/out.csv'",
        "SELECT * FROM read_parquet('https://example.org/x.parquet')",
    ):
        refused(capsys, str(scores), sql)
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]


def test_scores_are_not_written_by_a_query(capsys, scores):
    files = {path: path.read_bytes() for path in (scores / "scores").iterdir()}
    target = next(iter(files))
    copy = f"COPY (SELECT 1 AS id) TO '{target}'"
    for sql in (
        copy,
        f"EXPLAIN ANALYZE {copy}",
        f"explain {copy}",
        f"/* */ EXPLAIN ANALYZE {copy}",
        f"EXPLAIN (ANALYZE) {copy}",
    ):
        refused(capsys, str(scores), sql)
    assert {path: path.read_bytes() for path in (scores / "scores").iterdir()} == files


@pytest.mark.parametrize("sql", ["EXPLAIN SELECT * FROM scores", "explain analyze SELECT count(*) FROM scores"])
def test_a_question_can_be_explained(capsys, scores, sql):
    assert "parquet" in answer(capsys, str(scores), sql).lower()


def test_a_folder_without_scores(capsys, tmp_path):
    assert "holds no scores" in refused(capsys, str(tmp_path), "SELECT 1")
