import csv
import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3agiqa.corpus import FIXED_FIELDS, open_corpus
from m3agiqa.corpus.files import fetch
from m3agiqa.corpus.rows import BYTES_PER_TABLE, made_up_id
from m3agiqa.errors import UserError
from m3agiqa.images import ImageRejected, decode
from tests import corpora
from tests.corpora import encode, picture, read, refusal, rows_of, written

# ---- text manifests


def test_the_bad_inputs_meet_their_statuses(tmp_path):
    statuses = corpora.write_bad_inputs(tmp_path)
    rows = {row["id"]: row for row in rows_of(tmp_path / "manifest.csv")}
    assert list(rows) == list(statuses)
    found = {}
    for name, row in rows.items():
        try:
            data = fetch(row["_uri"]) if row["_uri"] is not None else b""
            decode(data, **corpora.LIMITS)
            found[name] = "ok"
        except (ImageRejected, FileNotFoundError):
            found[name] = "rejected"
    assert found == statuses
    assert len(rows["long_prompt"]["prompt"]) == 7 * 7200
    assert rows["many_lines"]["prompt"] == 'first "quoted", line\nsecond line\r\nthird'
    assert rows["no_prompt"]["prompt"] is None
    assert rows["blank_prompt"]["prompt"] is None
    assert rows["no_image"]["image"] == ""
    assert rows["end_token"]["prompt"].startswith("<end_of_utterance>")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv"])
def test_csv_dialects(tmp_path, kind, ending):
    mark = "\t" if kind == "tsv" else ","
    lines = ["image,prompt,x", 'a.png,"one, ""two""\nthree",1', "/b.png,,2", "s3://k/c d.png,  ,", '"",p,3']
    data = ("\ufeff" + ending.join(lines) + ending).replace(",", mark).encode()
    path = written(tmp_path / f"m.{kind}", gzip.compress(data) if kind.endswith("gz") else data)
    rows = rows_of(path)
    assert [row["image"] for row in rows] == [str(tmp_path / "a.png"), "/b.png", "s3://k/c d.png", ""]
    assert [row["_uri"] for row in rows] == [str(tmp_path / "a.png"), "/b.png", "s3://k/c d.png", None]
    assert [row["prompt"] for row in rows] == [f'one{mark} "two"\nthree', None, None, "p"]
    assert [row["x"] for row in rows] == [1, 2, None, 3]


def test_types_of_a_csv_are_decided_over_the_whole_file(tmp_path):
    count = 150_000  # more than one block of the parser
    path = tmp_path / "m.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "prompt", "late", "n", "f", "code", "big", "gap", "huge", "mixed"])
        for i in range(count):
            last = i == count - 1
            late, gap = "abc" if last else i, "" if i % 2 else i
            mixed = 0.5 if last else 10**17 + 3
            writer.writerow([f"{i}.png", "p" * 60, late, i, i / 7, "007", 10**17 + i, gap, 10**20 + i, mixed])
    corpus = open_corpus(str(path))
    kinds = {field.name: str(field.type) for field in list(corpus.schema)[len(FIXED_FIELDS) :]}
    assert kinds == {
        **{"late": "string", "n": "int64", "f": "double", "code": "string", "big": "int64", "gap": "int64"},
        **{"huge": "string", "mixed": "string"},
    }
    last = read(corpus)[-1]
    assert last["late"] == "abc"
    assert last["f"] == (count - 1) / 7
    assert last["code"] == "007"
    assert last["big"] == 10**17 + count - 1
    assert last["gap"] is None
    assert last["huge"] == str(10**20 + count - 1)
    assert last["mixed"] == "0.5"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "-2", "0"], "int64"),
        (["1", "2.5", "1e-05"], "double"),
        (["0.5", "nan", "-inf"], "double"),
        (["1", "007"], "string"),
        (["+1", "2"], "string"),
        (["1e5", "2e5"], "string"),
        (["true", "false"], "string"),
        (["NA", "null"], "string"),
        (["2026-01-01"], "string"),
        (["-0"], "string"),
        (["1.5", "12345678901234567"], "string"),
        (["", ""], "string"),
    ],
)
def test_types_of_csv_columns(tmp_path, values, kind):
    path = written(tmp_path / "m.csv", "image,x\n" + "".join(f"a{i}.png,{x}\n" for i, x in enumerate(values)))
    corpus = open_corpus(str(path))
    assert str(corpus.schema.field("x").type) == kind
    if kind == "string":
        assert [row["x"] for row in read(corpus)] == values


