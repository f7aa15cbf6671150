"""A distillation against a server on this machine: what is asked and written, and going on without paying twice."""

import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3agiqa.aspects import Aspect
from m3agiqa.cli import main
from m3agiqa.corpus import open_corpus
from m3agiqa.distil import distil
from m3agiqa.distil.output import taught_from
from m3agiqa.distil_config import DistilConfig
from m3agiqa.finetuning.talks import Columns, read_talks
from m3agiqa.settings import load
from tests.corpora import encode, picture
from tests.distil.conftest import SCORES
from tests.distil.distilling import BOTH, ended, run, settings, written
from tests.distil.teacher_server import KEY, Say, completion, described, error, good

WORDS = ["bad", "poor", "fair", "good", "excellent"]


def test_every_label_is_asked_for_and_the_output_is_a_corpus(teacher, labelled, tmp_path):
    done = run(teacher, labelled, tmp_path / "out", "images.max_side=32", labels=BOTH)
    rows = written(tmp_path / "out")
    assert list(rows) == [f"i{i}" for i in range(5)]
    assert [row["teacher_quality_rating"] for row in rows.values()] == WORDS
    assert [row["teacher_correspondence_rating"] for row in rows.values()] == [None, *WORDS[3::-1]]
    assert rows["i0"]["teacher_correspondence_description"] is None
    assert rows["i3"]["teacher_quality_description"] == "Soft edges and a smooth sky mark p3, seen for its quality."
    assert [row["teacher_quality_implied"] for row in rows.values()] == WORDS
    assert [row["mos_quality"] for row in rows.values()] == list(SCORES)
    assert rows["i2"]["image"] == str(labelled.parent / "2.png")
    assert (rows["i2"]["prompt"], rows["i2"]["generator"]) == ("p2", "g")
    assert len(teacher.asks) == 9
    assert set(teacher.paid.values()) == {1}
    ask = teacher.asked("p3")[0]
    assert "on average 3.4, on a scale from 0 (worst) to 5 (best), which is good." in ask.text
    assert ask.image.size == (32, 24)
    assert ask.body["response_format"]["json_schema"]["strict"] is True
    assert done["counts"] == {"quality": {"described": 5}, "correspondence": {"described": 4}}
    assert done["left"] == 0
    assert json.loads((tmp_path / "out" / "distil.json").read_text()) == done
    # Who learns from it may read the images, wherever they are.
    assert taught_from(str(tmp_path / "out")) == (str(labelled.parent),)
    assert taught_from(str(labelled.parent)) == ()


def test_the_output_becomes_a_published_file(teacher, labelled, tmp_path, capsys):
    run(teacher, labelled, tmp_path / "out")
    args = [
        "conversations",
        "--input",
        str(tmp_path / "out"),
        "--output",
        str(tmp_path / "o.json"),
        "--aspect",
        "quality",
    ]
    assert main([*args, "--check", "mos_quality"]) == 0
    assert "mos_quality: 100.0% of 5 words are those of the score" in capsys.readouterr().out
    items = json.loads((tmp_path / "o.json").read_text())
    assert [item["conversations"][3]["content"] for item in items] == WORDS
    assert "original prompt is: 'p4'." in items[4]["conversations"][0]["content"]


def test_what_is_missing_in_the_output_is_no_fault_to_who_learns_from_it(teacher, labelled, tmp_path):
    def behave(ask):
        refused = (ask.prompt, ask.aspect) in {("p1", "quality"), ("p2", "quality"), ("p2", "correspondence")}
        return completion(None, refusal="No.") if refused else good(ask)

    teacher.behave = behave
    run(teacher, labelled, tmp_path / "out", labels=BOTH)
    corpus = open_corpus(str(tmp_path / "out"), lenient=True)
    talks = read_talks({"out": corpus}, Columns(labels=BOTH))
    assert not talks.bad
    learnt = [(talks.pictures[talk.picture].id, str(talk.aspect)) for talk in talks.talks]
    both = [(f"i{i}", aspect) for i in (3, 4) for aspect in ("quality", "correspondence")]
    assert learnt == [("i0", "quality"), ("i1", "correspondence"), *both]
    assert talks.unanswered == {Aspect.QUALITY: 1, Aspect.CORRESPONDENCE: 1}
    assert talks.silent == 1


