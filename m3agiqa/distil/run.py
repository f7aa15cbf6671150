"""A distillation from start to stop: opens everything, has the teacher asked, and writes down what came of it."""

import asyncio
import contextlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from m3agiqa import __version__
from m3agiqa.aspects import Aspect
from m3agiqa.corpus.files import absolute
from m3agiqa.distil.batch import ask_in_batches
from m3agiqa.distil.desk import Desk
from m3agiqa.distil.estimate import Estimator, Plan, plan
from m3agiqa.distil.journal import Journal, Verdict
from m3agiqa.distil.limits import Stop, Stopped
from m3agiqa.distil.online import ask_online
from m3agiqa.distil.output import (
    CONVERSATIONS,
    check_same,
    count,
    decides,
    out_folder,
    read_manifest,
    write_conversations,
    write_manifest,
)
from m3agiqa.distil.prompts import TEACHER_WORDINGS, Prompter
from m3agiqa.distil.tasks import labels_of, open_labelled, survey
from m3agiqa.distil.teacher import Teacher
from m3agiqa.distil_config import DistilConfig
from m3agiqa.errors import UserError

_SIGN_OF_LIFE_S = 10.0
_GO_ON = "the same command goes on"


def distil(
    config: DistilConfig,
    input_uri: str,
    out: str,
    labels: Mapping[Aspect, str],
    scale: tuple[float, float],
    *,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Asks a teacher to explain human scores; the same call goes on where an earlier one stopped.

    No answer that has come in is asked for again. Of a process that is killed, those still under way are lost, at most
    `limits.concurrency`; of one that is interrupted or ended by an error they are waited for.

    Args:
        out: local folder. labels: aspect -> the column of its scores. scale: lowest and highest score.
        say: takes notes and signs of life.

    Returns:
        What distil.json holds.

    Raises:
        UserError: for what cannot be used, before anything is asked; and for what ended the run early, once all that
            was paid for is written.
    """
    started = time.monotonic()
    desk, folder, counted = _open(config, input_uri, out, labels, scale, say)
    parts = decides(config, absolute(input_uri), desk.labels)
    check_same(folder, parts)
    teacher = _teacher(desk, folder)
    content = {"m3agiqa": __version__, "decides": parts, "config": config.model_dump(mode="json"), "begun": _now()}
    if (read_manifest(folder) or {}).get("decides") != parts:
        write_manifest(folder, content)
    with Journal(folder, config.budget) as journal:
        if journal.pending and not config.batch.use:
            raise UserError(f"--out {out}", "has a batch under way, which is paid for", "go on with --batch")
        desk.journal = journal
        desk.estimator = Estimator(config, desk.prompter, journal)
        reason = asyncio.run(_ask(desk, teacher, folder, say))
        counts = write_conversations(desk, folder, counted["embedded"] > 0)
        content |= _result(desk, counts, reason, time.monotonic() - started)
        write_manifest(folder, content)
    if isinstance(reason, UserError):
        raise _ended(reason, str(content["go_on"]))
    if reason is not None:
        raise reason
    return content


def dry_run(
    config: DistilConfig,
    input_uri: str,
    out: str,
    labels: Mapping[Aspect, str],
    scale: tuple[float, float],
    *,
    say: Callable[[str], None] = print,
) -> Plan:
    """What `distil` would ask and what that would cost; needs no key, asks nothing and writes nothing.

    Raises:
        UserError: for what cannot be used.
    """
    desk, folder, _ = _open(config, input_uri, out, labels, scale, say)
    check_same(folder, decides(config, absolute(input_uri), desk.labels))
    desk.journal = Journal.peek(folder, config.budget)
    desk.estimator = Estimator(config, desk.prompter, desk.journal)
    return plan(desk.open_rows(), config, desk.estimator)


def _open(
    config: DistilConfig,
    input_uri: str,
    out: str,
    columns: Mapping[Aspect, str],
    scale: tuple[float, float],
    say: Callable[[str], None],
) -> tuple[Desk, Path, Counter[str]]:
    if config.ask.wording not in TEACHER_WORDINGS:
        raise UserError(f"ask.wording={config.ask.wording}", "there is none", f"take {', '.join(TEACHER_WORDINGS)}")
    labels, folder = labels_of(columns, scale, config.ratings), out_folder(out)
    corpus = open_labelled(input_uri, config.corpus, config.access, labels)
    for note in corpus.notes:
        say(f"note: {note}")
    counted = survey(corpus, labels)
    prompter = Prompter(config.ask.wording, scale, config.ask.blind, config.images.detail)
    journal = Journal(folder, config.budget)
    return Desk(config, corpus, labels, prompter, journal, Estimator(config, prompter, journal)), folder, counted


def _teacher(desk: Desk, folder: Path) -> Teacher:
    """The teacher, before anything is written.

    Raises:
        UserError: if it cannot be asked; of an output that was begun it says what is there.
    """
    config = desk.config
    try:
        return Teacher(config.teacher, config.limits.longest_retry_after_s)
    except UserError as error:
        desk.journal = Journal.peek(folder, config.budget)
        if not desk.journal.requests and not desk.journal.pending:
            raise
        raise _ended(error, _go_on(count(desk))) from None


def _ended(error: UserError, go_on: str) -> UserError:
    """What ends a run, with what there is."""
    return UserError(error.value, error.rule, f"{error.cure}: {go_on}")


async def _ask(desk: Desk, teacher: Teacher, folder: Path, say: Callable[[str], None]) -> BaseException | None:
    """Has everything asked. Returns what ended that early, or None."""
    stop = Stop()
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        say("note: waiting for the answers under way, which are paid; once more ends at once")
        stop(KeyboardInterrupt())

    # Not in a thread of somebody else's program.
    with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupted)
    signs = asyncio.create_task(_signs_of_life(desk))
    try:
        if desk.config.batch.use:
            await ask_in_batches(desk, teacher, stop, folder / "batches", say)
        else:
            await ask_online(desk, teacher, stop)
    except Stopped:
        pass
    except Exception as error:  # noqa: BLE001 - whatever it is, what was paid for is to be written first
        stop(error)
    finally:
        signs.cancel()
        await teacher.client.close()
    return stop.reason


async def _signs_of_life(desk: Desk) -> None:
    told = desk.journal.requests
    while True:
        await asyncio.sleep(_SIGN_OF_LIFE_S)
        if desk.journal.requests != told:
            told = desk.journal.requests
            cost = f", cost {desk.journal.cost:.4f}" if desk.config.budget.input_price is not None else ""
            print(f"{time.strftime('%H:%M:%S')} {told} answers{cost}", file=sys.stderr, flush=True)


def _result(
    desk: Desk, counts: Mapping[str, Counter[str]], reason: BaseException | None, seconds: float
) -> dict[str, Any]:
    journal = desk.journal
    priced = desk.config.budget.input_price is not None and desk.config.budget.output_price is not None
    verdicts = Counter(str(entry.verdict) for entries in journal.answers.values() for entry in entries)
    return {
        "ended": _now(),
        "seconds": round(seconds, 3),
        "counts": {aspect: dict(one) for aspect, one in counts.items()},
        "answers": {"paid": journal.requests, **verdicts},
        "tokens": {"input": journal.usage.input, "output": journal.usage.output, "cached": journal.usage.cached},
        "cost": round(journal.cost, 6) if priced else None,
        "failures": dict(desk.failures),
        "stopped": None if reason is None else str(reason) or type(reason).__name__,
        "left": sum(one["left"] for one in counts.values()),
        "go_on": _go_on(counts),
    }


def _go_on(counts: Mapping[str, Counter[str]]) -> str:
    described, left = (sum(one[name] for one in counts.values()) for name in ("described", "left"))
    return f"{described} descriptions are kept, {left} are left" + (f"; {_GO_ON}" if left else "")


def summary(done: Mapping[str, Any], out: str) -> list[str]:
    """What to say at the end, from what distil.json holds."""
    lines = []
    for aspect, one in done["counts"].items():
        parts = [f"{one.get('described', 0)} described"]
        words = {"given_up": "given up", "unreadable": "unreadable", "no_prompt": "without a prompt", "left": "left"}
        parts += [f"{one[key]} {said}" for key, said in words.items() if one.get(key)]
        lines.append(f"{aspect}: {', '.join(parts)}")
    tokens, answers = done["tokens"], done["answers"]
    useless = [verdict for verdict in Verdict if verdict is not Verdict.OK and answers.get(verdict)]
    unusable = [f"{answers[verdict]} {verdict.replace('_', ' ')}" for verdict in useless]
    cost = "" if done["cost"] is None else f", cost {done['cost']:.4f}"
    paid = f"{answers['paid']} answers" + (f" ({', '.join(unusable)})" if unusable else "")
    lines.append(f"{paid}, {tokens['input']:,} tokens in, {tokens['output']:,} out{cost}")
    if done["left"]:
        why = "; ".join(f"{count} x {reason}" for reason, count in done["failures"].items())
        lines.append(f"{done['go_on']} ({why})" if why else done["go_on"])
    return [*lines, f"conversations: {out.rstrip('/')}/{CONVERSATIONS}"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
