"""How fast the teacher may be asked, how much may be spent, and how everybody stops together."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from m3agiqa.distil.journal import Journal
from m3agiqa.distil_config import BudgetConfig, LimitsConfig
from m3agiqa.errors import UserError

_MINUTE = 60.0


class Stopped(Exception):
    """The run is ending: what has not been asked yet is not asked."""


class Stop:
    """Tells all workers that the run ends, and why. Waiting through it ends at once."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.reason: BaseException | None = None

    def __call__(self, reason: BaseException) -> None:
        """Ends the run; the first reason counts."""
        if self.reason is None:
            self.reason = reason
        self._event.set()

    def check(self) -> None:
        """Raises `Stopped` if the run is ending."""
        if self.reason is not None:
            raise Stopped

    async def pause(self, seconds: float) -> None:
        """Waits, unless the run ends.

        Raises:
            Stopped: if it does.
        """
        try:
            await asyncio.wait_for(self._event.wait(), timeout=max(seconds, 0.0))
        except TimeoutError:
            return
        raise Stopped


@dataclass
class Ticket:
    """One request in the minute's count; `tokens` is put right once they are known."""

    at: float
    tokens: int


class Pace:
    """At most so many requests and tokens in any minute. A server's Retry-After holds everybody back.

    Args:
        pause: waits for seconds. clock: in seconds, on any steady clock.
    """

    def __init__(
        self,
        config: LimitsConfig,
        pause: Callable[[float], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests, self._tokens = config.requests_per_minute, config.tokens_per_minute
        self._pause, self._clock = pause, clock
        self._seen: deque[Ticket] = deque()
        self._held_until = float("-inf")
        # Whoever waits keeps it, so that requests go out in the order in which they came.
        self._turn = asyncio.Lock()

    async def take(self, tokens: int) -> Ticket:
        """Waits until a request of so many tokens fits in."""
        if self._tokens is not None:
            tokens = min(tokens, self._tokens)  # one that is larger than the limit goes alone
        async with self._turn:
            while (wait := self._wait(tokens)) > 0:
                await self._pause(wait)
            ticket = Ticket(self._clock(), tokens)
            self._seen.append(ticket)
            return ticket

    def hold(self, seconds: float) -> None:
        """Lets nobody through for so long."""
        self._held_until = max(self._held_until, self._clock() + seconds)

    def _wait(self, tokens: int) -> float:
        now = self._clock()
        while self._seen and now - self._seen[0].at >= _MINUTE:
            self._seen.popleft()
        wait = self._held_until - now
        if self._requests is not None and len(self._seen) >= self._requests:
            wait = max(wait, self._seen[len(self._seen) - self._requests].at + _MINUTE - now)
        if self._tokens is not None:
            over = sum(ticket.tokens for ticket in self._seen) + tokens - self._tokens
            for ticket in self._seen:
                if over <= 0:
                    break
                over -= ticket.tokens
                wait = max(wait, ticket.at + _MINUTE - now)
        return wait


class Budget:
    """What may still be spent; requests under way count with the most that they may cost.

    Args:
        journal: knows what is spent, by earlier commands too.
    """

    def __init__(self, config: BudgetConfig, journal: Journal) -> None:
        self._config, self._journal = config, journal
        self._under_way = 0
        self._reserved = 0.0
        self._changed = asyncio.Condition()

    def exceeded_by(self, cost: float | None) -> UserError | None:
        """What a further request of that cost breaks; None: nothing."""
        config, journal = self._config, self._journal
        if config.max_requests is not None and journal.requests + self._under_way >= config.max_requests:
            return UserError(f"--max-requests {config.max_requests}", "is reached", "raise it to go on")
        if config.max_cost is not None and journal.cost + self._reserved + (cost or 0.0) > config.max_cost:
            spent = f"is reached ({journal.cost:.4f} spent)"
            return UserError(f"--max-cost {config.max_cost:g}", spent, "raise it to go on")
        return None

    async def reserve(self, cost: float | None) -> None:
        """Sets a request's cost aside; waits where requests under way may turn out cheaper.

        Raises:
            UserError: if the budget is reached.
        """
        async with self._changed:
            while (error := self.exceeded_by(cost)) is not None:
                if not self._under_way:
                    raise error
                await self._changed.wait()
            self.set_aside(cost)

    def set_aside(self, cost: float | None) -> None:
        """Counts a request as under way."""
        self._under_way += 1
        self._reserved += cost or 0.0

    async def release(self, cost: float | None) -> None:
        """A request is no longer under way: the journal has it, or it was not answered."""
        async with self._changed:
            self._under_way -= 1
            self._reserved -= cost or 0.0
            self._changed.notify_all()


def backoff(config: LimitsConfig, tries: int) -> float:
    """Seconds to wait after so many failed tries (from 1): doubling up to a limit, half of it by chance."""
    longest = min(config.longest_wait_s, config.first_wait_s * 2.0 ** min(tries - 1, 60))
    return longest * random.uniform(0.5, 1.0)
