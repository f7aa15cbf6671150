"""Reading conversations: columns, words from scores, bad rows, splits and the order of batches."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from m3agiqa.aspects import Aspect
from m3agiqa.errors import UserError
from m3agiqa.finetuning.order import batches_of, pieces
from m3agiqa.finetuning.parts import shares, split
from m3agiqa.finetuning.talks import Columns
from tests.corpora import encode, picture
from tests.finetuning.helpers import rows, settings, talks_of, write

Q, C, A = Aspect.QUALITY, Aspect.CORRESPONDENCE, Aspect.AUTHENTICITY


def read(tmp_path, made, columns=None):
    return talks_of(write(tmp_path / "c", made, pictures=False), columns=columns)


def test_answers_are_found_under_their_usual_names(tmp_path):
    talks = read(tmp_path, rows(6), Columns(labels={Q: "mos_quality"}))
    assert talks.aspects == (Q, A)
    assert len(talks.talks) == 12
    assert [(t.aspect, t.description, t.word, t.score) for t in talks.talks[2:4]] == [
        (Q, "It is b.", "poor", 1.25),
        (A, "It is b!.", "fair", None),
    ]
    assert not talks.bad


def test_words_are_made_of_scores_where_there_are_none(tmp_path):
    made = [{k: v for k, v in row.items() if k != "teacher_quality_rating"} for row in rows(10, ("quality",))]
    with pytest.raises(UserError, match="no column teacher_quality_rating"):
        read(tmp_path, made)
    talks = read(tmp_path, made, Columns(labels={Q: "mos_quality"}, scale=(0, 5)))
    assert [t.word for t in talks.talks[:5]] == ["bad", "poor", "fair", "good", "excellent"]
    stretched = read(tmp_path, made, Columns(labels={Q: "mos_quality"}, scale=(0, 10)))
    assert [(t.word, t.score) for t in stretched.talks[:5]][-1] == ("fair", 2.5)


def test_a_teacher_that_was_not_asked_is_no_fault(tmp_path):
    made = rows(4)
    for i, row in enumerate(made):
        row["image"] = f"{i}.png"
        del row["image_path"], row["_size"]
    made[1] |= {"teacher_quality_description": None, "teacher_quality_rating": None}
    made[2] |= {f"teacher_{a}_{s}": None for a in ("quality", "authenticity") for s in ("description", "rating")}
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "c.parquet")
    talks = talks_of(str(tmp_path / "c.parquet"))
    assert [(t.picture, t.aspect) for t in talks.talks] == [(0, Q), (0, A), (1, A), (2, Q), (2, A)]
    assert talks.silent == 1
    assert talks.unanswered == {Q: 1}
    assert talks.notes() == ["1 rows without a conversation left out", "quality: 1 rows without an answer"]
    assert [p.id for p in talks.pictures] == ["r0", "r1", "r3"]


def test_what_a_csv_leaves_out_is_no_conversation(tmp_path):
    made = rows(3)
    made[1] |= {"teacher_authenticity_description": "", "teacher_authenticity_rating": ""}
    talks = read(tmp_path, made)
    assert [(t.picture, t.aspect) for t in talks.talks] == [(0, Q), (0, A), (1, Q), (2, Q), (2, A)]
    assert not talks.bad


BAD = [
    ({"teacher_quality_description": "  "}, "row 1 (id r1): quality: the description is empty"),
    ({"teacher_quality_rating": ""}, "row 1 (id r1): quality: the rating is empty"),
    ({"teacher_quality_rating": "great"}, "row 1 (id r1): quality: the rating 'great' is not one of the five words"),
    ({"teacher_quality_rating": "good or fair"}, "quality: the rating 'good or fair' is not one of the five"),
    ({"mos_quality": 7}, "row 1 (id r1): quality: the score 7 is outside the scale 0 to 5"),
    ({"mos_quality": "nan"}, "quality: the score nan is outside the scale"),
    (
        {"teacher_quality_rating": "x", "teacher_authenticity_description": ""},
        "row 1 (id r1): quality: the rating 'x' is not one of the five words; authenticity: the description is empty",
    ),
]


@pytest.mark.parametrize(("change", "said"), BAD)
def test_a_bad_row_is_named_with_its_number_and_id(tmp_path, change, said):
    made = rows(3)
    made[1] |= change
    talks = read(tmp_path, made, Columns(labels={Q: "mos_quality"}))
    assert len(talks.bad) == 1
    assert said in str(talks.bad[0])
    assert {t.picture for t in talks.talks} == {0, 1}
    assert [p.id for p in talks.pictures] == ["r0", "r2"]


def test_correspondence_needs_a_prompt(tmp_path):
    made = rows(3, ("correspondence",))
    made[2]["prompt"] = ""
    assert [str(bad) for bad in read(tmp_path, made).bad] == ["row 2 (id r2): correspondence: there is no prompt"]


def test_words_are_taken_as_people_write_them(tmp_path):
    made = rows(2, ("quality",))
    made[0]["teacher_quality_rating"] = " Good. "
    assert read(tmp_path, made).talks[0].word == "good"


COLUMNS = [
    (Columns(descriptions={Q: "teacher_qualty_description"}), "did you mean teacher_quality_description"),
    (Columns(ratings={Q: "nothing"}), "--rating quality=nothing: no input has such a column"),
    (Columns(labels={C: "mos_quality"}), "no input has descriptions of correspondence"),
    (Columns(labels={Q: "prompt2"}), "column prompt2 is of type string, not numbers"),
    (Columns(descriptions={Q: "mos_quality"}), "column mos_quality is of type double, not text"),
]


@pytest.mark.parametrize(("columns", "said"), COLUMNS)
def test_columns_that_cannot_be_used_are_refused(tmp_path, columns, said):
    made = [row | {"prompt2": "x"} for row in rows(3)]
    with pytest.raises(UserError, match=said):
        read(tmp_path, made, columns)


def conversation(number, roles=("user", "assistant", "user", "assistant"), word="fair"):
    texts = ["It's original prompt is: 'a cat'. Describe.", f"Description {number}.", "Rate.", word]
    talk = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    return {"id": str(number), "image": f"{number}.jpg", "conversations": talk}


def test_published_conversations(tmp_path):
    items = [conversation(0), conversation(1, ("user", "system", "user", "assistant")), conversation(2, word="so so")]
    file = tmp_path / "train_quality.json"
    file.write_text(json.dumps(items))
    with pytest.raises(UserError, match="say which aspect they are of"):
        talks_of(str(file))
    talks = talks_of(str(file), columns=Columns({Q: "description_given"}, {Q: "rating_given"}))
    assert [(t.description, t.word, t.prompt) for t in talks.talks] == [("Description 0.", "fair", "a cat")]
    assert [str(bad) for bad in talks.bad] == [
        "row 1 (id 1): its conversation is not user, assistant, user, assistant, each with a text "
        "(message 1 has the role 'system', not assistant)",
        "row 2 (id 2): quality: the rating 'so so' is not one of the five words",
    ]


def test_published_conversations_without_answers_are_bad_rows(tmp_path):
    """A teacher that was not asked leaves nulls, or fields of a CSV empty; a conversation is there to be answered."""
    items = [conversation(number) for number in range(6)]
    for number, empty in ((1, (1, 3)), (2, (1,)), (3, (3,))):
        for message in empty:
            items[number]["conversations"][message]["content"] = ""
    del items[4]["conversations"][1:]
    del items[5]["conversations"][2:]
    items[5]["conversations"][1]["content"] = " "
    file = tmp_path / "train_quality.json"
    file.write_text(json.dumps(items))
    for columns in (Columns({Q: "description_given"}, {Q: "rating_given"}), both_aspects()):
        talks = talks_of(str(file), columns=columns)
        assert [talks.pictures[talk.picture].id for talk in talks.talks if talk.aspect is Q] == ["0"]
        said = [str(bad) for bad in talks.bad]
        for number, why in enumerate(("holds no answer", "description is empty", "rating is empty"), start=1):
            assert said[number - 1].startswith(f"row {number} (id {number}): ")
            assert why in said[number - 1]
        assert said[3:] == [f"row {number} (id {number}): its conversation holds no answer" for number in (4, 5)]
        assert talks.silent == 0


def both_aspects():
    return Columns(dict.fromkeys((Q, A), "description_given"), dict.fromkeys((Q, A), "rating_given"))


def test_no_prompt_is_in_two_parts(tmp_path):
    made = [row | {"prompt": f"p{i // 3}"} for i, row in enumerate(rows(60))]
    talks = read(tmp_path, made)
    found = split(talks, settings("tiny", "data.split_by=prompt", "data.validation_share=0.2"), talks.aspects, 1)
    train, judged = ({t.prompt for t in part} for part in (found.train, found.validation))
    assert not train & judged
    assert len(train | judged) == 20
    assert found.counts()["validation"] == {"images": 12, "authenticity": 12, "quality": 12}
    only = split(talks, settings("tiny", "data.split_by=prompt", "watch.most_rows=4"), (Q,), 1)
    assert {t.aspect for t in only.train} == {Q}
    assert len(only.validation) == 4


def test_the_column_split_is_kept_to(tmp_path):
    made = [row | {"split": ("train", "train", "val", "test")[i % 4]} for i, row in enumerate(rows(8))]
    talks = read(tmp_path, made)
    found = split(talks, settings("tiny", "data.split_by=split"), talks.aspects, 1)
    assert [sorted({talks.pictures[t.picture].id for t in part}) for part in (found.train, found.validation)] == [
        ["r0", "r1", "r4", "r5"],
        ["r2", "r6"],
    ]
    assert found.notes == ("2 test images are not touched",)
    made[5]["split"] = "other"
    talks = read(tmp_path, made)
    with pytest.raises(UserError, match=r"row 5 \(id r5\) has the value other"):
        split(talks, settings("tiny", "data.split_by=split"), talks.aspects, 1)


@pytest.mark.parametrize("split_by", ["prompt", "id"])
def test_tests_are_not_touched_however_the_others_are_split(tmp_path, split_by):
    made = [row | {"split": ("train", "test", "")[i % 3], "prompt": f"p{i // 2}"} for i, row in enumerate(rows(60))]
    talks = read(tmp_path, made)
    config = settings("tiny", f"data.split_by={split_by}", "data.validation_share=0.2")
    found = split(talks, config, talks.aspects, 1)
    train, judged = ({talks.pictures[t.picture].id for t in part} for part in (found.train, found.validation))
    assert train | judged == {row["id"] for row in made if row["split"] != "test"}
    assert not train & judged
    assert len(judged) == 8
    assert "20 test images are not touched" in found.notes
    assert any(note.endswith("test prompts are also trained on: scores on them flatter") for note in found.notes)
    only = read(tmp_path / "only", [row | {"split": "test"} for row in made])
    with pytest.raises(UserError, match=r"the training part: holds no conversations of .* beside 60 test images"):
        split(only, config, only.aspects, 1)


def test_workers_share_images_not_conversations(tmp_path):
    talks = read(tmp_path, rows(21))
    found = split(talks, settings("tiny"), talks.aspects, 1)
    made = shares(found, talks.pictures, 2)
    assert sorted(t.picture for share in made for t in share.train) == sorted(t.picture for t in found.train)
    assert not set(made[0].pictures) & set(made[1].pictures)
    assert abs(len(made[0].train) - len(made[1].train)) <= 2
    with pytest.raises(UserError, match="the validation part has 3 images"):
        shares(found, talks.pictures, 8)


def test_embedded_images_are_found_again(tmp_path):
    from m3agiqa.finetuning.pictures import embedded_images

    made = [
        {
            "id": str(i),
            "image": encode(picture(seed=i)),
            "teacher_quality_description": "d",
            "teacher_quality_rating": "bad",
        }
        for i in range(7)
    ]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "c.parquet", row_group_size=2)
    talks = talks_of(str(tmp_path / "c.parquet"), rows_per_shard=2)
    assert len(talks.shards) == 4
    wanted = {number: talks.pictures[number] for number in (0, 3, 6)}
    assert {n: data == made[n]["image"] for n, data in embedded_images(wanted, talks.shards)} == {
        0: True,
        3: True,
        6: True,
    }


def order(talks, seed=0, **how):
    lengths = [10 + 7 * (i % 13) for i in range(len(talks))]
    generator = torch.Generator().manual_seed(seed)
    return lengths, batches_of(talks, lengths, 8, **({"bucket": 4, "together": False} | how), generator=generator)


def test_batches_hold_everything_once_and_similar_lengths(tmp_path):
    talks = read(tmp_path, rows(50)).talks
    lengths, found = order(talks)
    assert sorted(place for batch in found for place in batch) == list(range(100))
    assert [len(batch) for batch in found] == [8] * 12 + [4]
    spread = sum(max(lengths[p] for p in b) - min(lengths[p] for p in b) for b in found)
    mixed = order(talks, bucket=1)[1]
    assert spread < 0.6 * sum(max(lengths[p] for p in b) - min(lengths[p] for p in b) for b in mixed)
    assert order(talks)[1] == found
    assert order(talks, seed=1)[1] != found
    pictures = [len({talks[place].picture for place in batch}) for batch in order(talks, together=True)[1]]
    assert pictures == [4] * 12 + [2]


def test_pieces_are_as_many_as_asked():
    assert pieces([1, 2, 3, 4, 5], 2, 4) == [[1, 2], [3, 4], [5], []]
