"""A folder of image files, each with its prompt beside it in a text file of the same name."""

import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from m3agiqa.corpus import files
from m3agiqa.corpus.access import Access
from m3agiqa.corpus.rows import ROWS_PER_TABLE, Corpus, Options, blank_to_null, corpus_schema
from m3agiqa.errors import UserError

# fmt: off
IMAGE_SUFFIXES: frozenset[str] = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib",
    ".tif", ".tiff", ".avif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm",
    ".heic", ".heif", ".jxl", ".ico", ".tga", ".psd",
))
# fmt: on
"""What makes a file an image candidate, in any case. It includes formats that cannot be decoded: such a file gives a
rejected row, as a corrupt or mislabelled one does, and does not vanish."""

MANIFEST_STEMS = ("metadata", "manifest")


def is_image(name: str) -> bool:
    """Whether a file counts as an image, going by its name."""
    return suffix(name) in IMAGE_SUFFIXES


def suffix(name: str) -> str:
    """The file name's extension in lower case, with its dot."""
    return posixpath.splitext(name)[1].lower()


@dataclass(frozen=True)
class FolderShard:
    """A slice of the image files of a folder.

    Attributes:
        base: the folder's URI.
        names: relative paths [n].
        prompts: relative paths of the text files with the prompts [n]; null where there is none.
        access: how those are read.
    """

    base: str
    names: pa.Array
    prompts: pa.Array
    access: Access

    @property
    def where(self) -> str:
        """From which file to which."""
        return f"{self.base}, {self.names[0].as_py()} to {self.names[-1].as_py()}"

    def read(self) -> Iterator[pa.Table]:
        """Yields the rows; reads the prompts, not the images."""
        for start in range(0, len(self.names), ROWS_PER_TABLE):
            names = self.names.slice(start, ROWS_PER_TABLE)
            sidecars = self.prompts.slice(start, ROWS_PER_TABLE).to_pylist()
            wanted = sorted({name for name in sidecars if name is not None})
            contents = files.fetch_all([files.join(self.base, name) for name in wanted], self.access.fetch)
            # A sidecar that cannot be read (a link to nowhere, say) is no prompt; it must not end the run.
            texts = {name: decode_text(data or b"") for name, data in zip(wanted, contents, strict=True)}
            uris = pa.array([files.join(self.base, name) for name in names.to_pylist()], pa.string())
            prompts = pa.array([texts[name].strip() if name else None for name in sidecars], pa.string())
            count = len(names)
            yield pa.Table.from_arrays(
                [
                    pa.concat_arrays([names]),
                    uris,
                    uris,
                    pa.nulls(count, pa.large_binary()),
                    blank_to_null(prompts),
                    pa.nulls(count, pa.string()),
                ],
                schema=corpus_schema(()),
            )


def decode_text(data: bytes) -> str:
    """The text of a sidecar: UTF-8, else Windows' code page, as the other thing that text editors write."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def open_folder(listing: files.Listing, options: Options) -> Corpus:
    """A corpus of image files. The id of an image is its path relative to the folder.

    Files count as images by their extension (`IMAGE_SUFFIXES`, in any case); other files and hidden ones are left out.

    Raises:
        UserError: a file name is not UTF-8.
    """
    images = [name for name in listing.names if is_image(name)]
    sidecars = {name for name in listing.names if name.endswith(".txt")}
    prompts = [text if (text := posixpath.splitext(name)[0] + ".txt") in sidecars else None for name in images]
    shards = []
    try:
        for start in range(0, len(images), options.rows_per_shard):
            part = slice(start, start + options.rows_per_shard)
            shards.append(
                FolderShard(
                    listing.base,
                    pa.array(images[part], pa.string()),
                    pa.array(prompts[part], pa.string()),
                    options.access,
                )
            )
    except UnicodeEncodeError as error:
        cure = "rename the file"
        raise UserError(f"input {listing.base}", f"a file name is not UTF-8: {error.object!a}", cure) from error
    return Corpus(tuple(shards), corpus_schema(()), len(images), options.access, tuple(_notes(listing, len(images))))


def _notes(listing: files.Listing, images: int) -> Iterator[str]:
    manifests = [name for name in listing.names if name.split(".")[0] in MANIFEST_STEMS]
    if manifests:
        uri = files.join(listing.base, manifests[0])
        yield f"the folder's {manifests[0]} is not read; to use its prompts give it as the input: {uri}"
    left_out = Counter(
        suffix(name) or "no extension" for name in listing.names if not is_image(name) and not name.endswith(".txt")
    )
    if left_out:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common(5))
        yield f"{left_out.total():,} files without an image's extension are left out ({kinds})"
