"""Human scores in columns of decimals: numbers as any others, for all who read them."""

from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3agiqa.aspects import Aspect
from m3agiqa.cli import main
from m3agiqa.corpus.numbers import are_numbers, floats
from m3agiqa.evaluation.tables import Table
from m3agiqa.finetuning.talks import Columns
from m3agiqa.predictor.captured import open_captured, read_conversations
from tests import captured_sets
from tests.finetuning.helpers import talks_of

SCORES = [Decimal(hundredths) / 100 for hundredths in range(0, 501)]
COLUMN = pa.array(SCORES, pa.decimal128(5, 2))


def test_a_decimal_becomes_the_float_that_is_nearest():
    column = pa.chunked_array([COLUMN, pa.array([None], COLUMN.type)])
    assert floats(column).to_pylist() == [*map(float, SCORES), None]
    large = pa.array([Decimal("-100.1"), Decimal("1234567890.123")], pa.decimal256(50, 10))
    assert floats(pa.chunked_array([large])).to_pylist() == [-100.1, 1234567890.123]
    assert floats(pa.chunked_array([[1, None]])).to_pylist() == [1.0, None]


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.decimal128(4, 1)])
def test_types_of_numbers(kind):
    assert are_numbers(kind)


@pytest.mark.parametrize("kind", [pa.string(), pa.bool_(), pa.null(), pa.timestamp("s"), pa.list_(pa.float32())])
def test_other_types(kind):
    assert not are_numbers(kind)


def write(folder, count=20):
    """Conversations with decimal scores."""
    said = {
        "id": [f"r{i}" for i in range(count)],
        "image": [f"{i}.png" for i in range(count)],
        "prompt": [f"p{i}" for i in range(count)],
        "teacher_quality_description": ["d"] * count,
        "teacher_quality_rating": ["bad"] * count,
        "mos": COLUMN[:count],
    }
    pq.write_table(pa.table(said), folder / "c.parquet")
    return str(folder / "c.parquet")


def test_fine_tuning_takes_them(tmp_path):
    talks = talks_of(write(tmp_path), columns=Columns(labels={Aspect.QUALITY: "mos"}))
    assert [talk.score for talk in talks.talks] == pytest.approx([*map(float, SCORES[:20])])
    assert not talks.bad
    low = talks_of(write(tmp_path), columns=Columns(labels={Aspect.QUALITY: "mos"}, scale=(0.05, 5)))
    assert str(low.bad[0]) == "row 0 (id r0): quality: the score 0 is outside the scale 0.05 to 5"


def test_a_predictor_takes_them(tmp_path):
    made = captured_sets.rows(30)
    for row in made:
        row["mos_quality"] = Decimal(str(row["mos_quality"]))
    folder = captured_sets.write(tmp_path / "set", made)
    found = read_conversations([open_captured(str(folder))], {"quality": "mos_quality"}, (0.0, 5.0))
    assert sorted(found.label) == sorted(float(row["mos_quality"]) for row in made)


def test_an_evaluation_takes_them():
    rows = pa.table({"mos": pa.chunked_array([COLUMN])})
    assert Table("--truth x", rows, has_ids=False).numbers("mos", "--label").tolist() == [*map(float, SCORES)]


def test_words_are_checked_against_them(tmp_path, capsys):
    given = ["conversations", "--input", write(tmp_path), "--aspect", "quality", "--check", "mos", "--no-images"]
    assert main(given) == 0
    assert "mos: 100.0% of 20 words are those of the score" in capsys.readouterr().out
