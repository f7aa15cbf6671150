"""The stages of the training: see, drill, read and say; each can be taken up where it stopped.

- `see`: the facts from pictures; the eye and the connector only. It is most of the work.
- `drill`: text alone: to copy from a prompt, and to tell whether two words are the same. Inside long conversations
  this is hardly ever learnt.
- `read`: conversations about pictures; the language side only, which learns what this eye's tokens tell.
- `say`: the same with everything.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3agiqa.tiny.corpus import Pool, Sample, draw_scene
from m3agiqa.tiny.examples import Encoder, altered, describe_correspondence
from m3agiqa.tiny.eyecode import WHOLE, EyeLoss
from m3agiqa.tiny.facts import ITEMS
from m3agiqa.tiny.runner import Log, Losses, run_stage
from m3agiqa.tiny.talks import Batch, choose, collate, padded, rating_losses, states_of, word_loss
from m3agiqa.tiny.vision import BEGUN_LAYERS, initialise, join, look, pixel_values

_SEE_BATCH, _DRILL_BATCH, _READ_BATCH, _SAY_BATCH = 12, 64, 20, 16


@dataclass(frozen=True)
class Plan:
    """How long and on what to train.

    Counts, not times, so that the same plan gives the same model on the same kind of CPU.

    Attributes:
        bases: undamaged pictures, each of which is damaged anew every time it is drawn.
        begin_on: pictures that the eye's beginning is fitted to.
    """

    bases: int = 6000
    begin_on: int = 400
    see_steps: int = 12000
    drill_steps: int = 300
    read_steps: int = 1000
    say_steps: int = 300


@dataclass(frozen=True)
class Training:
    """What the stages work on."""

    model: Any
    encoder: Encoder
    eye_loss: EyeLoss
    pool: Pool
    plan: Plan
    work: Path
    log: Log
    seed: int = 0

    @property
    def eye(self) -> dict[str, Any]:
        """What `see` learns."""
        parts = self.model.model
        return {"eye": parts.vision_model, "connector": parts.connector, "loss": self.eye_loss}

    @property
    def language(self) -> dict[str, Any]:
        """What `drill` and `read` learn."""
        return {"language": self.model.model.text_model, "words": self.model.lm_head}


def see(at: Training) -> None:
    """The eye and the connector learn to tell the facts of pictures."""
    first = at.pool.draw(at.plan.begin_on, np.random.default_rng([at.seed, 2]))
    pixels = pixel_values([s.pixels for s in first])
    initialise(at.model, first[:200])
    whole, parts, _ = at.eye_loss.targets(first)
    join(at.model, pixels, (whole @ at.eye_loss.code[:WHOLE])[:, None] + parts @ at.eye_loss.code[WHOLE:])

    def losses(rng: np.random.Generator) -> dict[str, Tensor]:
        samples = at.pool.draw(_SEE_BATCH, rng)
        found: dict[str, Tensor] = at.eye_loss(*look(at.model, samples), samples)
        return found

    groups = [*eye_groups(at.model), {"params": list(at.eye_loss.parameters()), "lr": 1e-3}]
    run_stage("see", losses, groups, at.eye, steps=at.plan.see_steps, work=at.work, log=at.log, seed=at.seed)


def eye_groups(model: Any, share: float = 1.0) -> list[dict[str, Any]]:
    """The layers that begin with something, which twice the rate would wipe out, the others, and the connector.

    Each token's numbers are sums of hundreds of inputs: at a usual rate the connector would upset them all.
    """
    eye = model.model.vision_model
    late = [*eye.encoder.layers[BEGUN_LAYERS:].parameters()]
    apart = {id(p) for p in late}
    early = [p for p in eye.parameters() if id(p) not in apart]
    rates = ((early, 1.5e-4), (late, 4e-4), ([*model.model.connector.parameters()], 3e-5))
    return [{"params": params, "lr": share * rate} for params, rate in rates]


def prepare_to_compare(model: Any) -> None:
    """Half of the heads begin with keys equal to their queries, so that a word attends to its like."""
    for layer in model.model.text_model.layers:
        attention = layer.self_attn
        half = attention.q_proj.weight.shape[0] // 2
        with torch.no_grad():
            attention.k_proj.weight[:half] = attention.q_proj.weight[:half]


def drill(at: Training) -> None:
    """The language side learns, without pictures, to copy from a prompt and to tell whether two words are the same."""
    prepare_to_compare(at.model)
    builder = at.encoder.builder

    def losses(rng: np.random.Generator) -> dict[str, Tensor]:
        rows = [(builder.answer(given), builder.answer(said)) for given, said in drill_lines(_DRILL_BATCH, rng)]
        learnt = [[False] * len(given) + [True] * len(said) for given, said in rows]
        ids, learn = padded([given + said for given, said in rows], learnt, at.encoder.pad_id)
        last = states_of(at.model, ids)
        right = (at.model.lm_head(last[learn]).argmax(-1) == ids.roll(-1, 1)[learn]).float().mean()
        return {"words": word_loss(at.model, ids, learn, last), "wrong": (1 - right).detach()}

    _language_stage(at, "drill", losses, at.plan.drill_steps, 1e-3)


def drill_lines(count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """A scene and a prompt for it or for another, as text, and what is to be said of the two."""
    lines = []
    for _ in range(count):
        shown = draw_scene(rng, held_out=False)
        asked = altered(shown, int(rng.integers(len(ITEMS) + 1)), rng)
        lines.append((f"Here: {shown.text}. Prompt: {asked.text}.", describe_correspondence(shown, asked)))
    return lines


def read(at: Training) -> None:
    """The language side learns to describe and rate from what the eye tells."""

    def losses(rng: np.random.Generator) -> dict[str, Tensor]:
        samples, batch = _talks(at, _READ_BATCH, rng)
        with torch.no_grad():
            _, tokens = look(at.model, samples)
        return _of_words(at, batch, states_of(at.model, batch.ids, tokens[batch.image_of]))

    _language_stage(at, "read", losses, at.plan.read_steps, 1e-3)


def _talks(at: Training, count: int, rng: np.random.Generator) -> tuple[list[Sample], Batch]:
    """Pictures, and a conversation about each."""
    samples = at.pool.draw(count, rng)
    talks = choose([s.facts for s in samples], rng)
    return samples, collate(talks, [at.encoder.encode(c) for _, c in talks], at.encoder.pad_id)


def _of_words(at: Training, batch: Batch, last: Tensor) -> dict[str, Tensor]:
    rating_ids = torch.tensor([ids[0] for ids in at.encoder.builder.rating_ids])
    words = {"words": word_loss(at.model, batch.ids, batch.learn, last)}
    return words | rating_losses(at.model, batch, last, rating_ids)


def _language_stage(at: Training, name: str, losses: Losses, steps: int, rate: float) -> None:
    groups = [{"params": [p for part in at.language.values() for p in part.parameters()], "lr": rate}]
    run_stage(name, losses, groups, at.language, steps=steps, work=at.work, log=at.log, seed=at.seed)


def say(at: Training) -> None:
    """Everything learns from conversations about pictures, the eye slowly, for it has learnt most of what it will."""

    def losses(rng: np.random.Generator) -> dict[str, Tensor]:
        samples, batch = _talks(at, _SAY_BATCH, rng)
        patches, tokens = look(at.model, samples)
        last = states_of(at.model, batch.ids, tokens[batch.image_of])
        return _of_words(at, batch, last) | at.eye_loss(patches, tokens, samples)

    rest = [p for part in (at.eye_loss, *at.language.values()) for p in part.parameters()]
    groups = [*eye_groups(at.model, 0.3), {"params": rest, "lr": 5e-4}]
    everything = at.eye | at.language
    run_stage("say", losses, groups, everything, steps=at.plan.say_steps, work=at.work, log=at.log, seed=at.seed)
