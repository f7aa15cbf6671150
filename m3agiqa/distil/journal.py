"""The journal of an output: every answer that was paid for, on the disk before anything else is done with it.

OUT/journal.jsonl holds one JSON object a line, and only ever grows. A line that a crash has torn off is forgotten.
"""

import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any

from m3agiqa.distil_config import BudgetConfig
from m3agiqa.errors import UserError

JOURNAL = "journal.jsonl"


class Verdict(StrEnum):
    """What an answer is worth."""

    OK = "ok"
    LEAK = "leak"
    """It gives the score away."""
    INVALID = "invalid"
    """It is not of the form that was asked for."""
    REFUSED = "refused"
    """The teacher, or a filter before it, will not answer: asking again would give the same."""
    LEFT_OVER = "left_over"
    """It came in a batch and is to what is not asked any more: a score or a prompt has changed, or the row is gone."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one or of many answers; `cached` are among the `input` ones."""

    input: int = 0
    output: int = 0
    cached: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.input + other.input, self.output + other.output, self.cached + other.cached)


def cost_of(usage: Usage, config: BudgetConfig, *, batch: bool = False) -> float | None:
    """What tokens cost, or None where the prices are not known."""
    if config.input_price is None or config.output_price is None:
        return None
    cached_price = config.input_price if config.cached_price is None else config.cached_price
    fresh = usage.input - usage.cached
    cost = fresh * config.input_price + usage.cached * cached_price + usage.output * config.output_price
    return cost / 1e6 * (config.batch_share if batch else 1.0)


@dataclass(frozen=True)
class Entry:
    """One answer.

    Attributes:
        id, aspect: the task. asked: digest of the request (`Prompter.digest`).
        content: the answer as it came. description, rating: what it says, where it could be read.
        reason: why the verdict is not `ok`. usage: tokens that were paid. cost: null where prices were not known.
        batch: name of the batch that it came in.

    One that is left over is to no task: its id is that of its line in the batch; aspect and `asked` are empty.
    """

    id: str
    aspect: str
    asked: str
    verdict: Verdict
    content: str
    description: str | None = None
    rating: str | None = None
    reason: str | None = None
    usage: Usage = field(default_factory=Usage)
    cost: float | None = None
    batch: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """The task's."""
        return self.id, self.aspect


class Journal:
    """An open journal. A context manager, which keeps other processes off the output.

    Args:
        prices: of answers that came when none were known.

    Attributes:
        answers: by task, in the order in which they came.
        batches: by name, what is known of each batch; see `batch.py`.
        requests, usage, cost: of all answers; without prices the cost is 0.
    """

    def __init__(self, folder: Path, prices: BudgetConfig | None = None) -> None:
        self.path = folder / JOURNAL
        self._prices = prices or BudgetConfig.model_construct()
        self.answers: dict[tuple[str, str], list[Entry]] = defaultdict(list)
        self.batches: dict[str, dict[str, Any]] = {}
        self.requests = 0
        self.usage = Usage()
        self.cost = 0.0

    def __enter__(self) -> "Journal":
        try:
            # Unbuffered: what is added is given to the system at once, whatever becomes of this process.
            self._file = self.path.open("ab+", buffering=0)
        except OSError as error:
            raise UserError(str(self.path), f"cannot be written ({error})", "give a folder you own") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(str(self.path.parent), "another process writes to it", "wait for it, or end it") from None
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    @classmethod
    def peek(cls, folder: Path, prices: BudgetConfig | None = None) -> "Journal":
        """What the journal of a folder holds, if there is one; nothing is written or locked."""
        journal = cls(folder, prices)
        if journal.path.exists():
            with journal.path.open("rb") as file:
                journal._take_lines(file)
        return journal

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    @property
    def pending(self) -> list[str]:
        """Names of the batches whose answers are paid for and not taken yet."""
        return [name for name, facts in self.batches.items() if facts.get("state") in ("made", "submitted")]

    def add(self, entry: Entry) -> None:
        """Takes an answer; when this returns, it is on the disk."""
        self._append({"answer": asdict(entry)})
        self._take(entry)

    def add_batch(self, name: str, **facts: Any) -> None:
        """Takes what has become known of a batch."""
        self._append({"batch": {"name": name, **facts}})
        self.batches.setdefault(name, {}).update(facts)

    def _append(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, ensure_ascii=False, separators=(",", ":"), default=str).encode() + b"\n"
        file, before = self._file.fileno(), os.fstat(self._file.fileno()).st_size
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        except OSError as error:
            # Half a line would spoil the next one.
            os.ftruncate(file, before)
            raise UserError(str(self.path), f"cannot be written ({error})", "make room") from None

    def _read(self) -> None:
        self._file.seek(0)
        # What a crash tore off must not run into the next line.
        self._file.truncate(self._take_lines(self._file))

    def _take_lines(self, lines: Iterable[bytes]) -> int:
        """Takes all lines that are whole, and returns their length in bytes."""
        whole = 0
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                content = json.loads(line)
                if "batch" in content:
                    facts = content["batch"]
                    self.batches.setdefault(facts.pop("name"), {}).update(facts)
                else:
                    answer = content["answer"]
                    usage, verdict = Usage(**answer.pop("usage")), Verdict(answer.pop("verdict"))
                    self._take(Entry(**answer, usage=usage, verdict=verdict))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                cure = "mend or remove that line: it holds an answer that was paid for"
                raise UserError(str(self.path), f"line {number} cannot be read ({error})", cure) from None
        return whole

    def _take(self, entry: Entry) -> None:
        self.answers[entry.key].append(entry)
        self.requests += 1
        self.usage += entry.usage
        cost = entry.cost
        if cost is None:
            cost = cost_of(entry.usage, self._prices, batch=entry.batch is not None)
        self.cost += cost or 0.0
