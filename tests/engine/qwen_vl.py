"""Qwen-VL models of a few thousand parameters, and what both engines make of them.

A program, `python -m tests.engine.qwen_vl compare|downscale NAME FOLDER OUT`: with the stand-in for torchvision on its
path, which is not for the process of the other tests.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from m3agiqa.aspects import Aspect
from m3agiqa.config import RunConfig, load_config
from m3agiqa.engine.base import Item
from m3agiqa.engine.vllm_plugins import MODELS
from m3agiqa.tiny.architecture import END, PAD, train_tokenizer
from tests.engine.capture_helpers import random_images
from tests.engine.test_engines import assess

VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# Qwen's turns, with the tiny tokenizer's end.
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}\n{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    + END
    + "\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)
WIDTH = 128
PATCH = 8
# 4 to 64 tokens a picture.
PIXELS = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}


def write_model(name: str, folder: Path) -> None:
    """A checkpoint (`Qwen3VL` or `Qwen2_5_VL`) with everything that the engines load."""
    tokenizer = train_tokenizer(["a red cube"], 512)
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION)})
    tokenizer.chat_template = TEMPLATE
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION))
    config = getattr(transformers, f"{name}Config")(
        text_config=_text(name, tokenizer),
        vision_config=_vision(name),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    for weights in model.parameters():
        # The usual spread is for wider models: with it neither picture nor place would matter to the states.
        weights.data *= 5 if weights.dim() > 1 else 1
    model.save_pretrained(folder)
    videos = {"Qwen3VL": "Qwen3VLVideoProcessor", "Qwen2_5_VL": "Qwen2VLVideoProcessor"}[name]
    getattr(transformers, f"{name}Processor")(
        transformers.Qwen2VLImageProcessor(patch_size=PATCH, size=PIXELS),
        tokenizer,
        getattr(transformers, videos)(patch_size=PATCH),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def _text(name: str, tokenizer: Any) -> dict[str, Any]:
    places = (
        {"mrope_section": [6, 5, 5], "mrope_interleaved": True} if name == "Qwen3VL" else {"mrope_section": [8, 4, 4]}
    )
    end, pad = tokenizer.convert_tokens_to_ids([END, PAD])
    return {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | places,
        "bos_token_id": None, "eos_token_id": end, "pad_token_id": pad,
    }  # fmt: skip


def _vision(name: str) -> dict[str, Any]:
    own: dict[str, Any] = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    if name == "Qwen2_5_VL":
        own = {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
    return own | {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": PATCH,
        "out_hidden_size": WIDTH,
    }  # fmt: skip


def config_for(kind: str, folder: Path, *more: str) -> RunConfig:
    """Of a run that captures; in vLLM with steps so short that prompts are cut, pictures among them."""
    return load_config(
        None,
        [
            f"engine.kind={kind}",
            f"model.path={folder}",
            "model.dtype=float32",
            "capture.kind=states",
            "scoring.max_description_tokens=24",
            "engine.batch_size=5",
            "engine.max_num_batched_tokens=64",
            "engine.max_num_seqs=16",
            *more,
        ],
    )


def compare(name: str, folder: Path) -> dict[str, Any]:
    """How far vLLM's answers and states are from those of transformers, and how much a picture matters to them."""
    items = [Item(np.asarray(image), "a red cube", tuple(Aspect)) for image in random_images(8)]
    expected, _ = assess(config_for("transformers", folder), items)
    found, stats = assess(config_for("vllm", folder), items)
    pairs = [(a[aspect], b[aspect]) for a, b in zip(expected, found, strict=True) for aspect in Aspect]
    last = torch.stack([found[i][Aspect.QUALITY].captured.values[-1] for i in range(len(items))])
    module, _, own = MODELS[f"{name}ForConditionalGeneration"].partition(":")
    parents = getattr(importlib.import_module(module), own).__mro__
    return {
        "same_words": [a.description == b.description and a.rating_answer == b.rating_answer for a, b in pairs],
        "same_shapes": [a.captured.values.shape == b.captured.values.shape for a, b in pairs],
        "errors": [_share(a.captured.values - b.captured.values, a.captured.values) for a, b in pairs],
        "apart": _share(last - last.mean(0), last),
        "parents": [parent.__name__ for parent in parents],
        "stats": stats,
    }


def downscale(folder: Path) -> dict[str, Any]:
    """What both engines make of pictures of which the largest are too long for the context by a few tokens."""
    items = [Item(np.asarray(image), "a red cube", (Aspect.QUALITY,)) for image in random_images(8)]
    whole, _ = assess(config_for("transformers", folder), items)
    longest = max(found[Aspect.QUALITY].prompt_tokens for found in whole)
    more = (f"model.max_model_len={longest}", "scoring.downscale_to_fit=true")
    found = [assess(config_for(kind, folder, *more), items)[0] for kind in ("transformers", "vllm")]
    keys = ("note", "description", "rating_answer", "prompt_tokens")
    rows = [[[getattr(row[Aspect.QUALITY], key) for key in keys] for row in rows] for rows in found]
    return {"context": longest, "transformers": rows[0], "vllm": rows[1]}


def _share(difference: torch.Tensor, of: torch.Tensor) -> float:
    return float(difference.abs().max() / of.abs().max())


if __name__ == "__main__":
    what, name, folder, out = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    write_model(name, folder)
    out.write_text(
        json.dumps({"compare": lambda: compare(name, folder), "downscale": lambda: downscale(folder)}[what]())
    )
