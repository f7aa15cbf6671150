"""A scorer in a Ray actor, and what it does when its engine is lost."""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from m3agiqa.config import RunConfig
from m3agiqa.connection import quiet_libraries
from m3agiqa.decoding import as_failed
from m3agiqa.errors import RunBroken, UserError
from m3agiqa.scoring import Scorer
from m3agiqa.suspects import DEATHS_TO_CONVICT, DEATHS_TO_SUSPECT, Losses, Plan

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POISON = f"the engine's process died {DEATHS_TO_CONVICT} times while this row alone was in it"


class ScorerActor:
    """A scorer in a Ray actor. Several batches may be in its engine at once.

    An engine that dies takes this process with it: Ray starts the actor anew and gives it the same batches again.
    Which rows were in it then is known to the board (`suspects.py`), so that one that kills engines is found.
    """

    def __init__(self, config: RunConfig, fingerprint: str, board: Any, verbose: bool) -> None:
        quiet_libraries(verbose)
        end_with_node()
        # Ray Data runs several batches of each of its tasks at once; this is what bounds them all together.
        self._at_once = config.ray.batches_in_flight
        self._places, self._alone = asyncio.Semaphore(self._at_once), asyncio.Lock()
        self._board = board
        self._name = ray.get_runtime_context().get_actor_id()
        # So many losses with no row scored in between, and it is not the rows: halving a batch takes fewer.
        self._most_losses = DEATHS_TO_SUSPECT + DEATHS_TO_CONVICT + config.ray.batch_size.bit_length() + 2
        try:
            losses: Losses = ray.get(board.started.remote(self._name))
            if losses.count >= self._most_losses:
                raise _broken(losses)
            self._scorer = Scorer(config, fingerprint)
            ray.get(board.loaded.remote(self._name))
        except UserError as error:
            ray.get(board.refuse.remote(error))
            raise

    def __del__(self) -> None:
        """Ray Data takes an actor out of its pool so. One that was never up, or that is killed, says nothing."""
        if hasattr(self, "_scorer"):
            self._board.left.remote(self._name)

    async def __call__(self, rows: pa.Table) -> AsyncIterator[pa.Table]:
        done: list[tuple[list[int], pa.Table]] = []
        async with self._places:
            plan: Plan = await self._board.admit.remote(self._name, rows["id"].to_pylist())
            # What is reported before the whole batch is done would be reported again where it is given again.
            whole = not (plan.alone or plan.poison)
            if plan.together:
                done.append(await self._score(rows, plan.together, alone=False, report=whole))
        if plan.poison:
            done.append((plan.poison, await self._scorer.score(as_failed(rows.take(plan.poison), _POISON))))
        for group in plan.alone:
            async with self._whole_engine():
                if not await self._board.enter.remote(self._name, rows["id"].take(group).to_pylist(), True):
                    break
                done.append(await self._score(rows, group, alone=True, report=False))
        if done:
            scored = _in_order(done)
            if not whole:
                self._board.report.remote(self._name, *self._outcome(scored))
            yield scored

    async def _score(
        self, batch: pa.Table, places: list[int], *, alone: bool, report: bool
    ) -> tuple[list[int], pa.Table]:
        """The places and their rows, which the board has let in, scored. Never returns where the engine dies."""
        rows = batch if len(places) == batch.num_rows else batch.take(places)
        try:
            scored = await self._scorer.score(rows)
        except UserError as error:
            await self._board.refuse.remote(error)
            raise
        except Exception:
            if await self._board.losses.remote(self._name) + 1 >= self._most_losses:
                raise
            # An exception would end the run, or count good rows as errors.
            logging.getLogger(__name__).exception("the engine is lost; this actor ends and is started anew")
            os._exit(1)
        outcome = self._outcome(scored) if report else ()
        await self._board.leave.remote(self._name, rows["id"].to_pylist(), alone, *outcome)
        return places, scored

    def _outcome(self, scored: pa.Table) -> tuple[Counter[str], dict[str, float]]:
        """What the board is told: rows by status, and the engine's counters."""
        return Counter(scored["status"].to_pylist()), self._scorer.stats()

    @contextlib.asynccontextmanager
    async def _whole_engine(self) -> AsyncIterator[None]:
        """All places at once. Two that each held some of them would wait for each other."""
        async with self._alone:
            for _ in range(self._at_once):
                await self._places.acquire()
        try:
            yield
        finally:
            for _ in range(self._at_once):
                self._places.release()


def end_with_node() -> None:
    """Has the system kill this process when Ray's daemon on its node, which started it, is gone.

    Ray's own way out can wait for ever by then (a lock, taken in a destructor), and the engine's memory with it.
    """
    with contextlib.suppress(OSError):  # not on Linux, or the parent is in another namespace
        if Path(f"/proc/{os.getppid()}/comm").read_text().strip() == "raylet":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _broken(losses: Losses) -> RunBroken:
    rule = f"it died {losses.count} times, and no row was scored in between"
    if not losses.loading:
        return RunBroken("the engine", rule, "-v shows why; the same command goes on")
    cure = "look at the node's memory, and the GPU's, while weights load; -v shows more; the same command goes on"
    return RunBroken("the engine", f"{rule}, the last time while it was loaded", cure)


def _in_order(parts: list[tuple[list[int], pa.Table]]) -> pa.Table:
    """The rows of a batch by their places in it."""
    if len(parts) == 1:
        return parts[0][1]
    places = np.concatenate([places for places, _ in parts])
    return pa.concat_tables([rows for _, rows in parts]).take(np.argsort(places))
