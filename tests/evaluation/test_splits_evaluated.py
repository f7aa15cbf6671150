"""`m3agiqa split`, then `m3agiqa evaluate` on a part of it, whatever the rows are told apart by."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.csv import read_csv

from m3agiqa.cli import main
from tests.evaluation.evaluating import labelled, write


@pytest.fixture(scope="module")
def rows():
    return labelled(160)


def split_of(table, out, *more):
    args = ["split", "--input", table, "--out", str(out), "--label", "mos_q", "--no-images", *more]
    assert main(args) == 0
    parts = pq.read_table(out) if out.suffix == ".parquet" else read_csv(out)
    return sum(part == "test" for part in parts["part"].to_pylist())


def evaluated_rows(folder, *args):
    assert (
        main(["evaluate", *args, "--label", "quality=mos_q", "--out", str(folder), "--samples", "100", "--no-plots"])
        == 0
    )
    return json.loads((folder / "evaluation.json").read_text())["aspects"]["quality"]["rows"]


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_split_of_a_table_without_ids_is_evaluated(rows, tmp_path, suffix):
    """The two commands of docs/numbers.md."""
    columns = [name for name in rows[0] if name != "id"]
    table = write(tmp_path / "labelled.csv", rows, columns)
    split = tmp_path / f"split{suffix}"
    count = split_of(table, split)
    args = ["--split", str(split)]
    assert evaluated_rows(tmp_path / "a", "--scores", table, *args) == count
    assert evaluated_rows(tmp_path / "b", "--scores", table, "--truth", table, *args) == count
    sorted_rows = write(tmp_path / "sorted.csv", sorted(rows, key=lambda row: row["mos_q"]), columns)
    assert evaluated_rows(tmp_path / "c", "--scores", sorted_rows, *args) == count
    alike = [row | {"image_path": f"{i}/image.png"} for i, row in enumerate(rows)]
    one = write(tmp_path / "alike.csv", alike, columns)
    split = tmp_path / f"alike-split{suffix}"
    count = split_of(one, split)
    assert evaluated_rows(tmp_path / "d", "--scores", one, "--split", str(split)) == count


def test_a_split_of_images_within_a_table_is_evaluated(rows, tmp_path, capsys):
    made = [
        {k: v for k, v in row.items() if k not in ("id", "image_path")} | {"image": row["id"].encode()} for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "t.parquet")
    split = tmp_path / "split.parquet"
    count = split_of(str(tmp_path / "t.parquet"), split)
    args = ["--scores", str(tmp_path / "t.parquet"), "--split", str(split)]
    assert evaluated_rows(tmp_path / "out", *args) == count
    pq.write_table(pa.Table.from_pylist(made[::-1]), tmp_path / "t.parquet")
    capsys.readouterr()
    assert main(["evaluate", *args, "--label", "quality=mos_q", "--out", str(tmp_path / "refused")]) == 2
    assert "none of its 160 rows" in capsys.readouterr().err


def test_a_split_by_ids_of_another_name_is_evaluated(rows, tmp_path):
    named_ids = [{"name": row["id"]} | row for row in rows]
    table = write(tmp_path / "t.csv", named_ids, ["name", "prompt", "mos_q", "quality_mos"])
    count = split_of(table, tmp_path / "s.csv", "--id-column", "name")
    args = ["--scores", table, "--id-column", "name", "--split", str(tmp_path / "s.csv")]
    assert evaluated_rows(tmp_path / "out", *args) == count
