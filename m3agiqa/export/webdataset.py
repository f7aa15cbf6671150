"""WebDataset tars: of each sample the picture, its caption as `.txt` and its scores as `.json`.

OUT/train/00000.tar with 000000000.png, 000000000.txt, 000000000.json
"""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence

from m3agiqa.export.copying import Folder
from m3agiqa.export.rows import Row


class WebDataset:
    """Writes a shard as a tar, which has its name only when it is whole."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def write(self, part: str, shards: Iterable[Sequence[Row]]) -> None:
        """Writes the tars that are not there."""
        for shard, rows in enumerate(shards):
            name = f"{part}/{shard:05d}.tar"
            if not self._folder.exists(name):
                self._write_tar(name, rows)

    def _write_tar(self, name: str, rows: Sequence[Row]) -> None:
        with self._folder.whole(name) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            # A few at a time: a shard's pictures need not be in memory together.
            for start in range(0, len(rows), 64):
                some = rows[start : start + 64]
                for row, image in zip(some, self._folder.read_images([row.image for row in some]), strict=True):
                    scores = json.dumps(row.columns, ensure_ascii=False).encode()
                    for suffix, data in ((row.suffix, image), (".txt", row.caption.encode()), (".json", scores)):
                        # No times and no owner: the same rows give the same bytes.
                        member = tarfile.TarInfo(f"{row.number:09d}{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
