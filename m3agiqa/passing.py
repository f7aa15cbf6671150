"""Columns that pass through from the corpus: all files of an output hold the same ones, of the same types.

Readers take the types of whichever file comes first, and rows that are scored anew go into files that are there. Where
an input says nothing of its types they follow from its values, so that one more row can change them.
"""

import pyarrow as pa
from pyarrow import parquet as pq

from m3agiqa.errors import UserError
from m3agiqa.records import RESERVED_COLUMNS, scores_schema
from m3agiqa.replace import retry_output
from m3agiqa.resume import cannot_read
from m3agiqa.runs import Output


def as_written(output: Output, corpus: pa.Schema) -> pa.Schema:
    """The schema that rows of a corpus shall have, so that they fit the rows that an output holds.

    It is the corpus's own, but for columns that hold the same under another type (`large_string`, a dictionary) or
    nothing at all (`null`): they get the type that is written.

    Raises:
        UserError: a column is of another type there, or on one side only, or a score file cannot be read.
    """
    for part, cure in (
        (output, "or give another --output"),
        (retry_output(output), f"or remove {output.uri}/retry: its rows are scored again"),
    ):
        if (files := part.files()) and (written := _written(part, files[0])):
            corpus = _fitted(written, corpus, part.uri, cure)
    return corpus


def _written(output: Output, file: str) -> dict[str, pa.DataType]:
    """The types of the columns that passed through into a score file, by name."""
    try:
        with output.filesystem.open_input_file(file) as stream:
            schema = pq.read_schema(stream)
    except (pa.ArrowInvalid, OSError) as error:
        raise cannot_read(output, error) from error
    return {field.name: field.type for field in schema if field.name not in RESERVED_COLUMNS}


def _fitted(written: dict[str, pa.DataType], corpus: pa.Schema, uri: str, cure: str) -> pa.Schema:
    given = {field.name: field.type for field in scores_schema(corpus) if field.name not in RESERVED_COLUMNS}
    value = f"--output {uri}"
    for name, kind in written.items():
        if name not in given:
            rule = f"its rows have a column {name!r} ({kind}), which the input lacks"
            raise UserError(value, rule, f"put it back, {cure}")
        if not _fits(given[name], kind):
            rule = f"column {name!r} is of type {kind} in its rows, and of type {given[name]} in the input"
            raise UserError(value, rule, f"give it as {kind} again, {cure}")
    for name, kind in given.items():
        if name not in written:
            rule = f"the input has a column {name!r} ({kind}), which its rows lack"
            raise UserError(value, rule, f'leave it out: --set corpus.drop=["{name}"], {cure}')
    return pa.schema([field.with_type(_type(field, written)) for field in corpus])


def _fits(given: pa.DataType, written: pa.DataType) -> bool:
    """Whether every value of one type is one of the other, too."""
    return bool(pa.types.is_null(given) or _plain(given) == _plain(written) or _stored(given) == written)


def _type(field: pa.Field, written: dict[str, pa.DataType]) -> pa.DataType:
    """What is written, or the field's own type where a file holds that as what is written anyway."""
    kind = written.get(field.name, field.type)
    return field.type if _stored(field.type) == kind else kind


def _stored(kind: pa.DataType) -> pa.DataType:
    """A type as parquet gives it back: seconds come as milliseconds, say."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.schema([("x", kind)]).empty_table(), sink)
    return pq.read_schema(pa.BufferReader(sink.getvalue())).field("x").type


def _plain(kind: pa.DataType) -> pa.DataType:
    """A type without the choice of how its values are laid out."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_large_binary(kind):
        return pa.binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _plain(field.type)) for field in kind])
    return kind
