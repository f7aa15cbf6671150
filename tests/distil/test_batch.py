"""The Batch API: all at once, half the price, found again whatever was killed in between."""

import json
import re

import pytest

from m3agiqa.aspects import RATING_WORDS, Aspect
from m3agiqa.distil.journal import JOURNAL, Journal
from m3agiqa.distil.run import summary
from m3agiqa.errors import UserError
from tests.distil.distilling import BOTH, ended, run, written
from tests.distil.teacher_server import completion, described, error, good

BATCH = ("batch.use=true", "batch.poll_s=0.01", "budget.input_price=1000", "budget.output_price=1000")


def test_all_is_asked_in_batches_at_half_the_price(teacher, labelled, tmp_path):
    (tmp_path / "out" / "batches").mkdir(parents=True)
    (tmp_path / "out" / "distil.json").write_text("{}")
    (tmp_path / "out" / "batches" / "killed.jsonl").write_text("half a li")
    done = run(teacher, labelled, tmp_path / "out", *BATCH, "batch.max_requests=4", labels=BOTH)
    assert done["counts"] == {"quality": {"described": 5}, "correspondence": {"described": 4}}
    assert done["cost"] == pytest.approx(9 * 1.1 / 2)
    assert [batch["request_counts"]["total"] for batch in teacher.batches.values()] == [5, 4]
    assert "POST /v1/chat/completions" not in teacher.log
    assert not list((tmp_path / "out" / "batches").iterdir())
    assert len(written(tmp_path / "out")) == 5
    run(teacher, labelled, tmp_path / "out", *BATCH, labels=BOTH)
    assert len(teacher.batches) == 2


def test_what_cannot_be_used_goes_into_the_next_batch(teacher, labelled, tmp_path):
    def behave(ask):
        if ask.format == "json_schema":
            return error(400, "json_schema is not supported", param="response_format")
        trouble = {"p0": described("I give it 0.41."), "p1": error(500, "oops"), "p2": completion("{")}
        return trouble[ask.prompt] if ask.prompt in trouble and ask.number == 2 else good(ask)

    teacher.behave = behave
    done = run(teacher, labelled, tmp_path / "out", *BATCH)
    assert [batch["request_counts"]["total"] for batch in teacher.batches.values()] == [5, 5, 3]
    assert done["counts"]["quality"] == {"described": 5}
    assert done["answers"] == {"paid": 7, "ok": 5, "leak": 1, "invalid": 1}
    assert done["failures"] == {}


def test_a_batch_without_answers_ends_the_run(teacher, labelled, tmp_path):
    teacher.behave = lambda ask: error(500, "oops")
    assert "a batch gave no answers (HTTP 500: oops)" in ended(teacher, labelled, tmp_path / "out", *BATCH)
    assert len(teacher.batches) == 1
    teacher.behave = lambda ask: good(ask) if ask.prompt == "p0" else error(429, "x", code="insufficient_quota")
    line = ended(teacher, labelled, tmp_path / "out", *BATCH)
    assert "the quota is used up" in line
    assert "1 descriptions are kept, 4 are left" in line


def test_a_batch_that_the_server_refuses_is_made_anew_by_the_next_command(teacher, labelled, tmp_path):
    teacher.ends = [("failed", 0)]
    line = ended(teacher, labelled, tmp_path / "out", *BATCH)
    kept = "0 descriptions are kept, 5 are left; the same command goes on"
    assert line == f"batch batch_0: was refused: no such model; mend that: {kept}"
    assert not teacher.asks
    assert run(teacher, labelled, tmp_path / "out", *BATCH)["answers"] == {"paid": 5, "ok": 5}
    assert len(teacher.batches) == 2


