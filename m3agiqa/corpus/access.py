"""Which files a corpus may name. A manifest may come from anywhere; the run that reads it has rights of its own.

Images are read from the folders of the corpus, from `corpus.images` and from `access.roots`; from the web only where
`access.http` says so. The rule holds for what a path leads to, links followed, and not only for what it says.
"""

import contextlib
import errno
import functools
import math
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from m3agiqa.config import AccessConfig
from m3agiqa.corpus import files, web
from m3agiqa.corpus.web import Refused

_WEB = ("http://", "https://")
_TOO_LARGE = "too-large:"


@dataclass(frozen=True)
class Access:
    """What may be read; small, and goes through pickle.

    Attributes:
        roots: URIs of folders, local ones absolute.
        config: the rest of the rules.
    """

    roots: tuple[str, ...]
    config: AccessConfig = field(default_factory=AccessConfig.model_construct)

    def fetch(self, uri: str) -> bytes:
        """Reads a whole file.

        Raises:
            Refused: the rules do not allow it.
            FileNotFoundError: there is no such file, or nothing can be one under that name: the input's fault.
            OSError: anything else: the system's fault, worth another try.
        """
        if uri.lower().startswith(_WEB):
            return self._from_web(uri)
        if uri.startswith(_TOO_LARGE):
            size, _, name = uri.removeprefix(_TOO_LARGE).partition(":")
            raise Refused(name, self._too_large(float(size)))
        most = self.max_bytes
        if files.is_local(uri):
            data = self._local(uri, most)
        else:
            self._check_remote(uri)
            data = files.fetch(uri, most + 1)
        if len(data) > most:
            raise Refused(uri, f"is larger than {self.config.max_mib:g} MiB (access.max_mib)")
        return data

    @property
    def max_bytes(self) -> int:
        """Size of the largest image that is read, wherever it is."""
        return self.config.max_mib * 2**20

    def check_size(self, name: str, size: int) -> None:
        """For what is read otherwise, as it is inside a file of the corpus.

        Raises:
            Refused: it is larger than is read.
        """
        if size > self.max_bytes:
            raise Refused(name, self._too_large(size))

    def _too_large(self, size: float) -> str:
        mib, most = size / 2**20, self.config.max_mib
        return (
            f"has {mib:,.1f} MiB, more than access.max_mib={most}; to allow it: --set access.max_mib={math.ceil(mib)}"
        )

    def _from_web(self, url: str) -> bytes:
        if not self.config.http:
            raise Refused(url, "is on the web, which is not read from unless access.http=true")
        rules = self.config
        most = rules.http_max_mib * 2**20
        return web.fetch(url, hosts=rules.http_hosts, timeout_s=rules.http_timeout_s, max_bytes=most)

    @contextlib.contextmanager
    def opened(self, path: str) -> Iterator[int]:
        """A local file, open for reading: its descriptor, for as long as the block lasts.

        Raises:
            Refused, FileNotFoundError, OSError: as `fetch` does.
        """
        if path.startswith("file://"):
            raise Refused(path, "is a file:// address; a corpus names files by their path")
        allowed = _resolved(tuple(root for root in self.roots if files.is_local(root)))
        if not _below(posixpath.normpath(path), (*allowed, *self.roots)):
            raise _outside(path)
        try:
            # Not waiting for a writer: a pipe of that name would hold the run up for ever.
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (ValueError, OSError) as error:
            raise files.as_missing(error, path) from error
        with contextlib.ExitStack() as last:
            last.callback(os.close, handle)
            # Of the open file, not of its name: a link that is changed in between changes nothing.
            if not _below(str(Path(f"/proc/self/fd/{handle}").readlink()), allowed):
                raise _outside(path)
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise FileNotFoundError(errno.ENOENT, "not a file", path)
            yield handle

    def _local(self, path: str, most: int) -> bytes:
        with self.opened(path) as handle, os.fdopen(handle, "rb", closefd=False) as stream:
            return stream.read(most + 1)

    def _check_remote(self, uri: str) -> None:
        if "::" in uri:
            raise Refused(uri, "is a chain of file systems, which a corpus may not name")
        path, options = files.split_options(uri)
        for root in self.roots:
            folder, own = files.split_options(root)
            if options == own and _below(_plain(path), (_plain(folder),)):
                return
        raise _outside(uri)


def too_large(name: str, size: int) -> str:
    """What a row names in place of an image inside a file that was not read for its size: `fetch` says why."""
    return f"{_TOO_LARGE}{size}:{name}"


def _outside(uri: str) -> Refused:
    path, _ = files.split_options(uri)
    return Refused(uri, f"leads outside of the corpus; to allow it: --set access.roots=[{posixpath.dirname(path)}]")


def _below(path: str, roots: Iterable[str]) -> bool:
    return any(path.startswith(root.rstrip("/") + "/") for root in roots)


def _plain(uri: str) -> str:
    """A remote URI with `..` worked out, as some stores do."""
    scheme, mark, rest = uri.partition("://")
    place, _, key = rest.partition("/")
    return f"{scheme}{mark}{place}{posixpath.normpath('/' + key)}"


@functools.lru_cache(maxsize=64)
def _resolved(roots: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(Path(root).resolve()) for root in roots)
