"""What an engine's actor tells Prometheus, over Ray's own metrics endpoint on each node; Ray puts `ray_` before names.

Counters are by run (its fingerprint) and engine. `cluster/grafana.json` shows them.
"""

import itertools
import subprocess
import threading
import time
from collections import Counter as Tally
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
from ray.util.metrics import Counter, Gauge

from m3agiqa.actor import ScorerActor
from m3agiqa.config import RunConfig

_EVERY_S = 10.0
_TAGS = ("run", "engine")
_COUNTED = {
    "prompt_tokens": "Tokens of prompts, images and descriptions included",
    "generated_tokens": "Tokens that were generated",
    "prefix_cache_queries": "Tokens looked up in the prefix cache",
    "prefix_cache_hits": "Tokens found in the prefix cache",
    "processor_cache_queries": "Images looked up among those that the processor has made ready",
    "processor_cache_hits": "Images found among those that the processor has made ready",
    "encoded_images": "Images that went through the vision encoder; no more than there are, at best",
    "preemptions": "Requests that had to give their memory back",
}
"""Counters of the engines that are passed on; `m3agiqa_` before, and Prometheus' `_total` behind."""


class EngineMetrics:
    """The metrics of one engine, in its actor.

    Args:
        run: the fingerprint.
        engine: the actor's name.
        gpus: indices of the GPUs that it has; none: their memory is not told.
    """

    def __init__(self, run: str, engine: str, gpus: Sequence[str] = ()) -> None:
        tags = {"run": run, "engine": engine}
        self._images = Counter("m3agiqa_images", "Images by how they ended", tag_keys=(*_TAGS, "status"))
        self._images.set_default_tags(tags)
        self._counters = {name: Counter(f"m3agiqa_{name}", doc, tag_keys=_TAGS) for name, doc in _COUNTED.items()}
        self._age = Gauge("m3agiqa_oldest_batch_seconds", "Age of the oldest batch in the engine", tag_keys=_TAGS)
        self._waiting = Gauge("m3agiqa_batches", "Batches in the engine or waiting for it", tag_keys=_TAGS)
        self._memory = Gauge("m3agiqa_gpu_memory_mib", "Memory in use on the engine's GPUs", tag_keys=_TAGS)
        for metric in (*self._counters.values(), self._age, self._waiting, self._memory):
            metric.set_default_tags(tags)
        self._seen: dict[str, float] = {}
        self._gpus, self._numbers, self._since = gpus, itertools.count(), dict[int, float]()
        threading.Thread(target=self._watch, name="metrics", daemon=True).start()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around the time that a batch spends in the actor."""
        number = next(self._numbers)
        self._since[number] = time.monotonic()
        try:
            yield
        finally:
            del self._since[number]

    def done(self, statuses: Mapping[str, int], totals: Mapping[str, float]) -> None:
        """Adds rows by status, and what the engine's counters have grown by."""
        for status, count in statuses.items():
            self._images.inc(count, {"status": status})
        for name, counter in self._counters.items():
            grown = totals.get(name, 0.0) - self._seen.get(name, 0.0)
            if grown > 0:
                counter.inc(grown)
                self._seen[name] = totals[name]

    def _watch(self) -> None:
        """Tells ages also while nothing comes back: that is when they are asked for."""
        while True:
            since = list(self._since.values())
            self._age.set(time.monotonic() - min(since) if since else 0.0)
            self._waiting.set(len(since))
            if self._gpus and (used := gpu_memory(self._gpus)):
                self._memory.set(sum(used))
            time.sleep(_EVERY_S)


class MeteredActor(ScorerActor):
    """A scorer in a Ray actor whose work Prometheus can follow."""

    def __init__(self, config: RunConfig, fingerprint: str, board: Any, verbose: bool) -> None:
        super().__init__(config, fingerprint, board, verbose)
        gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
        self._metrics = EngineMetrics(fingerprint, str(ray.get_runtime_context().get_actor_id())[:8], gpus)

    async def __call__(self, rows: pa.Table) -> AsyncIterator[pa.Table]:
        with self._metrics.batch():
            async for scored in super().__call__(rows):
                self._metrics.done(Tally(scored["status"].to_pylist()), self._scorer.stats())
                yield scored


def gpu_memory(gpus: Sequence[str] = ()) -> list[float]:
    """MiB in use of some GPUs of this machine, or of all; empty where there are none.

    Asked of the driver's tool, which unlike CUDA takes no memory of them itself.
    """
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        chosen = [f"--id={','.join(gpus)}"] if gpus else []
        done = subprocess.run([*command, *chosen], capture_output=True, text=True, timeout=30, check=True)
        return [float(line) for line in done.stdout.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
