"""Writes scores folders as `m3agiqa score` does, without an engine."""

import dataclasses
import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from m3agiqa.config import load_config
from m3agiqa.corpus.rows import FIXED_FIELDS
from m3agiqa.curation.recipe import Recipe
from m3agiqa.curation.rows import Scores
from m3agiqa.records import scores_schema
from m3agiqa.runs import Manifest, Output
from m3agiqa.settings import load
from tests.corpora import encode
from tests.test_phash import photo

FINGERPRINT = "0123456789abcdef"


def scored(name: str, mos: float | None, **more) -> dict:
    """A row that is ok, with a mean opinion score of quality and its interval."""
    row = {
        "id": name,
        "image": f"/pictures/{name}.png",
        "prompt": "a red fox",
        "generator": "one",
        "status": "ok",
        "quality_mos": mos,
        "quality_mos_low": None if mos is None else mos - 0.5,
        "quality_mos_high": None if mos is None else mos + 0.5,
        "quality_rating": "good",
        "quality_rating_probs": [0.0, 0.0, 0.25, 0.5, 0.25],
        "quality_description": f"what {name} shows",
        "width": 640,
        "height": 480,
        "image_sha256": hashlib.sha256(name.encode()).hexdigest(),
        "fingerprint": FINGERPRINT,
    }
    return row | more


def write_scores(
    folder: Path, rows: list[dict], *, files: int = 2, source: str = "in", passing=(), states=(), settings=()
) -> Path:
    """A scores folder of these rows, over several files, as rows of one run are."""
    corpus = pa.schema([*(field for field in FIXED_FIELDS if not field.name.startswith("_")), *passing])
    schema = scores_schema(corpus, states)
    config = load_config(None, ["engine.kind=simulated", *settings])
    output = Output(str(folder))
    output.make()
    output.write_manifest(Manifest(FINGERPRINT, {}, config.model_dump(mode="json"), source))
    for place in range(files):
        table = pa.Table.from_pylist(rows[place::files], schema=schema)
        pq.write_table(table, folder / "scores" / f"{place}_0.parquet")
    output.write_manifest(dataclasses.replace(output.read_manifest(), counts=output.count_by_status()))
    return folder


def write_pictures(folder: Path, count: int) -> list[str]:
    """So many PNG files that do not look alike; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        (folder / f"{seed}.png").write_bytes(encode(photo(seed)))
    return [str(folder / f"{seed}.png") for seed in range(count)]


def recipe(*overrides: str) -> Recipe:
    return load(Recipe, None, ["resources.threads=2", "resources.memory_gib=0.5", *overrides])


def opened(folder: Path, work: Path) -> Scores:
    work.mkdir(parents=True)
    return Scores(str(folder), work, memory_gib=0.5, threads=1)


def kept(folder: Path) -> list[dict]:
    """The rows of a curated set, in the order of its files."""
    files = sorted((folder / "scores").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files]).to_pylist()


def kept_ids(folder: Path) -> list[str]:
    return [row["id"] for row in kept(folder)]


def removed(folder: Path) -> dict[str, str]:
    """id -> rule of what was dropped."""
    return {row["id"]: row["rule"] for row in pq.read_table(folder / "removed.parquet").to_pylist()}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(one.relative_to(folder)): one.read_bytes() for one in sorted(folder.rglob("*")) if one.is_file()}
