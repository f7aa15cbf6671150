"""What the systems that are compared have in common: the corpus, the model, the prompts and their settings.

One compute core for every system: vLLM on a CPU binds its engine's threads so that one core stays free for
its scheduler, and on a machine of two cores each engine gets the same one.
"""

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from m3agiqa import conversation
from m3agiqa.aspects import Aspect
from m3agiqa.config import RunConfig, load_config
from m3agiqa.engine.prompting import PromptBuilder, prompt_builder
from m3agiqa.models import model_folder

HEAD_WIDTH = 512
"""Outputs of the published predictor's first layer."""
CONTEXT = 2048


@dataclass(frozen=True)
class Job:
    """What one measurement is given.

    Attributes:
        manifest: the corpus, a CSV with the columns image_path and prompt.
        model: `tiny` or a checkpoint's folder.
        dtype: float32 or bfloat16.
        tokens: longest description.
        images: rows of the manifest, from the first.
    """

    manifest: str
    model: str
    dtype: str
    tokens: int
    images: int

    def config(self, *more: str) -> RunConfig:
        """The run configuration for it."""
        # Without the adapter that comes with the tiny model: the other systems apply none.
        model = [f"model.path={self.model}", "model.adapters=null", f"model.dtype={self.dtype}"]
        return load_config(None, [*model, f"scoring.max_description_tokens={self.tokens}", *more])

    def folder(self) -> Path:
        """The checkpoint."""
        return model_folder(self.config().model)

    def builder(self) -> PromptBuilder:
        """Builds the same token ids as our engines do."""
        return prompt_builder(self.folder(), self.config().model)

    def corpus(self) -> list[tuple[Image.Image, str]]:
        """Its images and prompts, in memory."""
        path = Path(self.manifest)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))[: self.images]
        return [(Image.open(path.parent / row["image_path"]).convert("RGB"), row["prompt"]) for row in rows]


@dataclass(frozen=True)
class Talk:
    """One conversation before it is held."""

    image: Image.Image
    questions: conversation.Questions


def talks(corpus: list[tuple[Image.Image, str]]) -> list[Talk]:
    """The conversations over a corpus: an image's aspects one after the other."""
    return [Talk(image, conversation.questions(aspect, prompt)) for image, prompt in corpus for aspect in Aspect]


def vllm_environment() -> None:
    """As our engine sets it, but without what our plugin changes in vLLM; before vLLM is imported."""
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_COMPILE_DISABLE": "1"}
    os.environ.update(quiet, VLLM_CPU_KVCACHE_SPACE="1", VLLM_PLUGINS="")


def vllm_args(job: Job) -> dict[str, Any]:
    """Engine arguments, as our engine sets them on a CPU."""
    return {
        "dtype": job.dtype,
        "enforce_eager": True,
        "block_size": 32,
        "limit_mm_per_prompt": {"image": 1},
        "max_model_len": CONTEXT,
    }


def sampling(builder: PromptBuilder, tokens: int) -> dict[str, Any]:
    """Sampling parameters of both rounds, as our engine sets them."""
    return {
        "temperature": 0.0,
        "max_tokens": tokens,
        "stop_token_ids": list(builder.stop_ids),
        "detokenize": False,
        "logit_bias": dict.fromkeys(sorted(builder.control_ids - set(builder.stop_ids)), -100.0),
    }


def vllm_prompts(ids: list[list[int]], held: list[Talk]) -> list[Any]:
    """Token ids and images as vLLM takes them."""
    return [
        {"prompt_token_ids": prompt, "multi_modal_data": {"image": talk.image}}
        for prompt, talk in zip(ids, held, strict=True)
    ]
