"""Parquet with the pictures in it, as Hugging Face writes image data sets: `image` is a struct of bytes and path.

OUT/train-00000.parquet; `load_dataset("parquet", data_dir=OUT)` gives decoded images
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from m3agiqa.export.copying import Folder
from m3agiqa.export.rows import Row

# The names of types in `datasets` where they are not those of Arrow.
_DTYPES = {pa.float32(): "float32", pa.float64(): "float64"}
GROUP = 100
"""Rows of a row group: a reader, like the writer, has the pictures of one in memory."""
_IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])


class Parquet:
    """Writes a shard as a file.

    Args:
        columns: name -> type of the columns of a row.
        reference: the file holds where a picture is, and not the picture.
    """

    def __init__(self, folder: Folder, columns: dict[str, pa.DataType], *, reference: bool) -> None:
        self._folder, self._reference = folder, reference
        values = {"text": pa.string()} | columns
        features = {name: {"dtype": _DTYPES.get(kind, str(kind)), "_type": "Value"} for name, kind in values.items()}
        described = json.dumps({"info": {"features": {"image": {"_type": "Image"}} | features}})
        self._schema = pa.schema([("image", _IMAGE), *values.items()], metadata={"huggingface": described})

    def write(self, part: str, shards: Iterable[Sequence[Row]]) -> None:
        """Writes the files that are not there."""
        for shard, rows in enumerate(shards):
            name = f"{part}-{shard:05d}.parquet"
            if not self._folder.exists(name):
                self._write_file(name, rows)

    def _write_file(self, name: str, rows: Sequence[Row]) -> None:
        with self._folder.whole(name) as file, pq.ParquetWriter(file, self._schema) as writer:
            for start in range(0, len(rows), GROUP):
                made = self._made(rows[start : start + GROUP])
                writer.write_table(pa.Table.from_pylist(made, schema=self._schema))

    def _made(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        images = [None] * len(rows) if self._reference else self._folder.read_images([row.image for row in rows])
        paths = [row.image if self._reference else row.name for row in rows]
        return [
            {"image": {"bytes": image, "path": path}, "text": row.caption} | row.columns
            for row, image, path in zip(rows, images, paths, strict=True)
        ]
