"""Columns of numbers in a corpus, human scores above all: whole, floating or decimal."""

import pyarrow as pa


def are_numbers(kind: pa.DataType) -> bool:
    """Whether a column of this type holds numbers."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def floats(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers [n] as float64, each the one that is nearest; null stays null."""
    if pa.types.is_decimal(column.type):
        # Arrow multiplies a decimal out, and makes 0.41000000000000003 of 0.41: off the edge of a bin or of the scale.
        column = column.cast(pa.string())
    return column.cast(pa.float64())
