"""Hugging Face's `imagefolder`: pictures, and beside them `metadata.jsonl` with `file_name`, `text` and the scores.

OUT/train/00000/000000000.png, OUT/train/metadata.jsonl; `load_dataset("imagefolder", data_dir=OUT)`
"""

import json
from collections.abc import Iterable, Sequence

from m3agiqa.export.copying import Folder
from m3agiqa.export.rows import Row


class ImageFolder:
    """Writes shards as folders of their own: a folder of millions of files is slow to list."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def write(self, part: str, shards: Iterable[Sequence[Row]]) -> None:
        """Writes the pictures that are not there, and the part's metadata after them."""
        # One file for all shards: `datasets` wants equal types in all of them, and infers them from the values.
        with self._folder.whole(f"{part}/metadata.jsonl") as file:
            for shard, rows in enumerate(shards):
                self._folder.put_images(f"{part}/{shard:05d}", [(row.image, row.name) for row in rows])
                for row in rows:
                    line = {"file_name": f"{shard:05d}/{row.name}", "text": row.caption} | row.columns
                    file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