def test_the_same_command_again_asks_nothing(teacher, labelled, tmp_path):
    first = run(teacher, labelled, tmp_path / "out")
    before = written(tmp_path / "out")
    again = run(teacher, labelled, tmp_path / "out")
    assert len(teacher.asks) == 5
    assert written(tmp_path / "out") == before
    assert again["answers"] == first["answers"]


def test_blind_shows_no_score(teacher, labelled, tmp_path):
    run(teacher, labelled, tmp_path / "out", "ask.blind=true")
    for ask, score in zip(teacher.asks, SCORES, strict=True):
        assert str(score) not in ask.text
        assert "on average" not in ask.text


def test_an_image_without_a_prompt_is_asked_about_quality_alone(teacher, labelled, tmp_path):
    labelled.write_text(labelled.read_text().replace(",p3,", ",,"))
    done = run(teacher, labelled, tmp_path / "out", labels=BOTH)
    assert done["counts"]["correspondence"] == {"described": 3, "no_prompt": 1}
    row = written(tmp_path / "out")["i3"]
    assert row["teacher_correspondence_rating"] is None
    assert row["teacher_correspondence_description"] is None
    assert "no prompt" in row["teacher_correspondence_note"]
    assert "The prompt of this" not in teacher.asked("", "quality")[0].text


def test_images_within_the_corpus_are_copied_and_bad_ones_named(teacher, tmp_path):
    images = [encode(picture(40, 30, seed=1)), b"no image", encode(picture(40, 30, seed=2))]
    table = {"id": ["a", "b", "c"], "image": images, "prompt": ["pa", "pb", "pc"], "mos_quality": [1, 2, 3]}
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    done = run(teacher, tmp_path / "c.parquet", tmp_path / "out")
    rows = written(tmp_path / "out")
    assert [row["_bytes"] for row in rows.values()] == images
    assert "not an image" in rows["b"]["teacher_quality_note"]
    assert done["counts"]["quality"] == {"described": 2, "unreadable": 1}
    assert teacher.asked("pc")[0].image.size == (40, 30)


@pytest.mark.parametrize(
    "trouble",
    [
        error(429, "slow down"),
        error(500, "oops"),
        error(503, "busy", {"Retry-After": "0.05"}),
        Say(200, b'{"id": "c", "choices": [{"mess'),
        Say(200, {"object": "chat.completion", "choices": []}),
        Say(0, {}),
        Say(200, {}, hold=1.0),
    ],
    ids=["429", "500", "503 with Retry-After", "truncated", "no choices", "hung up", "silent"],
)
def test_what_passes_is_tried_again(teacher, labelled, tmp_path, trouble):
    teacher.behave = lambda ask: trouble if ask.number <= 2 and ask.prompt == "p1" else good(ask)
    done = run(teacher, labelled, tmp_path / "out", "teacher.timeout_s=0.3")
    assert [len(teacher.asked(f"p{i}")) for i in range(5)] == [1, 3, 1, 1, 1]
    assert done["counts"]["quality"] == {"described": 5}
    assert done["answers"]["paid"] == 5


def test_retry_after_holds_everybody_back(teacher, labelled, tmp_path):
    teacher.behave = lambda ask: error(429, headers={"Retry-After": "1"}) if len(teacher.asks) == 1 else good(ask)
    run(teacher, labelled, tmp_path / "out", "limits.concurrency=1")
    assert teacher.asks[1].at - teacher.asks[0].at >= 1.0
    teacher.asks.clear()
    teacher.behave = lambda ask: error(429, headers={"Retry-After": "9999"})
    line = ended(teacher, labelled, tmp_path / "other")
    assert "asks to wait for 9999 s" in line
    assert len(teacher.asks) == 1


def test_one_image_that_fails_for_good_is_left_and_asked_next_time(teacher, labelled, tmp_path):
    teacher.behave = lambda ask: error(500, "oops") if ask.prompt == "p2" else good(ask)
    done = run(teacher, labelled, tmp_path / "out")
    assert done["counts"]["quality"] == {"described": 4, "left": 1}
    assert done["failures"] == {"HTTP 500: oops, 3 times": 1}
    assert "the same command goes on" in done["go_on"]
    assert written(tmp_path / "out")["i2"]["teacher_quality_note"] == "not asked yet"
    teacher.behave = good
    assert run(teacher, labelled, tmp_path / "out")["left"] == 0
    assert len(teacher.paid) == 5
    assert set(teacher.paid.values()) == {1}


