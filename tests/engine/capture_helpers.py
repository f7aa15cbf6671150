"""A real vLLM engine with capture, and transformers (with PEFT) as the oracle it is held against."""

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from m3agiqa.aspects import Aspect
from m3agiqa.config import ModelConfig
from m3agiqa.conversation import questions
from m3agiqa.engine.prompting import load_processor, prompt_builder
from m3agiqa.engine.shared_states import StatesInbox

ARCHITECTURE = "Idefics3ForConditionalGeneration"
_numbers = itertools.count()


def random_images(count: int, seed: int = 0) -> list[Image.Image]:
    """Images of different sizes and shapes, smooth enough to differ from each other after resizing."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (rng.integers(2, 9), rng.integers(2, 9), 3), dtype=np.uint8)
        size = (int(rng.integers(20, 300)), int(rng.integers(20, 300)))
        images.append(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    return images


@dataclass(frozen=True)
class Captured:
    """A conversation as the engine had it: the whole prompt of round 2 and its states [tokens, hidden]."""

    ids: list[int]
    states: torch.Tensor
    cached: int


class CapturingEngine:
    """Two rounds against an AsyncLLM, the way m3agiqa's engine runs them."""

    def __init__(self, llm: Any, folder: Path, inbox: StatesInbox, preemptions: list[int]) -> None:
        self.llm, self.inbox, self.preemptions = llm, inbox, preemptions
        self.builder = prompt_builder(folder, ModelConfig(path=str(folder)))
        # A model with random weights would write image placeholders, and the next prompt would have too many.
        self._banned = dict.fromkeys(self.builder.control_ids, -100.0)

    async def converse(
        self,
        image: Image.Image,
        aspect: Aspect,
        *,
        first: int = 12,
        second: int = 3,
        lora: Any = None,
        described: asyncio.Event | None = None,
    ) -> Captured:
        """Both rounds, each of a fixed number of tokens, and the states of the second one's prompt.

        ``described`` is set between the rounds.
        """
        prompt = await self.describe(image, aspect, first, lora)
        if described is not None:
            described.set()
        with self.inbox.ask() as ticket:
            from m3agiqa.engine.vllm_capture import request_extra_args

            output = await self.generate(prompt, image, second, lora, request_extra_args(ticket))
            states = await ticket.receive(timeout_s=10)
        return Captured(list(output.prompt_token_ids), states, output.num_cached_tokens)

    async def describe(self, image: Image.Image, aspect: Aspect, tokens: int = 12, lora: Any = None) -> list[int]:
        """Round 1; returns the prompt of round 2."""
        asked = questions(aspect, "a red cube on a table")
        prompt = self.builder.first_round(asked)
        output = await self.generate(prompt, image, tokens, lora)
        return prompt + list(output.outputs[0].token_ids) + self.builder.second_round(asked)

    async def generate(
        self, ids: list[int], image: Image.Image, tokens: int, lora: Any = None, extra: dict[str, Any] | None = None
    ) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            logit_bias=self._banned,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=extra,
        )
        prompt: Any = {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
        last = None
        async for output in self.llm.generate(prompt, params, f"r{next(_numbers)}", lora_request=lora):
            last = output
        return last

    def unread(self) -> list[str]:
        """Files of requests that are still in shared memory."""
        return [path.name for path in self.inbox.folder.iterdir() if path.name != "lock"]


@contextlib.asynccontextmanager
async def capturing_engine(folder: Path, **args: Any) -> AsyncIterator[CapturingEngine]:
    """An engine on the CPU with capture on."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from m3agiqa.engine.vllm_capture import capture_engine_args

    preemptions = [0]
    defaults = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "block_size": 32}
    engine_args = AsyncEngineArgs(
        model=str(folder),
        limit_mm_per_prompt={"image": 1},
        generation_config="vllm",
        **(defaults | args),
        **capture_engine_args([ARCHITECTURE]),
    )
    llm = AsyncLLM.from_engine_args(engine_args, stat_loggers=[_preemption_counter(preemptions)])
    try:
        with StatesInbox() as inbox:
            yield CapturingEngine(llm, folder, inbox, preemptions)
    finally:
        await asyncio.to_thread(llm.shutdown, 30)


def _preemption_counter(total: list[int]) -> Any:
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Counter(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            if iteration_stats is not None:
                total[0] += iteration_stats.num_preempted_reqs

        def log_engine_initialized(self) -> None:
            pass

    return Counter


class Oracle:
    """The states by transformers in float32, each conversation alone and from scratch."""

    def __init__(self, folder: Path, adapters: dict[str, Path] | None = None) -> None:
        from transformers import AutoModelForImageTextToText

        config = ModelConfig(path=str(folder))
        self._processor = load_processor(folder, config)
        self._image_token = prompt_builder(folder, config, self._processor).image_token
        self._model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        for name, path in (adapters or {}).items():
            self._add(name, path)

    def _add(self, name: str, path: Path) -> None:
        from peft import PeftModel

        if isinstance(self._model, PeftModel):
            self._model.load_adapter(path, adapter_name=name)
        else:
            self._model = PeftModel.from_pretrained(self._model, path, adapter_name=name).eval()

    @torch.inference_mode()
    def states(self, ids: list[int], image: Image.Image, adapter: str | None = None) -> torch.Tensor:
        """[tokens, hidden] after the final norm, for a prompt whose image tokens are put in already."""
        if adapter is not None:
            self._model.set_adapter(adapter)
        pixels = self._processor(text=[self._image_token], images=[[image]], return_tensors="pt")
        output = self._model(
            input_ids=torch.tensor([ids]),
            pixel_values=pixels["pixel_values"],
            pixel_attention_mask=pixels["pixel_attention_mask"],
            output_hidden_states=True,
        )
        return output.hidden_states[-1][0]

    def error(self, captured: Captured, image: Image.Image, adapter: str | None = None) -> float:
        """Largest difference, as a share of the largest value."""
        expected = self.states(captured.ids, image, adapter)
        assert captured.states.shape == expected.shape
        return float((captured.states.float() - expected).abs().max() / expected.abs().max())


def write_random_adapter(model: Path, folder: Path, seed: int) -> Path:
    """A PEFT adapter with random weights on every projection of the language model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    targets = r".*text_model.*\.(q|k|v|o|gate|up|down)_proj"
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder)
    return folder
