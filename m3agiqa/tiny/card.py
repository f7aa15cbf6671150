"""The model card: what was measured, as JSON for programs and as text for people."""

import json
from pathlib import Path
from typing import Any

from m3agiqa.tiny.architecture import Size
from m3agiqa.tiny.pictures import COLOURS, PLACES, SHAPES

_TEXT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# m3agiqa tiny

An Idefics3 of {parameters:,} parameters that rates images for quality, correspondence with the prompt and
authenticity. It exists so that m3agiqa can be tried and tested on any CPU, from end to end and with real
weights. **It is a toy**: it was trained from nothing on rendered scenes, collages and a few
photographs with artificial damage. It has never seen an AI-generated image or a human score, so its scores
say nothing about either.

## What it knows

- *Quality*: blur, noise, JPEG blocks, pixelation, low contrast, under- and overexposure, banding.
- *Authenticity*: areas that are melted, tiled, covered by a checkerboard, scrambled or smeared. A picture
  without such an area counts as authentic, rendered or not.
- *Correspondence*: prompts such as "two red spheres on a sandy plain", with one to three equal objects. It sets
  every item that is asked for beside the one it sees. Of other prompts it can at best say that they ask for
  something else.
    - shapes: {shapes}
    - colours: {colours}
    - places: {places}

It sees {image_size} x {image_size} pixels in {image_tokens} tokens, whatever the size and the aspect ratio of the
image: damage that disappears at that size is not seen.

## Measured

By `m3agiqa score`, with the adapter and the predictor that come with the model, on pictures that are held out from the
training (`m3agiqa.tiny.corpus` says what is): scenes with combinations of colour, shape and place that were never
trained on, crops of the demo's photographs, both of them taken together, and pictures with kinds of degradation that
were never trained on (unseen). `SRCC` is the rank correlation of the predictor's score with the true score, which
follows from how each picture was made; `of ratings` is that of the expected rating; `word` is how often the rating word
is right, `within one` how often it is right or next to it, and `majority` how often the commonest word is.

{table}

Descriptions name the main degradation first in {fault_scenes} of the degraded scenes, {fault_photographs} of the
degraded photographs and {fault_both} of both. Of {crops} crops of photographs, each with blur, noise and compression
of five levels, the mean quality score falls from every level to the next in {falling}.

What the eye itself tells of the quality, read off its image tokens without any language (`m3agiqa.tiny.eyecode`),
correlates with the truth with SRCC {eye_quality} over both parts, and of the authenticity with {eye_authenticity}.
Rating and predictor can hardly do better, as they read the same tokens.

Photographs are not measured for correspondence, as the model knows no prompt that would fit one.

## Made again

    make tiny-model

trains it in four stages (`m3agiqa.tiny.stages`), its adapter by `m3agiqa finetune` and its predictor by `m3agiqa
train-predictor` on other pictures, and writes this card. Seed {seed}.
"""


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Writes `card.json` and `README.md` into `folder`."""
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    results, size = card["results"], Size(**card["size"])
    text = _TEXT.format(
        parameters=card["parameters"],
        seed=card["seed"],
        image_size=size.image_size,
        image_tokens=size.image_tokens,
        shapes=", ".join(SHAPES),
        colours=", ".join(COLOURS),
        places=", ".join(PLACES),
        table=_table(results),
        fault_scenes=_number(results["scenes"]["quality"]["fault_named"]),
        fault_photographs=_number(results["photographs"]["quality"]["fault_named"]),
        fault_both=_number(results["both"]["quality"]["fault_named"]),
        eye_quality=_number(results["eye"]["quality"]),
        eye_authenticity=_number(results["eye"]["authenticity"]),
        crops=results["ladder"]["crops"],
        falling=_number(results["ladder"]["falling"]),
    )
    (folder / "README.md").write_text(text)


_COLUMNS = {
    "SRCC": "srcc",
    "of ratings": "srcc_rating",
    "word": "word",
    "within one": "word_within_one",
    "majority": "majority_word",
}


def _table(results: dict[str, Any]) -> str:
    lines = [
        f"| pictures | aspect | number | {' | '.join(_COLUMNS)} |",
        "|---|---|---:" + "|---:" * len(_COLUMNS) + "|",
    ]
    for part in ("scenes", "photographs", "both", "unseen"):
        for aspect, found in results[part].items():
            cells = " | ".join(_number(found[key]) for key in _COLUMNS.values())
            lines.append(f"| {part} | {aspect} | {found['images']} | {cells} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
