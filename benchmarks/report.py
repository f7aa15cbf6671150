"""Time, memory and size of the report of many scores: `python -m benchmarks.report`.

Makes a folder of scores as a run leaves it (files of 512 rows, descriptions of about 300 characters, pictures of
1,024 x 1,024 pixels), then runs `m3agiqa report` on it, and opens the report from disk in headless Chromium where there
is one. Prints a JSON line: seconds, and milliseconds from the navigation's start to the first paint of content (the
heading and the figures) and to the last change of the largest one. Scores and words are drawn by chance.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from playwright.sync_api import Playwright, sync_playwright

from benchmarks.memory import peak_mib
from m3agiqa.aspects import RATING_LEVELS, RATING_WORDS, Aspect
from m3agiqa.config import load_config
from m3agiqa.records import scores_schema
from m3agiqa.runs import Manifest, Output, fingerprint, fingerprint_parts

_ROWS_PER_FILE = 512
_PICTURES = 256
_SIDE = 1024
# The last of each kind of paint, once there has been one and a second more.
_PAINTS = """() => new Promise((resolve) => {
  const told = {};
  for (const type of ["paint", "largest-contentful-paint"]) {
    new PerformanceObserver((list) => {
      for (const entry of list.getEntries()) told[entry.name || type] = entry.startTime;
      setTimeout(() => resolve(told), 1000);
    }).observe({ type, buffered: true });
  }
})"""


def write_scores(folder: Path, rows: int) -> None:
    """Writes a folder of scores with its pictures."""
    rng = np.random.default_rng(0)
    pictures = [str(folder / "pictures" / f"{i}.png") for i in range(_PICTURES)]
    (folder / "pictures").mkdir(parents=True)
    for path in pictures:
        coarse = Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8))
        coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(path, compress_level=1)
    vocabulary = ["".join(rng.choice(list("abcdefghijklmnop"), 6)) for _ in range(500)]
    texts = pa.array([" ".join(rng.choice(vocabulary, 43)) for _ in range(20_000)])
    config = load_config(None, ["engine.kind=simulated", "predictor.path=null"])
    parts = fingerprint_parts(config)
    manifest = Manifest(fingerprint(parts), parts, config.model_dump(mode="json"), str(folder / "pictures"))
    output = Output(str(folder / "run"))
    output.make()
    output.write_manifest(manifest)
    for first in range(0, rows, _ROWS_PER_FILE):
        table = _table(rng, first, min(_ROWS_PER_FILE, rows - first), pictures, texts)
        pq.write_table(table, folder / "run" / "scores" / f"{first:09d}.parquet")


def _table(rng: np.random.Generator, first: int, count: int, pictures: list[str], texts: pa.Array) -> pa.Table:
    schema = scores_schema(pa.schema([(name, pa.string()) for name in ("id", "image", "prompt", "generator")]))
    columns: dict[str, pa.Array] = {
        "id": pa.array([f"row-{first + i:09d}" for i in range(count)]),
        "image": pa.array([pictures[i] for i in rng.integers(0, _PICTURES, count)]),
        "prompt": texts.take(pa.array(rng.integers(0, len(texts), count))),
        "generator": pa.array([f"generator-{i}" for i in rng.integers(0, 12, count)]),
        "status": pa.array(["ok"] * count),
    }
    for aspect in Aspect:
        probs = rng.dirichlet(np.ones(5), count).astype(np.float32)
        mos = np.clip(rng.normal(2.8, 0.9, count), 0, 5).astype(np.float32)
        columns |= {
            f"{aspect}_description": texts.take(pa.array(rng.integers(0, len(texts), count))),
            f"{aspect}_rating": pa.array([RATING_WORDS[i] for i in probs.argmax(1)]),
            f"{aspect}_rating_probs": pa.array(list(probs), pa.list_(pa.float32())),
            f"{aspect}_rating_score": pa.array(probs @ np.array(RATING_LEVELS, np.float32)),
            f"{aspect}_mos": pa.array(mos),
            f"{aspect}_mos_low": pa.array(np.clip(mos - 1, 0, 5)),
            f"{aspect}_mos_high": pa.array(np.clip(mos + 1, 0, 5)),
            f"{aspect}_finish_reason": pa.array(["stop"] * count),
        }
    filled = [columns[f.name] if f.name in columns else pa.nulls(count, f.type) for f in schema]
    return pa.Table.from_arrays(filled, schema=schema)


def paint_ms(page: Path, visits: int) -> dict[str, float]:
    """Median milliseconds to each kind of paint, a new browser for each visit; empty where there is no Chromium."""
    browser = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
    if browser is None:
        return {}
    with sync_playwright() as playwright:
        found = [_visit(playwright, browser, page) for _ in range(visits)]
    return {name: round(statistics.median(one[name] for one in found)) for name in found[0]}


def _visit(playwright: Playwright, browser: str, page: Path) -> dict[str, float]:
    with playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"]) as chromium:
        opened = chromium.new_page(viewport={"width": 1200, "height": 900})
        opened.goto(page.as_uri())
        return dict(opened.evaluate(_PAINTS))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--visits", type=int, default=5, help="of the browser")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scores(folder, args.rows)
        started = time.monotonic()
        peak = peak_mib([sys.executable, "-m", "m3agiqa.cli", "report", str(folder / "run")])
        seconds = round(time.monotonic() - started, 1)
        size = round((folder / "run" / "report.html").stat().st_size / 1e6, 2)
        known = {"rows": args.rows, "seconds": seconds, "peak_mib": round(peak), "report_mb": size}
        print(json.dumps(known | {"paint_ms": paint_ms(folder / "run" / "report.html", args.visits)}))


if __name__ == "__main__":
    main()
