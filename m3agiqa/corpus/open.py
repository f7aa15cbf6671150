"""Finds out what an input is, and opens it."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from m3agiqa.config import AccessConfig
from m3agiqa.corpus import files, folder, tar, text
from m3agiqa.corpus.access import Access
from m3agiqa.corpus.parquet import open_parquet
from m3agiqa.corpus.rows import Corpus, Options, shorten
from m3agiqa.errors import UserError

PARQUET_SUFFIXES = (".parquet", ".pq")
DEFAULT_ROWS_PER_SHARD = 4096

_ACCEPTED = "give images, one CSV, TSV, JSONL or JSON manifest, parquet files or tars"
# What a folder holds beside a corpus as well: the later of them count only where nothing before them is there.
_WEAK = ("text manifest", "JSON file")
_OPENERS: dict[str, Callable[[files.Listing, Options], Corpus]] = {
    "image": folder.open_folder,
    "text manifest": text.open_text,
    "JSON file": text.open_text,
    "parquet": open_parquet,
    "tar": tar.open_tars,
}


def open_corpus(
    uri: str,
    *,
    image_column: str | None = None,
    prompt_column: str = "prompt",
    id_column: str = "id",
    generator_column: str = "generator",
    images: str | None = None,
    text_only: bool = False,
    access: AccessConfig | None = None,
    drop: Sequence[str] = (),
    reserved: Collection[str] = (),
    rows_per_shard: int = DEFAULT_ROWS_PER_SHARD,
    lenient: bool = False,
) -> Corpus:
    """Opens a corpus: checks what can be checked without reading the images, and cuts it into shards.

    Inputs are an image or a folder of images (prompts in `same-name.txt`), a manifest (CSV, TSV, JSON lines or an
    array, parquet), a published conversation file (`conversations.py`), WebDataset tars, a glob or a brace pattern of
    these; local, or behind any URI that pyarrow or fsspec can open. In a folder that has images, manifests of text are
    left out with a note, and JSON files beside other manifests without one; images and parquet files or tars in one
    folder are an error, as either could be meant.

    Args:
        uri: the input.
        image_column: of a manifest: a path or URL, bytes, or a struct of both; None: the first of `IMAGE_COLUMNS`.
        prompt_column: of a manifest; rows have no prompt where there is no such column.
        id_column: of a manifest; must be unique. Without it ids are made up, see `rows.made_up_id`.
        generator_column: of a manifest.
        images: folder that a manifest's relative image paths start from; None: the manifest's own.
        text_only: the images are not wanted, and there may be none: `image` is null where there is no column of them.
        access: which files the rows may name, beyond those below the input's own folders; None: no others.
        drop: columns that shall not pass through.
        reserved: names that no column may pass through under.
        rows_per_shard: about how many rows a shard has, where the input can be cut.
        lenient: a published conversation of another form is a row that says so (`conversations.ERROR`), and no error.

    Raises:
        UserError: whatever makes the input unusable as a whole. An image that is missing is no such thing.
    """
    try:
        listing = files.expand(uri)
        kind, names = _choose(uri, listing.names)
        if kind == "image":
            names = listing.names  # with the prompts beside them
        roots = (
            [listing.base] if kind == "image" else [files.split(files.join(listing.base, name))[0] for name in names]
        )
        rules = access or AccessConfig.model_construct()
        roots += [files.absolute(root) for root in (*([images] if images else []), *rules.roots)]
        allowed = Access(tuple(dict.fromkeys(roots)), rules)
        columns = (image_column, prompt_column, id_column, generator_column)
        options = Options(*columns, tuple(drop), reserved, rows_per_shard, allowed, images, text_only, lenient)
        return _OPENERS[kind](files.Listing(listing.base, names), options)
    except OSError as error:
        raise UserError(
            f"input {uri}", f"it cannot be read: {shorten(error)}", "check the path and the access"
        ) from error


def access_of(uri: str, images: str | None, rules: AccessConfig, *more: str) -> Access:
    """What the rows of a corpus may name, long after it was opened, and the folders `more`; lists no folder.

    Args:
        uri, images, rules: as they were for `open_corpus` (`rules`: its `access`).

    Raises:
        UserError: nothing can be said of the input, as its file system does not answer.
    """
    roots = (*([images] if images else []), *rules.roots, *more)
    try:
        return Access((files.base_of(uri), *map(files.absolute, roots)), rules)
    except OSError as error:
        rule = f"it cannot be reached: {shorten(error)}"
        raise UserError(f"input {uri}", rule, "check the path and the access") from error


def kind_of(name: str) -> str | None:
    """What a file is, going by its name; None: nothing that a corpus is made of."""
    lower = name.lower()
    if folder.is_image(name):
        return "image"
    if lower.endswith(PARQUET_SUFFIXES):
        return "parquet"
    if lower.endswith(tar.SUFFIXES):
        return "tar"
    kind = text.format_of(name)
    return "JSON file" if kind == text.JSON_ARRAY else "text manifest" if kind else None


def _choose(uri: str, names: list[str]) -> tuple[str, list[str]]:
    """The kind of corpus that files make up, and the files of that kind."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        if (kind := kind_of(name)) is not None:
            kinds.setdefault(kind, []).append(name)
    if not kinds:
        if not names:
            raise UserError(f"input {uri}", "the folder is empty", _ACCEPTED)
        found = Counter(folder.suffix(name) or "no extension" for name in names)
        listed = ", ".join(f"{count} {suffix}" for suffix, count in found.most_common(5))
        raise UserError(f"input {uri}", f"no images, and no file type that is known ({listed})", _ACCEPTED)
    strong = [kind for kind in kinds if kind not in _WEAK] or [kind for kind in _WEAK if kind in kinds][:1]
    if len(strong) > 1:
        listed = " and ".join(f"{len(kinds[kind])} {kind} files" for kind in strong)
        cure = f"give a glob of those that are meant, such as {uri.rstrip('/')}/*.parquet"
        raise UserError(f"input {uri}", f"it holds {listed}, and either could be meant", cure)
    return strong[0], kinds[strong[0]]
