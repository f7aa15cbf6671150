"""An engine without a model: deterministic answers after a set time, for load tests and dry runs."""

import asyncio
import hashlib
from collections.abc import Sequence

from m3agiqa.aspects import RATING_WORDS, Aspect
from m3agiqa.config import RunConfig
from m3agiqa.engine.base import Item, Outcome
from m3agiqa.records import Assessment


class SimulatedEngine:
    """Ratings are drawn from a hash of pixels, prompt and aspect: they mean nothing, but never change."""

    def __init__(self, config: RunConfig) -> None:
        self._latency_s = config.engine.simulated_latency_s
        self._items = 0

    async def assess(self, items: Sequence[Item]) -> list[Outcome]:
        """One outcome per item; the items of a call take their latency side by side."""
        await asyncio.sleep(self._latency_s)
        self._items += len(items)
        return [{aspect: _assessment(item, aspect) for aspect in item.aspects} for item in items]

    def stats(self) -> dict[str, float]:
        """Images seen."""
        return {"images": float(self._items)}

    def close(self) -> None:
        """Nothing to free."""


def _assessment(item: Item, aspect: Aspect) -> Assessment:
    digest = hashlib.sha256(item.pixels.tobytes() + repr((item.prompt, str(aspect))).encode()).digest()
    weights = [1 + byte for byte in digest[: len(RATING_WORDS)]]
    probs = tuple(weight / sum(weights) for weight in weights)
    word = RATING_WORDS[probs.index(max(probs))]
    return Assessment(
        description=f"Simulated description of the {aspect}.",
        rating=word,
        rating_answer=word,
        rating_probs=probs,
        prompt_tokens=0,
        generated_tokens=0,
        finish_reason="stop",
    )
