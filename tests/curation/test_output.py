"""The files of a curated set: the same bytes whatever the order of the scores, and on an object store."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3agiqa.curate import curate
from m3agiqa.curation import output
from m3agiqa.curation.sample import allocate
from m3agiqa.runs import Output
from tests.curation.scored import files_of, kept, kept_ids, recipe, removed, scored, write_scores

RULES = [
    "rows.where=quality_mos > 1",
    "duplicates.exact=true",
    "quantile.top={quality_mos: 0.9}",
    "quantile.within=generator",
    "best.per_prompt=4",
    "sample.size=60",
    "sample.strata=generator",
    "split.validation=0.2",
    "pairs.margin=0.5",
]


def some_rows(count: int) -> list[dict]:
    return [
        scored(
            f"{i:05d}",
            (i * 37 % 101) / 20,
            prompt=None if i % 19 == 0 else f"prompt {i % 23}",
            generator=("one", "two", None)[i % 3],
            image_sha256=str(i % 170),
        )
        for i in range(count)
    ]


def test_the_order_and_the_files_of_the_scores_do_not_matter(tmp_path, monkeypatch):
    # Small groups and files, so that there are several of each.
    monkeypatch.setattr(output, "_ROW_GROUP", 16)
    monkeypatch.setattr(output, "_ROWS_PER_FILE", 32)
    rows = some_rows(200)
    found = []
    for place, (order, files) in enumerate(((rows, 2), (rows[::-1], 5))):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        write_scores(tmp_path / "run", order, files=files)
        curate(recipe(*RULES), str(tmp_path / "run"), str(tmp_path / f"out{place}"))
        found.append(files_of(tmp_path / f"out{place}"))
    assert found[0] == found[1]
    assert [name for name in found[0] if name.startswith("scores/")] == [
        "scores/part-00000.parquet",
        "scores/part-00001.parquet",
    ]
    ids, gone = kept_ids(tmp_path / "out0"), removed(tmp_path / "out0")
    assert len(ids) == 60
    assert ids == sorted(ids)
    assert sorted([*ids, *gone]) == sorted(row["id"] for row in rows)
    sheet = json.loads((tmp_path / "out0" / "curation.json").read_text())
    assert {step["rule"]: step["dropped"] for step in sheet["funnel"] if step["dropped"]} == {
        rule: list(gone.values()).count(rule) for rule in gone.values()
    }


def test_what_a_killed_command_left_is_written_anew(tmp_path):
    write_scores(tmp_path / "run", some_rows(20))
    (tmp_path / "out.partial" / "scores").mkdir(parents=True)
    (tmp_path / "out.partial" / "scores" / "part-00007.parquet").write_bytes(b"half")
    curate(recipe(), str(tmp_path / "run"), str(tmp_path / "out"))
    assert len(kept_ids(tmp_path / "out")) == 20
    assert not (tmp_path / "out.partial").exists()


def test_the_columns_keep_their_types_and_descriptions(tmp_path):
    write_scores(tmp_path / "run", some_rows(5))
    curate(recipe(), str(tmp_path / "run"), str(tmp_path / "out"))
    before, after = (Output(str(tmp_path / name)).dataset().schema for name in ("run", "out"))
    assert after.equals(before, check_metadata=True)


@pytest.mark.parametrize("name", ["quality_mos=9", "generator=two", "x*y", "a[1]?"])
def test_the_name_of_a_folder_is_only_a_name(tmp_path, name):
    # A pattern would find these, too.
    write_scores(tmp_path / "xzy" / "run", [scored("other", 1.0)])
    run = write_scores(tmp_path / name / "run", [scored("a", 4.0)])
    write_scores(tmp_path / "a1k" / "run", [scored("other", 1.0)])
    curate(recipe("rows.where=quality_mos < 5"), str(run), str(tmp_path / "out"))
    (row,) = kept(tmp_path / "out")
    assert (row["id"], row["quality_mos"], row["generator"]) == ("a", 4.0, "one")


def test_an_output_that_is_a_link_is_what_it_leads_to(tmp_path):
    write_scores(tmp_path / "run", some_rows(5))
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    for name in ("empty", "new"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        curate(recipe(), str(tmp_path / "run"), str(tmp_path / name))
        assert (tmp_path / name).is_symlink()
        assert len(kept_ids(tmp_path / "disk" / name)) == 5


@pytest.mark.parametrize("name", ["split", "Split"])
def test_both_rows_of_a_pair_are_of_one_part(tmp_path, name):
    parts = [*"aaaabbbb", None, None]
    rows = [scored(str(i), i / 2, **{name: part}) for i, part in enumerate(parts)]
    write_scores(tmp_path / "run", rows, passing=[pa.field(name, pa.string())])
    curate(recipe("pairs.margin=0.1", "pairs.per_prompt=5"), str(tmp_path / "run"), str(tmp_path / "out"))
    pairs = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    found = sorted((row["chosen_id"], row["rejected_id"], row["split"]) for row in pairs)
    assert found == [("2", "1", "a"), ("3", "0", "a"), ("6", "5", "b"), ("7", "4", "b"), ("9", "8", None)]


def test_scores_and_output_on_an_object_store(tmp_path, bucket):
    write_scores(tmp_path / "run", some_rows(30))
    for name, data in files_of(tmp_path / "run").items():
        bucket(f"curated/run/{name}", data)
    curate(recipe(*RULES[:2]), "s3://m3agiqa-corpus/curated/run", "s3://m3agiqa-corpus/curated/out")
    rows = Output("s3://m3agiqa-corpus/curated/out").rows(["id"])
    curate(recipe(*RULES[:2]), str(tmp_path / "run"), str(tmp_path / "out"))
    assert rows["id"].to_pylist() == kept_ids(tmp_path / "out")
    gone = Output("s3://m3agiqa-corpus/curated/out").read("removed.parquet")
    assert pq.read_table(pa.BufferReader(gone)).num_rows == 30 - rows.num_rows


@pytest.mark.parametrize(
    ("counts", "size", "equal", "expected"),
    [
        ([10, 30, 60], 10, False, [1, 3, 6]),
        ([1, 1, 1], 2, False, [1, 1, 0]),
        ([7], 3, False, [3]),
        ([2, 3], 9, False, [2, 3]),
        ([10, 30, 60], 10, True, [3, 3, 4]),
        ([1, 30, 60], 21, True, [1, 10, 10]),
        ([1, 2], 9, True, [1, 2]),
    ],
)
def test_shares_of_strata(counts, size, equal, expected):
    assert allocate(counts, size, equal=equal) == expected
