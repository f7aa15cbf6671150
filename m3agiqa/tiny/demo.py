"""The demo corpus: photographs and rendered scenes, whole and damaged, with a manifest.

    python -m m3agiqa.tiny.demo --out DIR

Needs numpy and pillow only, so that it starts at once.
"""

import argparse
import csv
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from m3agiqa.aspects import SCALE_MAX
from m3agiqa.tiny.degrade import DEGRADATIONS, Damage, degrade, falsify
from m3agiqa.tiny.pictures import Picture, Scene, render, to_bytes

COLUMNS = ("image_path", "prompt", "generator", "case", "true_quality", "true_authenticity")
_SIDE = 384
_SEED = 9_000_000  # far from any seed of the training


@dataclass(frozen=True)
class Row:
    """One picture of the corpus; `quality` and `authenticity` follow from how it was made (see `degrade`)."""

    name: str
    pixels: Picture
    prompt: str
    generator: str
    case: str
    quality: float = SCALE_MAX
    authenticity: float = SCALE_MAX


_PHOTOGRAPHS = {
    "astronaut.jpg": "a portrait of an astronaut in an orange suit in front of a flag",
    "cat.jpg": "a close-up of a ginger cat",
    "coffee.jpg": "a cup of espresso with a spoon on a wooden table",
    "flower.jpg": "an orange dahlia on a dark green background",
    "rocket.jpg": "a rocket launch at dusk",
    "temple.jpg": "a Chinese temple among trees",
}
_DAMAGED_PHOTOGRAPHS = (("cat.jpg", Damage("blur", 0.7)), ("flower.jpg", Damage("noise", 0.6)))

# Each scene with the damages that its copies get.
_SCENES: tuple[tuple[Scene, tuple[Damage, ...]], ...] = (
    (
        Scene(2, "red", "sphere", "on a sandy plain"),
        (Damage("blur", 0.35), Damage("blur", 0.9)),
    ),
    (
        Scene(1, "blue", "cube", "on a wooden table"),
        (Damage("noise", 0.6), Damage("checkerboard", 0.6)),
    ),
    (
        Scene(3, "yellow", "star", "on a green meadow"),
        (Damage("underexposure", 0.75), Damage("melted", 0.6)),
    ),
    (
        Scene(2, "purple", "ring", "in the snow"),
        (Damage("compression", 0.8), Damage("scrambled", 0.45)),
    ),
    (
        Scene(1, "white", "cylinder", "on a stone floor"),
        (Damage("pixelation", 0.65), Damage("smeared", 0.4)),
    ),
    (
        Scene(3, "red", "cone", "on a calm sea"),
        (Damage("low contrast", 0.7),),
    ),
)
_WRONG_PROMPTS = (
    (0, "three blue cubes in the snow", "wrong prompt"),
    (1, "a red cube on a wooden table", "wrong colour"),
)


def photographs() -> list[tuple[Image.Image, str]]:
    """The photographs that are shipped, with the prompt that each could have come from."""
    found = []
    for name, prompt in _PHOTOGRAPHS.items():
        with (files("m3agiqa.tiny") / "photos" / name).open("rb") as file:
            found.append((Image.open(file).convert("RGB"), prompt))
    return found


def rows() -> list[Row]:
    """The whole corpus, the same every time."""
    made: list[Row] = []
    for (image, prompt), name in zip(photographs(), _PHOTOGRAPHS, strict=True):
        stem = Path(name).stem
        pixels = np.asarray(image, np.float32) / 255.0
        made.append(Row(f"photo-{stem}", pixels, prompt, "photograph", "untouched"))
        made += [_copy(made[-1], damage, i) for i, (which, damage) in enumerate(_DAMAGED_PHOTOGRAPHS) if which == name]
    whole: list[Row] = []
    for number, (scene, damages) in enumerate(_SCENES):
        pixels = render(scene, _SEED + number, _SIDE).pixels
        whole.append(Row(f"scene-{number}", pixels, scene.text, "rendered", "untouched"))
        made.append(whole[-1])
        made += [_copy(whole[-1], damage, i) for i, damage in enumerate(damages)]
    for number, prompt, case in _WRONG_PROMPTS:
        right = whole[number]
        made.append(Row(f"{right.name}-{case.replace(' ', '-')}", right.pixels, prompt, "rendered", case))
    return made


def _copy(row: Row, damage: Damage, number: int) -> Row:
    """`row` with one damage."""
    rng = np.random.default_rng([_SEED, number])
    name = f"{row.name}-{damage.kind.replace(' ', '-')}-{round(damage.severity * 100)}"
    case, left = f"severity {damage.severity:g}", SCALE_MAX * (1 - damage.severity)
    if damage.kind in DEGRADATIONS:
        pixels = degrade(row.pixels, damage, rng)
        return Row(name, pixels, row.prompt, f"degraded:{damage.kind}", case, quality=left)
    pixels = falsify(row.pixels, damage, rng)[0]
    return Row(name, pixels, row.prompt, f"artefact:{damage.kind}", case, authenticity=left)


def write(out: str | Path) -> Path:
    """Writes the pictures and `manifest.csv` to `out`; returns the path of the manifest."""
    folder = Path(out)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows():
            # PNG keeps the damage exactly as it was measured out.
            path = f"images/{row.name}.png"
            Image.fromarray(to_bytes(row.pixels)).save(folder / path)
            # With decimals throughout: a part of the manifest must not be read as whole numbers.
            truths = (f"{row.quality:.4f}", f"{row.authenticity:.4f}")
            writer.writerow((path, row.prompt, row.generator, row.case, *truths))
    return manifest


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m m3agiqa.tiny.demo", description="Writes the demo corpus.")
    parser.add_argument("--out", required=True, help="folder for the pictures and manifest.csv")
    manifest = write(parser.parse_args().out)
    print(f"{len(rows())} pictures with their prompts: {manifest}")


if __name__ == "__main__":
    main()
