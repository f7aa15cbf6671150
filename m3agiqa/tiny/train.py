"""Trains the tiny model from nothing in stages, and writes its folder."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from m3agiqa.tiny.architecture import SHIPPED, build, build_processor, save, train_tokenizer
from m3agiqa.tiny.corpus import Pool, draw_scene
from m3agiqa.tiny.examples import Encoder, conversations
from m3agiqa.tiny.eyecode import EyeLoss
from m3agiqa.tiny.facts import draw_damage
from m3agiqa.tiny.runner import Log
from m3agiqa.tiny.stages import Plan, Training, drill, read, say, see

STAGES = (see, drill, read, say)


def train(
    out: Path,
    work: Path,
    *,
    plan: Plan | None = None,
    seed: int = 0,
    log: Log = print,
) -> None:
    """Takes the model through the stages, each where it stopped, and writes it to `out` after the last.

    Args:
        work: folder for the states of the stages; what is finished there is not done again.
    """
    torch.manual_seed(seed)
    plan, size = plan or Plan(), SHIPPED
    processor = build_processor(train_tokenizer(_texts(seed)), size)
    model = build(size, processor.tokenizer, seed).train()
    at = Training(model, Encoder(processor), EyeLoss(model), Pool(1 + seed * 20_000, plan.bases), plan, work, log, seed)
    for stage in STAGES:
        stage(at)
    save(out, model.eval(), processor)
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "seed": seed, "plan": asdict(plan)}
    (out / "card.json").write_text(json.dumps(facts | {"size": asdict(size)}, indent=1) + "\n")
    log(f"the model is in {os.fspath(out)}")


def _texts(seed: int) -> list[str]:
    """Prompts and descriptions, from which the vocabulary is taken."""
    rng = np.random.default_rng([seed, 3])
    facts = [draw_damage(None if i % 5 == 0 else draw_scene(rng, held_out=False), rng) for i in range(1500)]
    return [f"{c.prompt} {c.description}" for known in facts for c in conversations(known, rng)]
