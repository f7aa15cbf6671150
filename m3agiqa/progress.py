"""Signs of life: one live line on a terminal, plain log lines elsewhere."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event, Thread
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from m3agiqa.errors import TooManyFailed, UserError
from m3agiqa.records import Status
from m3agiqa.suspects import Losses, Plan, Suspects

_POLL_S = 0.5
_LOG_EVERY_S = 10.0
# The rate is taken over this long, so that it follows what happens now and not the engine's start.
_WINDOW_S = 60.0
# A share of fewer rows says nothing yet.
_FEW_ROWS = 100


class Board:
    """What the workers of a run report, and what is to be done about it; lives in a Ray actor of its own.

    Args:
        max_failed_fraction: share of failed rows at which the run is stopped, once a hundred are scored.
    """

    def __init__(self, max_failed_fraction: float = 1.0) -> None:
        self._max_failed_fraction = max_failed_fraction
        self._statuses: Counter[str] = Counter()
        self._engines: dict[str, _AtWork] = {}
        self._most_engines = 0
        self._earlier: Counter[str] = Counter()
        self._earlier_s = 0.0
        self._refusal: UserError | None = None
        self._ready_at: float | None = None
        self._suspects = Suspects()

    def report(self, actor: str, statuses: Mapping[str, int], engine: Mapping[str, float]) -> None:
        """Adds rows by status, and takes an engine's counters as they stand."""
        at_work = self._at_work(actor)
        at_work.counters, at_work.heard_at = dict(engine), time.time()
        self._statuses.update(statuses)
        scored, failed = sum(self._statuses.values()), self._statuses[Status.FAILED]
        if scored >= _FEW_ROWS and failed > self._max_failed_fraction * scored:
            self.refuse(too_many_failed(failed, scored, self._max_failed_fraction))

    def refuse(self, error: UserError) -> None:
        """Takes an error that ends the run. Ray would hand on its text only, wrapped in tracebacks."""
        self._refusal = self._refusal or error

    def refusal(self) -> UserError | None:
        """The first such error: nothing more is read or scored then, and what is scored is written."""
        return self._refusal

    def started(self, actor: str) -> Losses:
        """An actor's process is new; see `Suspects.started`. The engine in the one before is gone."""
        if (lost := self._engines.get(actor)) is not None:
            self._count_in(actor, lost.heard_at)
        return self._suspects.started(actor)

    def loaded(self, actor: str) -> None:
        """Its engine is up."""
        self._suspects.loaded(actor)
        self._at_work(actor)

    def left(self, actor: str) -> None:
        """The pool has no more work for an actor, and its engine is gone with it."""
        if actor in self._engines:
            self._count_in(actor, time.time())

    def _at_work(self, actor: str) -> "_AtWork":
        now = time.time()
        self._ready_at = self._ready_at or now
        at_work = self._engines.setdefault(actor, _AtWork(now, now))
        self._most_engines = max(self._most_engines, len(self._engines))
        return at_work

    def _count_in(self, actor: str, until: float) -> None:
        """Keeps what an engine that was up until then has counted: the next in the same actor begins at nought."""
        gone = self._engines.pop(actor)
        self._earlier.update(gone.counters)
        self._earlier_s += until - gone.since

    def losses(self, actor: str) -> int:
        """How often it lost an engine since rows came out of one; see `Suspects.losses`."""
        return self._suspects.losses(actor)

    def admit(self, actor: str, ids: Sequence[str]) -> Plan:
        """How the rows of a batch are to go into an actor's engine, and notes that those `together` go in now.

        Nothing is planned where the run is to end. One call for a batch: an actor makes thousands a minute.
        """
        if self._refusal is not None:
            return Plan()
        plan = self._suspects.plan(ids)
        if plan.together:
            self._suspects.enter(actor, [ids[place] for place in plan.together], alone=False)
        return plan

    def enter(self, actor: str, ids: Sequence[str], alone: bool) -> bool:
        """Notes that rows go into an actor's engine. Returns whether they may: not where the run is to end."""
        if self._refusal is not None:
            return False
        self._suspects.enter(actor, ids, alone)
        return True

    def leave(
        self,
        actor: str,
        ids: Sequence[str],
        alone: bool,
        statuses: Mapping[str, int] | None = None,
        engine: Mapping[str, float] | None = None,
    ) -> None:
        """Notes that they came out of it, and reports them where it is given what `report` takes."""
        self._suspects.leave(actor, ids, alone)
        if statuses is not None and engine is not None:
            self.report(actor, statuses, engine)

    def snapshot(self) -> dict[str, Any]:
        """Rows by status, engines at work, when the first was up (Unix time), and what all of them have counted.

        `most_engines` were at work at once, and `engine_seconds` is how long engines were up, added up.
        """
        totals, now = self._earlier.copy(), time.time()
        for engine in self._engines.values():
            totals.update(engine.counters)
        return {
            "statuses": dict(self._statuses),
            "engines": len(self._engines),
            "most_engines": self._most_engines,
            "engine_seconds": self._earlier_s + sum(now - engine.since for engine in self._engines.values()),
            "ready_at": self._ready_at,
            "totals": dict(totals),
        }


