"""Rates, waits and prices, by a clock that the test moves."""

import asyncio
import random

import pytest

from m3agiqa.distil.journal import Usage, cost_of
from m3agiqa.distil.limits import Pace, Stop, Stopped, backoff
from m3agiqa.distil.teacher import retry_after
from m3agiqa.distil_config import DistilConfig
from m3agiqa.settings import load


class Clock:
    """Time that passes only by waiting."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def pause(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def times(tokens: list[int], *limits: str, hold: tuple[int, float] | None = None) -> list[float]:
    """When each of these requests goes out, all wanting to at 0."""
    clock = Clock()
    pace = Pace(load(DistilConfig, None, list(limits)).limits, clock.pause, clock)

    async def go() -> list[float]:
        found = []
        for i, count in enumerate(tokens):
            if hold is not None and hold[0] == i:
                pace.hold(hold[1])
            found.append((await pace.take(count)).at)
        return found

    return asyncio.run(go())


def test_requests_a_minute():
    assert times([1] * 5, "limits.requests_per_minute=2") == [0, 0, 60, 60, 120]


def test_tokens_a_minute():
    assert times([40, 40, 40, 500, 10], "limits.tokens_per_minute=100") == [0, 0, 60, 120, 180]


def test_tokens_are_put_right_once_they_are_known():
    clock = Clock()
    pace = Pace(load(DistilConfig, None, ["limits.tokens_per_minute=100"]).limits, clock.pause, clock)

    async def go() -> list[float]:
        first = await pace.take(90)
        first.tokens = 20
        return [first.at, (await pace.take(80)).at, (await pace.take(1)).at]

    assert asyncio.run(go()) == [0, 0, 60]


def test_a_hold_is_for_everybody():
    assert times([1] * 3, hold=(1, 7.5)) == [0, 7.5, 7.5]


def test_waits_double_up_to_a_limit_and_vary_by_a_half():
    random.seed(0)
    limits = load(DistilConfig, None, ["limits.first_wait_s=1", "limits.longest_wait_s=10"]).limits
    for tries, longest in ((1, 1), (2, 2), (4, 8), (5, 10), (5000, 10)):
        waits = [backoff(limits, tries) for _ in range(200)]
        assert longest / 2 <= min(waits) < longest * 0.55
        assert longest * 0.95 < max(waits) <= longest


def test_a_stop_ends_all_waiting():
    async def go() -> None:
        stop = Stop()
        waiting = asyncio.create_task(stop.pause(1000))
        await asyncio.sleep(0)
        stop(ValueError("first"))
        stop(ValueError("second"))
        with pytest.raises(Stopped):
            await waiting
        with pytest.raises(Stopped):
            stop.check()
        assert str(stop.reason) == "first"

    asyncio.run(go())


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "inf"}, None),
    ],
)
def test_retry_after(headers, seconds):
    assert retry_after(headers) == seconds


def test_prices():
    budget = load(
        DistilConfig, None, ["budget.input_price=2", "budget.output_price=10", "budget.cached_price=1"]
    ).budget
    assert cost_of(Usage(1_000_000, 100_000, 500_000), budget) == pytest.approx(1.0 + 0.5 + 1.0)
    assert cost_of(Usage(1_000_000, 100_000, 500_000), budget, batch=True) == pytest.approx(1.25)
    assert cost_of(Usage(1, 1), load(DistilConfig).budget) is None
