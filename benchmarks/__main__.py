"""`make bench`: images per second of each way to score one corpus, and their ratios, as JSON lines.

Each measurement runs in a process of its own; repetitions are interleaved and medians are compared, as
machines are noisy. Nothing is kept and no speed fails anything.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from benchmarks.systems import SYSTEMS

# System a takes one image after the other: its rate does not change with the number of images.
_REFERENCE_IMAGES = 16


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--model", choices=["tiny", "wide"], default="tiny")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--reference-images", type=int, default=_REFERENCE_IMAGES, help="images for system a")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--systems", default="a,d,e", help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--one", nargs=4, metavar=("SYSTEM", "MANIFEST", "MODEL", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        system, manifest, model, tokens = args.one
        found = SYSTEMS[system](Path(manifest), model, int(tokens), args.images)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Measures the systems in turn, and prints a line for each measurement and one for the medians' ratios."""
    manifest = write_corpus(folder / "corpus", args.images)
    model, tokens = ("tiny", 64) if args.model == "tiny" else (str(write_wide_model(folder / "model")), 48)
    systems = args.systems.split(",")
    rates: dict[str, list[float]] = {system: [] for system in systems}
    for repeat in range(args.repeats):
        for system in systems:
            images = args.reference_images if system == "a" else args.images
            one = ["--one", system, str(manifest), model, str(tokens), "--images", str(images)]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks", *one], stdout=subprocess.PIPE, text=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            rates[system].append(found["images"] / found["seconds"])
            line = {
                "system": system,
                "model": args.model,
                "repeat": repeat,
                "images_per_s": round(rates[system][-1], 3),
            }
            print(json.dumps(line | found), flush=True)
    medians = {system: statistics.median(found) for system, found in rates.items()}
    ratios = {f"d/{other}": round(medians["d"] / medians[other], 3) for other in systems if other != "d"}
    print(json.dumps({"model": args.model, "median_images_per_s": medians, "ratios": ratios}))


def write_corpus(folder: Path, images: int) -> Path:
    """Rendered scenes with their prompts; returns the manifest."""
    import numpy as np

    from m3agiqa.tiny.pictures import random_scene, render, to_bytes

    folder.mkdir()
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "prompt"])
        for i in range(images):
            scene = random_scene(np.random.default_rng(10**6 + i))
            Image.fromarray(to_bytes(render(scene, 10**6 + i, 256).pixels)).save(folder / f"{i:05d}.png")
            writer.writerow([f"{i:05d}.png", scene.text])
    return manifest


def write_wide_model(folder: Path) -> Path:
    """A random model in which, as in use, the model's work outweighs everything else: 576 image tokens."""
    from m3agiqa.tiny.architecture import Size, write_random_model

    size = Size(
        image_size=384, patch_size=8, scale_factor=2, vision_width=384, vision_layers=4, vision_mlp=768, vision_heads=6,
        text_width=768, text_layers=8, text_mlp=2048, text_head_dim=64,
    )  # fmt: skip
    return write_random_model(folder, size)


if __name__ == "__main__":
    main()
