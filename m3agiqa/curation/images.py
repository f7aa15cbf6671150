"""The image of a scored row: a file of its own, or part of a manifest or tar, which is read again."""

import re
from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from m3agiqa.config import AccessConfig
from m3agiqa.corpus import Access, Corpus, access_of, open_corpus
from m3agiqa.corpus.rows import shorten
from m3agiqa.curation.rows import Origin
from m3agiqa.errors import UserError

_EMBEDDED = re.compile(r"(?i)\.(tar|tar\.gz|tgz)::")
_FILE = re.compile(r"^(/|[A-Za-z][A-Za-z0-9+.-]*://)")


def is_embedded(image: str) -> bool:
    """Whether the column `image` of a row shows a place in a manifest (`a#7`) or a tar (`a.tar::b.png`), not a file."""
    return _FILE.match(image) is None or _EMBEDDED.search(image) is not None


def corpus_of(origin: Origin) -> Corpus:
    """The corpus that was scored, opened again.

    Raises:
        UserError: if it is not there any more.
    """
    return open_corpus(origin.input, **origin.corpus, access=_rules(origin))


def access_to(origin: Origin, *more: str) -> Access:
    """Which files the rows may name: those that the run which scored them could read, and `more` folders."""
    return access_of(origin.input, origin.corpus.get("images"), _rules(origin), *more)


def embedded(tables: Iterator[pa.Table], ids: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """id and file content of those rows of a corpus that are wanted and embed their image."""
    wanted = pa.array(list(ids), pa.string())
    for table in tables:
        found = table.filter(pc.and_(pc.is_in(table["id"], wanted), pc.is_valid(table["_bytes"])))
        yield from zip(found["id"].to_pylist(), found["_bytes"].to_pylist(), strict=True)


def read_image(uri: str, access: Access) -> bytes | None:
    """A whole image file; None where it cannot be read, or may not be."""
    try:
        return access.fetch(uri)
    except OSError:
        return None


def _rules(origin: Origin) -> AccessConfig:
    try:
        return AccessConfig.model_validate(origin.access)
    except ValidationError as error:
        raise UserError("access of the scores", shorten(error), "mend run.json or curation.json there") from None


def corpus_tables(corpus: Corpus) -> Iterator[Any]:
    """Every table of a corpus, one shard after the other."""
    for shard in corpus.shards:
        yield from shard.read()
