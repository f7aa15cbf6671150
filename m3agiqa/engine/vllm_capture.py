"""Captures hidden states in vLLM. With `vllm_models`, the only file that knows vLLM's insides.

How it works: the model writes its last hidden states (after the final norm: what the LM head sees) into a
cache that vLLM pages like its KV cache. When the last part of a prompt has been computed, the states of
all its positions are there, cached ones included; the connector below copies them to shared memory within
that very step. So they are on their way before the request's first token is, whatever becomes of the
request afterwards: it may finish, be preempted or aborted, and its blocks may be given to others.
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from m3agiqa.engine.shared_states import SHARED_MEMORY, StatesTicket, write_failure, write_states
from m3agiqa.engine.vllm_plugins import check_architectures, check_vllm

# Before the imports that would fail with another version.
check_vllm()

from vllm.config import KVTransferConfig, VllmConfig, get_layers_from_vllm_config  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank  # noqa: E402
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer  # noqa: E402
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec  # noqa: E402

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

_REQUEST_KEY = "m3agiqa_states"
_WRITER_THREADS = 4
_log = logging.getLogger(__name__)


def capture_engine_args(architectures: list[str], tensor_parallel_size: int = 1) -> dict[str, Any]:
    """The engine arguments that turn capture on; everything else about the engine stays as it is.

    Sets `VLLM_CPU_NUM_OF_RESERVED_CPU` in the environment where it is not set: on a CPU, vLLM would keep
    one more core per worker idle for a connector, or on two cores bind a compute thread to the scheduler's.

    Args:
        architectures: those of the checkpoint's config.json.
        tensor_parallel_size: that of the engine.

    Raises:
        UserError: if states cannot be captured from this model.
    """
    check_architectures(architectures)
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", str(tensor_parallel_size))
    config = KVTransferConfig(
        kv_connector=StatesConnector.__name__, kv_connector_module_path=__name__, kv_role="kv_producer"
    )
    return {"kv_transfer_config": config}


def request_extra_args(ticket: StatesTicket) -> dict[str, Any]:
    """What goes into `SamplingParams.extra_args` of the request whose prompt's states are wanted."""
    return {"kv_transfer_params": {_REQUEST_KEY: ticket.name}}


def is_capturing(config: VllmConfig) -> bool:
    """Whether an engine's configuration has capture turned on."""
    transfer = config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == StatesConnector.__name__


@dataclass
class _Job:
    """States to copy out: those of a prompt whose last part is computed in this step."""

    ticket: str
    blocks: list[int]
    tokens: int


@dataclass
class _Jobs(KVConnectorMetadata):
    """What the scheduler's side tells the worker's side with each step."""

    jobs: list[_Job] = field(default_factory=list)