def test_json_lines(tmp_path):
    items = [
        {"file_name": "a.png", "prompt": "p", "n": 1, "f": 1, "ok": True, "tags": ["x", {"y": "é"}], "mix": 1},
        {"file_name": "b.png", "generator": "g1", "f": 2.5, "ok": None, "mix": "two", "big": 2**70, "wide": 2**62},
        {"prompt": "no image", "late": "x", "wide": 0.5},
    ]
    text = "\ufeff" + "\r\n\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    rows = rows_of(written(tmp_path / "m.jsonl", text))
    assert [row["image"] for row in rows] == [str(tmp_path / "a.png"), str(tmp_path / "b.png"), ""]
    assert [row["generator"] for row in rows] == [None, "g1", None]
    assert [row["n"] for row in rows] == [1, None, None]
    assert [row["f"] for row in rows] == [1.0, 2.5, None]
    assert [row["ok"] for row in rows] == [True, None, None]
    assert [row["tags"] for row in rows] == ['["x", {"y": "é"}]', None, None]
    assert [row["mix"] for row in rows] == ["1", "two", None]
    assert [row["big"] for row in rows] == [None, str(2**70), None]
    assert [row["wide"] for row in rows] == [None, str(2**62), "0.5"]
    assert [row["late"] for row in rows] == [None, None, "x"]


def test_bad_text_manifests_name_the_line(tmp_path):
    def told(name: str, text: str | bytes) -> str:
        return refusal(written(tmp_path / name, text))

    good = "image,prompt\na.png,x\n"
    assert "row 3 has 3 fields where the header has 2" in told("a.csv", good + "b.png,x,y\n")
    assert "line 3 is not UTF-8" in told("b.csv", good.encode() + b"b.png,\xff\xfe\n")
    many = good + "b.png,yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\n" * 300_000
    assert "line 300003 is not UTF-8" in told("c.csv", many.encode() + b"b.png,\xff\n")
    assert "never closed" in told("d.csv", good + 'b.png,"open\nc.png,y\n')
    assert "never closed" in told("e.csv", good + 'b.png,"open\n' + "c.png,yyyyyyyyyyyyyyyyy\n" * 600_000)
    assert "Empty" in told("f.csv", "")
    assert "no rows" in told("g.csv", "image,prompt\n")
    assert "two columns are named 'image'" in told("h.csv", "image,image\na,b\n")
    assert "Truncated" in told("i.csv.gz", gzip.compress(os.urandom(4000).hex().encode())[:3000])
    assert "line 2 is not JSON" in told("a.jsonl", '{"image": "a"}\n{"image": \n')
    assert "line 1 is not a JSON object" in told("b.jsonl", "[1]\n")
    assert "line 2 is not UTF-8" in told("c.jsonl", b'{"image": "a"}\n{"image": "\xff"}\n')
    assert "line 1 is not UTF-8" in told("d.jsonl", '{"image": "\\ud800"}\n')
    assert "no rows" in told("e.jsonl", "\n")


