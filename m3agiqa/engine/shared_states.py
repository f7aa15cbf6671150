"""Hands hidden states from an engine's process to the process that asked for them, through shared memory.

The asking side makes an empty file in a folder of its own under /dev/shm and sends its name along with
the request; the engine's side fills it. Only the asking side makes and removes files: removing one is
how a request is called off, and what a writer still puts into a removed file is freed when it closes it.
So nothing is left behind by a request that was aborted, failed, or outlived its engine.

Layout of a file: a header of 64 bytes (magic, status, data type, tokens, width; little-endian), then
the states row by row. The header is written last.
"""

import asyncio
import fcntl
import itertools
import os
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from m3agiqa.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "m3agiqa-states-"
_NAME = re.compile(PREFIX + r"[0-9]+-[A-Za-z0-9_]+/[0-9]+")
_LOCK = "lock"
_HEADER = struct.Struct("<8sIIQQ")
_HEADER_BYTES = 64
_MAGIC = b"m3agiqa1"
_READY, _FAILED = 1, 2
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALLEST_WAIT_S, _LONGEST_WAIT_S = 0.0002, 0.01


class StatesLost(Exception):
    """The engine did not, or could not, hand over the states of one request; others may be fine."""


class StatesInbox:
    """The asking side: one per process that reads states. Use it as a context manager, or call `close`.

    Args:
        root: where shared memory is mounted.

    Raises:
        UserError: if there is no writable shared memory.
    """

    def __init__(self, root: Path = SHARED_MEMORY) -> None:
        try:
            remove_abandoned(root)
            self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=root))
        except OSError as error:
            raise UserError(
                str(root), f"cannot be written to ({error.strerror})", "mount shared memory there"
            ) from None
        # The kernel lets go of the lock when this process ends, however it ends: see remove_abandoned.
        # Locked before it has its name, so that nobody finds it unlocked.
        unnamed = self.folder / f"{_LOCK}.new"
        self._lock = os.open(unnamed, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(self.folder / _LOCK)
        self._numbers = itertools.count()

    def ask(self) -> "StatesTicket":
        """A ticket for one request; close it (or use it as a context manager) whatever happens to the request."""
        return StatesTicket(self.folder / str(next(self._numbers)))

    def close(self) -> None:
        """Calls off whatever is still asked for. Tensors that were handed out stay valid."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> "StatesInbox":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StatesTicket:
    """One request's states, asked for and not yet there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))

    @property
    def name(self) -> str:
        """What the engine's side is told: the file relative to the root of shared memory."""
        return f"{self._path.parent.name}/{self._path.name}"

    async def receive(self, timeout_s: float = 30.0) -> torch.Tensor:
        """The states [tokens, width], in the engine's data type, mapped and not copied.

        The memory is freed with the tensor. Call it when the request has finished: the engine hands over
        as soon as the prompt has been computed, so that this waits only for a copy that is under way.

        Args:
            timeout_s: seconds to wait at most.

        Raises:
            StatesLost: if they do not come in time, or the engine could not write them.
        """
        deadline, pause = time.monotonic() + timeout_s, _SMALLEST_WAIT_S
        while (states := self._take()) is None:
            self._check(deadline, timeout_s)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT_S)
        return states

    def read(self, timeout_s: float = 30.0) -> torch.Tensor:
        """Like `receive`, for callers without an event loop."""
        deadline, pause = time.monotonic() + timeout_s, _SMALLEST_WAIT_S
        while (states := self._take()) is None:
            self._check(deadline, timeout_s)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT_S)
        return states

    def close(self) -> None:
        """Calls the states off where they have not been taken yet. May be called more than once."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> "StatesTicket":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, deadline: float, timeout_s: float) -> None:
        if time.monotonic() > deadline:
            self.close()
            raise StatesLost(
                f"the engine sent no hidden states within {timeout_s:g} s: the request has not finished, or did not "
                "ask for them (extra_args), or the engine runs without capture"
            )

    def _take(self) -> torch.Tensor | None:
        try:
            with self._path.open("rb") as file:
                data = file.read(_HEADER_BYTES)
        except FileNotFoundError:
            raise StatesLost("these states were taken, or called off, before") from None
        if len(data) < _HEADER_BYTES:
            return None
        magic, status, kind, tokens, width = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            return None
        if status == _FAILED:
            reason = self._path.read_bytes()[_HEADER_BYTES:].decode(errors="replace")
            self.close()
            raise StatesLost(f"the engine could not hand over the hidden states: {reason}")
        dtype = _DTYPES[kind]
        size = _HEADER_BYTES + tokens * width * dtype.itemsize
        whole = torch.from_file(str(self._path), shared=True, size=size, dtype=torch.uint8)
        self.close()
        return whole[_HEADER_BYTES:].view(dtype).view(tokens, width)


def write_states(
    name: str, tokens: int, width: int, dtype: torch.dtype, fill: Callable[[torch.Tensor], object], root: Path
) -> bool:
    """The engine's side: puts states where a ticket asked for them.

    Args:
        name: the ticket's name.
        tokens: number of rows.
        width: number of columns.
        dtype: data type of the states; float32, bfloat16 or float16.
        fill: writes the states into the tensor [tokens, width] that it is given.
        root: where shared memory is mounted.

    Returns:
        False if the ticket was closed in the meantime.

    Raises:
        OSError: if shared memory is full.
    """
    descriptor = _open(name, root)
    if descriptor is None:
        return False
    try:
        size = _HEADER_BYTES + tokens * width * dtype.itemsize
        # Reserves the pages: without it, a full /dev/shm would kill this process with SIGBUS at the write.
        os.posix_fallocate(descriptor, 0, size)
        mapped = torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8)
        fill(mapped[_HEADER_BYTES:].view(dtype).view(tokens, width))
        os.pwrite(descriptor, _HEADER.pack(_MAGIC, _READY, _DTYPES.index(dtype), tokens, width), 0)
    finally:
        os.close(descriptor)
    return True


def write_failure(name: str, reason: str, root: Path) -> None:
    """The engine's side: says why there are no states, so that nobody waits for them."""
    descriptor = _open(name, root)
    if descriptor is None:
        return
    try:
        os.ftruncate(descriptor, 0)
        header = _HEADER.pack(_MAGIC, _FAILED, 0, 0, 0).ljust(_HEADER_BYTES, b"\0")
        os.pwrite(descriptor, header + reason.encode(), 0)
    finally:
        os.close(descriptor)


def _open(name: str, root: Path) -> int | None:
    # Requests may come from less trusted places than this module: no other file can be named.
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a ticket")
    try:
        return os.open(root / name, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None


def remove_abandoned(root: Path = SHARED_MEMORY) -> None:
    """Removes the folders of processes that ended without closing their inbox.

    Goes by their locks: a process id says nothing where containers share /dev/shm.
    """
    for folder in root.glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:
            # Another user's, removed just now, or so new that its lock is not there yet.
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