def test_leaks_and_wrong_forms_are_asked_again_with_the_reason(teacher, labelled, tmp_path):
    bad = {
        "p0": described("It would get 0.41 from most."),
        "p1": completion('{"description": "Cut o', finish="length"),
        "p2": completion("no JSON at all"),
        "p3": completion('{"description": "Sharp.", "rating": "splendid"}'),
        "p4": described("   "),
    }
    teacher.behave = lambda ask: bad[ask.prompt] if ask.number == 1 else good(ask)
    done = run(teacher, labelled, tmp_path / "out")
    assert done["answers"] == {"paid": 10, "ok": 5, "leak": 1, "invalid": 4}
    assert done["counts"]["quality"] == {"described": 5}
    again = teacher.asked("p0")[1].body["messages"]
    assert again[2]["content"] == bad["p0"].body["choices"][0]["message"]["content"]
    assert "states the score ('0.41')" in again[3]["content"]
    assert "max_output_tokens" in teacher.asked("p1")[1].body["messages"][3]["content"]


def test_a_teacher_that_cannot_be_stopped_from_leaking_is_given_up(teacher, labelled, tmp_path):
    teacher.behave = lambda ask: described("The image quality is good.") if ask.prompt == "p3" else good(ask)
    done = run(teacher, labelled, tmp_path / "out", "sampling.again=1")
    assert len(teacher.asked("p3")) == 2
    assert done["counts"]["quality"] == {"described": 4, "given_up": 1}
    row = written(tmp_path / "out")["i3"]
    assert row["teacher_quality_description"] is None
    assert row["teacher_quality_rating"] is None
    assert row["teacher_quality_note"].startswith("leak: gives a verdict")
    run(teacher, labelled, tmp_path / "out", "sampling.again=1")
    assert len(teacher.asked("p3")) == 2


@pytest.mark.parametrize(
    "refusal",
    [
        completion(None, refusal="I can't help with that."),
        completion("", finish="content_filter"),
        completion("I'm sorry, but I can't assist with that."),
        described("I'm sorry, I cannot describe this image."),
        error(400, "Your input was rejected by our safety system", code="content_policy_violation"),
    ],
    ids=["refusal", "filter", "plain words", "in JSON", "policy"],
)
def test_a_refusal_is_not_asked_again(teacher, labelled, tmp_path, refusal):
    teacher.behave = lambda ask: refusal if ask.prompt == "p1" else good(ask)
    done = run(teacher, labelled, tmp_path / "out")
    run(teacher, labelled, tmp_path / "out")
    assert len(teacher.asked("p1")) == 1
    assert done["counts"]["quality"] == {"described": 4, "given_up": 1}
    assert written(tmp_path / "out")["i1"]["teacher_quality_note"].startswith("refused: ")


def test_json_is_asked_for_as_the_server_takes_it(teacher, labelled, tmp_path):
    def picky(ask):
        if ask.format != "text":
            return error(400, f"response_format of type {ask.format} is not supported", param="response_format")
        return completion("Here you are:\n```json\n" + good(ask).body["choices"][0]["message"]["content"] + "\n```")

    teacher.behave = picky
    done = run(teacher, labelled, tmp_path / "out")
    assert [ask.format for ask in teacher.asks] == [
        "json_schema",
        "json_object",
        "text",
        "text",
        "text",
        "text",
        "text",
    ]
    assert done["counts"]["quality"] == {"described": 5}
    line = ended(
        teacher, labelled, tmp_path / "strict", "teacher.response_format=json_schema", "limits.give_up_after=2"
    )
    assert "json_schema is not supported" in line


