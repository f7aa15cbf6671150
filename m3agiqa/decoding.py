"""From rows of a corpus to decoded images, in the place of their rows. Knows nothing of Ray or of models.

Apart from `scoring.py`, which needs torch: tasks that decode run by the dozen, and shall be light.
"""

import contextlib
import functools
import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from m3agiqa.apart import Apart, Died
from m3agiqa.config import ImageConfig
from m3agiqa.corpus import Access, Refused
from m3agiqa.corpus.files import is_local
from m3agiqa.errors import one_line
from m3agiqa.images import DecodedImage, ImageRejected, decode
from m3agiqa.records import Status

# What decoding puts in place of the corpus's own internal columns.
DECODED = {
    "_pixels": pa.large_binary(),
    "_rows": pa.int32(),
    "_columns": pa.int32(),
    "_width": pa.int32(),
    "_height": pa.int32(),
    "_sha256": pa.string(),
    "_status": pa.string(),
    "_error": pa.string(),
}
_Source = tuple[str | None, bytes | None]
# Files are read this many at a time: object stores answer slowly, but many at once.
_FETCH_THREADS = 16
# Local files that take no longer than this are read one by one: changing threads would take longer than reading.
_FAST_READ_S = 0.005
# Object stores refuse some requests when they are busy; the pauses before trying again.
_FETCH_PAUSES_S = (0.5, 2.0)


def decode_rows(
    rows: pa.Table,
    limits: ImageConfig,
    access: Access,
    slice_rows: int = 16,
    *,
    text_only: bool = False,
    careful: bool = False,
) -> Iterator[pa.Table]:
    """Reads and decodes the images of some rows of a corpus; none of them where it is `text_only`.

    Yields tables of at most `slice_rows` rows, in order: the columns of the corpus that are not internal,
    and the pixels as internal ones. A row whose image cannot be read keeps its place, with the reason.

    Args:
        careful: one of the rows may kill the process that decodes it. Each is decoded in a process apart, slowly, and
            those that kill it are failures.
    """
    public = rows.select([name for name in rows.column_names if not name.startswith("_")])
    sources = list(zip(rows["_uri"].to_pylist(), rows["_bytes"].to_pylist(), strict=True))
    with contextlib.ExitStack() as last:
        if careful:
            images = _all_apart(last.enter_context(Apart()), access, sources, limits)
        else:
            pool = last.enter_context(ThreadPoolExecutor(_FETCH_THREADS))
            images = (_decode_one(read, limits) for read in _read_all(pool, access, sources, slice_rows))
        for start in range(0, rows.num_rows, slice_rows):
            count = min(slice_rows, rows.num_rows - start)
            decoded = [{} if text_only else next(images) for _ in range(count)]
            table = public.slice(start, slice_rows)
            for name, kind in DECODED.items():
                table = table.append_column(name, pa.array([row.get(name) for row in decoded], kind))
            yield table


def _all_apart(
    apart: Apart, access: Access, sources: Sequence[_Source], limits: ImageConfig
) -> Iterator[dict[str, Any]]:
    apart.call(len, "")  # where not even that is done, no row is to blame
    for source in sources:
        try:
            yield apart.call(_read_and_decode, access, source, limits)
        except Died:
            why = "the process that read and decoded this row alone died, as those before it did with others"
            yield {"_status": str(Status.FAILED), "_error": why}


def _read_and_decode(access: Access, source: _Source, limits: ImageConfig) -> dict[str, Any]:
    return _decode_one(_read(access, source), limits)


def _read_all(
    pool: ThreadPoolExecutor, access: Access, sources: Sequence[_Source], slice_rows: int
) -> Iterator[bytes | tuple[Status, str]]:
    """What is read of each source, in order; of those that are read at once, no more than a slice is ahead."""
    read = functools.partial(_read, access)
    fast = all(uri is None or is_local(uri) for uri, _ in sources)
    for start in range(0, len(sources), slice_rows):
        part = iter(sources[start : start + slice_rows])
        while fast and (source := next(part, None)) is not None:
            began = time.monotonic()
            data = read(source)
            fast = time.monotonic() - began < _FAST_READ_S
            yield data
        yield from pool.map(read, part)


def _read(access: Access, source: _Source) -> bytes | tuple[Status, str]:
    uri, data = source
    if uri is None and data is None:
        return Status.REJECTED, "the row names no image"
    for pause_s in (*_FETCH_PAUSES_S, None):
        try:
            if data is not None:
                access.check_size("the embedded image", len(data))
                return data
            return access.fetch(str(uri))
        except Refused as refused:
            return Status.REJECTED, f"not read: {refused}"
        except FileNotFoundError:
            return Status.REJECTED, f"there is no such file: {uri}"
        except Exception as error:  # noqa: BLE001 - the row boundary: file systems raise errors of their own kinds
            if pause_s is None:
                return Status.FAILED, f"cannot read {uri}: {one_line(error)}"
        time.sleep(pause_s)
    raise AssertionError("the last try returns")


def _decode_one(read: bytes | tuple[Status, str], limits: ImageConfig) -> dict[str, Any]:
    if not isinstance(read, bytes):
        return {"_status": str(read[0]), "_error": read[1]}
    digest = {"_sha256": hashlib.sha256(read).hexdigest()}
    try:
        image: DecodedImage = decode(read, **limits.model_dump())
    except ImageRejected as rejection:
        return digest | {"_status": str(Status.REJECTED), "_error": str(rejection)}
    except Exception as error:  # noqa: BLE001 - the row boundary: a decoder's bug costs one row, not the run
        return digest | {"_status": str(Status.FAILED), "_error": f"decoding failed: {one_line(error)}"}
    height, width, _ = image.pixels.shape
    return digest | {
        "_pixels": image.pixels.tobytes(),
        "_rows": height,
        "_columns": width,
        "_width": image.width,
        "_height": image.height,
    }


def as_failed(rows: pa.Table, why: str) -> pa.Table:
    """Rows that `decode_rows` made, as the system's failures: they will not go into an engine."""
    for name, value in (("_status", str(Status.FAILED)), ("_error", why), ("_pixels", None)):
        column = pa.array([value] * rows.num_rows, DECODED[name])
        rows = rows.set_column(rows.column_names.index(name), name, column)
    return rows
