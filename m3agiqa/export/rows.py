"""A row as the layouts get it, and its caption."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from m3agiqa.aspects import Aspect, word_of_score

Format = Literal["imagefolder", "kohya", "parquet", "webdataset", "diffusion-dpo"]
FORMATS: tuple[str, ...] = get_args(Format)
Caption = Literal["prompt", "description", "both"]
PARTS = {"train": "train", "val": "validation", "test": "test"}
"""Our name of a part -> the name that `datasets` knows it by."""


@dataclass(frozen=True)
class Row:
    """One picture of a training set.

    Attributes:
        number: its place in its part, from 0; it names the files.
        image: URI of the file.
        suffix: of the file, from the dot.
        caption: as asked for.
        columns: id, prompt, generator and scores, by the names of a scores file.
    """

    number: int
    image: str
    suffix: str
    caption: str
    columns: dict[str, Any]

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.number:09d}{self.suffix}"


class Layout(Protocol):
    """Writes rows as one kind of trainer wants them."""

    def write(self, part: str, shards: Iterable[Sequence[Row]]) -> None:
        """Writes a part (`train`, `validation`), shard by shard. What is there already is not written again."""
        ...


@dataclass(frozen=True)
class Captions:
    """How a caption is made: of what, of which aspect's description, and whether with words for the scores."""

    kind: Caption = "prompt"
    aspect: Aspect = Aspect.QUALITY
    tags: bool = False

    def columns(self) -> Iterator[str]:
        """The columns of a scores file that captions are made of."""
        yield "prompt"
        if self.kind != "prompt":
            yield f"{self.aspect}_description"
        if self.tags:
            yield from (f"{aspect}_{suffix}" for aspect in Aspect for suffix in ("mos", "rating"))

    def of(self, row: dict[str, Any]) -> str:
        """The caption on one line; empty where a row has nothing to make it of."""
        texts = [row["prompt"]] if self.kind != "description" else []
        texts += [row[f"{self.aspect}_description"]] if self.kind != "prompt" else []
        said = ". ".join(text.strip().rstrip(".") for text in texts if text and text.strip())
        words = [f"{word} {aspect}" for aspect in Aspect if (word := self._word(row, aspect))] if self.tags else []
        return " ".join(", ".join([said, *words] if said else words).split())

    def _word(self, row: dict[str, Any], aspect: Aspect) -> str | None:
        mos: float | None = row[f"{aspect}_mos"]
        rating: str | None = row[f"{aspect}_rating"]
        return rating if mos is None else word_of_score(mos)
