"""Asks one request at a time for each of several rows, and has every answer on the disk before the next is asked."""

import asyncio

from m3agiqa.distil.desk import Desk
from m3agiqa.distil.journal import Entry, cost_of
from m3agiqa.distil.judge import declined, judge
from m3agiqa.distil.limits import Budget, Pace, Stop, Stopped, backoff
from m3agiqa.distil.tasks import Row, Task
from m3agiqa.distil.teacher import Declined, Failed, Retry, Teacher
from m3agiqa.errors import UserError

_Item = tuple[Row, list[Task]]


async def ask_online(desk: Desk, teacher: Teacher, stop: Stop) -> None:
    """Asks all that is open. Ends early where `stop` says so, requests under way awaited: they are paid."""
    workers = _Workers(desk, teacher, stop)
    await asyncio.gather(*(workers.work() for _ in range(desk.config.limits.concurrency)))


class _Workers:
    def __init__(self, desk: Desk, teacher: Teacher, stop: Stop) -> None:
        self._desk, self._teacher, self._stop = desk, teacher, stop
        self._budget = Budget(desk.config.budget, desk.journal)
        self._pace = Pace(desk.config.limits, stop.pause)
        self._items = desk.open_rows()
        self._reading = asyncio.Lock()

    async def work(self) -> None:
        """Takes row after row, its aspects one after the other."""
        try:
            while (item := await self._next()) is not None:
                row, tasks = item
                image = await self._desk.image(row)
                for task in tasks if image is not None else ():
                    assert image is not None
                    await self._settle(task, *image)
        except Stopped:
            return
        except UserError as error:
            self._stop(error)
        except Exception as error:  # noqa: BLE001 - the answers that the others wait for are paid: they must come in
            self._stop(error)

    async def _next(self) -> _Item | None:
        async with self._reading:
            self._stop.check()
            return await asyncio.to_thread(next, self._items, None)

    async def _settle(self, task: Task, url: str, size: tuple[int, int]) -> None:
        """Asks until there is nothing more to ask about a task."""
        while not (state := self._desk.state(task)).done:
            try:
                await self._ask(task, url, size, state.refused)
            except Failed as error:
                return self._desk.failed(str(error), self._teacher, self._stop)
            self._desk.answered()

    async def _ask(self, task: Task, url: str, size: tuple[int, int], refused: tuple[str, str] | None) -> None:
        """Gets one answer into the journal, however often the server has to be asked for it.

        Raises:
            Failed: if it does not come. Stopped, UserError: if the run ends.
        """
        limits = self._desk.config.limits
        for tries in range(1, limits.retries + 2):
            try:
                return await self._try(task, url, size, refused)
            except Retry as error:
                reason, after = str(error), error.after
            if after is not None:
                self._pace.hold(after)
            if tries <= limits.retries:
                await self._stop.pause(backoff(limits, tries) if after is None else after)
        raise Failed(f"{reason}, {limits.retries + 1} times" if limits.retries else reason)

    async def _try(self, task: Task, url: str, size: tuple[int, int], refused: tuple[str, str] | None) -> None:
        self._stop.check()
        desk = self._desk
        guess = desk.estimator.most(task, size, refused)
        most = cost_of(guess, desk.config.budget)
        await self._budget.reserve(most)
        try:
            ticket = await self._pace.take(guess.input + guess.output)
            self._stop.check()
            entry: Entry
            try:
                reply = await self._teacher.ask(desk.prompter.messages(task, url, refused))
                entry = judge(task, reply, desk.prompter, desk.config.budget, guess)
            except Declined as error:
                entry = declined(task, str(error), desk.prompter)
            except (Retry, Failed):
                ticket.tokens = 0
                raise
            desk.journal.add(entry)
            ticket.tokens = entry.usage.input + entry.usage.output
        finally:
            await self._budget.release(most)
