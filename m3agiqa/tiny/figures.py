"""How good the tiny model is: figures from the scores that `m3agiqa score` gave to what was held out.

    python -m m3agiqa.tiny.figures --scored DIR --model DIR

reads the scores of a corpus of `opinions.held_out_pictures` and writes the figures and the model's card.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import torch
from transformers import AutoModelForImageTextToText

from m3agiqa.aspects import RATING_WORDS, Aspect, word_of_score
from m3agiqa.predictor.metrics import agreement
from m3agiqa.tiny.card import write_card
from m3agiqa.tiny.examples import FAULTS
from m3agiqa.tiny.eyecode import scores_told
from m3agiqa.tiny.opinions import LADDER, held_out_pictures, label_column
from m3agiqa.tiny.vision import look

Row = dict[str, Any]

PARTS = {
    "scenes": ("scenes",),
    "photographs": ("photographs",),
    "both": ("scenes", "photographs"),
    "unseen": ("unseen",),
}
"""What figures are given of, and the parts of the corpus that it is made of."""


def measured(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of scored rows, by part of the corpus; what cannot be measured is None."""
    parts = {name: [row for row in rows if row["part"] in made_of] for name, made_of in PARTS.items()}
    aspects = {
        part: {str(aspect): found for aspect in Aspect if (found := of_aspect(chosen, aspect)) is not None}
        for part, chosen in parts.items()
    }
    for part in ("scenes", "photographs", "both"):
        if "quality" in aspects[part]:
            aspects[part]["quality"]["fault_named"] = faults_named(parts[part])
    return aspects | {"ladder": monotone([row for row in rows if row["part"] == "ladder"])}


def scored_rows(scored: Path) -> list[Row]:
    """The scored rows in a folder that `m3agiqa score` wrote."""
    rows = ds.dataset(scored / "scores").to_table(filter=ds.field("status") == "ok").to_pylist()
    # A CSV has no nulls.
    return [{name: None if value == "" else value for name, value in row.items()} for row in rows]


@torch.no_grad()
def told_by_the_eye(folder: Path, images: int) -> dict[str, float | None]:
    """SRCC of the scores that a model's image tokens tell of held-out pictures: what all else has to go by."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    told: dict[Aspect, list[float]] = {}
    truth: dict[Aspect, list[float]] = {}
    drawn = itertools.islice(held_out_pictures(images), images)
    while some := list(itertools.islice(drawn, 50)):
        _, tokens = look(model, [labelled.sample for labelled in some])
        for aspect, scores in scores_told(tokens).items():
            told.setdefault(aspect, []).extend(scores.tolist())
            truth.setdefault(aspect, []).extend(getattr(one.sample.facts, str(aspect)) for one in some)
    return {str(aspect): srcc(told[aspect], truth[aspect]) for aspect in told}


def of_aspect(rows: Sequence[Row], aspect: Aspect) -> dict[str, float | None] | None:
    """SRCC of the predictor's score and of the expected rating; how often the rating word is right or next to it."""
    known = [row for row in rows if row[label_column(aspect)] is not None and row[f"{aspect}_rating_score"] is not None]
    if len(known) < 2:
        return None
    truth = [float(row[label_column(aspect)]) for row in known]
    words = [word_of_score(score) for score in truth]
    off = [
        abs(RATING_WORDS.index(row[f"{aspect}_rating"]) - RATING_WORDS.index(word))
        for row, word in zip(known, words, strict=True)
    ]
    mos = [row[f"{aspect}_mos"] for row in known]
    return {
        "images": len(known),
        "srcc": None if None in mos else srcc(mos, truth),
        "srcc_rating": srcc([row[f"{aspect}_rating_score"] for row in known], truth),
        "word": _share([step == 0 for step in off]),
        "word_within_one": _share([step <= 1 for step in off]),
        "majority_word": _share([word == max(words, key=words.count) for word in words]),
    }


def srcc(predicted: Sequence[float], truth: Sequence[float]) -> float | None:
    """Rank correlation, to three places; None where either is constant."""
    found = agreement(torch.tensor(predicted), torch.tensor(truth))["srcc"]
    return None if found is None else round(found, 3)


def faults_named(rows: Sequence[Row]) -> float | None:
    """The share of degraded pictures whose description names the main degradation before any other."""
    degraded = [row for row in rows if row["fault"]]
    return _share([first_fault(row["quality_description"]) == row["fault"] for row in degraded])


def first_fault(description: str) -> str | None:
    """The degradation that a description names first."""
    named = {description.find(words): kind for kind, words in FAULTS.items() if words in description}
    return named[min(named)] if named else None


def monotone(rows: Sequence[Row]) -> dict[str, float | None]:
    """Of how many crops the quality score, the mean over the kinds, falls from each level to the next."""
    crops: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        levels = crops.setdefault(str(row["crop"]), {level: [] for level in LADDER})
        mos = row["quality_mos"]
        levels[float(row["severity"])].append(row["quality_rating_score"] if mos is None else mos)
    means = [[sum(scores) / len(scores) for scores in levels.values()] for levels in crops.values()]
    falls = [all(worse < better for better, worse in itertools.pairwise(m)) for m in means]
    return {"crops": len(crops), "falling": _share(falls)}


def _share(hits: Sequence[bool]) -> float | None:
    return round(sum(hits) / len(hits), 3) if hits else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m m3agiqa.tiny.figures", description="Writes the model's card.")
    parser.add_argument("--scored", required=True, type=Path, help="folder that `m3agiqa score` wrote")
    parser.add_argument("--model", required=True, type=Path, help="folder of the model")
    given = parser.parse_args()
    rows = scored_rows(given.scored)
    results = measured(rows)
    results["eye"] = told_by_the_eye(given.model, results["both"]["quality"]["images"])
    card = json.loads((given.model / "card.json").read_text()) | {"results": results}
    write_card(given.model, card)
    print(json.dumps(card["results"], indent=1))


if __name__ == "__main__":
    main()