@dataclass
class _AtWork:
    """An engine that is up since `since`, its counters as they stood at `heard_at` (both Unix time)."""

    since: float
    heard_at: float
    counters: dict[str, float] = field(default_factory=dict)


def too_many_failed(failed: int, scored: int, most: float) -> TooManyFailed:
    """What a run with that many failed rows ends with."""
    cure = "see `error` in the scores; --retry-failed scores them anew, ray.max_failed_fraction allows more"
    return TooManyFailed(f"{failed:,} of {scored:,} rows", f"failed, more than the {most:.0%} that may", cure)


class Rate:
    """Images per second over the last minute, and what is left of the run."""

    def __init__(self, total: int | None, window_s: float = _WINDOW_S) -> None:
        self._total = total
        self._window_s = window_s
        self._seen: list[tuple[float, int]] = []

    def update(self, now: float, done: int) -> None:
        """Notes how many rows were done at `now` (seconds on any steady clock)."""
        # The count stands still while an engine starts; the clock begins with the first images.
        if not done:
            self._seen = [(now, 0)]
            return
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= self._window_s:
            self._seen.pop(0)

    @property
    def per_second(self) -> float | None:
        """Images per second, or None while it cannot be told."""
        if len(self._seen) < 2:
            return None
        (t0, n0), (t1, n1) = self._seen[0], self._seen[-1]
        return (n1 - n0) / (t1 - t0) if n1 > n0 and t1 > t0 else None

    @property
    def eta_s(self) -> float | None:
        """Seconds to go, or None while it cannot be told."""
        rate = self.per_second
        if rate is None or self._total is None:
            return None
        return max(self._total - self._seen[-1][1], 0) / rate


class Live:
    """Shows a run while it goes on. A context manager; `snapshot` is asked twice a second.

    Args:
        snapshot: what `Board.snapshot` returns.
        total: rows to do, or None where that is not known.
        stream: where to write; a terminal gets one live line, anything else a line every ten seconds.
    """

    def __init__(self, snapshot: Callable[[], dict[str, Any]], total: int | None, stream: TextIO | None = None) -> None:
        self._snapshot, self._total = snapshot, total
        self._console = Console(file=stream or sys.stderr)
        self._rate = Rate(total)
        self._stop = Event()
        self._thread = Thread(target=self._watch, name="progress", daemon=True)
        self.last: dict[str, Any] = Board().snapshot()

    def __enter__(self) -> "Live":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def report(self) -> dict[str, Any]:
        """What is known of the run now, for whoever asks from elsewhere."""
        rate, eta = self._rate.per_second, self._rate.eta_s
        return {"statuses": self.last["statuses"], "engines": self.last["engines"], "per_second": rate, "eta_s": eta}

    def _watch(self) -> None:
        if self._console.is_terminal:
            self._watch_terminal()
        else:
            self._watch_log()

    def _watch_terminal(self) -> None:
        counted = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*counted, TextColumn("{task.fields[note]}"), console=self._console) as bar:
            task = bar.add_task("", total=self._total, note="")
            while True:
                ended = self._stop.wait(_POLL_S)
                done = self._poll()
                bar.update(task, completed=done, note=self._note())
                if ended:
                    return

    def _watch_log(self) -> None:
        logged_at, logged = time.monotonic(), -1
        while True:
            ended = self._stop.wait(_POLL_S)
            done = self._poll()
            now = time.monotonic()
            if (ended and done != logged) or now - logged_at >= _LOG_EVERY_S:
                of = f"/{self._total}" if self._total is not None else ""
                self._console.print(f"{time.strftime('%H:%M:%S')} {done}{of} images, {self._note()}", highlight=False)
                logged_at, logged = now, done
            if ended:
                return

    def _poll(self) -> int:
        try:
            self.last = self._snapshot()
        except Exception:  # noqa: BLE001 - a sign of life must not end the run that it reports on
            return sum(self.last["statuses"].values())
        done = sum(self.last["statuses"].values())
        self._rate.update(time.monotonic(), done)
        return done

    def _note(self) -> str:
        statuses = self.last["statuses"]
        if self.last["ready_at"] is None:
            return "starting the engine"
        rate, eta = self._rate.per_second, self._rate.eta_s
        parts = [f"{rate:.1f} images/s" if rate is not None else "-- images/s"]
        if self._total is not None:
            parts.append(f"ETA {duration(eta)}" if eta is not None else "ETA --")
        parts += [f"{statuses[s]} {s}" for s in (Status.REJECTED, Status.FAILED) if statuses.get(s)]
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """`42s`, `3m 20s`, `5h 07m` or `2d 03h`."""
    whole = round(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02d}h"
    if hours:
        return f"{hours}h {m:02d}m"
    return f"{minutes}m {s:02d}s" if minutes else f"{s}s"
