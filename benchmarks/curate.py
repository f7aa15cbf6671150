"""Curating many scored rows beside DuckDB's own time for the same filter, and exporting beside `cp`: `python -m
benchmarks.curate`.

Prints a JSON line for each. What a repetition compares runs one after the other, so that a busy machine is
busy for all; medians are of the repetitions. Peak memory is that of the whole command (`benchmarks.memory`).
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from benchmarks.memory import peak_mib
from m3agiqa.config import load_config
from m3agiqa.corpus.rows import FIXED_FIELDS
from m3agiqa.records import scores_schema
from m3agiqa.runs import Manifest, Output

WHERE = "quality_mos > 3 AND quality_mos_low > 2.5 AND correspondence_mos > 2"
MEMORY_GIB = 1.5
_ROWS_PER_FILE = 500_000
# Values of a column by its name's end; what is not named is null.
_VALUES = {
    "_description": "repeat('the picture shows what was asked for ', 4) || i",
    "_rating": "['bad', 'poor', 'fair', 'good', 'excellent'][CAST(1 + hash(i, 1) % 5 AS INTEGER)]",
    "_rating_probs": "[random(), random(), random(), random(), random()]",
    "_rating_score": "5 * random()",
    "_mos": "5 * (hash(i, 2) % 100000) / 100000",
    "_mos_low": "4 * (hash(i, 3) % 100000) / 100000",
    "_mos_high": "5 * random()",
    "_finish_reason": "'stop'",
    "id": "lpad(CAST(hash(i) % 1000000000 AS VARCHAR), 9, '0') || '-' || i",
    "image": "'/data/pictures/' || i || '.png'",
    "prompt": "'a prompt of some words, number ' || i // 4",
    "generator": "'generator ' || i % 7",
    "status": "CASE WHEN i % 100 = 0 THEN 'rejected' ELSE 'ok' END",
    "width": "512 + i % 512",
    "height": "512 + i % 300",
    "image_sha256": "sha256(CAST(i AS VARCHAR))",
    "fingerprint": "'0123456789abcdef'",
}


def write_scores(folder: Path, rows: int) -> None:
    """A scores folder of made-up rows, in no order of their ids."""
    config = load_config(None, ["engine.kind=simulated"])
    output = Output(str(folder))
    output.make()
    output.write_manifest(Manifest("0123456789abcdef", {}, config.model_dump(mode="json"), "in"))
    schema = scores_schema(pa.schema([field for field in FIXED_FIELDS if not field.name.startswith("_")]))
    columns = []
    for field in schema:
        value = next((sql for end, sql in _VALUES.items() if field.name.endswith(end) and end[0] == "_"), None)
        value = _VALUES.get(field.name, value) or "NULL"
        kind = {"float": "FLOAT", "int32": "INTEGER", "string": "VARCHAR"}.get(str(field.type), "FLOAT[]")
        columns.append(f"CAST({value} AS {kind}) AS {field.name}")
    with duckdb.connect() as con:
        con.execute("SET enable_progress_bar = false")
        for start in range(0, rows, _ROWS_PER_FILE):
            numbers = f"range({start}, {min(start + _ROWS_PER_FILE, rows)}) AS numbers(i)"
            target = folder / "scores" / f"{start:09d}.parquet"
            con.execute(f"COPY (SELECT {', '.join(columns)} FROM {numbers}) TO '{target}' (COMPRESSION zstd)")


def duckdb_alone(folder: str, out: str, order: str) -> None:
    """The filter as DuckDB does it by itself, with the same memory and threads."""
    with duckdb.connect() as con:
        con.execute("SET enable_progress_bar = false")
        con.execute(f"SET memory_limit='{MEMORY_GIB}GiB'; SET temp_directory='{out}.spilled'")
        query = f"SELECT * FROM read_parquet('{folder}/scores/*.parquet') WHERE status = 'ok' AND {WHERE} {order}"
        con.execute(f"COPY ({query}) TO '{out}' (COMPRESSION zstd)")


def measure_rows(folder: Path, rows: int, repeats: int) -> None:
    """Curating beside DuckDB alone, sorted by id as a curated set is, and in the order in which rows come."""
    if not (folder / "run").exists():
        write_scores(folder / "run", rows)
    curate = [sys.executable, "-m", "m3agiqa.cli", "curate", str(folder / "run"), "--where", WHERE]
    curate += ["--set", f"resources.memory_gib={MEMORY_GIB}", "--out", str(folder / "out")]
    alone = [sys.executable, "-m", "benchmarks.curate", "--alone", str(folder / "run"), str(folder / "alone.parquet")]
    commands = {"curate": curate, "duckdb_sorted": [*alone, "ORDER BY id"], "duckdb": [*alone, ""]}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, float] = {}
    for _ in range(repeats):
        for name, command in commands.items():
            if name == "curate":
                shutil.rmtree(folder / "out", ignore_errors=True)
            started = time.monotonic()
            peaks[name] = max(peaks.get(name, 0.0), round(peak_mib(command)))
            seconds[name].append(time.monotonic() - started)
    kept = Output(str(folder / "out")).dataset().count_rows()
    report("curate", {"rows": rows, "kept": kept, "peak_mib": peaks}, seconds, "curate")


def measure_export(folder: Path, images: int, kib: int, repeats: int) -> None:
    """Exporting images as a folder beside `cp -r` of the same files."""
    from PIL import Image

    rng, source = np.random.default_rng(0), folder / "pictures"
    source.mkdir()
    side = round((kib * 1024 / 3) ** 0.5)
    for i in range(images):  # noise, which a PNG cannot make smaller
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(source / f"{i}.png", compress_level=0)
    manifest = folder / "manifest.csv"
    manifest.write_text("id,image,prompt\n" + "".join(f"{i},pictures/{i}.png,a prompt\n" for i in range(images)))
    score = [sys.executable, "-m", "m3agiqa.cli", "score", "--input", str(manifest), "--output", str(folder / "run")]
    subprocess.run([*score, "--set", "engine.kind=simulated"], check=True, stdout=subprocess.DEVNULL)
    from m3agiqa.export.run import Options, export

    def ours() -> None:
        export(str(folder / "run"), str(folder / "out"), Options("imagefolder"))

    def cp() -> None:
        subprocess.run(["cp", "-r", str(source), str(folder / "copied")], check=True)

    ways: dict[str, Callable[[], None]] = {"export": ours, "cp": cp}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        # In turn first: what is in the page cache, and what is still to be written back, is shared fairly.
        for name in list(ways)[:: 1 if repeat % 2 else -1]:
            started = time.monotonic()
            ways[name]()
            seconds[name].append(time.monotonic() - started)
            for made in ("out", "copied"):
                shutil.rmtree(folder / made, ignore_errors=True)
            subprocess.run(["sync"], check=True)
    report("export", {"images": images, "mib": round(images * side * side * 3 / 2**20)}, seconds, "cp")


def report(name: str, known: dict[str, object], seconds: dict[str, list[float]], over: str) -> None:
    """Prints medians, and each one's ratio: how many times as long as it the way `over` took."""
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    ratios = {f"{over}/{way}": round(medians[over] / value, 2) for way, value in medians.items() if way != over}
    shown = {way: [round(one, 2) for one in found] for way, found in seconds.items()}
    print(json.dumps({"benchmark": name} | known | {"seconds": shown, "ratios": ratios}), flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curate", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="0: leave it out")
    parser.add_argument("--images", type=int, default=4000, help="0: leave it out")
    parser.add_argument("--kib", type=int, default=500, help="of an image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="a new folder for the made-up scores, which a later call finds there"
    )
    parser.add_argument("--alone", nargs=3, metavar=("SCORES", "OUT", "ORDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        duckdb_alone(*args.alone)
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.rows:
            measure_rows(args.folder or Path(folder), args.rows, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        if args.images:
            measure_export(Path(folder), args.images, args.kib, args.repeats)


if __name__ == "__main__":
    main()
