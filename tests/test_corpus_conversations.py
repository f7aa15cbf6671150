"""Published conversation files and other JSON arrays as corpora."""

import gzip
import json

import pytest

from m3agiqa.corpus import open_corpus
from m3agiqa.corpus.conversations import prompt_in
from tests.corpora import refusal, rows_of, written

QUESTION = (
    "<image>\nTake a close look at this AI-generated image and tell me everything you can about what you see. "
    "It's original prompt is: '{}'. Could you please help to analyze the image's quality?"
)


def item(number: int, prompt: str, **more) -> dict:
    texts = [QUESTION.format(prompt), f"Description {number}.", "Now rate it.", "fair"]
    roles = ("user", "assistant", "user", "assistant")
    return {
        "id": str(number),
        "image": f"/home/cuichuan/data/agiqa-3k/images/sd1.5_{number}.jpg",
        "conversations": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)],
        **more,
    }


@pytest.fixture
def published(tmp_path):
    items = [item(0, "a cat"), item(1, "it's 'red'. A dog's, \"HDR\"", response_0="Blurry.", response_1="poor")]
    return written(tmp_path / "train_quality.json", json.dumps(items))


def test_a_conversation_becomes_a_row(published, tmp_path):
    written(tmp_path / "sd1.5_0.jpg", b"x")
    rows = rows_of(published)
    assert [row["id"] for row in rows] == ["0", "1"]
    assert [row["prompt"] for row in rows] == ["a cat", "it's 'red'. A dog's, \"HDR\""]
    assert rows[0]["_uri"] == rows[0]["image"] == str(tmp_path / "sd1.5_0.jpg")
    assert rows[1]["_uri"] == str(tmp_path / "sd1.5_1.jpg")
    assert [row["description_given"] for row in rows] == ["Description 0.", "Description 1."]
    assert [row["rating_given"] for row in rows] == ["fair", "fair"]
    assert [(row["response_0"], row["response_1"]) for row in rows] == [(None, None), ("Blurry.", "poor")]
    assert "conversations" not in rows[0]


def test_images_are_looked_up_in_a_folder_of_the_users(published):
    assert [row["_uri"] for row in rows_of(published, images="s3://bucket/images")] == [
        "s3://bucket/images/sd1.5_0.jpg",
        "s3://bucket/images/sd1.5_1.jpg",
    ]


def test_an_image_that_is_where_the_file_says_is_taken_there(tmp_path):
    there = written(tmp_path / "elsewhere/a.png", b"x")
    file = written(tmp_path / "m.json", json.dumps([item(0, "x", image=str(there)), item(1, "y", image="sub/b.png")]))
    assert [row["_uri"] for row in rows_of(file)] == [str(there), str(tmp_path / "sub/b.png")]


@pytest.mark.parametrize(
    ("question", "prompt"),
    [
        (QUESTION.format("a. 'b'. c"), "a. 'b'. c"),
        ("It's original prompt is: 'two\nlines'.", "two\nlines"),
        ("Describe the image's quality.", None),
    ],
)
def test_the_prompt_is_what_stands_between_the_quotes(question, prompt):
    assert prompt_in(question) == prompt


def test_without_a_conversation_it_is_any_array_of_objects(tmp_path):
    data = '\ufeff [{"image": "a.png", "prompt": "p", "mos": 3}, {"image": "b.png", "mos": 2.5}]'
    for path in (written(tmp_path / "m.json", data), written(tmp_path / "m.json.gz", gzip.compress(data.encode()))):
        rows = rows_of(path)
        assert [(row["image"], row["prompt"], row["mos"]) for row in rows] == [
            (str(tmp_path / "a.png"), "p", 3.0),
            (str(tmp_path / "b.png"), None, 2.5),
        ]


def test_a_json_file_beside_other_manifests_is_not_meant(tmp_path):
    written(tmp_path / "info.json", "{}")
    written(tmp_path / "m.csv", "image,prompt\na.png,x\n")
    assert len(rows_of(tmp_path)) == 1
    (tmp_path / "m.csv").unlink()
    written(tmp_path / "a.png", "x")
    assert [row["id"] for row in rows_of(tmp_path)] == ["a.png"]


def test_what_is_no_conversation_is_told_in_one_line(tmp_path):
    def told(data: object) -> str:
        return refusal(written(tmp_path / "m.json", data if isinstance(data, str | bytes) else json.dumps(data)))

    assert "one dict, not an array" in told({"a": 1})
    assert "is not JSON" in told('[{"a": 1}')
    assert ".jsonl" in told('{"image": "a"}\n{"image": "b"}\n')
    assert "is not UTF-8" in told(b'[{"image": "\xff"}]')
    assert "is not UTF-8" in told('[{"image": "\\ud800"}]')
    assert "item 1 is no JSON object" in told([item(0, "x"), 7])
    assert "no rows" in told([])
    for talk in ("x", [], [{"role": "assistant", "content": "x"}], [{"role": "user", "content": 3}], [3]):
        assert "conversation of item 1 is not user, assistant" in told([item(0, "x"), item(1, "y", conversations=talk)])


@pytest.mark.parametrize("name", ["m.csv", "m.json", "m.parquet"])
def test_text_only_needs_no_column_of_images(tmp_path, name):
    import pyarrow as pa
    import pyarrow.parquet as pq

    items = [{"prompt": "a", "text": "x"}, {"prompt": "b", "text": "y"}]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(items), path)
    elif name.endswith("csv"):
        written(path, "prompt,text\na,x\nb,y\n")
    else:
        written(path, json.dumps(items))
    assert "no image column" in refusal(path)
    corpus = open_corpus(str(path), text_only=True)
    rows = [row for shard in corpus.shards for table in shard.read() for row in table.to_pylist()]
    assert [(row["image"], row["_uri"], row["prompt"], row["text"]) for row in rows] == [
        (None, None, "a", "x"),
        (None, None, "b", "y"),
    ]
    assert len({row["id"] for row in rows}) == 2
    assert "no column 'picture'" in refusal(path, text_only=True, image_column="picture")
