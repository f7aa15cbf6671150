"""Training conversations between the published form and ours, and what is wrong with them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3agiqa.aspects import RATING_WORDS, Aspect
from m3agiqa.cli import main
from m3agiqa.corpus.conversations import prompt_in
from tests.corpora import picture, rows_of
from tests.test_corpus_conversations import item


def conversations(*args: object) -> int:
    return main(["conversations", *map(str, args), "--aspect", "quality"])


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert conversations(*args) == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1
    return line


@pytest.fixture
def published(tmp_path):
    """Three good conversations with their images, as the published files have them."""
    items = [item(0, "a cat"), item(1, "it's 'red', \"HDR\"", response_0="Blurry.", response_1="poor"), item(2, "ü")]
    items[2]["image"] = "sub/2.png"
    (tmp_path / "sub").mkdir()
    for name in ("sd1.5_0.jpg", "sd1.5_1.jpg", "sub/2.png"):
        picture().save(tmp_path / name)
    path = tmp_path / "train_quality.json"
    path.write_text(json.dumps(items, indent=4) + "\n")
    return path


def test_there_and_back_to_the_byte(published, tmp_path):
    assert conversations("--input", published, "--output", tmp_path / "out/ours.parquet") == 0
    rows = rows_of(tmp_path / "out/ours.parquet")
    assert [row["prompt"] for row in rows] == ["a cat", "it's 'red', \"HDR\"", "ü"]
    assert [row["teacher_quality_description"] for row in rows] == [f"Description {i}." for i in range(3)]
    assert [row["teacher_quality_rating"] for row in rows] == ["fair"] * 3
    assert [row["response_0"] for row in rows] == [None, "Blurry.", None]
    assert [row["_uri"] for row in rows] == [str(tmp_path / n) for n in ("sd1.5_0.jpg", "sd1.5_1.jpg", "sub/2.png")]
    back = tmp_path / "back.json"
    assert conversations("--input", tmp_path / "out/ours.parquet", "--output", back) == 0
    assert back.read_bytes() == published.read_bytes()


def test_ours_there_and_back(tmp_path):
    picture().save(tmp_path / "a.png")
    rows = [
        {
            "id": f"r{i}", "image": str(tmp_path / "a.png"), "prompt": None if i == 1 else f"p{i}", "generator": "g",
            "mos_quality": [3.25, None, 4.0][i], "teacher_quality_description": f"D{i}",
            "teacher_quality_rating": RATING_WORDS[i], "teacher_correspondence_description": [None, "C", None][i],
        }
        for i in range(3)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "ours.parquet")
    assert conversations("--input", tmp_path / "ours.parquet", "--output", tmp_path / "theirs.json") == 0
    items = json.loads((tmp_path / "theirs.json").read_text())
    assert [message["role"] for message in items[0]["conversations"]] == ["user", "assistant", "user", "assistant"]
    assert items[0]["conversations"][0]["content"].startswith("<image>\n")
    assert prompt_in(items[0]["conversations"][0]["content"]) == "p0"
    assert conversations("--input", tmp_path / "theirs.json", "--output", tmp_path / "back.parquet") == 0
    back = rows_of(tmp_path / "back.parquet")
    for row, was in zip(back, rows_of(tmp_path / "ours.parquet"), strict=True):
        assert {name: row[name] for name in was} == was


@pytest.mark.parametrize(
    "question",
    [
        "The original prompt for the image was: 'a 'fine' day.' What can you deduce about the image based on this?",
        "An analysis of how well it aligns with the original prompt: 'a 'fine' day.'.",
        "The original prompt for the image was: 'a 'fine' day.'. How closely does the image resemble real scenes?",
    ],
)
def test_prompts_of_the_other_published_wordings(question):
    assert prompt_in(question) == "a 'fine' day."


def spoilt(published, number: int, change) -> None:
    items = json.loads(published.read_text())
    change(items[number])
    published.write_text(json.dumps(items))


def answer(number: int, text: object, role: str = "assistant"):
    def change(one: dict) -> None:
        one["conversations"][number] = {"role": role, "content": text}

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (answer(1, "x", "system"), "message 1 has the role 'system', not assistant"),
        (answer(1, " \n"), "its description is empty"),
        (answer(1, None), "message 1 has no text"),
        (answer(3, "splendid"), "its rating 'splendid' is none of bad, poor"),
        (lambda one: one["conversations"].pop(), "its conversation has 3 messages, not 4"),
        (lambda one: one["conversations"].append({"role": "user", "content": "x"}), "5 messages"),
        (lambda one: one["conversations"][0].update(weight=0), "a message has more than a role and a content"),
        (lambda one: one.pop("conversations"), "no list of messages"),
        (lambda one: one.update(image="gone.png"), "gone.png is not there"),
        (lambda one: one.update(image=None), "it names no image"),
        (lambda one: one.update(id=3), "its id is no text"),
        (lambda one: one.update(id="0"), "its id has been there before"),
        (lambda one: one.update(response_0=None), "its key 'response_0' cannot be kept"),
    ],
)
def test_bad_rows_are_named_and_can_be_skipped(published, tmp_path, capsys, change, told):
    spoilt(published, 1, change)
    line = refused(capsys, "--input", published, "--output", tmp_path / "o.parquet")
    assert f"1 of 3 rows are bad: row 1 (id {json.loads(published.read_text())[1].get('id')}): " in line
    assert told in line
    assert "--skip-bad" in line
    assert not (tmp_path / "o.parquet").exists()
    assert conversations("--input", published, "--output", tmp_path / "o.parquet", "--skip-bad") == 0
    assert "row 1 (id" in capsys.readouterr().err
    assert [row["id"] for row in rows_of(tmp_path / "o.parquet")] == ["0", "2"]


def test_bad_rows_of_ours(tmp_path, capsys):
    picture().save(tmp_path / "a.png")
    good = {"image": "a.png", "teacher_quality_description": "D", "teacher_quality_rating": "fair"}
    rows = [
        {"id": "0", **good},
        {"id": "1", **good, "teacher_quality_description": None},
        {"id": "2", **good, "teacher_quality_rating": "so-so"},
        {"id": "3", **good, "image": "gone.png"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "ours.parquet")
    line = refused(capsys, "--input", tmp_path / "ours.parquet", "--output", tmp_path / "o.json")
    for told in (
        "row 1 (id 1): its description is empty",
        "row 2 (id 2): its rating 'so-so'",
        "row 3 (id 3): its image",
    ):
        assert told in line
    assert (
        conversations(
            "--input", tmp_path / "ours.parquet", "--output", tmp_path / "o.json", "--no-images", "--skip-bad"
        )
        == 0
    )
    assert [one["id"] for one in json.loads((tmp_path / "o.json").read_text())] == ["0", "3"]


def test_images_may_be_elsewhere_or_nowhere(published, tmp_path, capsys):
    for path in tmp_path.glob("sd1.5_*.jpg"):
        path.rename(tmp_path / "sub" / path.name)
    assert "2 of 3 rows are bad" in refused(capsys, "--input", published, "--output", tmp_path / "o.json")
    assert conversations("--input", published, "--output", tmp_path / "o.json", "--no-images") == 0
    assert (tmp_path / "o.json").read_bytes() == published.read_bytes()


def test_words_are_checked_against_scores(published, tmp_path, capsys):
    scores = "name,prompt,mos_quality,mos_align\nsd1.5_0.jpg,x,2.5,0.5\nsd1.5_1.jpg,y,2.1,2.2\n2.png,z,2.9,4.7\n"
    (tmp_path / "data.csv").write_text(scores)
    given = ["--input", published, "--scores", tmp_path / "data.csv", "--scores-image", "name"]
    assert conversations(*given, "--check", "mos_quality", "--dataset", "agiqa-3k") == 0
    said = capsys.readouterr().out
    assert "mos_quality: 100.0% of 3 words are those of the score, 100.0% within one" in said
    assert "mos_align: 33.3% of 3 words are those of the score, 33.3% within one" in said
    assert "they were made from mos_quality" in refused(capsys, *given, "--check", "mos_align")
    assert "other bins" in refused(capsys, *given, "--check", "mos_quality", "--scale", "0", "10")
    assert "no such column" in refused(capsys, *given, "--check", "mos")
    assert "nothing" not in refused(capsys, "--input", published, "--check", "mos_quality")
    (tmp_path / "data.csv").write_text(
        scores.replace("_0.jpg", "_7.jpg").replace("_1.jpg", "_8.jpg").replace("2.png", "9")
    )
    assert "no row is of one of the images" in refused(capsys, *given, "--check", "mos_quality")


def test_words_are_made_anew_from_the_right_scores(published, tmp_path, capsys):
    (tmp_path / "data.csv").write_text("image,mos_align\nsd1.5_0.jpg,0.5\nsd1.5_1.jpg,2.2\n2.png,\n")
    given = ["--input", published, "--scores", tmp_path / "data.csv", "--check", "mos_align"]
    assert not conversations(*given, "--fix-words", "--output", tmp_path / "o.parquet")
    assert "1 words made anew from mos_align, 1 conversations without a score left out" in capsys.readouterr().out
    assert [row["teacher_quality_rating"] for row in rows_of(tmp_path / "o.parquet")] == ["bad", "fair"]
    refused(capsys, *given, "--output", tmp_path / "wrong.parquet")
    assert not (tmp_path / "wrong.parquet").exists()
    assert "from which scores" in refused(capsys, "--input", published, "--fix-words", "--output", tmp_path / "p.json")


def test_what_cannot_be_done(published, tmp_path, capsys):
    assert "neither to write nor to check" in refused(capsys, "--input", published)
    assert "ends neither in .json nor in .parquet" in refused(
        capsys, "--input", published, "--output", tmp_path / "o.csv"
    )
    assert conversations("--input", published, "--output", tmp_path / "o.parquet") == 0
    args = ["conversations", "--input", str(tmp_path / "o.parquet"), "--output", str(tmp_path / "o.json")]
    assert main([*args, "--aspect", str(Aspect.AUTHENTICITY)]) == 2
    assert "no column teacher_authenticity_description" in capsys.readouterr().err
