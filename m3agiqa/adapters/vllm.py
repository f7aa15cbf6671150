"""Adapters in vLLM: what it would not apply is refused, before the engine starts and again inside it.

vLLM 0.32 (`vllm/lora/`) checks an adapter's settings and the *last part* of its module names when it loads
it, then looks up each module that it wrapped by full name. What no wrapped module asks for is dropped in
silence: adapters on the vision side (its modules share the names `q_proj`, `fc1`, ... with the language
model's), and every adapter whose names have another prefix than vLLM's. Saved embeddings are skipped.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3agiqa.adapters.files import Adapter, listed
from m3agiqa.aspects import Aspect
from m3agiqa.errors import UserError
from m3agiqa.models import model_config_json

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's `max_lora_rank` takes (`vllm.config.lora.MaxLoRARanks`)."""

LANGUAGE_MODULES = {
    "Idefics3ForConditionalGeneration": "model.text_model.",
    "SmolVLMForConditionalGeneration": "model.text_model.",
    "MiniCPMV": "llm.",
}
"""Architecture -> prefix of the modules that vLLM wraps (its `get_mm_mapping`), where it is known for certain."""

TOWER_LORA = {"Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"}
"""Those of them whose vision side takes LoRA with `enable_tower_connector_lora`."""

_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# Of other architectures: how their vision sides and connectors are called.
_VISION = re.compile(
    r"(^|\.)(vision\w*|visual|vit|vpm|apm|\w*tower|image_encoder|connector|resampler|perceiver\w*|merger"
    r"|multi_modal_projector|mm_projector|mlp1|audio\w*)\."
)
_EMBEDDINGS = {"embed_tokens", "lm_head", "wte", "word_embeddings"}
# As in vLLM's PEFTHelper: these only say how training began. Others change the base model's weights.
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}
_UNSUPPORTED = {
    "use_dora": "is DoRA",
    "lora_bias": "has biases in its LoRA layers",
    "alora_invocation_tokens": "is an activated LoRA",
    "layer_replication": "replicates layers",
    "use_bdlora": "is block-diagonal",
    "use_qalora": "is QA-LoRA",
    "trainable_token_indices": "holds single embeddings (trainable_token_indices)",
    "target_parameters": "acts on bare parameters (target_parameters)",
    "monteclora_config": "is MonteCLoRA",
    "velora_config": "is VeLoRA",
    "arrow_config": "routes between adapters (Arrow)",
    "kasa_config": "is KaSA",
}


def vllm_lora_args(adapters: Mapping[Aspect, Adapter]) -> dict[str, Any]:
    """The engine arguments for these adapters, all of them in memory at once; empty if there are none.

    Raises:
        UserError: if a rank is beyond what vLLM takes.
    """
    loaded = distinct(adapters)
    if not loaded:
        return {}
    # On a CPU vLLM 0.32 gives a request without an adapter the weights of the last slot where the batch
    # also holds requests with one (their index, -1, is taken from the end): a slot that stays empty.
    plain = len(adapters) < len(Aspect)
    highest = max(loaded, key=lambda adapter: adapter.rank)
    _check_rank(highest)
    return {
        "enable_lora": True,
        "max_loras": len(loaded) + plain,
        "max_lora_rank": next(rank for rank in MAX_LORA_RANKS if rank >= highest.rank),
        "worker_extension_cls": f"{__name__}.{AdapterReport.__name__}",
    }


def distinct(adapters: Mapping[Aspect, Adapter]) -> list[Adapter]:
    """Each adapter once, in the order of the aspects."""
    return list(dict.fromkeys(adapters[aspect] for aspect in Aspect if aspect in adapters))


def tower_adapters(vllm_args: Mapping[str, Any]) -> bool:
    """Whether the engine is told to apply adapters to the vision tower and the connector too."""
    return bool(vllm_args.get("enable_tower_connector_lora"))


