"""How far a run is, from what its output folder holds: it may be at work, cut short, or at its end."""

import re
import time
from dataclasses import asdict, dataclass
from typing import Any

from m3agiqa.errors import UserError
from m3agiqa.lease import Holder, read_holder
from m3agiqa.progress import duration
from m3agiqa.records import Status
from m3agiqa.runs import Manifest, Output

# A holder on another machine, whose process cannot be looked at, counts as at work for so many renewals.
_QUIET_BEATS = 6
_RETRY_FLAGS = re.compile(r" --retry-[a-z]+(?= |$)")


@dataclass(frozen=True)
class RunStatus:
    """What `m3agiqa status` says.

    Attributes:
        state: `running`, `stopped` (rows are left, or may be) or `done`.
        counts: written rows by status.
        left: rows of the input that are not written, None where that is not known yet (tars).
        images_per_second: of the run at work, else of the last one, which may have been killed; None where it is not
            known.
        eta_s: seconds to go, None where that is not known.
        holder: who is at work, None where nobody is.
        next: what to run next, None where there is nothing to do.
    """

    state: str
    counts: dict[str, int]
    left: int | None
    images_per_second: float | None
    eta_s: float | None
    holder: str | None
    next: str | None

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same for people."""
        left = "unknown (counted at the end)" if self.left is None else f"{self.left:,}"
        written = ", ".join(f"{self.counts.get(status, 0):,} {status}" for status in Status)
        lines = [
            f"{self.state}{f' ({self.holder})' if self.holder else ''}",
            f"rows  {sum(self.counts.values()):,} done: {written}; left: {left}",
        ]
        if self.images_per_second is not None:
            eta = f", {duration(self.eta_s)} to go" if self.eta_s is not None else ""
            lines.append(f"rate  {self.images_per_second:.1f} images/s{eta}")
        return [*lines, f"next  {self.next or 'nothing'}"]


def run_status(uri: str) -> RunStatus:
    """Looks into an output folder.

    Raises:
        UserError: if it holds no run.
    """
    output = Output(uri)
    manifest = output.read_manifest()
    if manifest is None:
        raise UserError(uri, "holds no run of m3agiqa", "give what --output named")
    counts = output.count_by_status()
    left = None if manifest.rows is None else max(manifest.rows - sum(counts.values()), 0)
    holder = read_holder(output)
    said = {} if holder is None else holder.live
    if holder is not None and _at_work(holder):
        rate, eta_s = said.get("per_second"), said.get("eta_s")
        shown = f"{holder.shown}, {duration(max(time.time() - holder.at, 0))} ago"
        return RunStatus("running", counts, left, rate, eta_s, shown, f"m3agiqa status {uri} (it is at work)")
    done = manifest.finished is not None and left == 0
    next_ = _next(manifest, counts, done)
    # One that was killed has not written how fast it was; what it said last is in the lease that it left behind.
    rate = said.get("per_second") if manifest.images_per_second is None else manifest.images_per_second
    return RunStatus("done" if done else "stopped", counts, left, rate, None, None, next_)


def _at_work(holder: Holder) -> bool:
    if holder.is_here():
        return holder.lives()
    return time.time() - holder.at < _QUIET_BEATS * holder.beat_s


def _next(manifest: Manifest, counts: dict[str, int], done: bool) -> str | None:
    command = manifest.command or f"the same command (input {manifest.input})"
    if manifest.finished is None:
        return command
    # What was to be retried has been: again it would score nothing, and leave what is left.
    whole = _RETRY_FLAGS.sub("", command)
    if not done:
        return whole
    return f"{whole} --retry-failed" if counts.get(Status.FAILED) else None
