"""What a predictor or an adapter was trained on: hashes of ids, images and prompts, in `trained_on.parquet`.

The file lies in the folder of what was trained; a run puts what its adapters' folders say beside its run.json, so
that nobody needs those folders later. With it `m3agiqa evaluate` notices a test set that a training has met, of which
every part counts: the validation part chose the step or the epoch, the calibration part the width of the intervals.
`m3agiqa train-predictor` calibrates on images whose states are like those of new ones: for that only what an adapter's
weights were fitted to counts. Loads no torch.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from m3agiqa.corpus.files import join, locate
from m3agiqa.errors import UserError

FILE = "trained_on.parquet"
KINDS = ("id", "image", "prompt")
TRAIN, VALIDATION, CALIBRATION = "train", "validation", "calibration"
Hashes = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class Seen:
    """Part of a training -> kind -> sorted unique 64-bit hashes: of ids, image files (their SHA-256) and prompts."""

    hashes: dict[str, dict[str, Hashes]]

    def met(self, kind: str, values: Sequence[str | None], part: str | None = None) -> list[str]:
        """Those of the values [n] that one part, or any, of the training has met, in order and each once."""
        known = [value for value in dict.fromkeys(values) if value is not None]
        own = [kinds[kind] for name, kinds in self.hashes.items() if part in (None, name)]
        inside = np.isin(_hashes(known), np.concatenate([_hashes([]), *own]))
        return [value for value, one in zip(known, inside.tolist(), strict=True) if one]

    def write(self, file: Path | IO[bytes] | pa.NativeFile) -> None:
        """Writes the file: `kind`, `hash` and `part`."""
        tables = [
            pa.table({"kind": [kind] * len(found), "hash": pa.array(found, pa.uint64()), "part": [part] * len(found)})
            for part, kinds in self.hashes.items()
            for kind, found in kinds.items()
            if len(found)
        ]
        empty = pa.schema({"kind": pa.string(), "hash": pa.uint64(), "part": pa.string()}).empty_table()
        pq.write_table(pa.concat_tables([empty, *tables]), file)


def seen(ids: Iterable[str], images: Iterable[str | None], prompts: Iterable[str | None], part: str = TRAIN) -> Seen:
    """Of the ids, image digests and prompts of one part of a training."""
    values = {"id": ids, "image": images, "prompt": prompts}
    return Seen(
        {part: {kind: np.unique(_hashes([v for v in found if v is not None])) for kind, found in values.items()}}
    )


def union(found: Iterable[Seen | None]) -> Seen | None:
    """What any of them has met, part by part; None where nothing is known of any."""
    known = [one.hashes for one in found if one is not None]
    parts = dict.fromkeys(part for one in known for part in one)
    made = {
        part: {kind: np.unique(np.concatenate([one[part][kind] for one in known if part in one])) for kind in KINDS}
        for part in parts
    }
    return Seen(made) if known else None


def read(folder: str | Path) -> Seen | None:
    """What a folder, local or on an object store, says of a training; None where it says nothing.

    A file of a version that wrote no parts is taken to be all of the train part.

    Raises:
        UserError: if the file cannot be read.
    """
    file = join(str(folder), FILE)
    try:
        store, path = locate(file)
        if store.get_file_info(path).type != pafs.FileType.File:
            return None
        with store.open_input_file(path) as stream:
            rows = pq.read_table(stream)
        kinds, hashes = np.array(rows["kind"].to_pylist()), np.array(rows["hash"].combine_chunks(), np.uint64)
        parts = np.array(rows["part"].to_pylist() if "part" in rows.column_names else [TRAIN] * len(kinds))
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UserError(file, f"cannot be read ({error})", "copy that folder again") from None
    names = dict.fromkeys(parts.tolist())
    return Seen(
        {part: {kind: np.unique(hashes[(kinds == kind) & (parts == part)]) for kind in KINDS} for part in names}
    )


def _hashes(values: Sequence[str]) -> Hashes:
    return np.array(
        [int.from_bytes(hashlib.blake2b(v.encode(), digest_size=8).digest(), "little") for v in values], np.uint64
    )
