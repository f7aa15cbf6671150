"""Files wherever they are: a local path, `file://`, any URI that pyarrow.fs knows (s3, gs, abfs, hdfs), else fsspec.

A file is named by one string, its URI: an absolute path where it is local. File systems are opened once per process.
"""

import errno
import functools
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.utils import glob_translate
from pyarrow import fs as pafs

from m3agiqa.errors import UserError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
# A key may hold a question mark: only what pyarrow reads as an option of the file system ends the path.
_OPTIONS = re.compile(r"\?(?=(?:endpoint_override|region|scheme|access_key|anonymous|retry_limit_seconds)=)")
_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_PATTERN = re.compile(r"[*?[{]")
_NEVER_A_FILE = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL}
PARALLEL_REQUESTS = 16
"""Small reads at once from a remote store, where each one waits tens of milliseconds."""


@dataclass(frozen=True)
class Listing:
    """Files under one folder.

    Attributes:
        base: the folder's URI.
        names: paths relative to it, `/` between the parts, sorted.
    """

    base: str
    names: list[str]


def is_local(uri: str) -> bool:
    """Whether the URI is a path on this machine."""
    return _SCHEME.match(uri) is None or uri.startswith("file://")


def absolute(uri: str) -> str:
    """The form of a URI that means the same on every node: a local path becomes absolute."""
    if uri.startswith("file://"):
        uri = unquote(uri[len("file://") :])
    return str(Path(uri).expanduser().absolute()) if is_local(uri) else uri


def local_out(out: str, cure: str) -> Path:
    """The absolute path of what `--out` names, where only this machine's disk will do.

    Raises:
        UserError: for a URI of another store.
    """
    if not is_local(out):
        raise UserError(f"--out {out}", "is not on this machine", cure)
    return Path(absolute(out))


def join(base: str, name: str) -> str:
    """The URI of `name` below the folder `base`; options of the file system (`?region=`) stay at the end."""
    path, options = split_options(base)
    return f"{path.rstrip('/')}/{name}{options}"


def split(uri: str) -> tuple[str, str]:
    """The URI of the folder that holds a file, and the file's name."""
    path, options = split_options(uri)
    folder, _, name = path.rstrip("/").rpartition("/")
    return (folder or "/") + options, name


def split_options(uri: str) -> tuple[str, str]:
    """A URI without the options of its file system, and these (`?region=...`, or nothing)."""
    found = _OPTIONS.search(uri)
    return (uri[: found.start()], uri[found.start() :]) if found else (uri, "")


@functools.lru_cache(maxsize=64)
def _store(scheme: str, place: str, options: str) -> tuple[pafs.FileSystem, str | None]:
    """The file system of `scheme://place` and what its paths begin with; None: they are whole URLs (fsspec)."""
    root = f"{scheme}://{place}"
    try:
        return pafs.FileSystem.from_uri(root + options)
    except pa.ArrowInvalid:
        pass  # not one of pyarrow's own
    try:
        found, _ = url_to_fs(root)
    except (ValueError, ImportError) as error:
        raise FileNotFoundError(f"no file system for {root}: {error}") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(found)), None


