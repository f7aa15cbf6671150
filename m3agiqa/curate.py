"""`m3agiqa curate`: a recipe applied to the scores of a run. Images are read, on Ray Data, only to compare them."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from PIL import Image
from ray.data import DataContext

from m3agiqa.connection import connect
from m3agiqa.corpus import Access
from m3agiqa.curation.funnel import Funnel
from m3agiqa.curation.images import access_to, corpus_of, embedded, is_embedded, read_image
from m3agiqa.curation.output import new_folder, write
from m3agiqa.curation.recipe import Recipe
from m3agiqa.curation.rows import Origin, Scores
from m3agiqa.curation.select import plan, select
from m3agiqa.id_set import IdSet
from m3agiqa.images import ImageRejected, decode
from m3agiqa.phash import hash_image
from m3agiqa.progress import Board
from m3agiqa.resume import Todo
from m3agiqa.source import CorpusSource

_HASHES = pa.schema([pa.field("id", pa.string()), pa.field("hash", pa.uint64())])
# A hash looks at 32 x 32 pixels: what is larger need not be decoded whole. The run has judged sizes already.
_LIMITS = {"max_pixels": 2**32, "min_side": 1, "max_side": 256, "max_aspect_ratio": float("inf")}
_ROWS_PER_BLOCK = 1024


@dataclass(frozen=True)
class Curated:
    """What was made: the content of `curation.json`, and the funnel."""

    sheet: dict[str, Any]
    funnel: Funnel


def curate(recipe: Recipe, scores_uri: str, out: str, *, verbose: bool = False) -> Curated:
    """Makes a curated set of the scores in a folder.

    Raises:
        UserError: for scores, a recipe or an output that cannot be used, and for a rule that leaves nothing; nothing
            is left at `out` then.
    """
    with new_folder(out) as folder:
        limits = recipe.resources
        scores = Scores(scores_uri, folder.work, memory_gib=limits.memory_gib, threads=limits.threads)
        try:
            origin = scores.origin()
            planned = plan(scores, recipe)

            def hasher(rows: pa.Table) -> pa.Table:
                connect(limits.address, 1, verbose=verbose)
                return hash_images(rows, origin)

            funnel = select(scores, planned, hasher)
            return Curated(write(folder, scores, planned, funnel, origin), funnel)
        finally:
            scores.close()


def hash_images(rows: pa.Table, origin: Origin) -> pa.Table:
    """The perceptual hash of each row's image, read by Ray tasks.

    Args:
        rows: id and image.

    Returns:
        id and hash (uint64), in no order; null, or no row at all, where there is no image that can be read.
    """
    apart = pa.array([is_embedded(image or "") for image in rows["image"].to_pylist()], pa.bool_())
    files, inside = rows.filter(pa.compute.invert(apart)), rows.filter(apart)
    tables = []
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    with DataContext.current(context):
        if files.num_rows:
            blocks = [files.slice(at, _ROWS_PER_BLOCK) for at in range(0, files.num_rows, _ROWS_PER_BLOCK)]
            hash_block = functools.partial(_hash_files, access=access_to(origin))
            tables += _collect(ray.data.from_arrow(blocks).map_batches(hash_block, batch_format="pyarrow"))
        if inside.num_rows:
            tables += _collect(_hash_corpus(origin, inside["id"].to_pylist()))
    found = pa.concat_tables([_HASHES.empty_table(), *tables])
    missing = rows.filter(pa.compute.invert(pa.compute.is_in(rows["id"], found["id"])))["id"]
    return pa.concat_tables([found, pa.table({"id": missing, "hash": pa.nulls(len(missing), pa.uint64())})])


def _hash_corpus(origin: Origin, ids: Sequence[str]) -> ray.data.Dataset:
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    wanted = Todo(only=IdSet.of([pa.array(ids, pa.string())]))

    def hash_rows(table: pa.Table) -> pa.Table:
        return _hashed(list(embedded(iter([table]), table["id"].to_pylist())))

    corpus = ray.data.read_datasource(CorpusSource(corpus_of(origin), wanted, board))
    return corpus.map_batches(hash_rows, batch_format="pyarrow")


def _collect(hashed: ray.data.Dataset) -> list[pa.Table]:
    batches: Iterable[Any] = hashed.iter_batches(batch_format="pyarrow", batch_size=None)
    return [table.cast(_HASHES) for table in batches]


def _hash_files(table: pa.Table, access: Access) -> pa.Table:
    pairs = zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True)
    return _hashed([(one, read_image(image, access)) for one, image in pairs])


def _hashed(images: list[tuple[str, bytes | None]]) -> pa.Table:
    hashes = [_hash(data) for _, data in images]
    return pa.table({"id": [one for one, _ in images], "hash": hashes}, schema=_HASHES)


def _hash(data: bytes | None) -> np.uint64 | None:
    if data is None:
        return None
    try:
        return np.uint64(hash_image(Image.fromarray(decode(data, **_LIMITS).pixels)))  # type: ignore[arg-type]
    except ImageRejected:
        return None
