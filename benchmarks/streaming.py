"""How many images a second the pipeline itself can pass on, and whether its memory stays flat.

    python -m benchmarks.streaming --rows 1000000                     # images of a few kB
    python -m benchmarks.streaming --rows 100000 --side 256           # images of about 32 kB
    python -m benchmarks.streaming --rows 20000 --without-ray         # decoding and scoring alone, in one process

The engine is the simulated one, without latency: what is left is reading, decoding, passing on and writing. The
manifest names the same few hundred pictures over and over, so that a million rows need no disk. One JSON line.
"""

import argparse
import asyncio
import contextlib
import json
import os
import threading
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from m3agiqa.config import RunConfig, load_config

PICTURES = 200
_SAMPLE_S = 5.0
_ROWS_PER_GROUP = 10_000


def write_corpus(folder: Path, rows: int, side: int) -> tuple[Path, float]:
    """A parquet manifest of so many rows over `PICTURES` JPEGs of side x side pixels.

    Returns:
        the manifest, and the mean size of a picture in kB.
    """
    random = np.random.default_rng(0)
    (folder / "pictures").mkdir(parents=True)
    sizes = []
    for i in range(PICTURES):
        noise = Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).filter(ImageFilter.GaussianBlur(1))
        file = folder / "pictures" / f"{i}.jpg"
        noise.save(file, quality=90)
        sizes.append(file.stat().st_size)
    manifest = folder / "manifest.parquet"
    schema = pa.schema([("id", pa.string()), ("image_path", pa.string()), ("prompt", pa.string())])
    with pq.ParquetWriter(manifest, schema) as writer:
        for start in range(0, rows, _ROWS_PER_GROUP):
            some = range(start, min(start + _ROWS_PER_GROUP, rows))
            paths = [f"pictures/{i % PICTURES}.jpg" for i in some]
            columns = [[f"{i:09d}" for i in some], paths, [f"picture number {i}" for i in some]]
            writer.write_table(pa.table(columns, schema=schema))
    return manifest, sum(sizes) / len(sizes) / 1000


class Usage:
    """Samples this process and Ray's while it is entered: memory that is not shared, in MB, and CPU time."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float, float]] = []
        self._cpu: dict[int, tuple[str, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Usage":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._stop.wait(_SAMPLE_S):
            below = own.children(recursive=True)
            for process in (own, *below):
                with contextlib.suppress(psutil.Error):  # it has just ended: what was seen of it before counts
                    self._cpu[process.pid] = (_name(process), sum(process.cpu_times()[:2]))
            workers = [p for p in below if _name(p).startswith("ray::")]
            self._samples.append((time.time(), _unshared(own), sum(map(_unshared, workers))))

    def cpu_seconds(self) -> dict[str, float]:
        """CPU seconds so far by kind of process, the largest first."""
        found: Counter[str] = Counter()
        for name, seconds in self._cpu.values():
            found[name] += seconds
        return {name: round(seconds, 1) for name, seconds in found.most_common(8)}

    def tenths(self, since: float) -> dict[str, float | None]:
        """Mean of the second and of the last tenth of the time from `since` (Unix time) on, and their ratio."""
        seen = [sample for sample in self._samples if sample[0] >= since]
        if len(seen) < 20:
            return {}
        tenth = len(seen) // 10
        found: dict[str, float | None] = {}
        for column, who in ((1, "driver"), (2, "workers")):
            second, last = (
                float(np.mean([s[column] for s in part])) for part in (seen[tenth : 2 * tenth], seen[-tenth:])
            )
            found |= {f"{who}_mb_second_tenth": round(second), f"{who}_mb_last_tenth": round(last)}
            found[f"{who}_growth"] = round(last / second, 3)
        return found


def _name(process: psutil.Process) -> str:
    try:
        command = process.cmdline()[0]
    except (psutil.Error, IndexError):
        return ""
    return "driver" if process.pid == os.getpid() else command.split("(")[0].rpartition("/")[2]


def _unshared(process: psutil.Process) -> float:
    try:
        return process.memory_full_info().uss / 1e6
    except psutil.Error:
        return 0.0  # it has just ended


def steady_rate(output: Path) -> float | None:
    """Rows a second by when the score files were finished, without the first tenth of that time and the last."""
    done = sorted(
        (f.stat().st_mtime, pq.ParquetFile(f).metadata.num_rows) for f in (output / "scores").glob("*.parquet")
    )
    if len(done) < 20:
        return None
    tenth = (done[-1][0] - done[0][0]) / 10
    since, until = done[0][0] + tenth, done[-1][0] - tenth
    return round(sum(rows for at, rows in done if since < at <= until) / (until - since), 1)


def without_ray(config: RunConfig, manifest: Path) -> dict[str, Any]:
    """Decodes and scores every row in this process."""
    from m3agiqa.corpus import open_corpus
    from m3agiqa.decoding import decode_rows
    from m3agiqa.scoring import Scorer

    corpus = open_corpus(str(manifest))
    scorer = Scorer(config, "benchmark")
    done, started, cpu = 0, time.monotonic(), time.process_time()
    for shard in corpus.shards:
        for table in shard.read():
            for rows in decode_rows(table, config.images, corpus.access, config.ray.batch_size):
                done += asyncio.run(scorer.score(rows)).num_rows
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    found = {"rows": done, "images_per_second": round(done / seconds, 1)}
    return found | {"cpu_ms_per_image": round(cpu / done * 1000, 3)}


def with_ray(config: RunConfig, manifest: Path, output: Path, store_mb: int) -> dict[str, Any]:
    """The whole pipeline on a local Ray whose object store has so many MB."""
    import ray

    from m3agiqa.connection import local_cluster
    from m3agiqa.pipeline import run_scoring
    from m3agiqa.resources import local_cpus

    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", object_store_memory=store_mb * 10**6, **local_cluster(local_cpus(config)), **quiet)
    with Usage() as usage:
        manifest_of_run = run_scoring(config, str(manifest), str(output))
    found = {"rows": sum(manifest_of_run.counts.values()), "seconds": manifest_of_run.seconds}
    rate = manifest_of_run.images_per_second or 0.0
    found |= {"cpu_seconds": usage.cpu_seconds(), "steady_images_per_second": steady_rate(output)}
    return found | {"images_per_second": rate} | usage.tenths(time.time() - found["rows"] / max(rate, 1e-9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=96, help="of the pictures, in pixels (default 96)")
    parser.add_argument("--store-mb", type=int, default=500, help="size of the object store (default 500)")
    parser.add_argument("--without-ray", action="store_true")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the run")
    args = parser.parse_args()
    config = load_config(None, ["engine.kind=simulated", *args.set])
    with TemporaryDirectory() as name:
        manifest, kilobytes = write_corpus(Path(name) / "in", args.rows, args.side)
        result: dict[str, Any] = {"benchmark": "streaming", "ray": not args.without_ray}
        result |= {"image_kb": round(kilobytes, 1), "cpus": os.cpu_count(), "store_mb": args.store_mb}
        if args.without_ray:
            result |= without_ray(config, manifest)
        else:
            result |= with_ray(config, manifest, Path(name) / "out", args.store_mb)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
