"""An engine without a model: deterministic answers after a set time, for load tests and dry runs."""

import asyncio
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from m3agiqa.aspects import RATING_WORDS, Aspect
from m3agiqa.config import RunConfig
from m3agiqa.engine.base import Item, ItemFailed, Outcome
from m3agiqa.records import Assessment, Captured

SIMULATED_WIDTH = 8
"""Numbers in a state that this engine makes up."""


class SimulatedEngine:
    """Ratings and states are drawn from a hash of pixels, prompt and aspect: they mean nothing, but never change."""

    def __init__(self, config: RunConfig) -> None:
        self._captures = config.capture.kind == "states"
        self._settings = config.engine
        self._items = 0

    async def assess(self, items: Sequence[Item]) -> list[Outcome]:
        """One outcome per item; the items of a call take their latency side by side."""
        if self._settings.simulated_log is not None:
            with Path(self._settings.simulated_log).open("a") as log:
                log.writelines(f"{os.getpid()} {item.prompt!r}\n" for item in items)
        await asyncio.sleep(self._settings.simulated_latency_s)
        self._items += len(items)
        poison = self._settings.simulated_poison
        if poison is not None and any(poison in (item.prompt or "") for item in items):
            os._exit(1)
        return [self._outcome(item) for item in items]

    def stats(self) -> dict[str, float]:
        """Images seen."""
        return {"images": float(self._items)}

    def close(self) -> None:
        """Nothing to free."""

    def _outcome(self, item: Item) -> Outcome:
        pixels = hashlib.sha256(b"" if item.pixels is None else item.pixels.data)
        if pixels.digest()[0] < 256 * self._settings.simulated_failures:
            return ItemFailed("a simulated failure")
        return {aspect: self._assessment(pixels.copy(), item, aspect) for aspect in item.aspects}

    def _assessment(self, pixels: "hashlib._Hash", item: Item, aspect: Aspect) -> Assessment:
        given = item.descriptions.get(aspect)
        described = f"Simulated description of the {aspect}." if given is None else given
        asked = repr((item.prompt, str(aspect)) if given is None else (item.prompt, str(aspect), given))
        pixels.update(asked.encode())
        digest = pixels.digest()
        weights = [1 + byte for byte in digest[: len(RATING_WORDS)]]
        probs = tuple(weight / sum(weights) for weight in weights)
        word = RATING_WORDS[probs.index(max(probs))]
        return Assessment(
            description=described,
            rating=word,
            rating_answer=word,
            rating_probs=probs,
            prompt_tokens=0,
            generated_tokens=0,
            finish_reason="stop" if given is None else "given",
            captured=_states(digest) if self._captures else None,
            bounds=(1, 3),
        )


def _states(digest: bytes) -> Captured:
    """4 to 7 tokens of `SIMULATED_WIDTH` numbers."""
    import torch

    seed = int.from_bytes(digest[:6], "big")
    return Captured(torch.randn(4 + digest[0] % 4, SIMULATED_WIDTH, generator=torch.Generator().manual_seed(seed)))