def check_for_vllm(adapter: Adapter, model: Path, *, tower: bool = False) -> None:
    """Refuses an adapter of which vLLM would drop something or which it does not support.

    Args:
        model: the base model's folder.
        tower: whether the engine runs with `enable_tower_connector_lora`.

    The architectures of `LANGUAGE_MODULES` are judged exactly. Of others, what is known to be left out
    for all is; `add_to_vllm` asks the engine for the rest.

    Raises:
        UserError: names the first tensors and how many there are, and the cure.
    """
    settings = adapter.settings
    reasons = [text for key, text in _UNSUPPORTED.items() if settings.get(key)]
    if settings.get("bias", "none") != "none":
        reasons.append(f"trains the model's biases (bias={settings['bias']})")
    init = settings.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        reasons.append(f"changes the base model's weights (init_lora_weights={init})")
    if settings.get("modules_to_save"):
        full = listed(list(adapter.full_tensors))
        reasons.append(f"holds whole modules (modules_to_save={', '.join(settings['modules_to_save'])}: {full})")
    if reasons:
        raise _refusal(adapter, model, f"{'; '.join(reasons)}: vLLM does not support that")
    _check_rank(adapter)
    tensors = _not_applied(adapter, model, tower=tower)
    if tensors:
        raise _refusal(adapter, model, f"vLLM would not apply {len(tensors)} of its tensors ({listed(tensors)})")


def _not_applied(adapter: Adapter, model: Path, *, tower: bool) -> list[str]:
    architectures = model_config_json(model).get("architectures") or []
    known = next((name for name in architectures if name in LANGUAGE_MODULES), None)
    pairs = {tensor: module for module, ab in adapter.lora_modules.items() for tensor in ab}
    return [t for t in adapter.shapes if t not in pairs or not _is_wrapped(pairs[t], known, tower=tower)]


def _is_wrapped(module: str, architecture: str | None, *, tower: bool) -> bool:
    leaf = module.rpartition(".")[2]
    # vLLM wraps embeddings for some classes, but heads that read the states count on the base model's.
    if leaf in _EMBEDDINGS:
        return False
    if architecture is None:
        return tower or not _VISION.search(module)
    if module.startswith(LANGUAGE_MODULES[architecture]):
        return leaf in _PROJECTIONS
    return tower and architecture in TOWER_LORA and bool(_VISION.search(module))


def _check_rank(adapter: Adapter) -> None:
    if adapter.rank > MAX_LORA_RANKS[-1]:
        raise UserError(
            f"adapter {adapter.folder}",
            f"has rank {adapter.rank}, and vLLM takes at most {MAX_LORA_RANKS[-1]}",
            "merge it into the model first: m3agiqa merge-adapter",
        )


def _refusal(adapter: Adapter, model: Path | str, rule: str) -> UserError:
    cure = f"merge it into the model first: m3agiqa merge-adapter --model {model} --adapter {adapter.folder} --out DIR"
    return UserError(f"adapter {adapter.folder}", rule, f"{cure}, then give DIR as model.path")


async def add_to_vllm(engine: Any, adapters: Mapping[Aspect, Adapter]) -> dict[Aspect, "LoRARequest"]:
    """Loads the adapters into a running AsyncLLM and makes sure that every weight has found its module.

    Args:
        engine: started with `vllm_lora_args`. Call this on the event loop that the engine is used on.

    Returns:
        What to pass as `lora_request` for each aspect; aspects without an adapter are not in it.

    Raises:
        UserError: if the engine has left out weights of an adapter, naming the modules.
    """
    from vllm.lora.request import LoRARequest

    requests: dict[Adapter, LoRARequest] = {}
    for adapter in distinct(adapters):
        # vLLM knows adapters by this number alone and would take another one under it for loaded.
        number = int(adapter.digest[:7], 16) + 1
        requests[adapter] = LoRARequest(adapter.name, number, str(adapter.folder))
        await engine.add_lora(requests[adapter])
        reports = await engine.collective_rpc(AdapterReport.m3agiqa_left_out.__name__, args=(number,))
        left_out = _in_all(reports)
        if left_out:
            rule = f"vLLM has left out its weights of {len(left_out)} modules ({listed(left_out)})"
            raise _refusal(adapter, "MODEL", rule)
    return {aspect: requests[adapter] for aspect, adapter in adapters.items()}


def _in_all(reports: Iterable[list[str]]) -> list[str]:
    """What no worker has applied: with pipeline parallelism each has a part of the model."""
    sets = [set(report) for report in reports]
    return sorted(set.intersection(*sets)) if sets else []


class AdapterReport:
    """Methods that vLLM adds to its workers (`worker_extension_cls`)."""

    def m3agiqa_left_out(self, adapter_id: int) -> list[str]:
        """Modules that a loaded adapter has weights for and that this worker has not put them on."""
        manager = self.get_model().lora_manager  # type: ignore[attr-defined]
        # Weights of packed modules (q, k, v) lie under the packed name (qkv) by now.
        return sorted(set(manager.get_adapter(adapter_id).loras) - set(manager.modules))