def test_columns(tmp_path):
    path = written(tmp_path / "m.csv", "uid,photo,caption,model,fingerprint,_x,id2\n1,a.png,c,g,f,x,y\n")
    assert "uid, photo, caption" in refusal(path)
    assert "corpus.image_column" in refusal(path)
    names = {"image_column": "photo", "prompt_column": "caption", "id_column": "uid", "generator_column": "model"}
    assert "'_x' cannot pass through" in refusal(path, **names)
    told = refusal(path, **names, drop=["_x"], reserved=["fingerprint"])
    assert '--set corpus.drop=["fingerprint"]' in told
    assert rows_of(path, **names, drop=["_x", "fingerprint"], reserved={"fingerprint"}) == [
        {
            **{"id": "1", "image": str(tmp_path / "a.png"), "_uri": str(tmp_path / "a.png"), "_bytes": None},
            **{"prompt": "c", "generator": "g", "id2": "y"},
        }
    ]
    assert "no column 'nope'" in refusal(path, **{**names, "prompt_column": "nope"})
    both = written(tmp_path / "n.csv", "image,prompt,caption\na.png,p,c\n")
    assert "'prompt' cannot pass through" in refusal(both, prompt_column="caption")
    assert rows_of(both, prompt_column="caption", drop=["prompt"])[0]["prompt"] == "c"
    assert "no column 'prompt'" in open_corpus(str(written(tmp_path / "o.csv", "image\na.png\n"))).notes[0]


def test_ids_of_manifests(tmp_path):
    text = "id,image\n007,a.png\n7,a.png\n"
    assert [row["id"] for row in rows_of(written(tmp_path / "m.csv", text))] == ["007", "7"]
    assert "id '7' occurs more than once" in refusal(written(tmp_path / "m.csv", text + "8,b.png\n7,c.png\n"))
    assert "row 2 of m.csv" in refusal(written(tmp_path / "m.csv", text + ",c.png\n"))
    assert "row 1 of m.jsonl" in refusal(written(tmp_path / "m.jsonl", '{"id":"a","image":"a"}\n{"image":"b"}\n'))
    pq.write_table(pa.table({"id": [5, 6, 5], "image": ["a", "b", "c"]}), tmp_path / "m.parquet")
    assert "id '5' occurs more than once" in refusal(tmp_path / "m.parquet")
    assert [row["id"][:9] for row in rows_of(tmp_path / "m.parquet", drop=["id"])] == [f"{i:08d}-" for i in range(3)]


def test_ids_must_be_unique_across_files(tmp_path):
    for part in range(2):
        pq.write_table(pa.table({"id": [f"a{part}", "same"], "image": ["a", "b"]}), tmp_path / f"{part}.parquet")
    assert "id 'same' occurs more than once" in refusal(tmp_path)


def test_a_moved_row_gets_another_id(tmp_path):
    lines = ["a.png,x\n", "b.png,y\n", "a.png,x\n", "a.png,z\n"]
    first = rows_of(written(tmp_path / "m.csv", "image,prompt\n" + "".join(lines)))
    again = rows_of(written(tmp_path / "m.csv", "image,prompt\n" + "".join(lines)))
    moved = rows_of(written(tmp_path / "m.csv", "image,prompt\n" + "".join(lines[::-1])))
    assert [row["id"] for row in first] == [row["id"] for row in again]
    before = {row["id"]: (row["image"], row["prompt"]) for row in first}
    assert all(before.get(row["id"], pair := (row["image"], row["prompt"])) == pair for row in moved)
    assert first[0]["id"] == made_up_id(0, "a.png", "x")
    assert first[0]["id"].startswith("00000000-")


# ---- parquet


