"""A labelled corpus for the demonstration's predictor: damaged pictures and their true scores.

    python -m m3agiqa.tiny.opinions --out DIR

The scores follow from how each picture was made; no human gave them. `make tiny-predictor` captures the tiny
model's states over this corpus and trains the predictor that is shipped with it.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

from m3agiqa.aspects import Aspect
from m3agiqa.tiny.examples import correspondence
from m3agiqa.tiny.samples import load_photographs, make_base, make_sample

_SEED = 5_000_000  # far from any seed of the model's training and of the demo


def label_column(aspect: Aspect) -> str:
    """The manifest's column of an aspect's true scores, 0 to 5; empty where the truth is not known."""
    return f"true_{aspect}"


def write(out: Path, images: int, seed: int = _SEED) -> Path:
    """Writes `images` pictures and `manifest.csv`; returns the manifest's path."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    photographs = load_photographs()
    manifest = out / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "prompt", *(label_column(aspect) for aspect in Aspect)])
        for number in range(images):
            rng = np.random.default_rng([seed + number, 7])
            sample = make_sample(make_base(seed + number, photographs), rng)
            about = correspondence(sample, rng)
            truths = {
                Aspect.QUALITY: sample.quality,
                # No prompt was drawn for a photograph that fits it: the predictor would learn that none ever does.
                Aspect.CORRESPONDENCE: about.score if sample.readable and sample.scene is not None else None,
                Aspect.AUTHENTICITY: sample.authenticity,
            }
            path = f"images/{number:05d}.png"
            Image.fromarray(sample.pixels).save(out / path)
            labels = ["" if truths[aspect] is None else f"{truths[aspect]:.4f}" for aspect in Aspect]
            writer.writerow([path, about.prompt, *labels])
    return manifest


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m m3agiqa.tiny.opinions", description="Writes a labelled corpus.")
    parser.add_argument("--out", required=True, type=Path, help="folder for the pictures and manifest.csv")
    parser.add_argument("--images", type=int, default=1500)
    given = parser.parse_args()
    print(f"{given.images} pictures with their true scores: {write(given.out, given.images)}")


if __name__ == "__main__":
    main()
