"""Small tables of scores and human scores that tests evaluate."""

import csv
from pathlib import Path

import numpy as np


def labelled(count, seed=0):
    """Rows with human scores of three aspects, and scores that tell of them."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        quality, authenticity, correspondence = rng.uniform(0.3, 4.7, 3)
        mos = float(np.clip(quality + 0.4 * rng.normal(), 0, 5))
        made.append(
            {
                "id": f"i{i:04}",
                "image_path": f"images/{i:04}.png",
                "prompt": f"prompt {i % max(count // 5, 1)}",
                "generator": f"g{i % 4}",
                "mos_q": round(quality, 4),
                "mos_a": round(authenticity, 4),
                "mos_c": round(correspondence, 4),
                "quality_mos": round(mos, 4),
                "quality_mos_low": round(max(mos - 0.8, 0), 4),
                "quality_mos_high": round(min(mos + 0.8, 5), 4),
                "quality_rating": ("bad", "poor", "fair", "good", "excellent")[min(int(mos), 4)],
                "authenticity_mos": round(float(np.clip(authenticity + rng.normal(), 0, 5)), 4),
                "correspondence_mos": round(float(np.clip(correspondence + rng.normal(), 0, 5)), 4),
            }
        )
    return made


def write(file, rows, columns=None):
    """Writes rows as CSV, all columns or some, and returns the path as text."""
    names = list(columns or rows[0])
    with Path(file).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return str(file)
