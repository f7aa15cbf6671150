"""Adapters of random weights, and copies of them with something changed."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LANGUAGE = r".*text_model.*\.(q|k|v|o|gate|up|down)_proj"
VISION = r".*(vision_model.*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)|modality_projection\.proj)"


def load_base(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def write_adapter(model: Path, folder: Path, seed: int = 0, **settings) -> Path:
    """A PEFT adapter of random weights; whole modules are changed at random too."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    defaults = {"r": 8, "lora_alpha": 16, "target_modules": LANGUAGE, "init_lora_weights": False}
    peft_model = get_peft_model(load_base(model), LoraConfig(**(defaults | settings)))
    with torch.no_grad():
        for name, tensor in peft_model.named_parameters():
            if ".modules_to_save." in name or name.endswith(("lora_magnitude_vector.default.weight", ".bias")):
                tensor.add_(torch.randn_like(tensor) * 0.05)
            if "init_lora_weights" in settings and ".lora_B." in name:
                tensor.mul_(1.5)
    peft_model.save_pretrained(folder)
    return folder


def edited(source: Path, folder: Path, **settings) -> Path:
    """A copy of an adapter with other settings in its adapter_config.json."""
    shutil.copytree(source, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def renamed(source: Path, folder: Path, old: str, new: str) -> Path:
    """A copy of an adapter with other tensor names."""
    shutil.copytree(source, folder)
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)
    return folder


@torch.inference_mode()
def logits(model, inputs):
    return model(**inputs[1]).logits
