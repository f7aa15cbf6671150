"""Folders of scores as `m3agiqa score` writes them, without a run: for what reads scores."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from m3agiqa.aspects import RATING_WORDS, Aspect
from m3agiqa.config import load_config
from m3agiqa.corpus import FIXED_FIELDS
from m3agiqa.records import Assessment, Opinion, ScoredRow, Status, scores_table
from m3agiqa.runs import Manifest, Output, fingerprint, fingerprint_parts
from tests.corpora import picture

SCRIPT = (
    "a fox </script><script>document.title = 'broken in'</script><img src=x onerror=\"document.title='broken in'\">"
)
"""A prompt that would take a careless page over."""


def scored_folder(
    folder: Path, count: int = 40, *, shift: float = 0.0, seed: int = 0, predictor: bool = True, prompt: str = "a fox"
) -> Path:
    """Writes `count` rows of three generators in two files: the last two are rejected and failed, row 1 has no prompt.

    Args:
        folder: the output folder; images go to its sibling `pictures`, a different small one for each of six rows.
        shift: added to every score.
        predictor: whether there are mean opinion scores.
        prompt: of every row; row 0 has `SCRIPT`.
    """
    rng = np.random.default_rng(seed)
    pictures = folder.parent / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for i in range(6):
        picture(64, 48, seed=i).save(pictures / f"{i}.png")
    prompts = [SCRIPT, None, *[f"{prompt} {i}" for i in range(2, count)]]
    images = [str(pictures / f"{i % 6}.png") for i in range(count - 1)] + [str(pictures / "gone.png")]
    corpus = pa.table(
        {
            "id": [f"row-{i:04d}" for i in range(count)],
            "image": images,
            "_uri": images,
            "_bytes": pa.nulls(count, pa.large_binary()),
            "prompt": prompts,
            "generator": [("alpha", "beta", None)[i % 3] for i in range(count)],
        },
        schema=pa.schema(FIXED_FIELDS),
    )
    rows = [_row(i, count, prompts[i], rng, shift, predictor) for i in range(count)]
    config = load_config(None, ["engine.kind=simulated", "predictor.path=null"])
    parts = fingerprint_parts(config)
    manifest = Manifest(fingerprint(parts), parts, config.model_dump(mode="json"), str(pictures))
    output = Output(str(folder))
    output.make()
    output.write_manifest(manifest)
    table = scores_table(corpus, rows, manifest.fingerprint)
    for part, rows_of_part in enumerate((table.slice(0, count // 2), table.slice(count // 2))):
        pq.write_table(rows_of_part, folder / "scores" / f"{part}.parquet")
    manifest.counts, manifest.images_per_second, manifest.seconds = output.count_by_status(), 12.5, 61.0
    output.write_manifest(manifest)
    return folder


def _row(i: int, count: int, prompt: str | None, rng: np.random.Generator, shift: float, predictor: bool) -> ScoredRow:
    if i == count - 1:
        return ScoredRow(Status.REJECTED, "there is no such file: gone.png")
    if i == count - 2:
        return ScoredRow(Status.FAILED, "cannot read 17.png: the store said <b>no</b>")
    aspects = [aspect for aspect in Aspect if prompt is not None or not aspect.needs_prompt]
    assessments, opinions = {}, {}
    for aspect in aspects:
        probs = rng.dirichlet(np.ones(5))
        word = RATING_WORDS[int(probs.argmax())]
        text = f"The picture is {word}. <i>{SCRIPT}</i>" if i == 0 else f"The picture is {word}."
        assessments[aspect] = Assessment(text, word, word, tuple(probs), 100, 20, "stop")
        if predictor:
            mos = float(np.clip(rng.normal(2.5 + shift, 0.8), 0, 5))
            opinions[aspect] = Opinion(mos, max(mos - 0.5, 0), min(mos + 0.5, 5))
    note = None if prompt is not None else "correspondence: not judged, the row has no prompt"
    return ScoredRow(Status.OK, note, 64, 48, f"{i % 6:064x}", assessments, opinions)


def curate_by_hand(folder: Path, kept: int) -> None:
    """Adds what a curation leaves beside its rows, `curation.json` and `removed.parquet`, and takes `run.json` away."""
    removed = pa.table({"id": ["gone-1", "gone-2"], "rule": ["quality_mos > 3", "near duplicates"]})
    pq.write_table(removed, folder / "removed.parquet")
    funnel = [
        {"rule": "input", "dropped": 0, "left": kept + 2},
        {"rule": "quality_mos > 3", "dropped": 1, "left": kept + 1},
        {"rule": "near <b>duplicates</b>", "dropped": 1, "left": kept},
    ]
    manifest = json.loads((folder / "run.json").read_text())
    origin = {"input": manifest["input"], "corpus": manifest["config"]["corpus"]}
    recipe = {"recipe_hash": "abc", "recipe": {"where": ["quality_mos > 3"]}}
    sheet = {"fingerprint": manifest["fingerprint"], "origin": origin, "funnel": funnel, **recipe}
    (folder / "curation.json").write_text(json.dumps(sheet))
    (folder / "run.json").unlink()
