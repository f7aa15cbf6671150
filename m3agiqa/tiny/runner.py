"""Runs a stage of the training: its steps follow from their number, are saved now and then, and are gone on with."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from m3agiqa.errors import UserError

Log = Callable[[str], None]
Losses = Callable[[np.random.Generator], dict[str, Tensor]]
"""The losses of one step, from a generator of its own."""

_SAVE_EVERY = 100


def run_stage(
    name: str,
    losses: Losses,
    groups: Sequence[dict[str, Any]],
    modules: Mapping[str, nn.Module],
    *,
    steps: int,
    work: Path,
    log: Log,
    seed: int = 0,
) -> None:
    """Trains `groups` for `steps` steps, unless `work` says that this was done; `modules` hold the result.

    Args:
        groups: parameter groups with their highest learning rates.
        modules: what is saved to `work/NAME.pt`.
    """
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps))
    parts: dict[str, Any] = {**modules, "optimizer": optimizer, "schedule": schedule}
    file = work / f"{name}.pt"
    first = load(file, parts, steps, seed) if file.exists() else 0
    learned = [p for group in groups for p in group["params"]]
    lately: dict[str, float] = {}
    for step in range(first, steps):
        rng = np.random.default_rng([seed, sum(name.encode()), step])
        found = losses(rng)
        optimizer.zero_grad()
        torch.stack([loss.float() for loss in found.values()]).sum().backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        lately = {k: 0.95 * lately.get(k, v.item()) + 0.05 * v.item() for k, v in found.items()}
        if step % 25 == 0 or step == steps - 1:
            log(f"{name} {step}/{steps} " + ", ".join(f"{k} {v:.3f}" for k, v in lately.items()))
        if (step + 1) % _SAVE_EVERY == 0 or step == steps - 1:
            save(file, parts, step + 1, steps, seed)


def save(file: Path, parts: Mapping[str, Any], step: int, steps: int, seed: int) -> None:
    """Writes the states of `parts` after `step` of `steps`, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    begun = file.with_suffix(".begun")
    counts = {"step": step, "steps": steps, "seed": seed}
    torch.save(counts | {name: part.state_dict() for name, part in parts.items()}, begun)
    begun.replace(file)


def load(file: Path, parts: Mapping[str, Any], steps: int, seed: int) -> int:
    """Takes up what `save` wrote; returns how many steps were done.

    Raises:
        UserError: it was written by a training of another length or seed.
    """
    saved = torch.load(file, weights_only=True)
    earlier = saved.get("steps", "unknown"), saved.get("seed", "unknown")  # before they were written down
    if earlier != (steps, seed):
        was = f"of {earlier[0]} steps with seed {earlier[1]}, not {steps} with {seed}"
        raise UserError(str(file), f"it is from a stage {was}", "give another --work, or remove the folder")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return int(saved["step"])


def warm_cosine(steps: int) -> Callable[[int], float]:
    """A learning rate that rises over the first steps and falls to a fiftieth along a cosine."""
    warm = min(100, 1 + steps // 10)

    def factor(step: int) -> float:
        done = min(step / max(steps, 1), 1.0)
        return min((step + 1) / warm, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    return factor
