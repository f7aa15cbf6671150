"""The Batch API: all at once, half the price, found again whatever was killed in between."""

import json

import pytest

from m3agiqa.distil.journal import JOURNAL, Journal
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
