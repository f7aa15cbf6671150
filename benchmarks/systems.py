"""Ways to score one corpus, each measured from the moment its models are loaded.

a  reference-style: transformers at batch 1; both rounds, then another full forward with the logits of
   all positions written out and the predictor's first layer on them (as the published code does)
d  ours: the whole product, Ray Data into parquet, with capture of the states
e  the limit: the same prompts handed straight to the bare vLLM engine, text only
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m3agiqa import conversation
from m3agiqa.aspects import Aspect
from m3agiqa.config import RunConfig, load_config

WIDTH = 512
"""Outputs of the published predictor's first layer."""


def config_for(model: str, description_tokens: int, *more: str) -> RunConfig:
    """float32 on the CPU, as all systems run."""
    common = [f"model.path={model}", "model.dtype=float32", f"scoring.max_description_tokens={description_tokens}"]
    return load_config(None, [*common, *more])


def read_corpus(manifest: Path) -> list[tuple[Image.Image, str]]:
    """All images and prompts, in memory."""
    import csv

    rows = list(csv.DictReader(manifest.open()))
    return [(Image.open(manifest.parent / row["image_path"]).convert("RGB"), row["prompt"]) for row in rows]


def reference_style(manifest: Path, model: str, description_tokens: int, images: int) -> dict[str, float]:
    """System a, over the first `images` images: one at a time, so that time goes with their number."""
    import torch

    from m3agiqa.engine.base import Item
    from m3agiqa.engine.transformers import TransformersEngine

    engine = TransformersEngine(config_for(model, description_tokens, "engine.batch_size=1", "capture.kind=logits"))
    corpus = read_corpus(manifest)[:images]
    layer: torch.nn.Linear | None = None
    started = time.perf_counter()
    for image, prompt in corpus:
        for aspect in Aspect:
            (outcome,) = asyncio.run(engine.assess([Item(np.asarray(image), prompt, (aspect,))]))
            assert isinstance(outcome, dict)
            captured = outcome[aspect].captured
            assert captured is not None
            layer = layer or torch.nn.Linear(captured.values.shape[1], WIDTH)
            with torch.inference_mode():
                layer(captured.values)
    return {"images": len(corpus), "seconds": time.perf_counter() - started}


def ours(manifest: Path, model: str, description_tokens: int, images: int) -> dict[str, float]:
    """System d."""
    from m3agiqa.pipeline import run_scoring

    capture = ("capture.kind=states", "ray.batches_in_flight=8")
    with tempfile.TemporaryDirectory() as out:
        done = run_scoring(config_for(model, description_tokens, *capture), str(manifest), out)
    assert done.counts == {"ok": images}, done.counts
    assert done.images_per_second is not None
    return {"images": images, "seconds": images / done.images_per_second, **done.engine}


def bare_engine(manifest: Path, model: str, description_tokens: int, images: int) -> dict[str, float]:
    """System e."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", TORCH_COMPILE_DISABLE="1")
    from vllm import LLM, SamplingParams

    from m3agiqa.engine.prompting import prompt_builder
    from m3agiqa.models import model_folder

    config = config_for(model, description_tokens)
    folder = model_folder(config.model)
    builder = prompt_builder(folder, config.model)
    corpus = read_corpus(manifest)
    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        limit_mm_per_prompt={"image": 1},
        max_model_len=2048,
    )

    def generate(prompts: list[list[int]], talks: list[Any], tokens: int) -> list[list[int]]:
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, stop_token_ids=list(builder.stop_ids), detokenize=False,
            logit_bias=dict.fromkeys(builder.control_ids - set(builder.stop_ids), -100.0),
        )  # fmt: skip
        asked: Any = [
            {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
            for ids, (image, _) in zip(prompts, talks, strict=True)
        ]
        done = llm.generate(asked, params, use_tqdm=False)
        return [builder.split_end(output.outputs[0].token_ids)[0] for output in done]

    talks = [(image, conversation.questions(aspect, prompt)) for image, prompt in corpus for aspect in Aspect]
    started = time.perf_counter()
    first = [builder.first_round(asked) for _, asked in talks]
    described = generate(first, talks, description_tokens)
    second = [p + d + builder.second_round(q) for p, d, (_, q) in zip(first, described, talks, strict=True)]
    generate(second, talks, config.scoring.max_rating_tokens)
    return {"images": images, "seconds": time.perf_counter() - started}


SYSTEMS: dict[str, Callable[[Path, str, int, int], dict[str, float]]] = {
    "a": reference_style,
    "d": ours,
    "e": bare_engine,
}
