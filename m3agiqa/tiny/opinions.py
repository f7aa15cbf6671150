"""Labelled corpora: damaged pictures in a manifest with their true scores.

    python -m m3agiqa.tiny.opinions --out DIR [--held-out]

The scores follow from how each picture was made; no human gave them. Descriptions and rating words stand beside
them, as a teacher would give them. `make tiny-adapter` trains the adapter that is shipped with the tiny model on some
of the training kind, `make tiny-predictor` captures the adapted model's states over others and trains the predictor;
`make tiny-figures` scores what is held out (see `corpus`) and measures all three by it.
"""

import argparse
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from m3agiqa.aspects import Aspect
from m3agiqa.tiny.corpus import Base, Sample, draw_scene, make_base, make_sample, photograph_base, scene_base
from m3agiqa.tiny.degrade import UNSEEN_DEGRADATIONS, Damage
from m3agiqa.tiny.demo import photographs
from m3agiqa.tiny.examples import Conversation, correspondence, describe_authenticity, describe_quality
from m3agiqa.tiny.facts import Facts

TRAINING_SEED, HELD_OUT_SEED = 5_000_000, 7_000_000
"""Far from any seed of the model's training and of the demo."""

LADDER_KINDS = ("blur", "noise", "compression")
LADDER = (0.1, 0.3, 0.5, 0.7, 0.9)
COLUMNS = ("image_path", "prompt", "part", "fault", "severity", "crop")


@dataclass(frozen=True)
class Labelled:
    """A picture, a prompt, and the part of the corpus that it belongs to.

    Attributes:
        crop: the number of the crop that was damaged, in the part `ladder`.
    """

    part: str
    sample: Sample
    about: Conversation
    crop: int | None = None


def description_column(aspect: Aspect) -> str:
    """The manifest's column of right descriptions, under the name that `m3agiqa finetune` looks for."""
    return f"teacher_{aspect}_description"


def label_column(aspect: Aspect) -> str:
    """The manifest's column of an aspect's true scores, 0 to 5; empty where the truth is not known."""
    return f"true_{aspect}"


def training_pictures(images: int, start: int = 0) -> Iterator[Labelled]:
    """Of the kind that the model was trained on, without the first `start` of them."""
    for seed in range(TRAINING_SEED + start, TRAINING_SEED + start + images):
        rng = np.random.default_rng([seed, 7])
        yield _labelled("training", make_base(seed), rng)


def held_out_pictures(images: int, seed: int = HELD_OUT_SEED) -> Iterator[Labelled]:
    """What is held out from the training: `images` scenes and photographs, and less of the rest.

    Three quarters are of the part `scenes`, one quarter of `photographs`. A further fifth (`unseen`) has one
    degradation of an unseen kind each, and `ladder` is crops of photographs with every level of `LADDER_KINDS`.
    """
    shot = [image for image, _ in photographs()]
    for number in range(images + images // 5):
        rng = np.random.default_rng([seed, number])
        scene = None if number % 4 == 3 else draw_scene(rng, held_out=True)
        base = scene_base(scene, seed + number, rng) if scene else photograph_base(shot, rng)
        if number < images:
            yield _labelled("scenes" if scene else "photographs", base, rng)
        else:
            kind = str(rng.choice(list(UNSEEN_DEGRADATIONS)))
            yield _labelled("unseen", base, rng, Facts(scene, (Damage(kind, float(rng.uniform(0.1, 1.0))),)))
    for crop in range(images // 40):
        rng = np.random.default_rng([seed, crop, 1])
        base = photograph_base(shot, rng)
        for kind in LADDER_KINDS:
            for severity in LADDER:
                yield _labelled("ladder", base, rng, Facts(None, (Damage(kind, severity),)), crop)


def _labelled(
    part: str, base: Base, rng: np.random.Generator, facts: Facts | None = None, crop: int | None = None
) -> Labelled:
    sample = make_sample(base, rng, facts)
    return Labelled(part, sample, correspondence(sample.facts, rng), crop)


def write(out: Path, pictures: Iterator[Labelled]) -> Path:
    """Writes `pictures` and `manifest.csv`; returns the manifest's path."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    manifest = out / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, *map(label_column, Aspect), *map(description_column, Aspect)])
        for number, labelled in enumerate(pictures):
            path = f"images/{number:05d}.png"
            Image.fromarray(np.ascontiguousarray(labelled.sample.pixels)).save(out / path)
            writer.writerow([path, *_row(labelled)])
    return manifest


def _row(labelled: Labelled) -> list[object]:
    facts = labelled.sample.facts
    truths = {
        Aspect.QUALITY: facts.quality,
        # No prompt was drawn for a photograph that fits it: the predictor would learn that none ever does.
        Aspect.CORRESPONDENCE: labelled.about.score if facts.readable and facts.scene else None,
        Aspect.AUTHENTICITY: facts.authenticity,
    }
    main = facts.degradations[0] if facts.degradations else None
    labels = ["" if truths[aspect] is None else f"{truths[aspect]:.4f}" for aspect in Aspect]
    taught = _descriptions(labelled) if labelled.part == "training" else {}
    said = ["" if truths[aspect] is None else taught.get(aspect, "") for aspect in Aspect]
    fault = [main.kind, f"{main.severity:.3f}"] if main else ["", ""]
    return [
        labelled.about.prompt,
        labelled.part,
        *fault,
        "" if labelled.crop is None else labelled.crop,
        *labels,
        *said,
    ]


def _descriptions(labelled: Labelled) -> dict[Aspect, str]:
    facts = labelled.sample.facts
    return {
        Aspect.QUALITY: describe_quality(facts.degradations),
        Aspect.CORRESPONDENCE: labelled.about.description,
        Aspect.AUTHENTICITY: describe_authenticity(facts.artefacts),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m m3agiqa.tiny.opinions", description="Writes a labelled corpus.")
    parser.add_argument("--out", required=True, type=Path, help="folder for the pictures and manifest.csv")
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--start", type=int, default=0, help="leaves out so many before them (default 0)")
    parser.add_argument("--held-out", action="store_true", help="what the model was not trained on, and is measured by")
    given = parser.parse_args()
    training, held_out = training_pictures(given.images, given.start), held_out_pictures(given.images)
    print(f"pictures with their true scores: {write(given.out, held_out if given.held_out else training)}")


if __name__ == "__main__":
    main()
