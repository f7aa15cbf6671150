"""A worker's images, ready for the model: read once, kept as far as they fit, else read anew in the background."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import IO, Any

import numpy as np
import torch

from m3agiqa.config import ImageConfig
from m3agiqa.corpus import Refused, Shard
from m3agiqa.engine.pictures import Tensors, encode_image
from m3agiqa.finetuning.talks import Bad, Picture
from m3agiqa.images import ImageRejected, decode

# Images that are read ahead of the one that is made ready, for each reader.
_AHEAD = 4
# Images of one shape that the vision side looks at together while it readies them.
_LOOK = 16


@dataclass(frozen=True)
class Seen:
    """What the vision side makes of one image.

    Attributes:
        pooled: what takes the place of the image's tokens, in pieces as the model has them.
        deepstack: the same of further layers, where the model has such (Qwen3-VL).
        pieces: whether the model gives and takes a list of pieces, rather than one tensor.
    """

    pooled: tuple[torch.Tensor, ...]
    deepstack: tuple[tuple[torch.Tensor, ...], ...]
    pieces: bool

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return [*self.pooled, *(tensor for layer in self.deepstack for tensor in layer)]


@dataclass(frozen=True)
class Prepared:
    """One image as the model takes it.

    Attributes:
        tensors: by the processor's names; without pixels where it is already `seen`.
    """

    tensors: Tensors
    seen: Seen | None = None

    @property
    def bytes(self) -> int:
        """Size in memory."""
        held = [*self.tensors.values(), *(self.seen.tensors if self.seen else [])]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


Look = Callable[[Sequence[Tensors]], list[Seen]]
"""Lets the vision side look at some images of one shape."""


class Pictures:
    """The images of one worker's conversations.

    Args:
        pictures: by number. shards: those that embedded images are read from.
        look: where the vision side learns nothing, what it makes of an image is kept rather than the pixels.
    """

    def __init__(
        self,
        pictures: Mapping[int, Picture],
        shards: Sequence[Shard],
        limits: ImageConfig,
        processor: Any,
        image_token: str | None,
        *,
        cache_mib: int,
        readers: int,
        look: Look | None = None,
    ) -> None:
        self._pictures, self._shards, self._limits = dict(pictures), shards, limits
        self._processor, self._image_token, self._look = processor, image_token, look
        self._room, self._readers = cache_mib * 2**20, readers
        self._pool, self._lock = ThreadPoolExecutor(readers), Lock()
        self._kept: dict[int, Prepared] = {}
        self._embedded: dict[int, tuple[int, int]] = {}
        self._spill: IO[bytes] | None = None
        self.tokens: dict[int, np.ndarray] = {}
        """Number of an image -> the token ids that stand for it."""
        self.digests: dict[int, str] = {}
        """Number of an image -> the SHA-256 of its file, once that was read."""

    @property
    def kept(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def open(self) -> list[Bad]:
        """Reads every image once, keeps those that there is room for, and returns the rows whose image is bad.

        What is kept is decided by the order alone, so that another run of the same training computes the same.
        """
        self._take_embedded()
        bad: list[Bad] = []
        same: list[tuple[int, Tensors]] = []
        for number, read in self._read_ahead(sorted(self._pictures)):
            if isinstance(read, Bad):
                bad.append(read)
                continue
            ids, tensors = read
            self.tokens[number] = np.asarray(ids, np.int32)
            if same and (len(same) == _LOOK or _shapes(same[0][1]) != _shapes(tensors)):
                self._keep(same)
                same = []
            same.append((number, tensors))
        self._keep(same)
        return bad

    def get(self, numbers: Iterable[int]) -> dict[int, Prepared]:
        """Some images, each once, kept or read again; safe in threads."""
        wanted = list(dict.fromkeys(numbers))
        with self._lock:  # the processor's tokenizer is no friend of threads
            read = dict(self._read_ahead([number for number in wanted if number not in self._kept]))
        found = {}
        for number in wanted:
            again = read.get(number)
            if isinstance(again, Bad):
                raise RuntimeError(f"an image that was there is no longer: {again}")
            found[number] = self._kept[number] if again is None else Prepared(again[1])
        return found

    def _keep(self, same: Sequence[tuple[int, Tensors]]) -> None:
        if not same or self._room <= 0:
            return
        seen = self._look([tensors for _, tensors in same]) if self._look is not None else [None] * len(same)
        for (number, tensors), one in zip(same, seen, strict=True):
            if one is not None:
                tensors = {key: value for key, value in tensors.items() if not key.startswith("pixel")}
            prepared = Prepared(tensors, one)
            if prepared.bytes <= self._room:
                self._room -= prepared.bytes
                self._kept[number] = prepared
            else:
                # The first that does not fit ends it: which are kept must not hang on the sizes of later ones.
                self._room = 0
                return

    def _read_ahead(self, numbers: Sequence[int]) -> Iterator[tuple[int, tuple[list[int], Tensors] | Bad]]:
        """Images one by one, in order: files are read and decoded in threads, the processor works here."""
        most = self._readers * _AHEAD
        waiting: list[tuple[int, Future[np.ndarray]]] = []
        for i in range(len(numbers) + most):
            if i < len(numbers):
                waiting.append((numbers[i], self._pool.submit(self._pixels, numbers[i])))
            if waiting and (i >= len(numbers) or len(waiting) > most):
                number, pixels = waiting.pop(0)
                try:
                    yield number, encode_image(self._processor, self._image_token, pixels.result())
                except Exception as error:  # noqa: BLE001 - the row boundary: a bad image costs its row
                    yield number, Bad(self._pictures[number].row, _reason(error))

    def _pixels(self, number: int) -> np.ndarray:
        data = self._bytes(number)
        if number not in self.digests:
            self.digests[number] = hashlib.sha256(data).hexdigest()
        return decode(data, **self._limits.model_dump()).pixels

    def _bytes(self, number: int) -> bytes:
        picture = self._pictures[number]
        if picture.place is not None:
            start, size = self._embedded[number]
            assert self._spill is not None
            return os.pread(self._spill.fileno(), size, start)
        if picture.uri is None:
            raise FileNotFoundError("the row names no image")
        return picture.access.fetch(picture.uri)

    def _take_embedded(self) -> None:
        """Copies this worker's embedded images to a local file, from which any can be had at once."""
        for number, data in embedded_images(self._pictures, self._shards):
            if self._spill is None:
                self._spill = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object, without a name
            self._embedded[number] = (self._spill.tell(), len(data))
            self._spill.write(data)
        if self._spill is not None:
            self._spill.flush()


def embedded_images(pictures: Mapping[int, Picture], shards: Sequence[Shard]) -> Iterator[tuple[int, bytes]]:
    """Numbers and bytes of those images that are embedded in their corpus; every shard is read once."""
    wanted: dict[int, dict[int, int]] = {}
    for number, picture in pictures.items():
        if picture.place is not None:
            wanted.setdefault(picture.place[0], {})[picture.place[1]] = number
    for shard, rows in wanted.items():
        for row, data in enumerate(value for table in shards[shard].read() for value in table["_bytes"]):
            if row in rows:
                yield rows[row], data.as_py()


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in tensors.items()}


def _reason(error: Exception) -> str:
    if isinstance(error, Refused):
        return f"not read: {error}"
    if isinstance(error, FileNotFoundError):
        return f"there is no such file: {error.filename}" if error.filename else str(error)
    if isinstance(error, ImageRejected):
        return str(error)
    return f"its image cannot be used ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
