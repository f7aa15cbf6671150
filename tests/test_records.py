import dataclasses

import pyarrow as pa
import pytest
import torch

from m3agiqa.aspects import Aspect
from m3agiqa.predictor.states import decode as decode_states
from m3agiqa.records import (
    RESERVED_COLUMNS,
    Assessment,
    Captured,
    ScoredRow,
    Status,
    scores_schema,
    scores_table,
)

CORPUS = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.string()),
        ("_uri", pa.string()),
        ("prompt", pa.string()),
        ("generator", pa.string()),
        ("seed", pa.int64()),
        ("tags", pa.list_(pa.string())),
    ]
)


def corpus_rows(n: int) -> pa.Table:
    return pa.table(
        {
            "id": [str(i) for i in range(n)],
            "image": ["x.png"] * n,
            "_uri": ["/x.png"] * n,
            "prompt": [None] * n,
            "generator": ["sd"] * n,
            "seed": list(range(n)),
            "tags": [["a"]] * n,
        },
        schema=CORPUS,
    )


ASSESSED = Assessment("Sharp.", "good", "good", (0.0, 0.0, 0.0, 0.5, 0.5), 100, 9, "stop")


def test_the_schema_holds_the_contract_and_no_internal_column():
    schema = scores_schema(CORPUS)
    assert schema.names[:6] == ["id", "image", "prompt", "generator", "seed", "tags"]
    for aspect in Aspect:
        for suffix in ("description", "rating", "rating_probs", "mos", "mos_low", "mos_high", "rating_score"):
            assert f"{aspect}_{suffix}" in schema.names
    for name in ("status", "error", "width", "height", "image_sha256", "fingerprint"):
        assert name in schema.names
    assert not [name for name in schema.names if name.startswith("_")]
    assert set(scores_schema(CORPUS, tuple(Aspect)).names) >= RESERVED_COLUMNS
    with_states = scores_schema(CORPUS, (Aspect.QUALITY,)).names
    assert sorted(set(with_states) - set(schema.names)) == [
        "quality_asked_tokens",
        "quality_described_tokens",
        "quality_states",
        "quality_tokens",
    ]


def test_rows_pass_through_and_scores_are_added():
    scored = [
        ScoredRow(width=4, height=3, image_sha256="ab", assessments={Aspect.QUALITY: ASSESSED}),
        ScoredRow(status=Status.REJECTED, error="empty file"),
    ]
    table = scores_table(corpus_rows(2), scored, "f00")
    assert table.schema == scores_schema(CORPUS)
    ok, rejected = table.to_pylist()
    assert (ok["seed"], ok["tags"], ok["status"], ok["error"]) == (0, ["a"], "ok", None)
    assert ok["quality_rating_score"] == pytest.approx(4.375)
    assert (ok["quality_description"], ok["quality_rating"], ok["prompt_tokens"]) == ("Sharp.", "good", 100)
    assert (rejected["status"], rejected["error"], rejected["fingerprint"]) == ("rejected", "empty file", "f00")


def test_what_does_not_exist_is_null_and_never_zero():
    scored = [ScoredRow(assessments={Aspect.QUALITY: ASSESSED}), ScoredRow(status=Status.FAILED, error="x")]
    ok, failed = scores_table(corpus_rows(2), scored, "f").to_pylist()
    assert ok["quality_mos"] is None
    assert ok["authenticity_rating_score"] is None
    judged = [name for name in RESERVED_COLUMNS & failed.keys() if name not in ("status", "error", "fingerprint")]
    assert all(failed[name] is None for name in judged)


def test_a_row_that_is_lost_is_noticed():
    with pytest.raises(ValueError, match="2 rows went in, but 1"):
        scores_table(corpus_rows(2), [ScoredRow()], "f")


def test_states_are_written_as_bfloat16_and_read_back():
    states = torch.randn(5, 3)
    table = scores_table(
        corpus_rows(2),
        [
            ScoredRow(
                assessments={Aspect.QUALITY: dataclasses.replace(ASSESSED, captured=Captured(states), bounds=(2, 4))}
            ),
            ScoredRow(Status.REJECTED),
        ],
        "f",
        (Aspect.QUALITY,),
    )
    assert table.schema.field("quality_states").type == pa.large_binary()
    row, rejected = table.to_pylist()
    assert (row["quality_tokens"], len(row["quality_states"])) == (5, 5 * 3 * 2)
    assert torch.equal(decode_states(row["quality_states"], 5), states.bfloat16())
    assert (row["quality_asked_tokens"], row["quality_described_tokens"]) == (2, 4)
    assert rejected["quality_states"] is None
    assert rejected["quality_tokens"] is None
    with pytest.raises(ValueError, match="30 bytes are not 4 rows"):
        decode_states(row["quality_states"], 4)
