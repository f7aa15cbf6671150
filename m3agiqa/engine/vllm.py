"""The vLLM engine: one engine, all aspects, both rounds, as many images in flight as its KV cache can hold.

An image's aspects are sent together, one after the other: vLLM knows a block of the prefix from the moment
that it is scheduled, so the first of them computes the image, and the other aspects under the same adapter
and the second rounds compute only what is new, even within one step. (Waiting for the first one's first
token gives the same hits.)
"""

import asyncio
import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from m3agiqa import conversation
from m3agiqa.adapters import add_to_vllm, check_for_vllm, distinct, load_adapters, tower_adapters
from m3agiqa.aspects import Aspect
from m3agiqa.config import RunConfig
from m3agiqa.engine.base import Item, ItemFailed, ItemRejected, Outcome
from m3agiqa.engine.capture import Keeper
from m3agiqa.engine.context import check_context, smaller
from m3agiqa.engine.places import Places
from m3agiqa.engine.prompting import prompt_builder
from m3agiqa.engine.rating import prefixes, rating_probs
from m3agiqa.engine.shared_states import StatesInbox, StatesLost, StatesTicket
from m3agiqa.engine.vllm_start import start
from m3agiqa.models import context_length, model_folder
from m3agiqa.records import Assessment

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.outputs import RequestOutput

# logit_bias is clamped to this by vLLM; it is far below any logit.
_NEVER = -100.0
# vLLM allows so many entries in a request's logit_bias.
_MAX_BIASED = 1024


@dataclass(frozen=True)
class _Visit:
    """An item while it is in the engine.

    Attributes:
        asked: of each aspect, the tokens up to the description (the image is one of them), and those after it.
        turn: vLLM takes requests of lower numbers first. An image's second rounds come before later images, while
            its keys and values are still in the cache, and its aspects one after the other.
    """

    item: Item
    image: Image.Image | None
    asked: dict[Aspect, tuple[list[int], list[int]]]
    turn: int


