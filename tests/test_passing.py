"""Which columns of a corpus fit the rows that an output holds already."""

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from m3agiqa.corpus import FIXED_FIELDS
from m3agiqa.errors import UserError
from m3agiqa.passing import as_written
from m3agiqa.records import scores_schema
from m3agiqa.runs import Output


def corpus(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([*FIXED_FIELDS, *columns.items()])


def written(folder: object, schema: pa.Schema) -> Output:
    output = Output(str(folder))
    output.make()
    pq.write_table(scores_schema(schema).empty_table(), f"{output.scores}/0.parquet")
    return output


KINDS = [
    pa.null(), pa.bool_(), pa.uint8(), pa.int64(), pa.float16(), pa.float64(), pa.decimal128(9, 2), pa.string(),
    pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary(4), pa.date32(), pa.date64(),
    pa.time32("s"), pa.timestamp("s"), pa.timestamp("ns", "Europe/Vienna"), pa.duration("s"),
    pa.dictionary(pa.int8(), pa.string()), pa.list_(pa.float32()), pa.list_(pa.float32(), 3),
    pa.large_list(pa.large_string()), pa.struct([("a", pa.int64()), ("b", pa.list_(pa.null()))]),
    pa.map_(pa.string(), pa.int64()),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_has_not_changed_fits_whatever_parquet_makes_of_it(tmp_path, kind):
    schema = corpus(x=kind)
    assert as_written(written(tmp_path, schema), schema) == schema


TEXTS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.large_string())]
LISTS = [pa.list_(pa.string()), pa.large_list(pa.large_string())]
STRUCTS = [pa.struct([("a", pa.string())]), pa.struct([("a", pa.large_string())])]


@pytest.mark.parametrize(
    ("there", "given"),
    [(a, b) for kinds in (TEXTS, LISTS, STRUCTS, [pa.binary(), pa.large_binary()]) for a in kinds for b in kinds]
    + [(kind, pa.null()) for kind in KINDS],
    ids=str,
)
def test_the_same_values_of_another_layout_are_written_as_those_that_are_there(tmp_path, there, given):
    output = written(tmp_path, corpus(x=there))
    schema = as_written(output, corpus(x=given))
    rows = schema.empty_table()
    values = {"id": pa.array(["1"]), "x": pa.nulls(1, given)}
    rows = pa.table([values.get(name, pa.nulls(1, rows.field(name).type)) for name in schema.names], schema.names)
    pq.write_table(rows.cast(schema).drop_columns(["_uri", "_bytes"]), f"{output.scores}/1.parquet")
    first, second = (pq.read_schema(file).field("x").type for file in output.files())
    assert first == second
    assert output.rows().num_rows == 1


@pytest.mark.parametrize(
    ("there", "given"),
    [(pa.int64(), pa.float64()), (pa.float64(), pa.int64()), (pa.int64(), pa.string()), (pa.string(), pa.int64()),
     (pa.int32(), pa.int64()), (pa.null(), pa.int64()),
     (pa.struct([("a", pa.int64())]), pa.struct([("b", pa.int64())])),
     (pa.timestamp("ms"), pa.timestamp("us"))],
    ids=str,
)  # fmt: skip
def test_another_type_is_refused_with_both_and_the_column(tmp_path, there, given):
    with pytest.raises(UserError, match="column 'x' is of type") as refused:
        as_written(written(tmp_path, corpus(x=there)), corpus(x=given))
    assert str(there) in str(refused.value)
    assert str(given) in str(refused.value)


def test_the_order_of_columns_and_those_that_do_not_pass_through_mean_nothing(tmp_path):
    output = written(tmp_path, corpus(a=pa.int64(), b=pa.string()))
    schema = corpus(b=pa.string(), a=pa.int64(), __index_level_0__=pa.int64())
    assert as_written(output, schema) == schema


def test_nothing_is_asked_of_a_corpus_where_nothing_is_written(tmp_path):
    assert as_written(Output(str(tmp_path)), corpus(x=pa.int64())) == corpus(x=pa.int64())


def test_a_file_that_is_broken_is_named(tmp_path):
    output = Output(str(tmp_path))
    output.make()
    (tmp_path / "scores" / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="a score file cannot be read"):
        as_written(output, corpus())
