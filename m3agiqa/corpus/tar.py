"""WebDataset tars: the files of a sample stand next to each other and share a key, their name up to the first dot."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from m3agiqa.corpus import files
from m3agiqa.corpus.access import too_large
from m3agiqa.corpus.folder import decode_text, is_image
from m3agiqa.corpus.rows import (
    BYTES_PER_TABLE,
    ROWS_PER_TABLE,
    Corpus,
    Options,
    check_passing,
    corpus_schema,
    shorten,
)
from m3agiqa.errors import UserError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_PROMPT_FIELDS = ("prompt", "caption")
_JSON_FIELD = pa.field("json", pa.string())


_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
# Longest header before a member, in bytes: they hold names, and tarfile reads them whole.
_MAX_HEADER = 2**20
# What a member holds, or what its row names in its place where it is too large to be read (`access.too_large`).
_Content = bytes | str


class _Member(tarfile.TarInfo):
    """A member whose headers are bounded. They may come out of a small compressed file, as everything in it may."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADERS and self.size > _MAX_HEADER:
            raise tarfile.ReadError(f"it has a header of {self.size / 2**20:,.0f} MiB")
        return super()._proc_member(tar)  # type: ignore[misc]


@dataclass
class _Sample:
    """Consecutive members of one key: images (stem, member name, content) and sidecars by stem."""

    key: str
    images: list[tuple[str, str, _Content]] = field(default_factory=list)
    texts: dict[str, _Content] = field(default_factory=dict)
    jsons: dict[str, _Content] = field(default_factory=dict)


