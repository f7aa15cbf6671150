"""What kohya's sd-scripts read: folders named REPEATS_NAME of pictures, each with its caption in `same-name.txt`.

OUT/train/1_00000/000000000.png, OUT/train/1_00000/000000000.txt;
`--train_data_dir=OUT/train --caption_extension=.txt` (what they look for by themselves is `.caption`)
"""

from collections.abc import Iterable, Sequence

from m3agiqa.export.copying import Folder, spread
from m3agiqa.export.rows import Row

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Of the pictures that sd-scripts look for; others they pass over without a word."""


class Kohya:
    """Writes shards as folders whose pictures are shown once an epoch."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def write(self, part: str, shards: Iterable[Sequence[Row]]) -> None:
        """Writes the pictures that are not there, and the captions."""
        for shard, rows in enumerate(shards):
            place = f"{part}/1_{shard:05d}"
            self._folder.put_images(place, [(row.image, row.name) for row in rows])
            # A line of its own even where it is empty: a file without one ends the training.
            captions = [(f"{place}/{row.number:09d}.txt", f"{row.caption}\n".encode()) for row in rows]
            spread(lambda one: self._folder.put(*one), captions, remote=not self._folder.local)
