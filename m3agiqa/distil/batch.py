"""Asks through the Batch API: all open requests in files, answers within a day, at half the price.

A batch has a name of ours, which is in the journal before the batch is made and in its metadata: a command that was
killed in between finds it again and does not pay for it twice. Its lines have names that say what was asked: an
answer to what has changed since is to no task, and is left over.
"""

import asyncio
import hashlib
import json
import uuid
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from m3agiqa.distil.desk import Desk
from m3agiqa.distil.journal import Entry, Usage, Verdict, cost_of
from m3agiqa.distil.judge import declined, judge, left_over
from m3agiqa.distil.limits import Budget, Stop, backoff
from m3agiqa.distil.tasks import Row, Task, tables, tasks_in
from m3agiqa.distil.teacher import Declined, Failed, FormatRefused, Reply, Retry, Teacher
from m3agiqa.errors import UserError

_ENDPOINT = "/v1/chat/completions"
_ENDED = {"completed", "failed", "expired", "cancelled"}
_TRANSFER_S = 1800.0
# Batches of the account that are looked through for one of ours.
_LOOK_THROUGH = 1000


async def ask_in_batches(desk: Desk, teacher: Teacher, stop: Stop, folder: Path, say: Callable[[str], None]) -> None:
    """Asks all that is open in rounds: answers that cannot be used are asked again in the next.

    Args:
        folder: for the files while they are uploaded. say: takes a line on each batch.

    Raises:
        UserError: what ends the run. Stopped: if something else does.
    """
    await _Batches(desk, teacher, stop, folder, say).run()


