"""Writes small captured sets in the format of `m3agiqa capture`, with labels that the states tell of."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

WIDTH = 12
STATES_OF = {
    "base": "0123456789abcdef",
    "conversation": "v1 abc",
    "image": "shown",
    "hidden": str(WIDTH),
    "adapter.quality": "none",
    "adapter.correspondence": "none",
}


def conversation(label, rng, aspect=0, width=WIDTH, noise=1.0):
    """States [tokens, width] in bfloat16; their mean along one direction an aspect is the label."""
    tokens = int(rng.integers(5, 14))
    states = rng.normal(size=(tokens, width)) * noise
    states[:, aspect] += 1.5 * (label - 2.5)
    return torch.tensor(states).bfloat16()


def rows(count, seed=0, aspects=("quality",), prompts=None, width=WIDTH, prefix="i"):
    """Rows as dictionaries, in the columns of a captured set, with a label column `mos_{aspect}` an aspect."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        row = {"id": f"{prefix}{i:04}", "image": f"/x/{i}.png", "prompt": f"{prefix} {i % (prompts or count)}"}
        for a, aspect in enumerate(aspects):
            label = float(np.round(rng.uniform(0.2, 4.8), 3))
            states = conversation(label, rng, a, width)
            row |= {
                f"mos_{aspect}": label,
                f"{aspect}_states": states.view(torch.int16).numpy().tobytes(),
                f"{aspect}_tokens": len(states),
                f"{aspect}_description": "a picture",
                f"{aspect}_rating": "good",
            }
        made.append(row | {"status": "ok", "error": None})
    return made


def write(folder, made, states_of=None, files=2, fingerprint="f0", group=16, **manifest):
    """Writes a captured set, and returns its folder as text."""
    folder = Path(folder)
    (folder / "scores").mkdir(parents=True)
    content = {"fingerprint": fingerprint, "states_of": states_of or STATES_OF, "finished": "2026-01-01"} | manifest
    (folder / "run.json").write_text(json.dumps(content))
    special = {"states": pa.large_binary(), "tokens": pa.int32()}
    names = list(made[0])
    for i in range(files):
        part = made[i::files]
        columns = {name: pa.array([row[name] for row in part], special.get(name.rpartition("_")[2])) for name in names}
        pq.write_table(pa.table(columns), folder / "scores" / f"part-{i}.parquet", row_group_size=group)
    return str(folder)


SMALL = (
    "head.width=32",
    "head.blocks=2",
    "head.hidden=16",
    "optim.learning_rate=0.004",
    "optim.epochs=4",
    "optim.batch_size=16",
    "calibration.level=0.8",
)
"""Settings of a training that takes seconds."""
