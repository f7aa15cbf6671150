"""An image's assessment does not depend on what is assessed beside it."""

import asyncio
import importlib.util
import random

import pytest

from m3agiqa.aspects import expected_score
from m3agiqa.config import load_config
from m3agiqa.engine.base import create_engine
from m3agiqa.errors import UserError
from tests.engine.test_engines import config_for, items

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

TOLERANCE = 1e-3
"""Largest difference of an expected score (0 to 5) in float32, as README states it."""


def test_neither_batch_nor_order_nor_replica_changes_a_score(demo_corpus):
    asked = items(demo_corpus)
    order = list(range(len(asked)))
    random.Random(0).shuffle(order)

    async def judge(engine, order, at_once):
        found = {}
        for start in range(0, len(order), at_once):
            chosen = order[start : start + at_once]
            found |= dict(zip(chosen, await engine.assess([asked[i] for i in chosen]), strict=True))
        return [found[i] for i in range(len(asked))]

    async def run(*ways):
        engine = create_engine(config_for("vllm", "tiny"))
        try:
            found = []
            for order, at_once in ways:
                # What lies in the engine's caches would be looked up, not computed again.
                assert await engine._engine.reset_prefix_cache()
                await engine._engine.reset_mm_cache()
                await engine._engine.reset_encoder_cache()
                found.append(await judge(engine, order, at_once))
            return found
        finally:
            engine.close()

    given = list(range(len(asked)))
    together, *others = asyncio.run(run((given, len(given)), (given, 1), (order, len(given))))
    others += asyncio.run(run((given, len(given))))
    for other in others:
        for one, two in zip(together, other, strict=True):
            for aspect in one:
                assert (one[aspect].description, one[aspect].rating) == (two[aspect].description, two[aspect].rating)
                drift = expected_score(one[aspect].rating_probs) - expected_score(two[aspect].rating_probs)
                assert abs(drift) <= TOLERANCE


def test_batch_invariant_mode_is_refused_where_vllm_has_none():
    with pytest.raises(UserError, match=r"engine\.batch_invariant=true.*GPUs only.*leave it out"):
        create_engine(load_config(None, ["engine.batch_invariant=true"]))
