"""A random model, adapters for it, and an image with a prompt: made once."""

import pytest
from PIL import Image

from tests.adapters.adapter_helpers import VISION, write_adapter


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from m3agiqa.tiny.architecture import write_random_model

    return write_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def adapter(model, tmp_path_factory):
    return write_adapter(model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def vision_adapter(model, tmp_path_factory):
    return write_adapter(model, tmp_path_factory.mktemp("vision"), target_modules=VISION)


@pytest.fixture(scope="session")
def inputs(model):
    from m3agiqa.config import ModelConfig
    from m3agiqa.engine.prompting import load_processor

    processor = load_processor(model, ModelConfig(path=str(model)))
    image = Image.linear_gradient("L").convert("RGB")
    text = "<|begin_of_text|>User:<image>Describe it<end_of_utterance>\nAssistant:"
    encoded = processor(text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt")
    return image, encoded, processor.tokenizer(text, add_special_tokens=False)["input_ids"]
