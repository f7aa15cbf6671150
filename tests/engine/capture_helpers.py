"""A real vLLM engine with capture, and transformers (with PEFT) as the oracle it is held against."""

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Iterator, Sequence
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
from m3agiqa.predictor.fold import fold
from m3agiqa.predictor.lm_head import LMHead

ARCHITECTURE = "Idefics3ForConditionalGeneration"
WIDTH = 512
"""Outputs of the published predictor's first layer."""
TIE = 1e-4
"""Logits that differ by a smaller share of their spread are equal but for rounding."""
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
class Described:
    """Round 1 of a conversation.

    Attributes:
        asked: the prompt of round 1, in which the image is one token.
        answer: the description's tokens.
        rest: what follows it in the prompt of round 2.
        finish_reason: why the description ends.
    """

    asked: list[int]
    answer: list[int]
    rest: list[int]
    finish_reason: str

    @property
    def prompt(self) -> list[int]:
        """That of round 2."""
        return self.asked + self.answer + self.rest


@dataclass(frozen=True)
class Captured:
    """A conversation as the engine had it.

    Attributes:
        described: its first round.
        ids: the whole prompt of round 2, the image's own tokens among them.
        answer: the tokens of round 2's answer.
        finish_reason: why that ends.
        states: those of `ids` [tokens, hidden].
        cached: how many of `ids` were not computed again.
        preempted: how often round 2 lost its place in the engine, and began again.
    """

    described: Described
    ids: list[int]
    answer: list[int]
    finish_reason: str
    states: torch.Tensor
    cached: int
    preempted: int

    @property
    def opened(self) -> int:
        """Where the description begins in `ids`."""
        return len(self.ids) - len(self.described.answer) - len(self.described.rest)

    @property
    def generated(self) -> list[int]:
        """Positions in `ids` + `answer` of the tokens that the engine wrote."""
        first = range(self.opened, self.opened + len(self.described.answer))
        return [*first, *range(len(self.ids), len(self.ids) + len(self.answer))]

    @property
    def answers(self) -> list[tuple[list[int], str]]:
        """Both answers, and why each of them ends."""
        return [(self.described.answer, self.described.finish_reason), (self.answer, self.finish_reason)]


class CapturingEngine:
    """Two rounds against an AsyncLLM, the way m3agiqa's engine runs them."""

    def __init__(self, llm: Any, folder: Path, inbox: StatesInbox) -> None:
        self.llm, self.inbox = llm, inbox
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
        ends: Sequence[int] = (),
        lora: Any = None,
        between: asyncio.Event | None = None,
    ) -> Captured:
        """Both rounds and the states of the second one's prompt.

        Answers have so many tokens, or fewer where one of ``ends`` comes. ``between`` is set between the rounds.
        """
        described = await self.describe(image, aspect, first, ends=ends, lora=lora)
        if between is not None:
            between.set()
        with self.inbox.ask() as ticket:
            from m3agiqa.engine.vllm_capture import request_extra_args

            extra = request_extra_args(ticket)
            output = await self.generate(described.prompt, image, second, ends=ends, lora=lora, extra=extra)
            states = await ticket.receive(timeout_s=10)
        (answer,) = output.outputs
        return Captured(
            described=described,
            ids=list(output.prompt_token_ids),
            answer=list(answer.token_ids),
            finish_reason=answer.finish_reason,
            states=states,
            cached=output.num_cached_tokens,
            preempted=output.metrics.num_preemptions,
        )

    async def describe(
        self, image: Image.Image, aspect: Aspect, tokens: int = 12, *, ends: Sequence[int] = (), lora: Any = None
    ) -> Described:
        """Round 1."""
        asked = questions(aspect, "a red cube on a table")
        prompt = self.builder.first_round(asked)
        (answer,) = (await self.generate(prompt, image, tokens, ends=ends, lora=lora)).outputs
        return Described(prompt, list(answer.token_ids), self.builder.second_round(asked), answer.finish_reason)

    async def generate(
        self,
        ids: list[int],
        image: Image.Image,
        tokens: int,
        *,
        ends: Sequence[int] = (),
        lora: Any = None,
        extra: dict[str, Any] | None = None,
    ) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            stop_token_ids=list(ends),
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

    def some_ends(self, every: int) -> list[int]:
        """Ordinary tokens to end answers at, which a model with random weights writes now and then."""
        ordinary = set(self.builder.tokenizer.get_vocab().values()) - self.builder.control_ids
        return sorted(ordinary)[::every]

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

    defaults = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "block_size": 32}
    engine_args = AsyncEngineArgs(
        model=str(folder),
        limit_mm_per_prompt={"image": 1},
        generation_config="vllm",
        **(defaults | args),
        **capture_engine_args([ARCHITECTURE]),
    )
    llm = AsyncLLM.from_engine_args(engine_args)
    try:
        with StatesInbox() as inbox:
            yield CapturingEngine(llm, folder, inbox)
    finally:
        await asyncio.to_thread(llm.shutdown, 30)


