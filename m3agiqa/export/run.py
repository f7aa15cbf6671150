"""`m3agiqa export`: the rows of a scores folder or a curated set, written for a trainer; what is written is kept.

OUT/export.json says what is being written, and in the end that it is all there. The same command goes on.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from m3agiqa.aspects import Aspect
from m3agiqa.corpus.files import absolute, join
from m3agiqa.corpus.folder import is_image
from m3agiqa.curation.expressions import first, literal, quoted
from m3agiqa.curation.images import access_to, corpus_of, corpus_tables, embedded, is_embedded
from m3agiqa.curation.rows import Origin, Scores
from m3agiqa.errors import UserError
from m3agiqa.export.copying import Folder
from m3agiqa.export.diffusion_dpo import DiffusionDPO, Pair
from m3agiqa.export.imagefolder import ImageFolder
from m3agiqa.export.kohya import SUFFIXES, Kohya
from m3agiqa.export.parquet import Parquet
from m3agiqa.export.rows import PARTS, Captions, Format, Layout, Row
from m3agiqa.export.webdataset import WebDataset
from m3agiqa.predictor.splits import part_of_name
from m3agiqa.records import Status

ItemT = TypeVar("ItemT")
MANIFEST = "export.json"
_ROWS_PER_SHARD = {"imagefolder": 10_000, "kohya": 10_000}
_FEWER_ROWS = 1000  # of a shard that is one file with the pictures in it
_SCORES = ("rating", "rating_score", "mos", "mos_low", "mos_high")
_KEPT = ("id", "prompt", "generator", *(f"{aspect}_{suffix}" for aspect in Aspect for suffix in _SCORES), "composite")
# Pictures that are parts of a manifest or a tar, as files, for as long as the export takes.
_SPOOL = "spool"
_OK = f"status = '{Status.OK}'"


@dataclass(frozen=True)
class Options:
    """What is written.

    Attributes:
        reference: pictures are referred to, not copied.
        rows_per_shard: None: 10,000 in a folder, 1,000 in a file.
    """

    format: Format
    captions: Captions = field(default_factory=Captions)
    reference: bool = False
    rows_per_shard: int | None = None

    def shard(self) -> int:
        """Rows of a shard."""
        return self.rows_per_shard or _ROWS_PER_SHARD.get(self.format, _FEWER_ROWS)


def export(source: str, out: str, options: Options) -> dict[str, int]:
    """Writes a training set. Returns the number of rows, or pairs, of each part.

    Raises:
        UserError: for a source, an output or options that cannot be used, and an image that cannot be read; what is
            written by then is kept for the next try.
    """
    with tempfile.TemporaryDirectory() as work:
        scores = Scores(source, Path(work), memory_gib=1.0)
        try:
            origin = scores.origin()
            folder = Folder(out, access_to(origin, join(absolute(out), _SPOOL)), link=options.reference)
            _check_options(options, folder)
            return _Export(scores, origin, folder, options).run()
        finally:
            scores.close()


def _check_options(options: Options, folder: Folder) -> None:
    if options.reference and options.format in ("webdataset", "diffusion-dpo"):
        raise UserError("--images reference", f"{options.format} holds the pictures themselves", "use --images copy")
    if options.reference and options.format != "parquet" and not folder.local:
        raise UserError("--images reference", "an object store has no links", "use --images copy, or a local folder")
    if options.format == "diffusion-dpo" and (options.captions.kind != "prompt" or options.captions.tags):
        rule = "a pair has one caption, but each of its pictures a description and scores of its own"
        raise UserError(f"--caption {options.captions.kind}", rule, "use --caption prompt without --tags")


class _Export:
    """One export in the making; what can be checked is checked when it is made, before anything is written."""

    def __init__(self, scores: Scores, origin: Origin, folder: Folder, options: Options) -> None:
        self._scores, self._origin, self._folder, self._options = scores, origin, folder, options
        self._con = scores.con
        if not first(self._con, f"SELECT count(*) FROM rows WHERE {_OK}")[0]:
            raise UserError(scores.uri, "holds no row that is ok", "score images that can be read")
        if first(self._con, f"SELECT count(*) FROM rows WHERE {_OK} AND image IS NULL")[0]:
            raise UserError(scores.uri, "holds rows without an image", "export scores of a corpus of images")
        if options.format == "kohya":
            self._check_suffixes()
        names = scores.schema.names
        asked = [name for name in options.captions.columns() if name in names]
        self._parts = self._find_parts() if scores.has("split") else {"train": []}
        # What has no value in a part is no column: `datasets` could not tell its type there.
        found = [
            scores.has_values([name for name in (*_KEPT, *asked) if name in names], _of(splits))
            for splits in self._parts.values()
        ]
        has = {name: all(one[name] for one in found) for name in found[0]}
        described = f"{options.captions.aspect}_description"
        if described in asked and not has[described]:
            rule = f"{described} is null in every row of a part of {scores.uri}"
            raise UserError(f"--caption {options.captions.kind}", rule, "name another --aspect, or caption by prompt")
        self._columns = {name: scores.schema.field(name).type for name in _KEPT if name == "id" or has.get(name)}
        self._read = sorted({"id", "image", *self._columns, *asked})
        self._pairs = self._find_pairs() if options.format == "diffusion-dpo" else {}

    def _check_suffixes(self) -> None:
        query = f"SELECT DISTINCT regexp_extract(lower(image), '\\.[a-z0-9]+$') FROM rows WHERE {_OK} ORDER BY 1"
        found = [suffix for (suffix,) in self._con.execute(query).fetchall()]
        if unread := [one for one in found if is_image(f"a{one}") and one not in SUFFIXES]:
            cure = "leave these rows out with m3agiqa curate, or choose another format"
            raise UserError("--format kohya", f"sd-scripts pass over {', '.join(unread)} files", cure)

    def run(self) -> dict[str, int]:
        """Writes what is not there."""
        sheet = self._begin()
        self._spool()
        written = self._write_pairs() if self._options.format == "diffusion-dpo" else self._write_rows()
        if not self._options.reference:
            self._folder.remove(_SPOOL)
        self._folder.put(MANIFEST, _json(sheet | {"written": written, "finished": True}))
        return written

    def _begin(self) -> dict[str, Any]:
        """Makes the folder this export's, or checks that it is."""
        options = asdict(self._options) | {"rows_per_shard": self._options.shard()}
        sheet: dict[str, Any] = {"options": options, "uri": absolute(self._scores.uri), "source": self._source()}
        said = f"--out {self._folder.uri}"
        if self._folder.exists(MANIFEST):
            earlier = json.loads(self._folder.read(MANIFEST))
            changed = [key for key, value in sheet.items() if earlier.get(key) != json.loads(json.dumps(value))]
            if changed == ["source"]:
                # Files are numbered by the rows, and those that are there are kept: they would be of other rows.
                rule = f"holds an export of what {self._scores.uri} was before it changed"
                raise UserError(said, rule, "give another folder")
            if changed:
                raise UserError(said, "holds another export", "give another folder, or the command that began it")
        elif not self._folder.is_empty():
            raise UserError(said, "is not empty and holds no export of m3agiqa", "give an empty or a new folder")
        try:
            self._folder.put(MANIFEST, _json(sheet | {"finished": False}))
        except OSError as error:
            raise UserError(said, f"cannot be written ({error})", "give a folder you own") from None
        return sheet

    def _source(self) -> dict[str, Any]:
        """What identifies all that is written: the same rows in the same parts with the same values, and the pairs."""
        names = sorted({*self._read, "image_sha256", *(["split"] if self._scores.has("split") else [])})
        row = f"to_json([{', '.join(f'CAST({quoted(name)} AS VARCHAR)' for name in names)}]::VARCHAR[])"
        query = f"SELECT count(*), bit_xor(md5_number(CAST({row} AS VARCHAR))) FROM rows WHERE {_OK}"
        rows, content = first(self._con, query)
        source = {"fingerprint": self._origin.fingerprint, "rows": rows, "content": f"{content:032x}"}
        if self._options.format == "diffusion-dpo":
            source["pairs"] = hashlib.sha256(repr(self._pairs).encode()).hexdigest()
        return source

    def _find_parts(self) -> dict[str, list[str]]:
        """The parts that the column `split` makes, and its values for each."""
        parts: dict[str, list[str]] = {}
        query = f"SELECT DISTINCT CAST(split AS VARCHAR) FROM rows WHERE {_OK} ORDER BY 1"
        for (value,) in self._con.execute(query).fetchall():
            parts.setdefault(self._part(value), []).append(value)
        return parts

    def _part(self, value: str | None) -> str:
        """The part that a value of the column `split` names."""
        part = part_of_name(value)
        if part is None:
            raise UserError(self._scores.uri, f"its column split holds {value!r}", "write train, val or test there")
        return PARTS[part]

    def _find_pairs(self) -> dict[str, list[Pair]]:
        """The preference pairs of each part."""
        table = self._scores.pairs()
        if table is None:
            rule = "holds no preference pairs"
            raise UserError(self._scores.uri, rule, "curate with --set pairs.margin=0.5, say, and export that")
        if self._scores.has("split") and "split" not in table.column_names:
            rule = "its preference pairs were made without its column split, and may mix its parts"
            raise UserError(self._scores.uri, rule, "curate once more")
        pairs: dict[str, list[Pair]] = {}
        for row in table.to_pylist():
            part = self._part(row.get("split", "train"))
            images = [self._image(row[f"{which}_id"], row[f"{which}_image"]) for which in ("chosen", "rejected")]
            pairs.setdefault(part, []).append(Pair(row["prompt"], row["chosen_id"], row["rejected_id"], *images))
        return pairs

    def _layout(self) -> Layout:
        if self._options.format == "parquet":
            return Parquet(self._folder, self._columns, reference=self._options.reference)
        kinds: dict[str, Callable[[Folder], Layout]] = {
            "imagefolder": ImageFolder,
            "kohya": Kohya,
            "webdataset": WebDataset,
        }
        return kinds[self._options.format](self._folder)

    def _write_rows(self) -> dict[str, int]:
        layout, written = self._layout(), {}
        for part, splits in self._parts.items():
            rows = _Counted(self._rows(splits))
            layout.write(part, rows.shards(self._options.shard()))
            written[part] = rows.count
        return written

    def _write_pairs(self) -> dict[str, int]:
        layout = DiffusionDPO(self._folder)
        for part, pairs in self._pairs.items():
            layout.write(part, _Counted(iter(pairs)).shards(self._options.shard()))
        return {part: len(pairs) for part, pairs in self._pairs.items()}

    def _rows(self, splits: list[str]) -> Iterator[Row]:
        columns = ", ".join(quoted(name) for name in self._read)
        batches = self._scores.batches(f"SELECT {columns} FROM rows WHERE {_of(splits)} ORDER BY id", 2048)
        for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            image = self._image(row["id"], row["image"])
            kept = {name: row[name] for name in self._columns}
            yield Row(number, image, self._folder.suffix_of(image), self._options.captions.of(row), kept)

    def _spool(self) -> None:
        """Brings pictures that are parts of other files into files of their own, in one pass over the corpus."""
        query = f"SELECT id, image FROM rows WHERE {_OK}"
        inside = {
            one: image
            for batch in self._scores.batches(query, 2048)
            for one, image in zip(*(column.to_pylist() for column in batch.columns), strict=True)
            if is_embedded(image or "") and not self._folder.exists(f"{_SPOOL}/{_spool_name(one)}")
        }
        if not inside:
            return
        for one, data in embedded(corpus_tables(corpus_of(self._origin)), list(inside)):
            self._folder.put(f"{_SPOOL}/{_spool_name(one)}", data)
            inside.pop(one, None)
        if inside:
            one, image = next(iter(inside.items()))
            cure = "bring it back and run the same command again"
            raise UserError(f"row {one!r}", f"its image {image} is not in {self._origin.input} any more", cure)

    def _image(self, one: str, image: str) -> str:
        """The URI of a row's image file."""
        return join(absolute(self._folder.uri), f"{_SPOOL}/{_spool_name(one)}") if is_embedded(image) else image


class _Counted(Generic[ItemT]):
    """Rows, in shards, of which nobody knows the number before they are read."""

    def __init__(self, rows: Iterator[ItemT]) -> None:
        self._rows, self.count = rows, 0

    def shards(self, size: int) -> Iterator[list[ItemT]]:
        """Lists of so many rows; the last may be shorter."""
        while shard := list(islice(self._rows, size)):
            self.count += len(shard)
            yield shard


def _spool_name(one: str) -> str:
    digest = hashlib.sha256(one.encode()).hexdigest()
    return f"{digest[:2]}/{digest}"


def _of(splits: list[str]) -> str:
    """SQL of the rows that are written of a part; all that are ok where there are no parts."""
    return f"{_OK} AND CAST(split AS VARCHAR) IN ({', '.join(map(literal, splits))})" if splits else _OK


def _json(sheet: dict[str, Any]) -> bytes:
    return (json.dumps(sheet, indent=2, ensure_ascii=False) + "\n").encode()
