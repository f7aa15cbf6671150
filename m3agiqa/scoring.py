"""From decoded images to scored rows: the engine, and what each outcome means for a row.

Knows nothing of Ray: a `Scorer` works on Arrow tables wherever it runs.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from m3agiqa.aspects import Aspect
from m3agiqa.config import RunConfig
from m3agiqa.decoding import DECODED
from m3agiqa.engine.base import Engine, Item, ItemFailed, ItemRejected, Outcome, create_engine
from m3agiqa.errors import UserError, one_line
from m3agiqa.opinions import Opinions
from m3agiqa.records import ScoredRow, Status, scores_table


def check_given(config: RunConfig, corpus: pa.Schema) -> None:
    """Refuses columns of given descriptions that the corpus lacks, and a judged aspect without one.

    Raises:
        UserError: naming the nearest column that there is.
    """
    if config.capture.first_answer != "given":
        return
    for aspect in config.scoring.aspects:
        if aspect not in config.capture.descriptions:
            cure = f"add --description {aspect}=COLUMN, or leave the aspect out: --set scoring.aspects=..."
            raise UserError("first_answer=given", f"no column is named for the descriptions of {aspect}", cure)
    public = [field for field in corpus if not field.name.startswith("_")]
    for aspect, column in config.capture.descriptions.items():
        value, names = f"--description {aspect}={column}", [field.name for field in public]
        if column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            cure = f"did you mean {near[0]}?" if near else f"its columns are {', '.join(names)}"
            raise UserError(value, "the input has no such column", cure)
        if not pa.types.is_string(kind := corpus.field(column).type) and not pa.types.is_large_string(kind):
            raise UserError(value, f"the column is of type {kind}, not text", "name a column of texts")


class Scorer:
    """An engine and what its outcomes mean for rows.

    Args:
        config: the run's configuration; the engine is loaded at once.
        fingerprint: written into every row.
    """

    def __init__(
        self, config: RunConfig, fingerprint: str, engine: Callable[[RunConfig], Engine] = create_engine
    ) -> None:
        self._aspects = config.scoring.aspects
        given = config.capture.first_answer == "given"
        self._given = {a: config.capture.descriptions[a] for a in self._aspects} if given else {}
        self._states = self._aspects if config.capture.write else ()
        self._retries = config.ray.retries
        self._fingerprint = fingerprint
        # First: what it refuses costs no start of an engine.
        self._opinions = Opinions(config)
        self.engine = engine(config)

    def stats(self) -> dict[str, float]:
        """Counters of the engine and the predictor since the start."""
        return self.engine.stats() | self._opinions.stats()

    async def score(self, rows: pa.Table) -> pa.Table:
        """Scores rows that `decode_rows` made: one row out for each row in, in order, in the scores schema.

        Raises:
            Exception: only where the engine itself can no longer be used.
        """
        decoded = rows.select(list(DECODED)).to_pylist()
        prompts = rows["prompt"].to_pylist()
        given = self._descriptions(rows)
        items = {i: self._item(row, prompts[i], given[i]) for i, row in enumerate(decoded) if row["_status"] is None}
        outcomes: dict[int, Outcome] = {i: no for i, item in items.items() if (no := self._refusal(item)) is not None}
        askable = {i: item for i, item in items.items() if item.aspects and i not in outcomes}
        for _ in range(1 + self._retries):
            outcomes |= dict(zip(askable, await self.engine.assess(list(askable.values())), strict=True))
            askable = {i: item for i, item in askable.items() if isinstance(outcomes[i], ItemFailed)}
            if not askable:
                break
        scored = [self._row(row, items.get(i), outcomes.get(i)) for i, row in enumerate(decoded)]
        opinions = await self._opinions.of([row.assessments for row in scored])
        for row, opinion in zip(scored, opinions, strict=True):
            row.opinions = opinion
        return scores_table(rows, scored, self._fingerprint, self._states)

    def _item(self, row: dict[str, Any], prompt: str | None, descriptions: Mapping[Aspect, str]) -> Item:
        data = row["_pixels"]
        pixels = None if data is None else np.frombuffer(data, np.uint8).reshape(row["_rows"], row["_columns"], 3)
        aspects = tuple(a for a in self._aspects if prompt is not None or not a.needs_prompt)
        return Item(pixels, prompt, aspects, descriptions)

    def _descriptions(self, rows: pa.Table) -> list[dict[Aspect, str]]:
        """For each row the given first answers that are there."""
        columns = {aspect: rows[column].to_pylist() for aspect, column in self._given.items()}
        return [{a: c[i] for a, c in columns.items() if (c[i] or "").strip()} for i in range(rows.num_rows)]

    def _refusal(self, item: Item) -> ItemRejected | None:
        lacking = [a for a in item.aspects if a in self._given and a not in item.descriptions]
        missing = [f"{aspect} (column {self._given[aspect]!r})" for aspect in lacking]
        return ItemRejected(f"no given description of {', '.join(missing)}") if missing else None

    def _row(self, row: dict[str, Any], item: Item | None, outcome: Outcome | None) -> ScoredRow:
        scored = ScoredRow(width=row["_width"], height=row["_height"], image_sha256=row["_sha256"])
        if item is None:
            scored.status, scored.error = Status(row["_status"]), row["_error"]
        elif outcome is None:
            scored.status, scored.error = Status.REJECTED, "no prompt, and every aspect of this run needs one"
        elif isinstance(outcome, ItemRejected):
            scored.status, scored.error = Status.REJECTED, one_line(outcome)
        elif isinstance(outcome, ItemFailed):
            scored.status, scored.error = Status.FAILED, one_line(outcome)
        else:
            scored.assessments = outcome
            scored.error = self._notes(item, outcome)
        return scored

    def _notes(self, item: Item, outcome: Any) -> str | None:
        """What an ok row lacks, or what was done to be able to judge it."""
        notes = [f"{a}: not judged, the row has no prompt" for a in self._aspects if a not in item.aspects]
        notes += sorted({found.note for found in outcome.values() if found.note})
        for aspect, found in outcome.items():
            cut = "cut at its limit (scoring.max_rating_tokens)" if found.rating_cut else None
            if found.rating is None:
                said = f"{Aspect(aspect)}: no rating word in the answer {found.rating_answer[:60]!r}"
                notes.append(f"{said}, which was {cut}" if cut else said)
            elif cut:
                notes.append(f"{Aspect(aspect)}: the rating's answer was {cut}")
        return "; ".join(notes) or None
