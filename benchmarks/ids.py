"""What a resume costs where many rows are done: time and memory until the first row can be told from a done one.

`python -m benchmarks.ids [--rows 10000000 --file 5000]` writes such an output, reads it as a run does, and prints one
JSON line. `--file` is the number of rows in a score file.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq


def write_output(folder: Path, rows: int, per_file: int) -> None:
    """A `scores` folder with ids such as a manifest of many files gives, and statuses."""
    (folder / "scores").mkdir(parents=True)
    for start in range(0, rows, per_file):
        numbers = range(start, min(start + per_file, rows))
        ids = pa.array([f"part-{i // 100_000:05d}.parquet:{i:08d}-{(i * 2654435761) % 2**32:08x}" for i in numbers])
        table = pa.table({"id": ids, "status": pa.array(["ok"] * len(ids))})
        pq.write_table(table, folder / "scores" / f"{start:012d}.parquet")


def measure(folder: str) -> dict[str, float]:
    """Reads what is done, then looks up ids by the shard; runs in a process of its own for its peak memory."""
    from m3agiqa.resume import Todo, done_ids
    from m3agiqa.runs import Output

    output = Output(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.monotonic(), time.process_time()
    done = done_ids(output)
    read_s, read_cpu_s = time.monotonic() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    asked = pa.table({"id": [f"new {i}" if i % 2 else f"part-00000.parquet:{i:08d}" for i in range(2048)]})
    todo, times = Todo(done), []
    for _ in range(20):
        cpu = time.process_time()
        todo.select(asked)
        times.append(time.process_time() - cpu)
    return {
        "rows": len(done),
        "read_s": round(read_s, 1),
        "read_cpu_s": round(read_cpu_s, 1),
        "set_mib": round((done.high.nbytes + done.low.nbytes) / 2**20, 1),
        "peak_mib_above_start": round((peak - before) / 2**10, 1),
        "lookup_of_2048_cpu_ms": round(1000 * float(np.median(times)), 2),
    }


def main() -> None:
    """Writes, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--file", type=int, default=5000)
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_output(Path(folder), args.rows, args.file)
        command = [sys.executable, "-m", "benchmarks.ids", "--measure", folder]
        subprocess.run(command, check=True, env=os.environ)


if __name__ == "__main__":
    main()