class VllmEngine:
    """Runs a checkpoint in vLLM's asynchronous engine, which lives in a process of its own."""

    def __init__(self, config: RunConfig) -> None:
        folder = model_folder(config.model)
        self._scoring = config.scoring
        self._context = context_length(folder, config.model)
        self._builder = prompt_builder(folder, config.model, text_only=config.corpus.text_only)
        self._keeper = Keeper(config.capture, folder)
        self._adapters = load_adapters(config.model.adapters, folder)
        for adapter in distinct(self._adapters):
            check_for_vllm(adapter, folder, tower=tower_adapters(config.engine.vllm_args))
        self._lora: dict[Aspect, LoRARequest] | None = None
        self._lora_lock = asyncio.Lock()
        self._inbox = StatesInbox() if self._keeper.wanted else None
        self._engine, self._tally, *room = start(
            config, folder, self._context, self._adapters, capture=self._keeper.wanted
        )
        self._places = Places(*room)
        self._numbers, self._turns = itertools.count(), itertools.count()
        self._counts = {"images": 0.0, "conversations": 0.0}
        self._banned = dict.fromkeys(sorted(self._builder.control_ids - set(self._builder.stop_ids)), _NEVER)
        self._banned = dict(itertools.islice(self._banned.items(), _MAX_BIASED))

    async def assess(self, items: Sequence[Item]) -> list[Outcome]:
        """One outcome per item, in order; as many as have room are in the engine at once (`places.py`).

        Raises:
            UserError: if the engine does not apply an adapter to all the modules that it is for.
        """
        async with self._lora_lock:
            if self._lora is None:
                self._lora = await add_to_vllm(self._engine, self._adapters)
        return list(await asyncio.gather(*(self._assess_to_fit(item) for item in items)))

    def stats(self) -> dict[str, float]:
        """Images and conversations, and what vLLM says of tokens, caches and queues."""
        return self._counts | self._tally.totals

    def close(self) -> None:
        """Ends the engine's process."""
        # It gets time to free its shared memory; killed at once it leaves that behind.
        self._engine.shutdown(timeout=30)
        # While Python goes down, its destructor would find half of the interpreter gone.
        self._engine = None
        if self._inbox is not None:
            self._inbox.close()

    async def _assess_to_fit(self, item: Item) -> Outcome:
        outcome = await self._assess(item)
        if isinstance(outcome, ItemRejected):
            for less, note in smaller(item, self._scoring):
                found = await self._assess(less)
                if not isinstance(found, ItemRejected | ItemFailed):
                    return {aspect: replace(assessment, note=note) for aspect, assessment in found.items()}
        return outcome

    async def _assess(self, item: Item) -> Outcome:
        asked = {aspect: self._questions(item, aspect) for aspect in item.aspects}
        async with self._places.take(self._need(asked, item.descriptions)):
            image = None if item.pixels is None else Image.fromarray(item.pixels)
            visit = _Visit(item, image, asked, next(self._turns))
            tasks: dict[Aspect, asyncio.Task[Assessment]] = {}
            try:
                async with asyncio.TaskGroup() as group:
                    for aspect in item.aspects:
                        tasks[aspect] = group.create_task(self._converse(visit, aspect))
            except ExceptionGroup as errors:
                if self._engine.errored:
                    raise
                return _outcome_of(errors)
        self._counts["images"] += 1
        self._counts["conversations"] += len(tasks)
        return {aspect: task.result() for aspect, task in tasks.items()}

    def _need(self, asked: Mapping[Aspect, tuple[list[int], list[int]]], given: Mapping[Aspect, str]) -> int:
        """Tokens of the KV cache that an image takes at most, from its first question to its last answer."""
        limits = self._scoring
        columns = zip(*(first for first, _ in asked.values()), strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, columns))
        own = [
            len(first)
            - shared
            + len(second)
            + limits.max_rating_tokens
            # A token is at least a byte.
            + (len(given[aspect].encode()) if aspect in given else limits.max_description_tokens)
            for aspect, (first, second) in asked.items()
        ]
        return self._places.need(shared, own, len({id(self._adapters.get(aspect)) for aspect in asked}))

    def _questions(self, item: Item, aspect: Aspect) -> tuple[list[int], list[int]]:
        questions = conversation.questions(aspect, item.prompt, self._scoring.conversation)
        return self._builder.first_round(questions), self._builder.second_round(questions)

    async def _converse(self, visit: _Visit, aspect: Aspect) -> Assessment:
        first, second = visit.asked[aspect]
        given = visit.item.descriptions.get(aspect)
        if given is None:
            description, finish_reason = await self._describe(first, second, visit, aspect)
        else:
            description, finish_reason = self._builder.answer(given), "given"
            check_context(len(first), len(second), self._scoring, self._context, len(description))
        prompt = first + description + second
        with self._inbox.ask() if self._inbox is not None else contextlib.nullcontext() as ticket:
            rated, logprobs = await self._rate(prompt, visit, aspect, ticket)
            captured = self._keeper.keep(await ticket.receive()) if ticket is not None else None
        assert rated.prompt_token_ids is not None
        opened = len(rated.prompt_token_ids) - len(description) - len(second)
        self._places.learn(opened - len(first))
        if given is not None:
            check_context(opened, len(second), self._scoring, self._context, len(description))
        rating_ids, rating_cut = self._builder.split_end(rated.outputs[0].token_ids)
        text = self._builder.decode(rating_ids)
        return Assessment(
            description=self._builder.decode(description) if given is None else given,
            rating=conversation.parse_rating(text),
            rating_answer=text,
            rating_probs=rating_probs(self._builder.rating_ids, logprobs),
            prompt_tokens=len(rated.prompt_token_ids),
            generated_tokens=(len(description) if given is None else 0) + len(rating_ids),
            finish_reason=finish_reason,
            captured=captured,
            bounds=(opened, opened + len(description)),
            rating_cut=rating_cut,
        )

    async def _describe(
        self, first: list[int], second: list[int], visit: _Visit, aspect: Aspect
    ) -> tuple[list[int], str]:
        """Round 1: the description's ids, and why they end."""
        # The image's own tokens are not known yet, so this is the least it can be.
        check_context(len(first), len(second), self._scoring, self._context)
        answer = await self._generate(first, visit, self._scoring.max_description_tokens, aspect=aspect)
        assert answer.prompt_token_ids is not None
        check_context(len(answer.prompt_token_ids), len(second), self._scoring, self._context)
        description, cut = self._builder.split_end(answer.outputs[0].token_ids)
        return description, "length" if cut else "stop"

    async def _rate(
        self, prompt: list[int], visit: _Visit, aspect: Aspect, ticket: StatesTicket | None
    ) -> tuple["RequestOutput", dict[tuple[int, ...], dict[int, float]]]:
        """Round 2, and the log-probabilities that the rating words' probabilities need."""
        needed = prefixes(self._builder.rating_ids)

        async def ask(prefix: tuple[int, ...], tokens: tuple[int, ...]) -> "RequestOutput":
            length = 1 if prefix else self._scoring.max_rating_tokens
            states = None if prefix else ticket
            return await self._generate(prompt + list(prefix), visit, length, tokens, aspect=aspect, ticket=states)

        outputs = await asyncio.gather(*(ask(prefix, tokens) for prefix, tokens in needed.items()))
        logprobs: dict[tuple[int, ...], dict[int, float]] = {}
        for (prefix, tokens), output in zip(needed.items(), outputs, strict=True):
            found = output.outputs[0].logprobs
            assert found is not None
            logprobs[prefix] = {token: found[0][token].logprob for token in tokens}
        return outputs[0], logprobs

    async def _generate(
        self,
        ids: list[int],
        visit: _Visit,
        max_tokens: int,
        logprobs_of: tuple[int, ...] = (),
        *,
        aspect: Aspect,
        ticket: StatesTicket | None = None,
    ) -> "RequestOutput":
        shown = {} if visit.image is None else {"multi_modal_data": {"image": visit.image}}
        prompt: Any = {"prompt_token_ids": ids} | shown
        params = self._params(max_tokens, logprobs_of)
        if ticket is not None:
            from m3agiqa.engine.vllm_capture import request_extra_args

            params.extra_args = request_extra_args(ticket)
        last = None
        assert self._lora is not None
        lora = self._lora.get(aspect)
        name = f"r{next(self._numbers)}"
        async for output in self._engine.generate(prompt, params, name, lora_request=lora, priority=visit.turn):
            last = output
        assert last is not None
        reason = last.outputs[0].finish_reason
        if reason not in ("stop", "length"):
            # vLLM reports some failures as an output with nothing in it; it is no answer.
            raise ItemFailed(f"the engine gave up on this image's request ({reason})")
        return last

    def _params(self, max_tokens: int, logprobs_of: tuple[int, ...]) -> "SamplingParams":
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            stop_token_ids=list(self._builder.stop_ids),
            logit_bias=self._banned or None,
            logprob_token_ids=list(logprobs_of) or None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def _outcome_of(errors: ExceptionGroup[Exception]) -> ItemRejected | ItemFailed:
    """What the errors of one item's conversations mean for it; raises those that mean a dead engine."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    if (dead := errors.subgroup(EngineDeadError)) is not None:
        raise dead
    error: Exception = errors
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ItemRejected | ItemFailed):
        return error
    if isinstance(error, VLLMClientError):
        return ItemRejected(f"the model cannot take this image or prompt: {error}")
    if isinstance(error, StatesLost):
        return ItemFailed(str(error))
    if isinstance(error, EngineGenerateError):
        return ItemFailed(f"the engine failed on this image: {error.__cause__!r}")
    raise error
