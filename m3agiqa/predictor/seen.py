"""What a predictor was trained on: hashes of ids, images and prompts, in `trained_on.parquet` in its folder.

With them `m3agiqa evaluate` notices a test set that training has met. Every part of a training counts: the validation
part chose the epoch, and the calibration part the width of the intervals. Loads no torch.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from m3agiqa.errors import UserError

FILE = "trained_on.parquet"
KINDS = ("id", "image", "prompt")
Hashes = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class Seen:
    """Sorted unique 64-bit hashes of each kind: of ids, of image files (their SHA-256) and of prompts."""

    hashes: dict[str, Hashes]

    def met(self, kind: str, values: Sequence[str | None]) -> list[str]:
        """Those of the values [n] that training has met, in order and each once."""
        known = [value for value in dict.fromkeys(values) if value is not None]
        inside = np.isin(_hashes(known), self.hashes[kind])
        return [value for value, one in zip(known, inside.tolist(), strict=True) if one]

    def table(self) -> pa.Table:
        """As it is written: `kind` and `hash`."""
        kinds = np.repeat(KINDS, [len(self.hashes[kind]) for kind in KINDS])
        hashes = np.concatenate([self.hashes[kind] for kind in KINDS])
        return pa.table({"kind": pa.array(kinds.tolist(), pa.string()), "hash": pa.array(hashes, pa.uint64())})


def seen(ids: Iterable[str], images: Iterable[str | None], prompts: Iterable[str | None]) -> Seen:
    """Of the ids, image digests and prompts of a training."""
    values = {"id": ids, "image": images, "prompt": prompts}
    return Seen({kind: np.unique(_hashes([v for v in found if v is not None])) for kind, found in values.items()})


def read(folder: str | Path) -> Seen | None:
    """What a predictor's folder says of its training; None where it says nothing.

    Raises:
        UserError: if the file cannot be read.
    """
    file = Path(folder).expanduser() / FILE
    if not file.is_file():
        return None
    try:
        rows = pq.read_table(file)
        kinds, hashes = np.array(rows["kind"].to_pylist()), np.array(rows["hash"].combine_chunks(), np.uint64)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise UserError(str(file), f"cannot be read ({error})", "copy the predictor's folder again") from None
    return Seen({kind: np.sort(hashes[kinds == kind]) for kind in KINDS})


def _hashes(values: Sequence[str]) -> Hashes:
    return np.array(
        [int.from_bytes(hashlib.blake2b(v.encode(), digest_size=8).digest(), "little") for v in values], np.uint64
    )
