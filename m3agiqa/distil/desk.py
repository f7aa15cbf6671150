"""What all ways of asking share: the request's wording, the journal, the limits, and the count of what went wrong."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from m3agiqa.corpus import Corpus
from m3agiqa.distil.estimate import Estimator
from m3agiqa.distil.journal import Entry, Journal
from m3agiqa.distil.limits import Stop
from m3agiqa.distil.prompts import Prompter
from m3agiqa.distil.tasks import Labels, Row, State, Task, data_url, rows, state_of
from m3agiqa.distil.teacher import Teacher
from m3agiqa.distil_config import DistilConfig
from m3agiqa.errors import UserError
from m3agiqa.images import ImageRejected


@dataclass
class Desk:
    """One run.

    Attributes:
        unreadable: why the image of a row cannot be sent, by id; it is not asked about.
        failures: requests that were not answered, by reason; the next command asks them again.
    """

    config: DistilConfig
    corpus: Corpus
    labels: Labels
    prompter: Prompter
    journal: Journal
    estimator: Estimator
    unreadable: dict[str, str] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    _in_a_row: int = 0

    def answers(self, task: Task) -> list[Entry]:
        """The answers to a task, without those to something else that was once asked about the same image."""
        digest = self.prompter.digest(task)
        return [entry for entry in self.journal.answers.get(task.key, ()) if entry.asked == digest]

    def state(self, task: Task) -> State:
        """Where a task stands."""
        return state_of(task.word, self.answers(task), self.config.sampling)

    def open_rows(self) -> Iterator[tuple[Row, list[Task]]]:
        """The rows that have something to ask, with what."""
        for row in rows(self.corpus, self.labels):
            tasks = [task for task in row.tasks if not self.state(task).done]
            if tasks and row.tasks[0].id not in self.unreadable:
                yield row, tasks

    async def image(self, row: Row) -> tuple[str, tuple[int, int]] | None:
        """The image of a row as a data URL, with its size in pixels; None, which is noted, where there is none."""
        name = row.tasks[0].id
        try:
            return await asyncio.to_thread(data_url, row, self.config.images)
        except ImageRejected as error:
            self.unreadable[name] = str(error)
        except FileNotFoundError as error:
            self.unreadable[name] = f"{error.filename}: {error.strerror}"
        except OSError as error:
            self.failures[f"an image cannot be read: {error.strerror or error}"] += 1
        return None

    def failed(self, reason: str, teacher: Teacher, stop: Stop) -> None:
        """Notes a request that was not answered; too many in a row end the run."""
        self.failures[reason] += 1
        self._in_a_row += 1
        if self._in_a_row >= self.config.limits.give_up_after:
            stop(UserError(teacher.name, reason, "mend that, or try later"))

    def answered(self) -> None:
        """Notes that the teacher is there."""
        self._in_a_row = 0