class StatesConnector(KVConnectorBase_V1, SupportsHMA):
    """Copies the states of prompts out of the engine. vLLM makes one for its scheduler and one per worker."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("capture of hidden states does not work with pipeline parallelism")
        self._group = _states_group(kv_cache_config)
        self._block_size = kv_cache_config.kv_cache_groups[self._group].kv_cache_spec.block_size
        # The scheduler's side: request -> ticket and length of its prompt, until the prompt is computed.
        self._wanted: dict[str, tuple[str, int]] = {}
        # The worker's side.
        self._cache: torch.Tensor | None = None
        self._writes = True
        self._stream: torch.cuda.Stream | None = None
        self._writers = ThreadPoolExecutor(_WRITER_THREADS, thread_name_prefix="m3agiqa-states")

    # The scheduler's side

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is owed to a request that is preempted after its prompt: the states have left by then."""
        return False

    def on_new_request(self, request: "Request") -> None:
        ticket = (request.kv_transfer_params or {}).get(_REQUEST_KEY)
        if ticket is not None:
            self._wanted[request.request_id] = (ticket, request.num_prompt_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> _Jobs:
        cached = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        jobs = _Jobs()
        for request in [request for request in computed if request in self._wanted]:
            ticket, length = self._wanted[request]
            if computed[request] + scheduler_output.num_scheduled_tokens[request] < length:
                continue
            del self._wanted[request]
            state = scheduler_output.kv_connector_block_state
            assert state is not None
            blocks = state.get_block_ids(request)
            assert blocks is not None
            jobs.jobs.append(_Job(ticket, list(blocks[self._group]), length))
        return jobs

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._wanted.pop(request.request_id, None)
        return False, None

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: "Request", blocks: Any, num_external_tokens: int) -> None:
        pass

    # The worker's side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        layers = get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches))
        if len(layers) != 1:
            raise ValueError("this model keeps no hidden states: is m3agiqa's plugin excluded by VLLM_PLUGINS?")
        # [blocks, 1, block size, width]
        self._cache = kv_caches[next(iter(layers))]
        if self._cache.shape[1:3] != (1, self._block_size):
            raise ValueError(f"a cache of {tuple(self._cache.shape)} does not have blocks of {self._block_size} tokens")
        for cache in kv_caches.values():
            if cache.is_cpu:
                # The system gives memory on first use: what there is not is to be missed now, and not after hours.
                cache.zero_()
        # States are the same on all ranks.
        self._writes = get_tensor_model_parallel_rank() == 0

    def wait_for_save(self) -> None:
        # vLLM calls it after the step's forward has been computed (CPU) or enqueued (CUDA).
        if not self._writes or not self.has_connector_metadata():
            return
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, _Jobs)
        for job in metadata.jobs:
            self._copy_out(job)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def shutdown(self) -> None:
        self._writers.shutdown()

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str:
        # Keeps the states of a token together.
        return "LBNHC"

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        # The model's hook runs between graphs, not in one.
        return True

    def _copy_out(self, job: _Job) -> None:
        cache = self._cache
        assert cache is not None
        if not cache.is_cuda:
            # Done before the step's tokens are returned: nobody ever waits.
            _write(job, cache.shape[3], cache.dtype, lambda rows: _gather(cache, job, rows))
            return
        # In order with the forward that wrote the states and those that may overwrite them.
        blocks = torch.tensor(job.blocks, pin_memory=True).to(cache.device, non_blocking=True)
        states = cache[blocks, 0].flatten(0, 1)[: job.tokens]
        self._stream = self._stream or torch.cuda.Stream(cache.device)
        self._stream.wait_stream(torch.cuda.current_stream(cache.device))
        with torch.cuda.stream(self._stream):
            pinned = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
            pinned.copy_(states, non_blocking=True)
            states.record_stream(self._stream)
            done = torch.cuda.Event()
            done.record()

        def write() -> None:
            done.synchronize()
            _write(job, pinned.shape[1], pinned.dtype, lambda rows: rows.copy_(pinned))

        self._writers.submit(write)


def _states_group(config: "KVCacheConfig") -> int:
    """Which of a request's block tables is that of the states."""
    groups = config.kv_cache_groups
    own = [i for i, group in enumerate(groups) if isinstance(group.kv_cache_spec, HiddenStateCacheSpec)]
    if len(own) == 1 or len(groups) == 1:
        # A model with one kind of attention has one table for all its layers.
        return own[0] if own else 0
    raise ValueError(f"cannot tell the hidden states' cache among {len(groups)} groups of layers")


def _gather(cache: torch.Tensor, job: _Job, rows: torch.Tensor) -> None:
    size = cache.shape[2]
    for i, block in enumerate(job.blocks[: -(-job.tokens // size)]):
        part = rows[i * size : (i + 1) * size]
        part.copy_(cache[block, 0, : len(part)])


def _write(job: _Job, width: int, dtype: torch.dtype, fill: Any, root: Path = SHARED_MEMORY) -> None:
    try:
        write_states(job.ticket, job.tokens, width, dtype, fill, root)
    # The boundary of one request: the engine goes on with the others, and the one that asked is told.
    except Exception as error:  # noqa: BLE001
        _log.warning("hidden states of one request were not handed over: %r", error)
        _report(job, f"{error!r}", root)


def _report(job: _Job, reason: str, root: Path) -> None:
    try:
        write_failure(job.ticket, reason, root)
    except (OSError, ValueError) as error:
        _log.warning("and the request could not be told: %r", error)
