"""The transformers engine: no vLLM needed, and the oracle that the vLLM engine is tested against.

Conversations are batched with left padding; both rounds are run from scratch, which is slow and plain.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from m3agiqa import conversation
from m3agiqa.adapters import add_to_transformers, distinct, load_adapters, use_adapter
from m3agiqa.aspects import Aspect
from m3agiqa.config import RunConfig
from m3agiqa.engine.base import Item, ItemFailed, ItemRejected, Outcome
from m3agiqa.engine.capture import Keeper
from m3agiqa.engine.context import check_context, smaller
from m3agiqa.engine.pictures import encode_image, image_inputs
from m3agiqa.engine.prompting import load_processor, prompt_builder
from m3agiqa.engine.rating import prefixes, rating_probs
from m3agiqa.models import context_length, model_folder, takes_images
from m3agiqa.records import Assessment, Captured


@dataclass
class _Talk:
    """One conversation on its way: an item, an aspect, and the token ids so far."""

    item: int
    aspect: Aspect
    questions: conversation.Questions
    ids: list[int]
    image: dict[str, Any]
    given: str | None = None
    description: list[int] = field(default_factory=list)
    cut: bool = False
    rating: list[int] = field(default_factory=list)
    rating_cut: bool = False
    logprobs: dict[tuple[int, ...], dict[int, float]] = field(default_factory=dict)
    captured: Captured | None = None
    bounds: tuple[int, int] | None = None
    note: str | None = None


class TransformersEngine:
    """Runs any image-text-to-text checkpoint of transformers with a chat template; without images, any causal one."""

    def __init__(self, config: RunConfig) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

        folder = model_folder(config.model)
        self._scoring = config.scoring
        self._batch_size = config.engine.batch_size
        self._context = context_length(folder, config.model)
        text_only = config.corpus.text_only
        self._processor = None if text_only else load_processor(folder, config.model)
        self._builder = prompt_builder(folder, config.model, self._processor, text_only=text_only)
        self._keeper = Keeper(config.capture, folder)
        device = config.engine.device
        self._device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        dtype = config.model.dtype if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
        loader = AutoModelForCausalLM if text_only and not takes_images(folder) else AutoModelForImageTextToText
        model: Any = loader.from_pretrained(folder, dtype=dtype, trust_remote_code=config.model.trust_remote_code)
        self._model = model.to(self._device).eval()
        # Greedy and nothing else: a checkpoint's own settings (a repetition penalty, say) would apply here only.
        self._model.generation_config = GenerationConfig()
        self._adapters = load_adapters(config.model.adapters, folder)
        self._peft = add_to_transformers(self._model, self._adapters)
        self._lock = asyncio.Lock()
        self._counts = {"images": 0.0, "conversations": 0.0, "prompt_tokens": 0.0, "generated_tokens": 0.0}

    async def assess(self, items: Sequence[Item]) -> list[Outcome]:
        """One outcome per item, in order."""
        # One batch at a time, whoever calls: there is one model, and the adapter in force is its state.
        async with self._lock:
            return await asyncio.to_thread(self._assess, items)

    def stats(self) -> dict[str, float]:
        """Images, conversations, prompt and generated tokens so far."""
        return dict(self._counts)

    def close(self) -> None:
        """Lets go of the model."""
        del self._model

    @torch.inference_mode()
    def _assess(self, items: Sequence[Item]) -> list[Outcome]:
        outcomes: list[dict[Aspect, Assessment] | ItemRejected | ItemFailed] = [{} for _ in items]
        talks: list[_Talk] = []
        for i, item in enumerate(items):
            try:
                talks += self._open_to_fit(i, item)
            except ItemRejected as rejection:
                outcomes[i] = rejection
            except Exception as error:  # noqa: BLE001 - the row boundary: what a processor cannot take costs one row
                outcomes[i] = ItemFailed(f"the model's processor failed: {type(error).__name__}: {error}")
        for adapter in [*distinct(self._adapters), None]:
            same = [talk for talk in talks if self._adapters.get(talk.aspect) is adapter]
            with use_adapter(self._peft, adapter):
                for start in range(0, len(same), self._batch_size):
                    self._converse_each(same[start : start + self._batch_size], outcomes)
        for talk in talks:
            found = outcomes[talk.item]
            if isinstance(found, dict):
                found[talk.aspect] = self._assessment(talk)
        self._counts["images"] += len(items)
        self._counts["conversations"] += len(talks)
        return list(outcomes)

    def _converse_each(
        self, talks: list[_Talk], outcomes: list[dict[Aspect, Assessment] | ItemRejected | ItemFailed]
    ) -> None:
        """Runs a batch; where that fails, each conversation alone, so that only those at fault are lost."""
        opened = [talk.ids for talk in talks]
        try:
            self._converse(talks)
        except Exception as error:  # noqa: BLE001 - the row boundary: out of memory, or an input the model trips over
            if len(talks) == 1:
                outcomes[talks[0].item] = ItemFailed(f"the model failed: {type(error).__name__}: {error}")
                return
            for talk, ids in zip(talks, opened, strict=True):
                talk.ids = ids
                self._converse_each([talk], outcomes)

    def _converse(self, talks: list[_Talk]) -> None:
        self._describe(talks)
        self._rate(talks)
        if self._keeper.wanted:
            self._capture(talks)

    def _open_to_fit(self, index: int, item: Item) -> list[_Talk]:
        try:
            return self._open(index, item)
        except ItemRejected:
            for less, note in smaller(item, self._scoring):
                with contextlib.suppress(ItemRejected):
                    return [replace(talk, note=note) for talk in self._open(index, less)]
            raise

    def _open(self, index: int, item: Item) -> list[_Talk]:
        """The conversations of one item, with the image's tokens put in for its placeholder."""
        expansion: list[int] = []
        image: dict[str, Any] = {}
        if item.pixels is not None:
            expansion, image = encode_image(self._processor, self._builder.image_token, item.pixels)
        talks = []
        for aspect in item.aspects:
            questions = conversation.questions(aspect, item.prompt, self._scoring.conversation)
            ids = self._builder.first_round(questions)
            if item.pixels is not None:
                at = ids.index(self._builder.image_token_id)
                ids[at : at + 1] = expansion
            given = item.descriptions.get(aspect)
            answer = [] if given is None else self._builder.answer(given)
            second, described = len(self._builder.second_round(questions)), None if given is None else len(answer)
            check_context(len(ids), second, self._scoring, self._context, described)
            talks.append(_Talk(index, aspect, questions, ids, image, given, answer))
        return talks

    def _describe(self, talks: list[_Talk]) -> None:
        own = [talk for talk in talks if talk.given is None]
        if not own:
            return
        generated, _ = self._generate(own, [talk.ids for talk in own], self._scoring.max_description_tokens)
        for talk, ids in zip(own, generated, strict=True):
            talk.description, talk.cut = self._builder.split_end(ids)

    def _rate(self, talks: list[_Talk]) -> None:
        for talk in talks:
            talk.bounds = (len(talk.ids), len(talk.ids) + len(talk.description))
            talk.ids = talk.ids + talk.description + self._builder.second_round(talk.questions)
        needed = prefixes(self._builder.rating_ids)
        for prefix, tokens in needed.items():
            prompts = [talk.ids + list(prefix) for talk in talks]
            length = 1 if prefix else self._scoring.max_rating_tokens
            generated, logits = self._generate(talks, prompts, length)
            logprobs = logits.float().log_softmax(-1)[:, list(tokens)].tolist()
            for talk, ids, row in zip(talks, generated, logprobs, strict=True):
                talk.logprobs[prefix] = dict(zip(tokens, row, strict=True))
                if not prefix:
                    talk.rating, talk.rating_cut = self._builder.split_end(ids)

    def _generate(
        self, talks: list[_Talk], prompts: list[list[int]], max_new_tokens: int
    ) -> tuple[list[list[int]], torch.Tensor]:
        """Greedy continuations (their end token included) and the logits [batch, vocabulary] of the first token."""
        inputs = self._inputs(talks, prompts)
        width = inputs["input_ids"].shape[1]
        out = self._model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self._builder.stop_ids),
            pad_token_id=self._builder.stop_ids[0],
            suppress_tokens=sorted(self._builder.control_ids - set(self._builder.stop_ids)),
            output_logits=True,
            return_dict_in_generate=True,
        )
        self._counts["prompt_tokens"] += sum(map(len, prompts))
        answers = [self._until_stop(row) for row in out.sequences[:, width:].tolist()]
        self._counts["generated_tokens"] += sum(map(len, answers))
        return answers, out.logits[0]

    def _capture(self, talks: list[_Talk]) -> None:
        """The states of the second round's prompts, without their padding."""
        # Padded on the right: a plain forward counts positions from the left edge.
        inputs = self._inputs(talks, [talk.ids for talk in talks], left=False)
        states = self._model.model(**inputs).last_hidden_state
        for talk, row, mask in zip(talks, states, inputs["attention_mask"], strict=True):
            talk.captured = self._keeper.keep(row[mask.bool()])

    def _inputs(self, talks: list[_Talk], prompts: list[list[int]], *, left: bool = True) -> dict[str, Any]:
        """What the model takes for some prompts of different lengths: padded, on the left to generate from."""
        width = max(map(len, prompts))
        pad = self._builder.stop_ids[0]
        ids = torch.full((len(prompts), width), pad, device=self._device)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            at = slice(width - len(prompt), width) if left else slice(0, len(prompt))
            ids[i, at] = torch.tensor(prompt, device=self._device)
            mask[i, at] = 1
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if talks[0].image:
            images = image_inputs([talk.image for talk in talks], ids, self._builder.image_token_id)
            for key, values in images.items():
                inputs[key] = values.to(self._model.dtype) if values.is_floating_point() else values
        return inputs

    def _until_stop(self, ids: list[int]) -> list[int]:
        for i, token in enumerate(ids):
            if token in self._builder.stop_ids:
                return ids[: i + 1]
        return ids

    def _assessment(self, talk: _Talk) -> Assessment:
        answer = self._builder.decode(talk.rating)
        return Assessment(
            description=self._builder.decode(talk.description) if talk.given is None else talk.given,
            rating=conversation.parse_rating(answer),
            rating_answer=answer,
            rating_probs=rating_probs(self._builder.rating_ids, talk.logprobs),
            prompt_tokens=len(talk.ids),
            generated_tokens=(len(talk.description) if talk.given is None else 0) + len(talk.rating),
            finish_reason="given" if talk.given is not None else "length" if talk.cut else "stop",
            captured=talk.captured,
            bounds=talk.bounds,
            rating_cut=talk.rating_cut,
            note=talk.note,
        )
