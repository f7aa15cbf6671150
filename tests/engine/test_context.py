"""A conversation that does not fit: rejected with its counts, or asked about a smaller image."""

import asyncio
import importlib.util
import json

import numpy as np
import pytest

from m3agiqa.aspects import Aspect
from m3agiqa.config import load_config
from m3agiqa.engine.base import Item, ItemRejected, create_engine
from m3agiqa.tiny.architecture import write_random_model

ASPECTS = (Aspect.QUALITY, Aspect.AUTHENTICITY)


@pytest.fixture(scope="module")
def tiling_model(tmp_path_factory):
    """A model that cuts large images into tiles, so that more pixels are more tokens (in transformers)."""
    folder = write_random_model(tmp_path_factory.mktemp("tiling"))
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"] |= {"do_resize": False, "do_image_splitting": True}
    file.write_text(json.dumps(settings))
    return folder


def image(side: int) -> Item:
    return Item(np.random.default_rng(side).integers(0, 255, (side, side, 3), dtype=np.uint8), "a cat", ASPECTS)


def assess(kind, model, asked, *more):
    common = [f"engine.kind={kind}", f"model.path={model}", "model.dtype=float32", "scoring.max_description_tokens=4"]

    async def run():
        engine = create_engine(load_config(None, [*common, *more]))
        try:
            return await engine.assess(asked)
        finally:
            engine.close()

    return asyncio.run(run())


def test_an_image_that_does_not_fit_is_downscaled_if_asked(tiling_model):
    asked = [image(100), image(1500)]
    small, large = assess("transformers", tiling_model, asked, "model.max_model_len=700")
    assert isinstance(large, ItemRejected)
    assert "but the context is 700 tokens" in str(large)
    more = ("model.max_model_len=700", "scoring.downscale_to_fit=true")
    same, fitted = assess("transformers", tiling_model, asked, *more)
    assert [(found.note, found.description) for found in same.values()] == [
        (None, found.description) for found in small.values()
    ]
    for aspect in ASPECTS:
        assert fitted[aspect].note == "image downscaled to 475 x 475 to fit the model's context"
        assert small[aspect].prompt_tokens < fitted[aspect].prompt_tokens < 700


def test_what_is_too_long_for_its_text_stays_rejected(tiling_model):
    asked = [Item(image(100).pixels, "word " * 9000, ASPECTS)]
    (found,) = assess("transformers", tiling_model, asked, "scoring.downscale_to_fit=true")
    assert isinstance(found, ItemRejected)
    assert "4096" in str(found)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_vllm_rejects_what_no_downscaling_makes_fit_and_goes_on(tmp_path):
    """Idefics3 enlarges every image to one size: fewer pixels are not fewer tokens."""
    folder = write_random_model(tmp_path / "model")
    asked = [Item(image(100).pixels, "word " * 9000, ASPECTS), image(60)]
    refused, fine = assess("vllm", folder, asked, "scoring.downscale_to_fit=true")
    assert isinstance(refused, ItemRejected)
    assert "4096" in str(refused)
    assert [fine[aspect].note for aspect in ASPECTS] == [None, None]
