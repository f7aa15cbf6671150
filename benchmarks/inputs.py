"""The corpus and the models that are measured on, made on the spot."""

import csv
import math
from pathlib import Path
from typing import Any

from PIL import Image


def write_corpus(folder: Path, first: int, images: int) -> Path:
    """Rendered scenes number `first` and on with their prompts; returns the manifest."""
    import numpy as np

    from m3agiqa.tiny.pictures import random_scene, render, to_bytes

    folder.mkdir()
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "prompt"])
        for i in range(first, first + images):
            scene = random_scene(np.random.default_rng(10**6 + i))
            Image.fromarray(to_bytes(render(scene, 10**6 + i, 256).pixels)).save(folder / f"{i:05d}.png")
            writer.writerow([f"{i:05d}.png", scene.text])
    return manifest


def write_wide_model(folder: Path, image_tokens: int = 576) -> Path:
    """A random model in which, as in use, the model's work outweighs everything else; `image_tokens` is a square."""
    from m3agiqa.tiny.architecture import Size, write_random_model

    side = math.isqrt(image_tokens)
    assert side * side == image_tokens, f"{image_tokens} image tokens are no square"
    size = Size(
        image_size=16 * side, patch_size=8, scale_factor=2, vision_width=384, vision_layers=2, vision_mlp=768,
        vision_heads=6, text_width=768, text_layers=6, text_mlp=2048, text_head_dim=64,
    )  # fmt: skip
    return write_random_model(folder, size)


def write_predictor(folder: Path, states: int, **size: Any) -> Path:
    """A predictor with random weights, all aspects, for `states` numbers a token; the published size, or `size`."""
    import torch

    from m3agiqa.aspects import Aspect
    from m3agiqa.predictor import Predictor
    from m3agiqa.predictor.head import Head, HeadConfig

    torch.manual_seed(0)
    Predictor(Head(HeadConfig(input_width=states, outputs=tuple(map(str, Aspect)), **size))).save(folder)
    return folder


def write_adapter(model: Path, folder: Path, seed: int) -> Path:
    """A LoRA adapter with random weights on every projection of the model's language side."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    targets = r".*text_model.*\.(q|k|v|o|gate|up|down)_proj"
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    get_peft_model(AutoModelForImageTextToText.from_pretrained(model), config).save_pretrained(str(folder))
    return folder
