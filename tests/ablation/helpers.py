"""Captured sets whose descriptions tell of the label, and the rest of their conversations does not."""

import numpy as np
import torch

from m3agiqa.ablate_config import AblateConfig
from m3agiqa.settings import load
from tests.captured_sets import WIDTH, write

QUALITY = ("quality", "mos_quality")
ASKED, DESCRIBED, TOKENS = 3, 8, 11

QUICK = (
    "shape.width=16",
    "shape.blocks=1",
    "shape.slstm_at=[]",
    "shape.hidden=8",
    "optim.epochs=2",
    "optim.batch_size=16",
    "optim.learning_rate=0.01",
    "measure.seeds=2",
    "measure.resamples=100",
)


def settings(*more):
    return load(AblateConfig, None, [*QUICK, *more])


def talks(count, seed=0, prompts=None, prefix="i", sign=1.0, noise=0.5, **columns):
    """Rows of a captured set with bounds and rating probabilities."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        label = float(np.round(rng.uniform(0.2, 4.8), 3))
        states = rng.normal(size=(TOKENS, WIDTH)) * noise
        states[ASKED:DESCRIBED, 0] += sign * (label - 2.5)
        probs = np.exp(-((label - np.linspace(0, 5, 5)) ** 2))
        row = {
            "id": f"{prefix}{i:04}",
            "prompt": f"{prefix} {i % (prompts or count)}",
            "mos_quality": label,
            "quality_states": torch.tensor(states).bfloat16().view(torch.int16).numpy().tobytes(),
            "quality_tokens": TOKENS,
            "quality_asked_tokens": ASKED,
            "quality_described_tokens": DESCRIBED,
            "quality_rating_probs": (probs / probs.sum()).tolist(),
            "status": "ok",
        }
        made.append(row | {name: value(i) for name, value in columns.items()})
    return made


def captured(folder, made, **manifest):
    return write(folder, made, **manifest)