def test_parquet_types_pass_through(tmp_path):
    table = pa.table(
        {
            "image": pa.array(["a.png", None]).dictionary_encode(),
            "prompt": pa.array(["p", "q"], pa.large_string()),
            "mos": pa.array([1.5, None], pa.float32()),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "vector": pa.array([[1.0], [2.0, 3.0]], pa.list_(pa.float16())),
            "when": pa.array([0, 1], pa.timestamp("us", "UTC")),
            "nested": pa.array([{"a": 1}, None]),
            "dotted.name": [1, 2],
            "__index_level_0__": [3, 4],
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    corpus = open_corpus(str(tmp_path / "m.parquet"))
    for name in table.column_names[2:]:
        assert corpus.schema.field(name).type == table.schema.field(name).type
    rows = read(corpus)
    assert [{name: row[name] for name in table.column_names[2:]} for row in rows] == table.select(
        table.column_names[2:]
    ).to_pylist()
    assert [row["image"] for row in rows] == [str(tmp_path / "a.png"), ""]


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_embedded_images(tmp_path, kind):
    images = [encode(picture(seed=i)) for i in range(3)]
    if kind == "binary":
        column, shown = pa.array([*images, None], pa.binary()), ["m.parquet#0", "m.parquet#1", "m.parquet#2", ""]
    else:
        column = pa.array(
            [{"bytes": image, "path": "label.png"} for image in images] + [{"bytes": None, "path": "d.png"}]
        )
        shown = ["m.parquet#0", "m.parquet#1", "m.parquet#2", str(tmp_path / "d.png")]
    pq.write_table(pa.table({"image": column, "prompt": list("abcd")}), tmp_path / "m.parquet")
    rows = rows_of(tmp_path / "m.parquet")
    assert [row["_bytes"] for row in rows] == [*images, None]
    assert [row["image"] for row in rows] == shown
    assert [row["_uri"] for row in rows] == [None, None, None, str(tmp_path / "d.png") if kind == "struct" else None]
    assert rows[1]["id"] == made_up_id(1, images[1], "b")


def test_parquet_shards(tmp_path):
    for part in range(4):
        table = pa.table({"image": [f"{part}-{i}.png" for i in range(100)], "n": range(100)})
        pq.write_table(table, tmp_path / f"{part}.parquet", row_group_size=30)
    corpus = open_corpus(str(tmp_path), rows_per_shard=60)
    assert 7 <= len(corpus.shards) <= 9
    assert len(open_corpus(str(tmp_path), rows_per_shard=1000).shards) == 1
    rows = read(corpus)
    assert [row["image"] for row in rows] == [
        str(tmp_path / f"{part}-{i}.png") for part in range(4) for i in range(100)
    ]
    assert rows[130]["id"] == "1.parquet:" + made_up_id(30, "1-30.png", None)


def test_parquet_tables_are_bounded_by_bytes(tmp_path):
    images = [os.urandom(1000) for _ in range(200)] + [os.urandom(3 * 2**20) for _ in range(24)]
    pq.write_table(pa.table({"image": images}), tmp_path / "m.parquet", compression="none")
    corpus = open_corpus(str(tmp_path / "m.parquet"))
    assert [row["_bytes"] for row in read(corpus)] == images
    sizes = [table.nbytes for shard in corpus.shards for table in shard.read()]
    assert max(sizes) <= BYTES_PER_TABLE + 2**20


def test_parquet_files_are_united(tmp_path):
    pq.write_table(pa.table({"image": ["a"], "n": pa.array([1], pa.int32()), "only": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": [2**40], "image": ["b"]}), tmp_path / "b.parquet")
    assert [(row["n"], row["only"]) for row in rows_of(tmp_path)] == [(1, "x"), (2**40, None)]
    pq.write_table(pa.table({"image": ["c"], "n": ["text"]}), tmp_path / "c.parquet")
    assert "do not agree" in refusal(tmp_path)


@pytest.mark.parametrize("column", ["id", "prompt"])
def test_text_in_parquet_that_is_no_utf8(tmp_path, column):
    text = {"id": pa.array(["a", "b"]), "prompt": pa.array(["c", "d"])}
    text[column] = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xd1"]).buffers())
    pq.write_table(pa.table({"image": ["a.png", "b.png"], **text}), tmp_path / "m.parquet")
    with pytest.raises(UserError, match=r"not a readable parquet file: .*UTF8"):
        rows_of(tmp_path / "m.parquet")


def test_bad_parquet(tmp_path):
    assert "not a readable parquet" in refusal(written(tmp_path / "a.parquet", b"PAR1 nonsense"))
    assert "not a readable parquet" in refusal(written(tmp_path / "b.parquet", b""))
    pq.write_table(pa.table({"image": pa.array([], pa.string())}), tmp_path / "c.parquet")
    assert "no rows" in refusal(tmp_path / "c.parquet")
    pq.write_table(pa.table({"image": [1]}), tmp_path / "d.parquet")
    assert "of type int64" in refusal(tmp_path / "d.parquet")