class _Batches:
    def __init__(self, desk: Desk, teacher: Teacher, stop: Stop, folder: Path, say: Callable[[str], None]) -> None:
        self._desk, self._teacher, self._stop, self._folder, self._say = desk, teacher, stop, folder, say
        self._tasks: dict[str, Task] = {}
        self._last_failure = "no reason given"
        self._progress = False

    async def run(self) -> None:
        await asyncio.to_thread(self._learn_tasks)
        while True:
            self._desk.failures.clear()
            self._progress = False
            under_way = self._desk.journal.pending
            for name in under_way:
                await self._collect(name)
            if under_way and not self._progress:
                raise UserError(self._teacher.name, f"a batch gave no answers ({self._last_failure})", "mend that")
            if not await self._submit():
                return

    def _learn_tasks(self) -> None:
        for table in tables(self._desk.corpus):
            for tasks in tasks_in(table, self._desk.labels):
                self._tasks |= {self._line(task): task for task in tasks}

    def _line(self, task: Task) -> str:
        """What a task's line is called in a batch."""
        return _custom_id(task.id, task.aspect, self._desk.prompter.digest(task))

    async def _submit(self) -> int:
        """Makes batches of all that is open and within the budget. Returns how many requests that is."""
        config = self._desk.config
        budget, items, sent = Budget(config.budget, self._desk.journal), self._desk.open_rows(), 0
        self._folder.mkdir(exist_ok=True)
        for old in self._folder.glob("*.jsonl"):
            old.unlink()
        ended: UserError | None = None
        while ended is None:
            name = uuid.uuid4().hex
            path = self._folder / f"{name}.jsonl"
            requests, ended, more = await self._write(path, items, budget)
            if requests:
                await self._send(name, path, requests)
                sent += requests
            path.unlink()
            if not more:
                break
        if ended is not None and not sent:
            raise ended
        return sent

    async def _write(
        self, path: Path, items: Iterator[tuple[Row, list[Task]]], budget: Budget
    ) -> tuple[int, UserError | None, bool]:
        """Writes one batch's file. Returns its requests, what ends the budget, and whether there is more."""
        config, requests = self._desk.config, 0
        with path.open("wb") as file:
            while requests < config.batch.max_requests and file.tell() < config.batch.max_mib * 2**20:
                self._stop.check()
                item = await asyncio.to_thread(next, items, None)
                if item is None:
                    return requests, None, False
                row, tasks = item
                image = await self._desk.image(row)
                for task in tasks if image is not None else ():
                    assert image is not None
                    url, size = image
                    refused = self._desk.state(task).refused
                    most = cost_of(self._desk.estimator.most(task, size, refused), config.budget, batch=True)
                    if (error := budget.exceeded_by(most)) is not None:
                        return requests, error, False
                    budget.set_aside(most)
                    body = self._teacher.body(self._desk.prompter.messages(task, url, refused))
                    line = {"custom_id": self._line(task), "method": "POST", "url": _ENDPOINT, "body": body}
                    file.write(json.dumps(line).encode() + b"\n")
                    requests += 1
        return requests, None, True

    async def _send(self, name: str, path: Path, requests: int) -> None:
        journal, client = self._desk.journal, self._teacher.client
        slow = client.with_options(timeout=_TRANSFER_S)
        file = await self._patiently(lambda: slow.files.create(file=path, purpose="batch"), _TRANSFER_S)
        journal.add_batch(name, state="made", requests=requests)

        async def create() -> Any:
            # Had an answer been lost on its way, the batch would be there already.
            return await self._find(name) or await client.batches.create(
                input_file_id=file.id,
                endpoint=_ENDPOINT,
                completion_window="24h",
                metadata={"m3agiqa": name},
            )

        batch = await self._patiently(create)
        journal.add_batch(name, state="submitted", id=batch.id)
        self._say(f"batch {batch.id}: {requests} requests submitted")

    async def _find(self, name: str) -> Any:
        """The batch of that name, or None."""
        seen = 0
        async for batch in self._teacher.client.batches.list(limit=100):
            seen += 1
            if (batch.metadata or {}).get("m3agiqa") == name:
                return batch
            if seen >= _LOOK_THROUGH:
                break
        return None

    async def _collect(self, name: str) -> None:
        """Waits for a batch, and takes its answers."""
        journal, slow = self._desk.journal, self._teacher.client.with_options(timeout=_TRANSFER_S)
        facts = journal.batches[name]
        if "id" not in facts:
            batch = await self._patiently(lambda: self._find(name))
            if batch is None:
                self._progress = True
                return journal.add_batch(name, state="never made")
            journal.add_batch(name, state="submitted", id=batch.id)
        batch = await self._wait(journal.batches[name]["id"])
        if batch.status == "cancelled":
            self._last_failure = "it was cancelled"
        taken = {_line_of(entry) for entry in self._of(name)}
        ended: UserError | None = None
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                content = await self._patiently(partial(slow.files.content, file_id), _TRANSFER_S)
                ended = self._take(name, content.content, taken) or ended
        journal.add_batch(name, state=batch.status)
        if unused := sum(entry.verdict == Verdict.LEFT_OVER for entry in self._of(name)):
            self._say(f"note: batch {batch.id}: {unused} answers are left over: what they are to has changed since")
        if batch.status == "failed":
            errors = (batch.errors.data if batch.errors else None) or []
            reason = self._teacher.clean(errors[0].message or "") if errors else "no reason given"
            raise UserError(f"batch {batch.id}", f"was refused: {reason}", "mend that")
        if ended is not None:
            raise ended

    async def _wait(self, batch_id: str) -> Any:
        client, told = self._teacher.client, None
        while True:
            batch = await self._patiently(lambda: client.batches.retrieve(batch_id))
            counts = batch.request_counts
            state = f"batch {batch_id}: {batch.status}"
            state += f", {counts.completed + counts.failed} of {counts.total} requests done" if counts else ""
            if state != told:
                self._say(state)
                told = state
            if batch.status in _ENDED:
                return batch
            await self._stop.pause(self._desk.config.batch.poll_s)

    def _of(self, name: str) -> list[Entry]:
        """The answers of a batch that the journal has."""
        return [entry for entries in self._desk.journal.answers.values() for entry in entries if entry.batch == name]

    def _take(self, name: str, data: bytes, taken: set[str]) -> UserError | None:
        """Takes the lines of a batch's output or error file. Returns what would end any further request.

        Args:
            taken: lines that the journal has already.
        """
        ended: UserError | None = None
        refused_format = False
        for text in data.splitlines():
            result = json.loads(text)
            line = str(result.get("custom_id"))
            try:
                if line not in taken:
                    self._desk.journal.add(self._entry(line, result, name))
                self._progress = True
            except UserError as error:
                ended = error
            except FormatRefused as error:
                refused_format, self._last_failure = True, str(error)
            except (Retry, Failed) as error:
                self._last_failure = str(error)
                self._desk.failures[str(error)] += 1
        # Nothing may have been answered, but the next round asks in another way.
        if refused_format and self._teacher.step_down(self._teacher.body([])):
            self._progress = True
        return ended

    def _entry(self, line: str, result: dict[str, Any], batch: str) -> Entry:
        """What is kept of a line of that name.

        Raises:
            UserError, FormatRefused, Retry, Failed: if it holds no answer.
        """
        desk, task = self._desk, self._tasks.get(line)
        response = result.get("response") or {}
        try:
            if response.get("status_code") != 200:
                status = response.get("status_code") or 500
                raise self._teacher.refusal(status, response.get("body") or result.get("error") or {})
            reply = self._teacher.read(response["body"])
        except Declined as error:
            if task is not None:
                return declined(task, str(error), desk.prompter, batch)
            reply = Reply("", str(error), None, Usage())
        if task is None:
            return left_over(line, reply, desk.config.budget, batch)
        guess = desk.estimator.most(task, (1024, 1024))
        return judge(task, reply, desk.prompter, desk.config.budget, guess, batch)

    async def _patiently(self, call: Callable[[], Awaitable[Any]], timeout_s: float | None = None) -> Any:
        """What a call of the API returns, tried again while the server is busy or silent.

        Raises:
            UserError: if it stays so, or for what no request will get past.
        """
        limits, reason = self._desk.config.limits, ""
        for tries in range(1, limits.retries + 2):
            try:
                return await self._teacher.call(call(), timeout_s)
            except Retry as error:
                reason = str(error)
                wait = backoff(limits, tries) if error.after is None else error.after
            except (Failed, Declined, FormatRefused) as error:
                raise UserError(self._teacher.name, str(error), "mend that, or leave --batch out") from None
            if tries <= limits.retries:
                await self._stop.pause(wait)
        raise UserError(self._teacher.name, f"{reason}, {limits.retries + 1} times", "try later")


def _custom_id(name: str, aspect: str, asked: str) -> str:
    """Identifies a request in a batch, what it asks included: at most 64 characters, whatever the ids are."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:32]}-{aspect}-{asked}"


def _line_of(entry: Entry) -> str:
    """The line of a batch that an answer came in."""
    return entry.id if entry.verdict == Verdict.LEFT_OVER else _custom_id(entry.id, entry.aspect, entry.asked)
