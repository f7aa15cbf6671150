"""Thumbnails of the pictures that a report shows, from wherever the run's input keeps them."""

import base64
import functools
import io
import re
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from PIL import Image
from pyarrow import ArrowException
from pyarrow import parquet as pq

from m3agiqa.config import AccessConfig
from m3agiqa.corpus import Access, access_of, files
from m3agiqa.corpus.rows import IMAGE_COLUMNS, shorten
from m3agiqa.errors import UserError
from m3agiqa.images import ImageRejected, decode

SIDE = 192
"""The longer side of a thumbnail, in pixels."""
_BUDGET_S = 60.0
_THREADS = 4
_MAX_PIXELS = 200_000_000
_ANY_RATIO = 1e6
_EMBEDDED = re.compile(r"^(?P<file>.+)(?:#(?P<row>\d+)|::(?P<member>.+))$", re.DOTALL)
_ABSOLUTE = re.compile(r"^(?:/|[A-Za-z][A-Za-z0-9+.-]*://)")


@dataclass(frozen=True)
class Thumbnail:
    """A `data:` URI of a small picture, or the reason why there is none."""

    uri: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Places:
    """Where the images of a run are.

    Attributes:
        input: the run's input, or None where it is not known; embedded images are looked for there.
        image_column: of a parquet manifest, where one is configured.
        images: the folder that its relative paths start from, where one is configured.
        access: the run's limits on what it reads.
    """

    input: str | None = None
    image_column: str | None = None
    images: str | None = None
    access: AccessConfig = field(default_factory=AccessConfig.model_construct)

    @functools.cached_property
    def allowed(self) -> Access:
        """What the run could read: the scores may be somebody else's, and name any file of this machine."""
        if self.input is None:
            return Access(self.access.roots, self.access)
        return access_of(self.input, self.images, self.access)


def thumbnails(images: Mapping[str, str | None], places: Places, budget_s: float = _BUDGET_S) -> dict[str, Thumbnail]:
    """Makes thumbnails of rows.

    Args:
        images: id -> the row's `image`: a URI, or `file.parquet#row` or `file.tar::member` below the input.
        places: what the rows came from.
        budget_s: pictures that are not read by then, in seconds, are left out with a reason.

    Returns:
        id -> thumbnail, for every id.
    """
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, image in images.items():
        found = None if image is None or _ABSOLUTE.match(image) else _EMBEDDED.match(image)
        # A file of its own is a task of its own; what is embedded is read file by file.
        groups[found["file"] if found else f"/{name}"].append((name, image or ""))
    late = Thumbnail(reason=f"left out: reading the pictures took more than {budget_s:.0f} s")
    made = dict.fromkeys(images, late)
    ends = time.monotonic() + budget_s
    with ThreadPoolExecutor(_THREADS) as pool:
        tasks = [pool.submit(_of_group, group, places, ends) for group in groups.values()]
        done, _ = wait(tasks)
    for task in done:
        made.update(task.result())
    return made


def _of_group(group: Sequence[tuple[str, str]], places: Places, ends: float) -> dict[str, Thumbnail]:
    made: dict[str, Thumbnail] = {}
    try:
        if time.monotonic() >= ends:
            return made
        for (name, _), data in zip(group, _contents([image for _, image in group], places), strict=True):
            made[name] = _thumbnail(data)
            if time.monotonic() >= ends:
                break
    except (OSError, UserError, ArrowException, tarfile.TarError, EOFError, KeyError) as error:
        made |= {name: Thumbnail(reason=shorten(error)) for name, _ in group if name not in made}
    return made


def _contents(images: Sequence[str], places: Places) -> Iterator[bytes]:
    """The bytes of images that are in one file, or of one image, in order.

    Raises:
        OSError: a file that is not there any more, or cannot be read.
    """
    if not images[0]:
        raise FileNotFoundError("the row names no image")
    found = None if _ABSOLUTE.match(images[0]) else _EMBEDDED.match(images[0])
    if found is None:
        yield places.allowed.fetch(images[0])
        return
    uri = _find(found["file"], places)
    if found["member"] is not None:
        yield from _from_tar(uri, [image.split("::", 1)[1] for image in images], places.allowed.max_bytes)
    else:
        yield from _from_parquet(uri, [int(image.rsplit("#", 1)[1]) for image in images], places.image_column)


def _find(name: str, places: Places) -> str:
    if places.input is None:
        raise FileNotFoundError(f"the image is inside {name}, and the run's input is not known")
    listing = files.expand(places.input)
    if name not in listing.names:
        raise FileNotFoundError(f"{name} is not in {places.input} any more")
    return files.join(listing.base, name)


def _from_tar(uri: str, members: Sequence[str], most: int) -> Iterator[bytes]:
    with files.open_file(uri) as stream, tarfile.open(fileobj=stream, mode="r:*") as tar:
        names = {info.name.removeprefix("./"): info for info in tar}
        for member in members:
            content = tar.extractfile(names[member])
            if content is None:
                raise FileNotFoundError(f"{member} in {uri} is no file")
            yield content.read(most)  # a run has judged none that is larger


def _from_parquet(uri: str, rows: Sequence[int], image_column: str | None) -> Iterator[bytes]:
    with files.open_file(uri) as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
        names = file.schema_arrow.names
        column = image_column or next((name for name in IMAGE_COLUMNS if name in names), None)
        if column is None or column not in names:
            raise FileNotFoundError(f"{uri} has no column of images any more")
        for row in rows:
            yield _embedded(file, column, row)


def _embedded(file: pq.ParquetFile, column: str, row: int) -> bytes:
    first = 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if row < first + count:
            # A few rows at a time: a row group of images may not fit into memory.
            for batch in file.iter_batches(16, [group], [column], use_threads=False):
                if row < first + batch.num_rows:
                    value = batch.column(0)[row - first].as_py()
                    data = value.get("bytes") if isinstance(value, dict) else value
                    if not isinstance(data, bytes):
                        raise FileNotFoundError(f"row {row} holds no image")
                    return data
                first += batch.num_rows
        first += count
    raise FileNotFoundError(f"there is no row {row} any more")


def _thumbnail(data: bytes) -> Thumbnail:
    try:
        image = decode(data, max_pixels=_MAX_PIXELS, min_side=1, max_side=SIDE, max_aspect_ratio=_ANY_RATIO)
    except ImageRejected as rejection:
        return Thumbnail(reason=str(rejection))
    buffer = io.BytesIO()
    Image.fromarray(image.pixels).save(buffer, "WEBP", quality=72, method=4)
    return Thumbnail(uri=f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}")