@dataclass(frozen=True)
class TarShard:
    """One tar; `name` is its path relative to the corpus, without the extension, and begins the ids.

    `fields` are the names that the prompt and the generator may have in a sample's JSON. A sample with a member of
    more than `most` bytes gives rows that name no image but the reason, and such a member is read past.
    """

    uri: str
    shown: str
    name: str
    fields: tuple[str, str]
    schema: pa.Schema
    most: int

    @property
    def where(self) -> str:
        """The tar."""
        return self.uri

    def read(self) -> Iterator[pa.Table]:
        """Yields the rows with their images, in the order of the tar.

        Raises:
            UserError: not a tar, truncated, or a prompt that stands apart from its image.
        """
        rows: list[dict[str, str | bytes | None]] = []
        size = 0
        for row in self._rows():
            rows.append(row)
            size += len(row["_bytes"] or b"")
            if len(rows) == ROWS_PER_TABLE or size >= BYTES_PER_TABLE:
                yield pa.Table.from_pylist(rows, schema=self.schema)
                rows, size = [], 0
        if rows:
            yield pa.Table.from_pylist(rows, schema=self.schema)

    def _rows(self) -> Iterator[dict[str, str | bytes | None]]:
        times: dict[str, int] = {}
        for sample in self._samples():
            for stem, member, content in sample.images:
                times[stem] = times.get(stem, 0) + 1
                again = f"#{times[stem]}" if times[stem] > 1 else ""
                text = sample.texts.get(stem, sample.texts.get(sample.key))
                extra = sample.jsons.get(stem, sample.jsons.get(sample.key))
                refused = next((part for part in (content, text, extra) if isinstance(part, str)), None)
                yield {
                    "id": f"{self.name}/{stem}{again}",
                    "image": f"{self.shown}::{member}",
                    "_uri": refused,
                    "_bytes": None if refused is not None else content,
                    **self._told(_read(text), _read(extra)),
                }

    def _told(self, text: bytes | None, extra: bytes | None) -> dict[str, str | None]:
        """What the sidecars say of an image."""
        details = _json_object(extra)
        prompt: object = decode_text(text).strip() if text is not None else None
        if prompt is None:
            prompt = next((p for name in (self.fields[0], *_PROMPT_FIELDS) if (p := details.get(name))), None)
        return {
            "prompt": _not_blank(prompt),
            "generator": _not_blank(details.get(self.fields[1])),
            "json": decode_text(extra) if extra is not None else None,
        }

    def _samples(self) -> Iterator[_Sample]:
        sample: _Sample | None = None
        seen: set[str] = set()
        for name, content in self._members():
            folder, slash, file = name.rpartition("/")
            key, stem = folder + slash + file.split(".")[0], name.rpartition(".")[0]
            if sample is None or key != sample.key:
                if sample is not None:
                    yield from self._finished(sample, seen)
                sample = _Sample(key)
            if is_image(name):
                sample.images.append((stem, name, content))
            else:
                (sample.texts if name.lower().endswith(".txt") else sample.jsons)[stem] = content
        if sample is not None:
            yield from self._finished(sample, seen)

    def _finished(self, sample: _Sample, seen: set[str]) -> Iterator[_Sample]:
        """Passes a whole sample on. Sorted by type, not by name, a tar would lose every prompt without a word."""
        if sample.images:
            yield sample
        elif sample.key in seen:
            rule = f"the files of sample {sample.key!r} do not stand next to each other"
            raise UserError(f"input {self.uri}", rule, "write the tar in order of names: tar --sort=name -cf ...")
        seen.add(sample.key)

    def _members(self) -> Iterator[tuple[str, _Content]]:
        try:
            with (
                files.open_stream(self.uri) as stream,
                tarfile.open(fileobj=stream, mode="r|*", bufsize=1 << 20, tarinfo=_Member) as tar,
            ):
                for member in tar:
                    # A streamed tar keeps every member it has seen, and would grow with the file.
                    tar.members = []  # type: ignore[attr-defined]
                    name = _plain(member.name.removeprefix("./"))
                    hidden = any(part.startswith(".") for part in name.split("/"))
                    if not member.isfile() or hidden:
                        continue
                    if is_image(name) or name.lower().endswith((".txt", ".json")):
                        yield name, self._content(tar, member, name)
        except (tarfile.TarError, EOFError) as error:
            rule = f"it is not a readable tar: {shorten(error)}"
            raise UserError(f"input {self.uri}", rule, "check that the file is whole") from error

    def _content(self, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> _Content:
        if member.size > self.most:
            return too_large(f"{self.shown}::{name}", member.size)
        content = tar.extractfile(member)
        assert content is not None
        return content.read()


def _read(content: _Content | None) -> bytes | None:
    return content if isinstance(content, bytes) else None


def _json_object(data: bytes | None) -> dict[str, object]:
    """The object in a sidecar; nothing where it is not one: the image can be judged all the same."""
    try:
        found = json.loads(data) if data is not None else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _not_blank(text: object) -> str | None:
    return _plain(text) if isinstance(text, str) and text.strip() else None


def _plain(text: str) -> str:
    """Half a surrogate pair, from a name or JSON that is not Unicode, fits no Arrow string."""
    return text.encode("utf-8", "replace").decode()


def open_tars(listing: files.Listing, options: Options) -> Corpus:
    """A corpus in WebDataset tars, one shard each.

    The id is `tarname/key` (`#2` and so on where a tar has the key again), the prompt that of the sample's `.txt`,
    else of `prompt` or `caption` in its `.json`. The `.json` passes through whole, as written, in the column `json`.
    Several images of one key are several rows. How many rows there are is not known before they are read.

    Raises:
        UserError: the first tar cannot be read or holds no image, or `json` is a reserved name.
    """
    passing = [] if "json" in options.drop else [_JSON_FIELD]
    check_passing(f"input {listing.base}", [item.name for item in passing], options)
    schema = corpus_schema(passing)
    fields = (options.prompt_column, options.generator_column)
    shards = []
    for name in listing.names:
        suffix = next(suffix for suffix in sorted(SUFFIXES, key=len) if name.lower().endswith(suffix))
        uri, most = files.join(listing.base, name), options.access.max_bytes
        shards.append(TarShard(uri, name, name[: -len(suffix)], fields, schema, most))
    if next(iter(shards[0]._samples()), None) is None:
        rule = "the tar holds no images"
        raise UserError(
            f"input {shards[0].uri}", rule, "give a tar of images, with prompts in .txt or .json beside them"
        )
    return Corpus(tuple(shards), schema, None, options.access)
