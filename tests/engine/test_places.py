"""How many images are in the engine at once, and that none of them is computed twice for it."""

import asyncio
import importlib.util

import numpy as np
import pytest

from m3agiqa.aspects import Aspect
from m3agiqa.config import load_config
from m3agiqa.engine.base import Item, create_engine
from m3agiqa.engine.places import Places
from m3agiqa.tiny.architecture import Size, write_random_model


async def _most_at_once(places: Places, visits: int, tokens: int) -> int:
    inside, most = 0, 0

    async def visit() -> None:
        nonlocal inside, most
        async with places.take(tokens):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(visit() for _ in range(visits)))
    return most


async def test_as_many_images_are_let_in_as_the_cache_holds():
    places = Places(blocks=100, block=10, image_tokens=0)
    assert await _most_at_once(places, 20, 300) == 3
    assert await _most_at_once(places, 20, 90) == 10


async def test_an_image_that_is_larger_than_the_cache_is_let_in_alone():
    assert await _most_at_once(Places(blocks=10, block=10, image_tokens=0), 5, 5000) == 1


async def test_a_visit_that_fails_gives_its_place_back():
    places = Places(blocks=10, block=10, image_tokens=0)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            async with asyncio.timeout(1), places.take(1000):
                raise ValueError("no")


def test_what_aspects_share_counts_once_for_each_adapter():
    places = Places(blocks=100, block=32, image_tokens=500)
    assert places.need(20, [100, 110, 120], adapters=1) == 520 + 330 + 3 * 32
    assert places.need(20, [100, 110, 120], adapters=3) == 3 * 520 + 330 + 3 * 32


def test_images_are_taken_to_be_as_large_as_the_largest_lately():
    places = Places(blocks=100, block=32, image_tokens=5000)
    for tokens in (70, 90, 60):
        places.learn(tokens)
    assert places.need(0, [100], adapters=1) == 90 + 100 + 32
    for _ in range(64):
        places.learn(50)
    assert places.need(0, [100], adapters=1) == 50 + 100 + 32


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_full_engine_computes_no_more_for_an_image_than_an_idle_one(tmp_path):
    # 256 image tokens, so that a step's 640 do not divide into images, and a cache of a few conversations.
    model = write_random_model(tmp_path / "model", Size(scale_factor=1, vision_layers=2, text_layers=2))
    settings = [
        f"model.path={model}",
        "model.dtype=float32",
        "capture.kind=states",
        "scoring.max_description_tokens=24",
        "model.max_model_len=1024",
        "engine.max_num_batched_tokens=640",
        "engine.vllm_args.num_gpu_blocks_override=96",
    ]
    draw = np.random.default_rng(0)
    pictures = [draw.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(25)]
    items = [Item(picture, "a red cube on a table", tuple(Aspect)) for picture in pictures]

    async def computed() -> tuple[float, float, float]:
        engine = create_engine(load_config(None, settings))
        try:
            found = []
            for asked in (items[:1], items[1:]):
                before = engine.stats()
                outcomes = await engine.assess(asked)
                assert all(len(outcome) == len(Aspect) for outcome in outcomes)
                made = {key: value - before.get(key, 0) for key, value in engine.stats().items()}
                found.append((made["prompt_tokens"] - made["prefix_cache_hits"]) / len(asked))
            return found[0], found[1], engine.stats()["preemptions"]
        finally:
            engine.close()

    alone, together, preemptions = asyncio.run(computed())
    assert together < 1.15 * alone
    assert preemptions == 0
