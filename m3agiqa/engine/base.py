"""The seam between scoring and whatever runs the model."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from m3agiqa.aspects import Aspect
from m3agiqa.config import RunConfig
from m3agiqa.records import Assessment


@dataclass(frozen=True)
class Item:
    """One image to judge.

    Attributes:
        pixels: uint8 [height, width, 3], RGB; None in a run of text only (`corpus.text_only`).
        prompt: what the image was made from, or None where it is not known.
        aspects: which aspects to judge; those that need a prompt only where there is one.
        descriptions: the answers of round 1 that are not asked for but given, by aspect.
    """

    pixels: np.ndarray | None
    prompt: str | None
    aspects: tuple[Aspect, ...]
    descriptions: Mapping[Aspect, str] = field(default_factory=dict)


class ItemRejected(Exception):
    """The model cannot take this item (too long for its context, say): the input's fault."""


class ItemFailed(Exception):
    """This item went wrong in the engine, which goes on: the system's fault."""


Outcome = Mapping[Aspect, Assessment] | ItemRejected | ItemFailed


class Engine(Protocol):
    """Judges images. One lives in each actor.

    `assess` returns one outcome for each item, in order; it raises only when the engine itself can
    no longer be used. Several calls may be under way at once; an engine that cannot do that queues them.
    """

    async def assess(self, items: Sequence[Item]) -> list[Outcome]:
        """Runs both rounds of every aspect of every item."""
        ...

    def stats(self) -> dict[str, float]:
        """Counters since the start, for the run's summary; empty where there is nothing to say."""
        ...

    def close(self) -> None:
        """Frees the model and ends processes that belong to it."""
        ...


def create_engine(config: RunConfig) -> Engine:
    """The engine that `config.engine.kind` names, loaded and ready. Imports only what it needs."""
    kinds: dict[str, tuple[str, str]] = {
        "vllm": ("m3agiqa.engine.vllm", "VllmEngine"),
        "transformers": ("m3agiqa.engine.transformers", "TransformersEngine"),
        "simulated": ("m3agiqa.engine.simulated", "SimulatedEngine"),
    }
    module, name = kinds[config.engine.kind]
    return getattr(importlib.import_module(module), name)(config)
