"""`python -m benchmarks.agiqa_sets FOLDER --out SETS`: AGIQA-3k's text-only conversations as captured sets.

FOLDER and the language model are those of `benchmarks.agiqa`, whose notes on what leaks where hold here too. Two sets
come out, in the format of `m3agiqa capture`, for `m3agiqa ablate`:

SETS/teacher   all 2,982 images with the teacher's descriptions, whose author had been shown the human score
SETS/own       the 597 of the published test split with the descriptions of a fine-tuned MLLM that saw no score

In both, `split` is the published one, and `mos_quality` the human score. One language model is trained on the
training conversations without a tenth of their prompts, which are the part `val`; it reads both sets. The published
file has the model's own descriptions for the test images alone, so a predictor is trained on the teacher's here.
"""

import argparse
import hashlib
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.agiqa import PLAN, Conversation, deal, read, targets, texts
from benchmarks.agiqa_lm import LanguageModel, Recipe, train
from m3agiqa.aspects import RATING_WORDS, Aspect
from m3agiqa.records import Assessment, Captured, ScoredRow, scores_table
from m3agiqa.runs import Manifest, Output

_VALIDATION_PARTS = 10
_ROWS_A_FILE = 500
_CORPUS = pa.schema([(name, pa.string()) for name in ("id", "prompt", "split")] + [("mos_quality", pa.float64())])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.agiqa_sets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the sets")
    parser.add_argument("--epochs", type=int, default=PLAN.lm.epochs, help="of the language model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = replace(PLAN.lm, epochs=args.epochs)
    learnt, own = read(args.folder)
    _, teacher = read(args.folder, own=False)
    held = deal(sorted({one.prompt for one in learnt}), _VALIDATION_PARTS, args.seed)[0]
    shown = [one for one in learnt if one.prompt not in held]
    model = train(texts(shown), targets(shown), shown[0].wording, recipe, args.seed)
    parts = ["val" if one.prompt in held else "train" for one in learnt]
    test = ["test"] * len(own)
    write(args.out / "teacher", model, [*learnt, *teacher], [*parts, *test], recipe, args.seed)
    write(args.out / "own", model, own, test, recipe, args.seed)


def write(
    folder: Path, model: LanguageModel, talks: list[Conversation], splits: list[str], recipe: Recipe, seed: int
) -> None:
    """One captured set."""
    output = Output(str(folder))
    made = {"recipe": asdict(recipe), "seed": seed}
    digest = hashlib.sha256(repr((made, texts(talks))).encode()).hexdigest()[:16]
    states_of = {"base": hashlib.sha256(repr(made).encode()).hexdigest()[:16], "conversation": "published"}
    manifest = Manifest(
        digest, made, {"corpus": {}}, "AGIQA-3k", states_of=states_of | {"image": "none"}, first_answer="given"
    )
    output.make()
    output.write_manifest(manifest)
    for start in range(0, len(talks), _ROWS_A_FILE):
        part = talks[start : start + _ROWS_A_FILE]
        columns = {
            "id": [one.image for one in part],
            "prompt": [one.prompt for one in part],
            "split": splits[start : start + _ROWS_A_FILE],
            "mos_quality": [one.score for one in part],
        }
        rows = scores_table(pa.table(columns, schema=_CORPUS), assess(model, part), digest, states=(Aspect.QUALITY,))
        pq.write_table(rows, f"{output.scores}/part-{start:05}.parquet", row_group_size=64)
    manifest.finished = datetime.now(UTC).isoformat()
    output.write_manifest(manifest)


def assess(model: LanguageModel, talks: list[Conversation]) -> list[ScoredRow]:
    """What the language model makes of conversations: states, rating probabilities, where the description is."""
    rows = []
    states = model.states(texts(talks))
    for one, found, probs in zip(talks, states, model.rating_probs(states).tolist(), strict=True):
        asked, described = (len(model.encode(text)) for text in (one.asked, one.asked + one.description))
        rating = RATING_WORDS[probs.index(max(probs))]
        assessment = Assessment(
            description=one.description,
            rating=rating,
            rating_answer=rating,
            rating_probs=tuple(probs),
            prompt_tokens=len(found),
            generated_tokens=0,
            finish_reason="given",
            captured=Captured(found),
            bounds=(asked, described),
        )
        rows.append(ScoredRow(assessments={Aspect.QUALITY: assessment}))
    return rows


if __name__ == "__main__":
    main()
