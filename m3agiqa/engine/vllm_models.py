"""vLLM's models, made to keep their last hidden states beside the KV cache where capture is on.

vLLM imports this in the engine's processes only; `vllm_plugins` names the classes.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer, basic_cache
from vllm.model_executor.models.idefics3 import Idefics3ForConditionalGeneration
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.minicpmv import MiniCPMV
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from m3agiqa.engine.vllm_capture import is_capturing


class Idefics3WithStates(Idefics3ForConditionalGeneration):
    """Idefics3, whose language model may be any that vLLM gives it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        keep_states(self, vllm_config)


class MiniCPMVWithStates(MiniCPMV):
    """MiniCPM-V. vLLM's class makes an object of another class, that of the checkpoint's version."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        model = super().__new__(cls, vllm_config=vllm_config, prefix=prefix)
        keep_states(model, vllm_config)
        return model


class LlamaWithStates(LlamaForCausalLM):
    """Llama without an image."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        _keep_states_of_a_whole_model(self, vllm_config, prefix)


class Qwen2WithStates(Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 without an image."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _keep_states_of_a_whole_model(self, vllm_config, prefix)


class Qwen3WithStates(Qwen3ForCausalLM):
    """Qwen3 without an image."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _keep_states_of_a_whole_model(self, vllm_config, prefix)


def _keep_states_of_a_whole_model(model: nn.Module, vllm_config: VllmConfig, prefix: str) -> None:
    # With a prefix it is the language model within another, which keeps the states itself.
    if not prefix:
        keep_states(model, vllm_config)


def keep_states(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Has `model` write what its forward returns (its states after the final norm) into a cache of their own.

    The cache is paged like the KV cache and shares its block tables, so that positions that come from the
    prefix cache have their states there already. vLLM writes a draft model's input to such a layer for its
    `extract_hidden_states`; done here, no speculative decoding is needed, which would halve the speed of
    decoding and does not go together with `logit_bias` and `logprob_token_ids`.
    """
    if not is_capturing(vllm_config):
        return
    config = vllm_config.model_config
    cache = vllm_config.cache_config
    # A cache in 8 bits is for keys and values; states are kept as the model has them.
    cache = cache if cache.cache_dtype == "auto" else replace(cache, cache_dtype="auto")
    # vLLM orders cache layers by the number in their names: this one comes after the model's own.
    name = f"m3agiqa_states.{config.get_total_num_hidden_layers()}"
    layer = CacheOnlyAttentionLayer(num_heads=1, head_size=config.get_hidden_size(), cache_config=cache, prefix=name)

    def keep(_model: nn.Module, _inputs: tuple[Any, ...], states: torch.Tensor) -> None:
        slots = get_forward_context().slot_mapping
        # vLLM gives one mapping per micro-batch where it overlaps two; start-up runs have none at all.
        assert isinstance(slots, dict), "capture does not work with dual-batch overlap"
        if name in slots:
            basic_cache(states[: slots[name].shape[0]].unsqueeze(1), layer.kv_cache, slots[name])

    model.register_forward_hook(keep)
