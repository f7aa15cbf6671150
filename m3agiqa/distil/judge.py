"""From an answer as it came to an entry of the journal: read, checked for leaks, priced."""

import re

from m3agiqa.distil.journal import Entry, Usage, Verdict, cost_of
from m3agiqa.distil.leaks import find_leak
from m3agiqa.distil.prompts import Prompter, read_answer
from m3agiqa.distil.tasks import Task
from m3agiqa.distil.teacher import Reply
from m3agiqa.distil_config import BudgetConfig

_SORRY = re.compile(
    r"(?:i'?m|i am) (?:sorry|unable)|"
    r"i (?:can'?t|cannot|can not|won'?t) (?:help|assist|provide|view|see|describe|comply)",
    re.IGNORECASE,
)


def judge(
    task: Task, reply: Reply, prompter: Prompter, prices: BudgetConfig, guess: Usage, batch: str | None = None
) -> Entry:
    """What an answer is worth.

    Args:
        guess: its tokens, should the server not tell. batch: name of the batch that it came in.
    """
    verdict, description, rating, reason = _verdict(task, reply, blind=prompter.blind)
    usage = reply.usage or guess
    return Entry(
        id=task.id,
        aspect=str(task.aspect),
        asked=prompter.digest(task),
        verdict=verdict,
        content=reply.content or reply.refusal or "",
        description=description,
        rating=rating,
        reason=reason,
        usage=usage,
        cost=cost_of(usage, prices, batch=batch is not None),
        batch=batch,
    )


def declined(task: Task, reason: str, prompter: Prompter, batch: str | None = None) -> Entry:
    """What is kept of a request that the server's policy forbids: it is not asked again."""
    return Entry(task.id, str(task.aspect), prompter.digest(task), Verdict.REFUSED, "", reason=reason, batch=batch)


def left_over(line: str, reply: Reply, prices: BudgetConfig, batch: str) -> Entry:
    """What is kept of an answer to what is not asked any more: it is paid for, and of no use.

    Args:
        line: what it is called in the batch of that name.
    """
    usage, content = reply.usage or Usage(), reply.content or reply.refusal or ""
    cost = cost_of(usage, prices, batch=True)
    return Entry(line, "", "", Verdict.LEFT_OVER, content, usage=usage, cost=cost, batch=batch)


def _verdict(task: Task, reply: Reply, *, blind: bool) -> tuple[Verdict, str | None, str | None, str | None]:
    if reply.refusal:
        return Verdict.REFUSED, None, None, " ".join(reply.refusal.split())[:200]
    if reply.finish_reason == "content_filter":
        return Verdict.REFUSED, None, None, "stopped by a content filter"
    try:
        answer = read_answer(reply.content)
    except ValueError as error:
        if _SORRY.match(reply.content.strip()):
            return Verdict.REFUSED, None, None, " ".join(reply.content.split())[:200]
        cut = "it is longer than teacher.max_output_tokens" if reply.finish_reason == "length" else str(error)
        return Verdict.INVALID, None, None, cut
    if _SORRY.match(answer.description):
        return Verdict.REFUSED, None, None, answer.description[:200]
    leak = find_leak(answer.description, None if blind else task.score, task.prompt)
    verdict = Verdict.OK if leak is None else Verdict.LEAK
    return verdict, answer.description, answer.rating, leak
