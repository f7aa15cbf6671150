"""Calls in a process of their own: what may end the process that it runs in, ends that one.

    with Apart() as apart:
        image = apart.call(decode, data)

Starting one takes a second or two; it is for what has killed a process before.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import TracebackType
from typing import Any


class Died(Exception):
    """The process ended before it answered."""


class Apart:
    """A process that calls functions for this one, begun with the first of them and anew after each that ended it."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of a module returns for some arguments, or the exception that it raises.

        Raises:
            Died: the process ended, whichever way.
        """
        # Begun anew and not forked: a fork of a process with threads, as Ray's are, may hang.
        pool = self._pool = self._pool or ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            self._end()
            raise Died(str(error)) from None

    def _end(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