def locate(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system that holds a URI, and the path in it.

    Raises:
        FileNotFoundError: no file system is known for the URI's scheme.
    """
    if is_local(uri):
        return pafs.LocalFileSystem(), absolute(uri)
    path, options = split_options(uri)
    scheme, _, rest = path.partition("://")
    place, _, key = rest.partition("/")
    store, prefix = _store(scheme, place, options)
    if prefix is None:
        return store, store.handler.fs._strip_protocol(path)
    full = f"{prefix}/{key}".rstrip("/")
    # A manifest's `../x.png`: keys are not resolved by the store. Others stay, as a key may well hold `//`.
    return store, posixpath.normpath(full) if "/./" in full or "/../" in full else full


def kind_of(uri: str) -> Literal["file", "folder", "missing"]:
    """What a URI points at."""
    try:
        store, path = locate(uri)
        found = store.get_file_info(path).type
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return "missing"
    return {pafs.FileType.File: "file", pafs.FileType.Directory: "folder"}.get(found, "missing")  # type: ignore[return-value]


def open_stream(uri: str, compression: str | None = None) -> pa.NativeFile:
    """Opens a file for reading from the start; `compression="detect"` goes by the file's extension."""
    store, path = locate(uri)
    return store.open_input_stream(path, compression=compression, buffer_size=1 << 20)


def open_file(uri: str) -> pa.NativeFile:
    """Opens a file for reading at any place."""
    store, path = locate(uri)
    return store.open_input_file(path)


def fetch(uri: str, most: int | None = None) -> bytes:
    """Reads a whole file, or its first `most` bytes. What a corpus names is read by `Access.fetch`.

    Raises:
        FileNotFoundError: there is no such file, or nothing can be one under that name: the input's fault.
        OSError: anything else: the system's fault, worth another try.
    """
    try:
        if is_local(uri):
            with Path(absolute(uri)).open("rb") as file:
                return file.read(-1 if most is None else most)
        store, path = locate(uri)
        if isinstance(store, pafs.PyFileSystem):
            return store.handler.fs.cat_file(
                path, end=most
            )  # one request, where opening a file first asks for its size
        with store.open_input_stream(path, compression=None) as stream:
            return stream.read(most)
    except (ValueError, OSError) as error:
        raise as_missing(error, uri) from error


def as_missing(error: ValueError | OSError, uri: str) -> OSError:
    """A FileNotFoundError where it is the name's fault that a file cannot be read; else the error itself."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "no such file", uri)
    if isinstance(error, ValueError):  # a NUL in the name, or a URL that cannot be read as one
        return FileNotFoundError(errno.ENOENT, f"not a usable file name ({error})", uri)
    if error.errno in _NEVER_A_FILE:
        return FileNotFoundError(errno.ENOENT, f"not a file ({error.strerror})", uri)
    return error


def fetch_all(uris: list[str], read: Callable[[str], bytes]) -> list[bytes | None]:
    """Reads many small files at once, in order; None for one that cannot be read."""

    def or_none(uri: str) -> bytes | None:
        try:
            return read(uri)
        except OSError:
            return None

    if len(uris) < 2 or is_local(uris[0]):
        return [or_none(uri) for uri in uris]
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        return list(pool.map(or_none, uris))


def expand(uri: str) -> Listing:
    """The files that a path, a folder (with all below it), a glob or a brace pattern stands for.

    What exists under the very name is taken at its word, brackets and all. Hidden files are left out.

    Raises:
        UserError: nothing is there, or a file of a brace pattern is missing.
    """
    uri = absolute(uri)
    kind = kind_of(uri)
    if kind == "folder":
        return Listing(uri, sorted(_walk(uri)))
    if kind == "file":
        folder, name = split(uri)
        return Listing(folder, [name])
    patterns = list(_expand_braces(uri))
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        matches = list(pool.map(_match, patterns))
    found = sorted({file for files in matches for file in files})
    if not found:
        what = "no file matches it" if len(patterns) > 1 or _is_glob(uri) else "does not exist"
        raise UserError(f"input {uri}", what, "give a folder of images, a manifest, a tar, a glob or a brace pattern")
    empty = [pattern for pattern, files in zip(patterns, matches, strict=True) if not files]
    if empty:
        cure = "narrow the braces to what is there, or use a glob such as *.tar"
        raise UserError(f"input {uri}", f"nothing at {empty[0]} ({len(empty)} of {len(patterns)} missing)", cure)
    folders = {split(file)[0] for file in found}
    options = split_options(found[0])[1]
    base = posixpath.commonpath([split_options(folder)[0].replace("://", ":/") for folder in folders])
    base = re.sub(r"^([A-Za-z][A-Za-z0-9+.-]*):/", r"\1://", base) + options
    start = len(split_options(base)[0].rstrip("/")) + 1
    return Listing(base, [split_options(file)[0][start:] for file in found])


def base_of(uri: str) -> str:
    """The folder below which all files are that an input stands for, whether they are still there or not."""
    uri = absolute(uri)
    path, options = split_options(uri)
    kind = kind_of(uri)
    if kind == "missing" and (sign := _PATTERN.search(path)) is not None:
        return path[: sign.start()].rpartition("/")[0] + options
    return split(uri)[0] if kind == "file" or (kind == "missing" and posixpath.splitext(path)[1]) else uri


def _is_glob(pattern: str) -> bool:
    return any(sign in split_options(pattern)[0] for sign in "*?[")


def _expand_braces(pattern: str) -> Iterator[str]:
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    start, dots, stop = found.group(1).partition("..")
    if dots and start.isdigit() and stop.isdigit():
        width = len(start) if start.startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(start), int(stop) + 1)]
    else:
        choices = found.group(1).split(",")
    for choice in choices:
        yield from _expand_braces(pattern[: found.start()] + choice + pattern[found.end() :])


def _match(pattern: str) -> list[str]:
    if not _is_glob(pattern):
        kind = kind_of(pattern)
        return [join(pattern, name) for name in _walk(pattern)] if kind == "folder" else [pattern][: kind == "file"]
    path, options = split_options(pattern)
    parts = path.split("/")
    fixed = next(i for i, part in enumerate(parts) if _is_glob(part))
    base, rest = "/".join(parts[:fixed]) + options, "/".join(parts[fixed:])
    if kind_of(base) != "folder":
        return []
    wanted = re.compile(glob_translate(rest))
    names = _walk(base, recursive="/" in rest or "**" in rest)
    return [join(base, name) for name in names if wanted.match(name)]


def _walk(uri: str, recursive: bool = True) -> Iterator[str]:
    """Relative paths of the files below a folder that are not hidden, in no order."""
    if is_local(uri):
        yield from _walk_local(Path(uri), recursive)
        return
    store, path = locate(uri)
    start = len(path.rstrip("/")) + 1
    for info in store.get_file_info(pafs.FileSelector(path, recursive=recursive)):
        name = info.path[start:]
        if info.type == pafs.FileType.File and not any(part.startswith(".") for part in name.split("/")):
            yield name


def _walk_local(top: Path, recursive: bool) -> Iterator[str]:
    # os.scandir, unlike pyarrow, need not ask for the size of each file: 1 M files in seconds. Links are followed, as
    # collections are often put together from them; a folder seen before is a loop.
    seen: set[tuple[int, int]] = set()
    start = len(str(top).rstrip("/")) + 1
    for folder, folders, names in os.walk(top, onerror=_raise, followlinks=True):
        status = os.stat(folder)  # noqa: PTH116 os.walk gives a str
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        prefix = folder[start:].rstrip("/")
        for name in names:
            if not name.startswith("."):
                yield f"{prefix}/{name}" if prefix else name


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out a folder that may not be read