def test_rejection_sampling_keeps_what_agrees(teacher, labelled, tmp_path):
    said = {
        "p0": ["fair", "poor", "bad"],
        "p1": ["bad", "fair", "bad"],
        "p2": ["fair"],
        "p3": ["good"],
        "p4": ["fair"] * 3,
    }
    teacher.behave = lambda ask: described(f"Answer {ask.number} of {ask.prompt}.", said[ask.prompt][ask.number - 1])
    some = ("ask.blind=true", "sampling.candidates=3")
    done = run(teacher, labelled, tmp_path / "out", *some)
    rows = written(tmp_path / "out")
    assert rows["i0"]["teacher_quality_description"] == "Answer 3 of p0."
    assert rows["i1"]["teacher_quality_description"] is None
    assert "no candidate agrees with the human word (they say bad, fair, bad)" in rows["i1"]["teacher_quality_note"]
    assert len(teacher.asks) == 3 + 3 + 1 + 1 + 3
    assert done["counts"]["quality"] == {"described": 3, "given_up": 2}
    run(teacher, labelled, tmp_path / "out", *some, "sampling.if_none_agrees=nearest")
    assert len(teacher.asks) == 11
    rows = written(tmp_path / "out")
    assert rows["i1"]["teacher_quality_description"] == "Answer 1 of p1."
    assert (rows["i4"]["teacher_quality_rating"], rows["i4"]["teacher_quality_implied"]) == ("excellent", "fair")


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (error(429, "You exceeded your current quota", code="insufficient_quota"), "the quota is used up"),
        (error(402, "Insufficient Balance"), "the quota is used up"),
        (error(404, "The model `x` does not exist"), "The model `x` does not exist"),
        (error(403, "Country not supported"), "Country not supported"),
    ],
)
def test_what_no_request_gets_past_ends_the_run_and_keeps_the_work(teacher, labelled, tmp_path, trouble, told):
    teacher.behave = lambda ask: good(ask) if len(teacher.asks) <= 2 else trouble
    line = ended(teacher, labelled, tmp_path / "out")
    assert told in line
    assert "2 descriptions are kept, 3 are left; the same command goes on" in line
    assert len(teacher.asks) == 3
    assert [row["teacher_quality_description"] is None for row in written(tmp_path / "out").values()] == [
        False, False, True, True, True,
    ]  # fmt: skip
    teacher.behave = good
    assert run(teacher, labelled, tmp_path / "out")["left"] == 0
    assert len(teacher.paid) == 5
    assert set(teacher.paid.values()) == {1}


def test_a_teacher_that_is_not_there(teacher, labelled, tmp_path):
    run(teacher, labelled, tmp_path / "out", "budget.max_requests=10")
    line = ended("http://127.0.0.1:9/v1", labelled, tmp_path / "new", "limits.give_up_after=1")
    assert "cannot be reached" in line
    assert "3 times" in line
    assert "5 are left; the same command goes on" in line


