"""Qwen's models of text and images, made to keep their states as `vllm_models` has it.

In a file of its own: vLLM's modules of them need torchvision, of which there is none for a CPU beside vLLM's build.
"""

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from m3agiqa.engine.vllm_models import keep_states


class Qwen3VLWithStates(Qwen3VLForConditionalGeneration):
    """Qwen3-VL. What its vision side adds to the first layers (deepstack) is in the states like all else."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        keep_states(self, vllm_config)


class Qwen25VLWithStates(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL. Its language model is `Qwen2WithStates` with a prefix, which keeps nothing itself."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        keep_states(self, vllm_config)