@dataclass(frozen=True)
class Comparison:
    """What a captured conversation is beside the oracle's. Errors are shares of the largest value.

    Attributes:
        same_prompt: whether the prompt's tokens are those of the transformers processor.
        tokens: how many the engine generated.
        wrong: how many of them are not the greedy choice.
        ties: at how many of them the two best are so nearly equal that either may be chosen.
        states: error of the states.
        projections: error of what the folded matrix makes of them, against the long way on the oracle's logits.
        folding: the same against the long way on the captured states: what folding alone adds.
    """

    same_prompt: bool
    tokens: int
    wrong: int
    ties: int
    states: float
    projections: float
    folding: float


class Oracle:
    """Tokens, states and projections by transformers and PEFT in float32, each conversation alone and from scratch."""

    def __init__(self, folder: Path, adapters: dict[str, Path] | None = None) -> None:
        from transformers import AutoModelForImageTextToText

        config = ModelConfig(path=str(folder))
        self._processor = load_processor(folder, config)
        self._builder = prompt_builder(folder, config, self._processor)
        self._model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        for name, path in (adapters or {}).items():
            self._add(name, path)
        self._head = LMHead.load(folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # The published predictor's first layer.
            self._layer = torch.nn.Linear(len(self._head.weight), WIDTH)
        self._folded = fold(self._layer.weight.detach(), self._layer.bias.detach(), self._head)

    def _add(self, name: str, path: Path) -> None:
        from peft import PeftModel

        if isinstance(self._model, PeftModel):
            self._model.load_adapter(path, adapter_name=name)
        else:
            self._model = PeftModel.from_pretrained(self._model, path, adapter_name=name).eval()

    @torch.inference_mode()
    def compare(self, captured: Captured, image: Image.Image, adapter: str | None = None) -> Comparison:
        """Holds a conversation against one forward, of the base model where no adapter is named."""
        expected, logits, shown = self._forward(captured.ids + captured.answer, image, adapter)
        wrong, ties = self._choices(captured, logits)
        length = len(captured.ids)
        assert captured.states.shape == expected[:length].shape
        states = captured.states.float()
        long = self._layer(logits[:length])
        short = self._folded(states)
        return Comparison(
            same_prompt=captured.ids == self._shown(captured.described.prompt, shown),
            tokens=len(captured.generated),
            wrong=wrong,
            ties=ties,
            states=_share(states - expected[:length], expected[:length]),
            projections=_share(short - long, long),
            folding=_share(short - self._layer(self._head.logits(states)), long),
        )

    def _forward(
        self, ids: list[int], image: Image.Image, adapter: str | None
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """States after the final norm [tokens, hidden], logits [tokens, vocabulary], and the image's own tokens."""
        inputs = self._processor(text=[self._builder.image_token], images=[[image]], return_tensors="pt")
        with self._using(adapter):
            output = self._model(
                input_ids=torch.tensor([ids]),
                pixel_values=inputs["pixel_values"],
                pixel_attention_mask=inputs["pixel_attention_mask"],
                output_hidden_states=True,
            )
        return output.hidden_states[-1][0], output.logits[0], inputs["input_ids"][0].tolist()

    @contextlib.contextmanager
    def _using(self, adapter: str | None) -> Iterator[None]:
        from peft import PeftModel

        if adapter is not None:
            self._model.set_adapter(adapter)
        off = adapter is None and isinstance(self._model, PeftModel)
        with self._model.disable_adapter() if off else contextlib.nullcontext():
            yield

    def _shown(self, prompt: list[int], shown: list[int]) -> list[int]:
        """A prompt with the image's own tokens in the place of its one."""
        at = prompt.index(self._builder.image_token_id)
        return prompt[:at] + shown + prompt[at + 1 :]

    def _choices(self, captured: Captured, logits: torch.Tensor) -> tuple[int, int]:
        """How many of the engine's tokens are not the greedy choice, and at how many the two best are equal."""
        at = torch.tensor(captured.generated)
        chosen = torch.tensor(captured.ids + captured.answer)[at]
        allowed = logits[at - 1].index_fill(1, torch.tensor(sorted(self._builder.control_ids)), -torch.inf)
        best, second = allowed.topk(2).values.T
        spread = logits[at - 1].amax(1) - logits[at - 1].amin(1)
        behind = best - allowed.gather(1, chosen[:, None])[:, 0]
        return int((behind > TIE * spread).sum()), int((best - second <= TIE * spread).sum())


def _share(difference: torch.Tensor, of: torch.Tensor) -> float:
    return float(difference.abs().max() / of.abs().max())


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