def test_keys_that_are_missing_wrong_or_sent_back(teacher, labelled, tmp_path, monkeypatch):
    teacher.behave = lambda ask: error(400, f"cannot read Authorization: Bearer {KEY}")
    assert "***" in ended(teacher, labelled, tmp_path / "echo")
    teacher.behave = lambda ask: described(f"Somebody wrote {KEY} on the wall of {ask.prompt}.")
    run(teacher, labelled, tmp_path / "said")
    assert "wrote *** on the wall" in written(tmp_path / "said")["i0"]["teacher_quality_description"]
    monkeypatch.setenv("TEACHER_KEY", "sk-wrong")
    assert "does not accept the key" in ended(teacher, labelled, tmp_path / "wrong")
    monkeypatch.setenv("TEACHER_KEY", f"{KEY}\nX-Evil: 1")
    assert "characters that no key has" in ended(teacher, labelled, tmp_path / "broken")
    monkeypatch.delenv("TEACHER_KEY")
    assert "TEACHER_KEY: is not set" in ended(teacher, labelled, tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_budgets_end_a_run_before_they_are_passed(teacher, labelled, tmp_path):
    prices = ("budget.input_price=1000", "budget.output_price=1000", "budget.image_tokens=700")
    line = ended(teacher, labelled, tmp_path / "out", "budget.max_requests=2", *prices, "limits.concurrency=4")
    assert "budget" not in line
    assert "--max-requests 2: is reached; raise it to go on: 2 descriptions are kept, 3 are left" in line
    assert len(teacher.asks) == 2
    # An answer costs 1.1, but might have cost 1.5: after 4.4 nobody can say that another one stays below 5.2.
    line = ended(teacher, labelled, tmp_path / "out", "budget.max_cost=5.2", *prices, "limits.concurrency=4")
    assert "--max-cost 5.2: is reached (4.4000 spent)" in line
    assert len(teacher.asks) == 4
    done = run(teacher, labelled, tmp_path / "out", "budget.max_cost=6", *prices)
    assert done["cost"] == pytest.approx(5.5)
    assert done["tokens"] == {"input": 5000, "output": 500, "cached": 0}


def test_answers_of_a_time_without_prices_cost_what_they_would_today(teacher, labelled, tmp_path):
    prices = ("budget.input_price=1000", "budget.output_price=1000", "budget.image_tokens=700")
    ended(teacher, labelled, tmp_path / "out", "budget.max_requests=2")
    ended(teacher, labelled, tmp_path / "out", "budget.max_requests=3", *prices)
    dear = [price.replace("1000", "2000") for price in prices]
    # Two answers of 2.2 and, from when they cost half, one of 1.1: another one would not stay below 6.
    assert "is reached (5.5000 spent)" in ended(teacher, labelled, tmp_path / "out", "budget.max_cost=6", *dear)
    assert len(teacher.asks) == 3
    assert run(teacher, labelled, tmp_path / "out", *prices)["cost"] == pytest.approx(5.5)


def test_a_dry_run_asks_and_writes_nothing(teacher, labelled, tmp_path, capsys):
    args = ["distil", "--input", str(labelled), "--out", str(tmp_path / "out"), "--label", "quality=mos_quality"]
    prices = ["budget.input_price=2", "budget.output_price=10", "budget.image_tokens=1000"]
    free = ["--set", *settings("http://127.0.0.1:9/v1", *prices, "teacher.key_env=NOT_THERE")]
    assert main([*args, "--dry-run", *free]) == 0
    full = capsys.readouterr().out
    assert "to ask: 5 descriptions, one request each" in full
    assert not (tmp_path / "out").exists()
    assert main([*args, "--dry-run", "--batch", *free]) == 0
    half = capsys.readouterr().out
    cost, batch = (float(text.splitlines()[0].rsplit(" ", 1)[1]) for text in (full, half))
    assert batch == pytest.approx(cost / 2, rel=0.01)
    assert cost == pytest.approx((5 * 1000 * 2 + 5 * 150 * 10) / 1e6, rel=0.5)
    ended(teacher, labelled, tmp_path / "out", "budget.max_requests=3")
    assert main([*args, "--dry-run", *free]) == 0
    out = capsys.readouterr().out
    assert "to ask: 2 descriptions, one request each: about 2,000 tokens in, 200 out" in out


def test_another_request_is_not_mixed_in(teacher, labelled, tmp_path):
    run(teacher, labelled, tmp_path / "out")
    assert "config.ask.blind" in ended(teacher, labelled, tmp_path / "out", "ask.blind=true")
    assert "config.teacher.model" in ended(teacher, labelled, tmp_path / "out", "teacher.model=other")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    assert "holds no distillation" in ended(teacher, labelled, tmp_path / "mine")
    assert len(teacher.asks) == 5
    labelled.write_text(labelled.read_text().replace(",2.37,", ",4.5,"))
    run(teacher, labelled, tmp_path / "out")
    assert [ask.prompt for ask in teacher.asks[5:]] == ["p2"], "the row whose score has changed, and no other"
    assert written(tmp_path / "out")["i2"]["teacher_quality_rating"] == "excellent"


def test_decimal_scores_are_taken_as_they_are_written(teacher, tmp_path):
    scores = [Decimal(text) for text in ("0.01", "0.09", "0.17", "0.25", "0.33", "0.41")]
    images = [encode(picture(40, 30, seed=i)) for i in range(6)]
    table = {"image": images, "prompt": [f"p{i}" for i in range(6)], "mos": pa.array(scores, pa.decimal128(4, 2))}
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    config = load(DistilConfig, None, settings(teacher))
    # The ends of the scale are on it, and each edge in between begins the next word.
    distil(config, str(tmp_path / "c.parquet"), str(tmp_path / "out"), {Aspect.QUALITY: "mos"}, (0.01, 0.41))
    assert [row["teacher_quality_rating"] for row in written(tmp_path / "out").values()] == [*WORDS, WORDS[-1]]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("mos_quality", "mos_q", "has no column mos_quality"),
        ("0.41", "nan", "holds nan"),
        ("0.41", "7", "7 is outside the scale 0 to 5"),
        ("0.41", "x", "not numbers"),
    ],
)
def test_labels_that_cannot_be_used(teacher, labelled, tmp_path, old, new, told):
    labelled.write_text(labelled.read_text().replace(old, new))
    assert told in ended(teacher, labelled, tmp_path / "out")
    assert not teacher.asks
