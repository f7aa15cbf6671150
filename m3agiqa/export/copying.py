"""Puts files into the folder of an export: in the kernel from disk to disk, else through memory."""

import contextlib
import errno
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

import pyarrow.fs as pafs
from PIL import Image

from m3agiqa.corpus import Access, Refused
from m3agiqa.corpus.files import is_local, locate
from m3agiqa.corpus.folder import is_image, suffix
from m3agiqa.errors import UserError
from m3agiqa.images import FORMATS

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
# Copies wait for the disk, and reads from a store for the network.
_THREADS = 4
_REMOTE_THREADS = 16
# Where the kernel cannot copy between these two files by itself.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


class Folder:
    """The folder of an export, local or on an object store.

    Attributes:
        access: which image files may be read, and are.
        link: whether image files are referred to by symbolic links.
    """

    def __init__(self, uri: str, access: Access, *, link: bool = False) -> None:
        self.uri, self.access, self.link = uri, access, link
        self.local = is_local(uri)
        try:
            self._store, self._path = locate(uri)
            is_file = self._store.get_file_info(self._path).type == pafs.FileType.File
        except (OSError, ValueError) as error:
            raise UserError(f"--out {uri}", f"cannot be used ({error})", "give a folder or a known URI") from None
        if is_file:
            raise UserError(f"--out {uri}", "is a file", "give a folder")

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self._store.get_file_info(f"{self._path}/{name}").type == pafs.FileType.File

    def is_empty(self) -> bool:
        """Whether nothing is there, or an empty folder."""
        return not self._store.get_file_info(pafs.FileSelector(self._path, allow_not_found=True))

    def read(self, name: str) -> bytes:
        """A whole file."""
        with self._store.open_input_stream(f"{self._path}/{name}") as stream:
            return stream.read()

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[IO[bytes]]:
        """A new file that has its name only when it is whole, and its folders."""
        path = f"{self._path}/{name}"
        self.make(os.path.dirname(name))  # noqa: PTH120 of a URI's path
        if not self.local:
            # A store publishes an object when it is closed, so it is opened only when all of it is there.
            with tempfile.TemporaryFile() as file:
                yield file
                file.seek(0)
                with self._store.open_output_stream(path) as stream:
                    shutil.copyfileobj(file, stream)
            return
        partial = Path(f"{path}.partial")
        with partial.open("wb") as file:
            yield file
        partial.replace(path)

    def put(self, name: str, data: bytes) -> None:
        """Writes a small file."""
        with self.whole(name) as file:
            file.write(data)

    def make(self, name: str) -> None:
        """Makes a folder."""
        self._store.create_dir(f"{self._path}/{name}".rstrip("/"), recursive=True)

    def remove(self, name: str) -> None:
        """Removes a folder and all in it, if it is there."""
        if self._store.get_file_info(f"{self._path}/{name}").type == pafs.FileType.Directory:
            self._store.delete_dir(f"{self._path}/{name}")

    def put_images(self, folder: str, images: Sequence[tuple[str, str]]) -> None:
        """Copies or links image files (URI, name) into a folder.

        Raises:
            UserError: for one that cannot be read.
        """
        self.make(folder)
        if not self.local:
            found = pafs.FileSelector(f"{self._path}/{folder}", allow_not_found=True)
            there = {info.base_name for info in self._store.get_file_info(found)}
            images = [(uri, name) for uri, name in images if name not in there]
        near = self.local and all(is_local(uri) for uri, _ in images)
        spread(lambda one: self._put_image(one[0], f"{self._path}/{folder}/{one[1]}"), images, remote=not near)

    def _put_image(self, uri: str, path: str) -> None:
        if self.local and is_local(uri):
            with contextlib.ExitStack() as last:
                with _readable(uri):
                    source = last.enter_context(self.access.opened(uri))
                link_file(uri, path) if self.link else copy_file(source, path)
            return
        data = self.read_image(uri)
        with self._store.open_output_stream(path) as stream:
            stream.write(data)

    def read_image(self, uri: str) -> bytes:
        """A whole image file.

        Raises:
            UserError: if it cannot be read, or may not be.
        """
        with _readable(uri):
            return self.access.fetch(uri)

    def read_images(self, uris: Sequence[str]) -> list[bytes]:
        """Whole image files, in order."""
        return spread(self.read_image, uris, remote=not all(map(is_local, uris)))

    def suffix_of(self, uri: str) -> str:
        """The suffix of an image file, from the dot; by its content where its name has none that is known."""
        if is_image(uri):
            return suffix(uri)
        with Image.open(io.BytesIO(self.read_image(uri)), formats=FORMATS) as image:
            known = {"JPEG": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}
            return known.get(str(image.format), f".{image.format}".lower())


def copy_file(source: int, path: str) -> None:
    """Copies an open file bit for bit. One that is there with the same size is taken for what an earlier run copied."""
    left = os.fstat(source).st_size
    try:
        into = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        if os.stat(path).st_size == left:  # noqa: PTH116 a system call for each of millions of files
            return
        into = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        while left and (copied := os.copy_file_range(source, into, left)):
            left -= copied
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
        with open(source, "rb", closefd=False) as one, open(into, "wb", closefd=False) as other:
            shutil.copyfileobj(one, other)
    finally:
        os.close(into)


@contextlib.contextmanager
def _readable(uri: str) -> Iterator[None]:
    """Says of an image that cannot, or may not, be read which one it is."""
    try:
        yield
    except Refused as error:
        cure = "run the same score command again with access set so: what is scored stays"
        raise UserError(uri, f"the rules of the run that scored it do not allow it: it {error.reason}", cure) from None
    except OSError as error:
        cure = "bring it back and run the same command again"
        raise UserError(uri, f"the image cannot be read ({error.strerror or error})", cure) from None


def link_file(source: str, path: str) -> None:
    """A symbolic link to a file."""
    with contextlib.suppress(FileExistsError):
        os.symlink(source, path)  # noqa: PTH211


def spread(work: Callable[[ItemT], ResultT], items: Iterable[ItemT], *, remote: bool) -> list[ResultT]:
    """The results of some calls, in order, several at a time; the first error ends it."""
    with ThreadPoolExecutor(_REMOTE_THREADS if remote else _THREADS) as pool:
        return list(pool.map(work, items))