@pytest.mark.parametrize(
    ("end", "why"), [("expired", "HTTP 500: it was not executed in time"), ("cancelled", "it was cancelled")]
)
def test_what_a_batch_did_not_come_to_goes_into_the_next(teacher, labelled, tmp_path, end, why):
    teacher.ends = [(end, 2)]
    assert run(teacher, labelled, tmp_path / "out", *BATCH)["answers"] == {"paid": 5, "ok": 5}
    assert [batch["request_counts"]["total"] for batch in teacher.batches.values()] == [5, 3]
    assert set(teacher.paid.values()) == {1}
    # One that came to nothing is not asked for again at once, as that might go on for ever.
    teacher.ends = [(end, 0)]
    line = ended(teacher, labelled, tmp_path / "other", *BATCH)
    assert f"a batch gave no answers ({why}); " in line
    assert "0 descriptions are kept, 5 are left; the same command goes on" in line
    assert len(teacher.batches) == 3
    assert run(teacher, labelled, tmp_path / "other", *BATCH)["left"] == 0


def test_only_what_the_budget_allows_is_submitted(teacher, labelled, tmp_path):
    line = ended(teacher, labelled, tmp_path / "out", *BATCH, "budget.max_requests=3")
    assert "--max-requests 3: is reached" in line
    assert "3 descriptions are kept, 2 are left" in line
    assert [batch["request_counts"]["total"] for batch in teacher.batches.values()] == [3]


def test_a_batch_is_gone_on_with_by_its_id(teacher, labelled, tmp_path):
    """As after a kill while it was under way: the journal knows the batch, and none of its answers."""
    run(teacher, labelled, tmp_path / "out", *BATCH)
    journal = tmp_path / "out" / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"state":"made"' in line or '"state":"submitted"' in line))
    assert "go on with --batch" in ended(teacher, labelled, tmp_path / "out", *BATCH, "batch.use=false")
    assert "POST /v1/chat/completions" not in teacher.log
    done = run(teacher, labelled, tmp_path / "out", *BATCH)
    assert len(teacher.batches) == 1
    assert done["counts"]["quality"] == {"described": 5}
    assert done["answers"]["paid"] == 5


def test_a_batch_half_taken_is_taken_to_the_end(teacher, labelled, tmp_path):
    run(teacher, labelled, tmp_path / "out", *BATCH)
    journal = tmp_path / "out" / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:4]))
    assert run(teacher, labelled, tmp_path / "out", *BATCH)["answers"]["paid"] == 5
    assert len(teacher.batches) == 1
    ids = [
        json.loads(line)["answer"]["id"] for line in journal.read_text().splitlines() if "answer" in json.loads(line)
    ]
    assert sorted(ids) == [f"i{i}" for i in range(5)]


def test_a_batch_whose_id_was_never_written_down_is_found_by_its_name(teacher, labelled, tmp_path):
    run(teacher, labelled, tmp_path / "out", *BATCH)
    journal = tmp_path / "out" / JOURNAL
    made = next(line for line in journal.read_text().splitlines(keepends=True) if '"state":"made"' in line)
    journal.write_text(made)
    assert run(teacher, labelled, tmp_path / "out", *BATCH)["answers"]["paid"] == 5
    assert len(teacher.batches) == 1
    # One that was not made after all is asked for anew.
    journal.write_text(made.replace(json.loads(made)["batch"]["name"], "0" * 32))
    assert run(teacher, labelled, tmp_path / "out", *BATCH)["answers"]["paid"] == 5
    assert len(teacher.batches) == 2
    assert Journal.peek(tmp_path / "out").batches["0" * 32]["state"] == "never made"


def test_an_answer_that_is_lost_on_its_way_makes_no_second_batch(teacher, labelled, tmp_path):
    teacher.lose_the_answer_of = "POST /v1/batches"
    assert run(teacher, labelled, tmp_path / "out", *BATCH)["answers"]["paid"] == 5
    assert len(teacher.batches) == 1


def cut_journal(out, *states):
    """Leaves of the journal what is known of batches in these states, as if the command had been killed then."""
    journal = out / JOURNAL
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    kept = [line for line in lines if line.get("batch", {}).get("state") in states]
    journal.write_text("".join(json.dumps(line) + "\n" for line in kept))


def judged(ask):
    """A description that says which word it was told."""
    word = re.search(r"which is (\w+)\.", ask.text)[1]
    return described(f"A {word}-looking smear lies across {ask.prompt}.", word)


