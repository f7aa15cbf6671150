"""What requests will cost before they are sent: of one image and aspect, and of all that is left (a dry run)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from m3agiqa.distil.journal import Journal, Usage, cost_of
from m3agiqa.distil.prompts import TEACHER_WORDINGS, Prompter
from m3agiqa.distil.tasks import Row, Task, data_url
from m3agiqa.distil_config import DistilConfig
from m3agiqa.images import ImageRejected

_CHARACTERS_PER_TOKEN = 4.0
_OVERHEAD_TOKENS = 60  # of the roles, and of the schema
# Images whose size is looked at for a dry run; the others are taken to be like them.
_SAMPLE = 64


def image_tokens(width: int, height: int, config: DistilConfig) -> int:
    """Tokens of an image as sent, in pixels, unless the configuration states them.

    As the GPT-4o family counts them: 85, and at high detail 170 for each tile of 512 pixels once the image fits into
    2048 and its shorter side into 768 pixels.
    """
    if config.budget.image_tokens is not None:
        return config.budget.image_tokens
    if config.images.detail == "low":
        return 85
    shrink = min(1.0, 2048 / max(width, height))
    shrink = min(shrink, 768 / min(width, height))
    return 85 + 170 * math.ceil(width * shrink / 512) * math.ceil(height * shrink / 512)


class Estimator:
    """Tokens of requests, by rule until answers have told better."""

    def __init__(self, config: DistilConfig, prompter: Prompter, journal: Journal) -> None:
        self._config, self._prompter, self._journal = config, prompter, journal

    def characters(self, task: Task) -> int:
        """Length of a request's own text."""
        return len(self._prompter.text(task))

    def most(self, task: Task, size: tuple[int, int], refused: tuple[str, str] | None = None) -> Usage:
        """The most that a request may use: the longest answer, and no less input than the mean so far."""
        text = self.characters(task) + len("".join(refused or ()))
        tokens = self._input(text, image_tokens(*size, self._config))
        if self._journal.usage.input:
            tokens = max(tokens, math.ceil(self._journal.usage.input / self._journal.requests))
        return Usage(tokens, self._config.teacher.max_output_tokens)

    def usual(self, text: int, image: int) -> Usage:
        """What a request usually uses, with a text of so many characters and an image of so many tokens."""
        if self._journal.usage.output:
            requests = self._journal.requests
            return Usage(round(self._journal.usage.input / requests), round(self._journal.usage.output / requests))
        return Usage(self._input(text, image), self._config.budget.answer_tokens)

    def _input(self, text: int, image: int) -> int:
        system = len(TEACHER_WORDINGS[self._prompter.version].system)
        return math.ceil((text + system) / _CHARACTERS_PER_TOKEN) + _OVERHEAD_TOKENS + image


@dataclass(frozen=True)
class Plan:
    """What is left to ask.

    Attributes:
        tasks: descriptions. most_requests: if every answer but the last cannot be used.
        usage: tokens of one request for each. cost: of that; None without prices. most_cost: of `most_requests`.
    """

    tasks: int
    most_requests: int
    usage: Usage
    cost: float | None
    most_cost: float | None


def plan(open_rows: Iterable[tuple[Row, list[Task]]], config: DistilConfig, estimator: Estimator) -> Plan:
    """Estimates what it takes to ask all open tasks, from the sizes of the first images."""
    tasks = characters = 0
    images: list[int] = []
    for i, (row, open_tasks) in enumerate(open_rows):
        tasks += len(open_tasks)
        characters += sum(map(estimator.characters, open_tasks))
        if i < _SAMPLE and config.budget.image_tokens is None:
            try:
                images.append(image_tokens(*data_url(row, config.images)[1], config))
            except (ImageRejected, OSError):
                continue
    image = config.budget.image_tokens or round(
        sum(images) / len(images) if images else image_tokens(1024, 1024, config)
    )
    one = estimator.usual(round(characters / tasks), image) if tasks else Usage()
    usage = Usage(one.input * tasks, one.output * tasks)
    per_task = config.sampling.candidates + config.sampling.again
    cost = cost_of(usage, config.budget, batch=config.batch.use)
    return Plan(tasks, tasks * per_task, usage, cost, None if cost is None else cost * per_task)
