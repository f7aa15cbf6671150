"""LoRA adapters: finding and checking them, and what each engine needs in order to apply them.

Light to import. `load` reads the configured adapters and holds them against the base model, `vllm` and
`peft` put them into the two engines (or refuse them), `merge` writes a full checkpoint.
"""

from m3agiqa.adapters.files import Adapter
from m3agiqa.adapters.load import load_adapters, trained_on
from m3agiqa.adapters.merge import merge_adapter
from m3agiqa.adapters.peft import add_to_transformers, use_adapter
from m3agiqa.adapters.vllm import add_to_vllm, check_for_vllm, distinct, tower_adapters, vllm_lora_args

__all__ = [
    "Adapter",
    "add_to_transformers",
    "add_to_vllm",
    "check_for_vllm",
    "distinct",
    "load_adapters",
    "merge_adapter",
    "tower_adapters",
    "trained_on",
    "use_adapter",
    "vllm_lora_args",
]
