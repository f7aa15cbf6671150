"""Peak memory of a run over a corpus and over one of ten times the size: `python -m benchmarks.memory`.

Prints a JSON line. Memory is the proportional set size of the command and all its processes (Ray's and
the engine's), so that what they share counts once; Ray's object store is part of it. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.inputs import write_corpus

_EVERY_S = 0.5


def peak_mib(command: list[str]) -> float:
    """Runs a command to its end; the most memory that it and its descendants had at one time, in MiB."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    watched, peak = psutil.Process(process.pid), 0.0
    while process.poll() is None:
        total = 0
        for one in [watched, *_children(watched)]:
            try:
                total += one.memory_full_info().pss
            except psutil.Error:
                continue
        peak = max(peak, total / 2**20)
        time.sleep(_EVERY_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return peak


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--images", type=int, default=100)
    args = parser.parse_args()
    peaks: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for images in (args.images, 10 * args.images):
            manifest = write_corpus(Path(folder) / f"corpus-{images}", 0, images)
            out = str(Path(folder) / f"out-{images}")
            score = [sys.executable, "-m", "m3agiqa.cli", "score", "--input", str(manifest), "--output", out]
            peaks[images] = round(peak_mib([*score, "--set", "capture.kind=states", "ray.rows_per_file=64"]))
    ratio = round(peaks[10 * args.images] / peaks[args.images], 3)
    print(json.dumps({"model": "tiny", "peak_mib": peaks, "ratio": ratio}))


if __name__ == "__main__":
    main()
