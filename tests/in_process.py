"""Whole runs in this process, without Ray: what a run makes of its input, its output and its own traces."""

import asyncio
import uuid
from collections import Counter

import pyarrow.parquet as pq
import pytest

from m3agiqa import pipeline
from m3agiqa.decoding import decode_rows
from m3agiqa.progress import Board
from m3agiqa.runs import Manifest
from m3agiqa.scoring import Scorer


class InProcess:
    """Takes the place of a run's work on the cluster.

    Attributes:
        stop_after: rows after which the run is interrupted; None: it is not.
        scored: rows that the last run scored, None where it began no work.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stop_after: int | None = None
        self.scored: int | None = None
        monkeypatch.setattr(pipeline, "_work", self.work)

    def work(self, run: pipeline._Run, manifest: Manifest) -> None:
        """Scores what is to do, a batch and a file at a time."""
        config = run.config
        scorer = Scorer(config, manifest.fingerprint)
        board = Board(config.ray.max_failed_fraction if run.todo.only is None else 1.0)
        self.scored = 0
        for rows in (rows for shard in run.corpus.shards for rows in shard.read()):
            left = run.todo.select(rows).cast(run.corpus.schema)
            for part in decode_rows(left, config.images, run.corpus.access, config.ray.batch_size):
                if self.stop_after is not None and self.scored >= self.stop_after:
                    raise KeyboardInterrupt
                scored = asyncio.run(scorer.score(part))
                pq.write_table(scored, f"{run.target.scores}/{uuid.uuid4().hex}.parquet")
                self.scored += scored.num_rows
                board.report("a", Counter(scored["status"].to_pylist()), {})
                if (refusal := board.refusal()) is not None:
                    raise refusal
