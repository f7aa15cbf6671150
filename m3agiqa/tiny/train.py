"""Trains the tiny model from nothing in two stages on one core, measures it and writes its folder."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Idefics3ForConditionalGeneration, Idefics3Processor

from m3agiqa.tiny.architecture import Size, build, build_processor, save, train_tokenizer
from m3agiqa.tiny.card import write_card
from m3agiqa.tiny.examples import Encoder, conversations
from m3agiqa.tiny.heads import Heads
from m3agiqa.tiny.measure import measure
from m3agiqa.tiny.pictures import COLOURS, PLACES, SHAPES
from m3agiqa.tiny.samples import Base, Sample, load_photographs, make_base, make_sample
from m3agiqa.tiny.stages import learn_to_see, learn_to_speak
from m3agiqa.tiny.talks import Teacher
from m3agiqa.tiny.vision import initialise

HELD_OUT = 1_000_000
"""Seeds from here on are never trained on."""

DEFAULT_MINUTES = 12.0


@dataclass(frozen=True)
class Plan:
    """How long and on what to train. Counts, not times, so that the same plan gives the same model."""

    bases: int
    see_steps: int
    say_steps: int
    batch: int = 16
    rate: float = 1.5e-3
    eye_rate: float = 1e-4
    connector_rate: float = 5e-5
    test_samples: int = 400


def plan_of(minutes: float) -> Plan:
    """The plan that takes about `minutes` on one core of the machine where the model was made."""
    return Plan(
        bases=max(60, int(minutes * 150)),
        see_steps=max(2, int(minutes * 50)),
        say_steps=max(2, int(minutes * 35)),
    )


class Pool:
    """Pictures to draw samples from: each is mirrored and damaged anew every time."""

    def __init__(self, bases: list[Base], rng: np.random.Generator) -> None:
        self.bases = bases
        self.rng = rng

    def draw(self, count: int) -> list[Sample]:
        """`count` samples by chance."""
        samples = [make_sample(self.bases[i], self.rng) for i in self.rng.integers(0, len(self.bases), count)]
        return [s.mirrored() if self.rng.random() < 0.5 else s for s in samples]


def train(out: Path, *, minutes: float = DEFAULT_MINUTES, seed: int = 0, log: Callable[[str], None] = print) -> None:
    """Trains a model and writes it, its `card.json` and its `README.md` to `out`."""
    began = time.process_time()
    plan = plan_of(minutes)
    torch.manual_seed(seed)
    pool, rng = _pool(plan, seed, log), np.random.default_rng([seed, 3])
    size = Size()
    texts = [f"{c.prompt} {c.description}" for s in pool.draw(1000) for c in conversations(s, rng)]
    processor = build_processor(train_tokenizer(texts), size)
    model = build(size, processor.tokenizer, seed)
    _fit(model, processor, pool, plan, rng, log)
    made = time.process_time() - began
    results = _results(model, Encoder(processor), plan, seed)
    save(out, model, processor)
    card = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_minutes": round(made / 60, 1),
        "seed": seed,
        "minutes": minutes,
        "plan": asdict(plan),
        "size": asdict(size),
        "results": results,
    }
    facts = {
        "image_size": size.image_size,
        "image_tokens": size.image_tokens,
        "shapes": ", ".join(SHAPES),
        "colours": ", ".join(COLOURS),
        "places": ", ".join(PLACES),
    }
    write_card(out, card, facts)
    log(json.dumps(results, indent=1))


def _pool(plan: Plan, seed: int, log: Callable[[str], None]) -> Pool:
    photographs = load_photographs()
    first = 1 + seed * 20_000
    bases = [make_base(first + i, photographs) for i in range(plan.bases)]
    log(f"{len(bases)} pictures")
    return Pool(bases, np.random.default_rng([seed, 2]))


def _fit(
    model: Idefics3ForConditionalGeneration,
    processor: Idefics3Processor,
    pool: Pool,
    plan: Plan,
    rng: np.random.Generator,
    log: Callable[[str], None],
) -> None:
    # Faster than the fused kernels here: these are made for long sequences.
    model.set_attn_implementation("eager")
    initialise(model, pool.draw(200))
    heads, teacher = Heads(model), Teacher(model, Encoder(processor), rng)
    model.train()
    how = {"batch": plan.batch, "rate": plan.rate, "eye_rate": plan.eye_rate, "connector_rate": plan.connector_rate}
    learn_to_see(model, heads, teacher, pool.draw, log, steps=plan.see_steps, **how)
    learn_to_speak(model, heads, teacher, pool.draw, log, steps=plan.say_steps, **how)
    model.eval()
    model.set_attn_implementation("sdpa")


def _results(
    model: Idefics3ForConditionalGeneration, encoder: Encoder, plan: Plan, seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Measured on scenes of unseen seeds, and on crops of photographs of which no other crop was seen."""
    from m3agiqa.tiny.demo import photographs

    rng = np.random.default_rng([seed, 4])
    bases = [make_base(HELD_OUT + i, []) for i in range(plan.test_samples)]
    scenes = [make_sample(base, rng) for base in bases]
    unseen = [image for image, _ in photographs()]
    shot: list[Base] = []
    at = HELD_OUT
    while len(shot) < plan.test_samples // 4:
        base = make_base(at, unseen)
        shot += [base] if base.scene is None else []
        at += 1
    return {
        "scenes": measure(model, encoder, scenes, seed),
        "photographs": measure(model, encoder, [make_sample(base, rng) for base in shot], seed),
    }
