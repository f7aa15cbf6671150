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

    async def run():
        engine = create_engine(config_for("vllm", "tiny"))
        try:
            together = await engine.assess(asked)
            alone = [(await engine.assess([item]))[0] for item in asked]
            mixed = await engine.assess([asked[i] for i in order])
            shuffled = [mixed[order.index(i)] for i in range(len(asked))]
            return together, alone, shuffled
        finally:
            engine.close()

    together, *others = asyncio.run(run())
    others.append(asyncio.run(run())[0])
    for other in others:
        for one, two in zip(together, other, strict=True):
            for aspect in one:
                assert (one[aspect].description, one[aspect].rating) == (two[aspect].description, two[aspect].rating)
                drift = expected_score(one[aspect].rating_probs) - expected_score(two[aspect].rating_probs)
                assert abs(drift) <= TOLERANCE


def test_batch_invariant_mode_is_refused_where_vllm_has_none():
    with pytest.raises(UserError, match=r"engine\.batch_invariant=true.*GPUs only.*leave it out"):
        create_engine(load_config(None, ["engine.batch_invariant=true"]))
