"""Preference pairs in the layout of Diffusion-DPO's trainers (that of Pick-a-Pic v2).

OUT/train-00000.parquet with jpg_0 and jpg_1 (the files' bytes, whatever their format), label_0 (1: jpg_0 is the better
one, 0: jpg_1 is), label_1 (1 - label_0) and caption; `load_dataset("parquet", data_dir=OUT)`
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from m3agiqa.export.copying import Folder
from m3agiqa.export.parquet import GROUP

SCHEMA = pa.schema(
    [
        pa.field("jpg_0", pa.binary()),
        pa.field("jpg_1", pa.binary()),
        pa.field("label_0", pa.float64()),
        pa.field("label_1", pa.float64()),
        pa.field("caption", pa.string()),
        pa.field("id_0", pa.string()),
        pa.field("id_1", pa.string()),
    ]
)


@dataclass(frozen=True)
class Pair:
    """One row of a curated set's `pairs.parquet`, with the URIs of its images."""

    caption: str
    chosen_id: str
    rejected_id: str
    chosen: str
    rejected: str


class DiffusionDPO:
    """Writes a shard of pairs as a file."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def write(self, part: str, shards: Iterable[Sequence[Pair]]) -> None:
        """Writes the files that are not there."""
        for shard, pairs in enumerate(shards):
            name = f"{part}-{shard:05d}.parquet"
            if not self._folder.exists(name):
                self._write_file(name, pairs)

    def _write_file(self, name: str, pairs: Sequence[Pair]) -> None:
        with self._folder.whole(name) as file, pq.ParquetWriter(file, SCHEMA) as writer:
            for start in range(0, len(pairs), GROUP):
                some = pairs[start : start + GROUP]
                chosen = self._folder.read_images([pair.chosen for pair in some])
                rejected = self._folder.read_images([pair.rejected for pair in some])
                rows = [_row(*one) for one in zip(some, chosen, rejected, strict=True)]
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))


def _row(pair: Pair, chosen: bytes, rejected: bytes) -> dict[str, object]:
    # The better one is first in half of the pairs, or a model could learn the place.
    first = hashlib.sha256(f"{pair.chosen_id}\0{pair.rejected_id}".encode()).digest()[0] % 2 == 0
    images, ids = (chosen, rejected), (pair.chosen_id, pair.rejected_id)
    zero, one = (0, 1) if first else (1, 0)
    return {
        "jpg_0": images[zero],
        "jpg_1": images[one],
        "label_0": float(first),
        "label_1": float(not first),
        "caption": pair.caption,
        "id_0": ids[zero],
        "id_1": ids[one],
    }