def test_another_request_does_not_get_the_answers_of_a_batch_under_way(teacher, labelled, tmp_path):
    teacher.behave, out = judged, tmp_path / "out"
    run(teacher, labelled, out, *BATCH)
    cut_journal(out, "made", "submitted")
    with pytest.raises(UserError) as caught:
        run(teacher, labelled, out, *BATCH, labels={Aspect.QUALITY: "mos_align"})
    assert str(caught.value).endswith(
        "holds a distillation that differs (labels.quality); "
        "give the command that began it with --batch, to take the answers of its batch under way, or another --out"
    )
    run(teacher, labelled, out, *BATCH)
    assert len(teacher.batches) == 1
    assert [row["teacher_quality_implied"] for row in written(out).values()] == list(RATING_WORDS)
    with pytest.raises(UserError, match="give the command that began it, or another --out"):
        run(teacher, labelled, out, *BATCH, labels={Aspect.QUALITY: "mos_align"})


@pytest.mark.parametrize("before", [0, 2])
def test_answers_to_scores_that_were_corrected_meanwhile_are_left_over(teacher, labelled, tmp_path, before):
    """Before: answers of the batch that had been taken when the command was killed, that of the corrected row too."""
    teacher.behave, out = judged, tmp_path / "out"
    run(teacher, labelled, out, *BATCH)
    lines = (out / JOURNAL).read_text().splitlines(keepends=True)
    (out / JOURNAL).write_text("".join(lines[: 2 + before]))
    labelled.write_text(labelled.read_text().replace("p1,g,1.0,", "p1,g,4.7,"))
    said = []
    done = run(teacher, labelled, out, *BATCH, say=said.append)
    rows = written(out)
    assert rows["i1"]["teacher_quality_description"] == "A excellent-looking smear lies across p1."
    assert [row["teacher_quality_rating"] for row in rows.values()] == ["bad", "excellent", *RATING_WORDS[2:]]
    assert [batch["request_counts"]["total"] for batch in teacher.batches.values()] == [5, 1]
    # What is paid for is counted, once.
    assert done["answers"] == {"paid": 6, "ok": 6} if before else {"paid": 6, "ok": 5, "left_over": 1}
    assert done["cost"] == pytest.approx(6 * 1.1 / 2)
    note = "note: batch batch_0: 1 answers are left over: what they are to has changed since"
    assert (note in said) == (not before)
    assert ("6 answers (1 left over), " in "\n".join(summary(done, str(out)))) == (not before)
    assert run(teacher, labelled, out, *BATCH)["answers"]["paid"] == 6


def test_a_batch_of_which_nothing_is_asked_any_more_does_not_end_the_run(teacher, labelled, tmp_path):
    teacher.behave = lambda ask: error(400, "no", code="content_policy_violation") if ask.prompt == "p0" else good(ask)
    out = tmp_path / "out"
    run(teacher, labelled, out, *BATCH)
    cut_journal(out, "made", "submitted")
    labelled.write_text(labelled.read_text().replace(",p", ",q"))
    done = run(teacher, labelled, out, *BATCH)
    assert done["answers"] == {"paid": 10, "ok": 5, "left_over": 5}
    assert done["cost"] == pytest.approx(9 * 1.1 / 2)


def test_a_batch_that_was_taken_whole_before_the_kill_is_not_without_answers(teacher, labelled, tmp_path):
    run(teacher, labelled, tmp_path / "out", *BATCH)
    journal = tmp_path / "out" / JOURNAL
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    assert run(teacher, labelled, tmp_path / "out", *BATCH)["answers"] == {"paid": 5, "ok": 5}


def test_names_of_lines_are_within_the_limit(teacher, labelled, tmp_path):
    labelled.write_text(labelled.read_text().replace("i1,", f"{'long' * 50},"))
    run(teacher, labelled, tmp_path / "out", *BATCH, labels=BOTH)
    names = [json.loads(line)["custom_id"] for line in teacher.files["file-0"].splitlines()]
    assert len(set(names)) == 9
    assert max(map(len, names)) <= 64


def test_answers_of_a_batch_without_prices_cost_its_share_later(teacher, labelled, tmp_path):
    assert run(teacher, labelled, tmp_path / "out", *BATCH[:2])["cost"] is None
    assert run(teacher, labelled, tmp_path / "out", *BATCH)["cost"] == pytest.approx(5 * 1.1 / 2)
