"""`python -m benchmarks.evaluate`: a million rows evaluated by the command, with its time and peak memory.

The rows are made up: human scores of one aspect, a scorer's `quality_mos`, twelve generators and as many prompts as a
tenth of the rows. The command runs in a process of its own, reading and writing included.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = write(Path(folder), args.rows)
        command = [sys.executable, "-m", "m3agiqa.cli", "evaluate", "--scores", str(table)]
        command += ["--label", "quality=mos", "--out", f"{folder}/out", "--samples", str(args.samples)]
        started = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.monotonic() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {
        "rows": args.rows,
        "samples": args.samples,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gib": round(used.ru_maxrss / 2**20, 2),
    }
    print(json.dumps(figures))


def write(folder: Path, rows: int) -> Path:
    """A parquet file of made-up scores."""
    rng = np.random.default_rng(0)
    labels = rng.uniform(0, 5, rows)
    table = pa.table(
        {
            "id": [f"image-{i:08}" for i in range(rows)],
            "prompt": [f"prompt {i}" for i in rng.integers(0, max(rows // 10, 1), rows).tolist()],
            "generator": [f"generator {i}" for i in rng.integers(0, 12, rows).tolist()],
            "mos": labels,
            "quality_mos": np.clip(labels + rng.normal(size=rows), 0, 5),
        }
    )
    pq.write_table(table, folder / "scores.parquet")
    return folder / "scores.parquet"


if __name__ == "__main__":
    main()
