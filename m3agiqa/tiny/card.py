"""The model card: what was measured, as JSON for programs and as text for people."""

import json
from pathlib import Path
from typing import Any

_TEXT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# m3agiqa tiny

An Idefics3 of {parameters:,} parameters that rates images for quality, correspondence with the prompt and
authenticity. It exists so that m3agiqa can be tried and tested on any CPU, from end to end and with real
weights. **It is a toy**: it was trained from nothing in {cpu_minutes} CPU-minutes on rendered scenes and a few
photographs with artificial damage. It has never seen an AI-generated image or a human score, so its scores
say nothing about either.

## What it knows

- *Quality*: blur, noise, JPEG blocks, pixelation, low contrast, under- and overexposure, banding.
- *Authenticity*: areas that are melted, tiled, covered by a checkerboard, scrambled or smeared. A picture
  without such an area counts as authentic, rendered or not.
- *Correspondence*: prompts such as "two red spheres on a sandy plain", with one or two groups of up to three
  objects. Of other prompts it can at best say that they ask for something else.
    - shapes: {shapes}
    - colours: {colours}
    - places: {places}

It sees {image_size} x {image_size} pixels in {image_tokens} tokens, whatever the size and the aspect ratio of the
image: damage that disappears at that size is not seen.

## Measured

Two rounds as in use: the model reads its own description before it rates. `SRCC` is the rank correlation of
the expected rating with the true score; `majority` is the accuracy of always saying the commonest word.

{table}

Scenes: drawn from seeds not trained on. Photographs: crops of the demo's photographs, none of which was
trained on; they are not rated for correspondence, as the model knows no prompt that would fit one.

## Made again

    python -m m3agiqa.tiny --out DIR --minutes {minutes:g} --seed {seed}
"""


def write_card(folder: Path, card: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes `card.json` and `README.md` into `folder`."""
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (folder / "README.md").write_text(_TEXT.format(**card, **facts, table=_table(card["results"])))


def _table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| pictures | aspect | number | SRCC | word accuracy | majority | description exact |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for pictures, aspects in results.items():
        for aspect, found in aspects.items():
            lines.append(
                f"| {pictures} | {aspect} | {found['images']:.0f} | {found['srcc']:.2f} | {found['word_accuracy']:.2f} "
                f"| {found['majority_word_accuracy']:.2f} | {found['description_exact']:.2f} |"
            )
    return "\n".join(lines)
