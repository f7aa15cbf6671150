"""One run at a time in an output folder: whoever runs holds a lease there, renewed for as long as it lives.

OUTPUT/lease.json is removed when a run ends. What a killed one left behind is taken over: at once where its
process was on this machine and is gone, else as soon as it has not changed for three renewals. Clocks of different
machines are never compared for that.
"""

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

from m3agiqa.errors import UserError
from m3agiqa.runs import LEASE, Output

BEAT_S = 10.0
"""Seconds between two renewals."""
_MISSED_BEATS = 3
# Of two that start in the same moment the one that wrote last has it; so long each waits before it looks again.
_SETTLE_S = 0.2


@dataclass(frozen=True)
class Holder:
    """Who has an output folder.

    Attributes:
        process: its number and start, as the system counts it: numbers are used again.
        at: Unix time of the last renewal on the holder's clock.
        live: what the run says of itself (`Live.last` and its rate).
    """

    token: str
    host: str
    process: str
    beat_s: float
    at: float
    beats: int = 0
    live: dict[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """For a message."""
        return f"process {self.process.split()[0]} on {self.host}"

    def is_here(self) -> bool:
        """Whether its machine is this one, so that `lives` can tell."""
        return self.host == socket.gethostname()

    def lives(self) -> bool:
        """Whether its process, which was on this machine, is still there."""
        return self.process == _process(int(self.process.split()[0]))


class Lease:
    """Holds an output folder while a run is at work in it; a context manager.

    Args:
        output: the folder.
        beat_s: seconds between two renewals.

    Attributes:
        live: asked at each renewal for what the run has to say of itself; may be replaced.
        on_lost: called where another run has taken the folder over, as it may when this one was stopped for minutes.

    Raises:
        UserError: on entering, where another run is at work in the folder.
    """

    def __init__(self, output: Output, *, beat_s: float = BEAT_S) -> None:
        self._output, self._beat_s = output, beat_s
        self._mine = Holder(uuid.uuid4().hex, socket.gethostname(), _process(os.getpid()), beat_s, time.time())
        self._stop = Event()
        self._thread = Thread(target=self._renew, name="lease", daemon=True)
        self.live: Callable[[], dict[str, Any]] = dict
        self.on_lost: Callable[[], None] = lambda: None

    def __enter__(self) -> "Lease":
        found = read_holder(self._output)
        if found is not None and _is_alive(found, self._output):
            raise self._refusal(found)
        self._write()
        time.sleep(_SETTLE_S)
        if not self.is_mine():
            raise self._refusal(read_holder(self._output) or self._mine)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self.is_mine():
            self._output.remove(LEASE)

    def is_mine(self) -> bool:
        """Whether no other run has taken the folder over."""
        found = read_holder(self._output)
        return found is not None and found.token == self._mine.token

    def _refusal(self, holder: Holder) -> UserError:
        rule = f"another run is at work there ({holder.shown})"
        return UserError(f"--output {self._output.uri}", rule, "wait for it or end it, or give another folder")

    def _renew(self) -> None:
        while not self._stop.wait(self._beat_s):
            try:
                if not self.is_mine():
                    self.on_lost()
                    return
                self._write()
            except OSError:
                continue  # A full disk or a store that does not answer: the next renewal may come through.

    def _write(self) -> None:
        self._mine = replace(self._mine, at=time.time(), beats=self._mine.beats + 1, live=self.live())
        self._output.write_whole(LEASE, json.dumps(asdict(self._mine)).encode())


def read_holder(output: Output) -> Holder | None:
    """Who holds the folder, or last did; None where nobody does."""
    try:
        data = output.read(LEASE)
        return None if data is None else Holder(**json.loads(data))
    except (ValueError, TypeError):
        return None


def _is_alive(holder: Holder, output: Output) -> bool:
    if holder.is_here():
        return holder.lives()
    wait_s = _MISSED_BEATS * holder.beat_s
    print(f"note: {holder.shown} has the output; {wait_s:.0f} s tell whether it is alive", file=sys.stderr)
    until = time.monotonic() + wait_s
    while time.monotonic() < until:
        time.sleep(min(1.0, holder.beat_s / 4))
        if (now := read_holder(output)) != holder:
            return now is not None
    return False


def _process(pid: int) -> str:
    """A process's number and its start in ticks since the machine's, or the number alone where it is gone."""
    try:
        return f"{pid} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except OSError:
        return f"{pid} gone"
