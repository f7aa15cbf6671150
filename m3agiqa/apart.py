"""Calls in a process of their own: what may end the process that it runs in, ends that one.

    with Apart() as apart:
        image = apart.call(decode, data)

Starting one takes a second; it is for what has killed a process before.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Died(Exception):
    """The process ended before it answered; the text says how."""


class Apart:
    """A process that calls functions for this one, begun with the first of them and anew after each that ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of a module returns for some arguments; all of it goes through pickle.

        Raises:
            Died: the process ended, whichever way. An exception ends it, too.
        """
        process = self._process = self._process or _start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((function, arguments), process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise Died(f"exit code {self._end()}") from None

    def _end(self) -> int | None:
        """Ends the process, which does so itself at the end of its input; returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        for stream in (process.stdin, process.stdout):
            try:
                assert stream is not None
                stream.close()
            except OSError:
                pass  # what could not be sent to one that is gone
        return process.wait()


def _start() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    )


def _serve() -> None:
    """Answers calls until its input ends, as it does when whoever makes them is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(function(*arguments), answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
