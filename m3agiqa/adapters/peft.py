"""Adapters in a transformers model, by PEFT."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from m3agiqa.adapters.files import Adapter, listed
from m3agiqa.adapters.vllm import distinct
from m3agiqa.aspects import Aspect
from m3agiqa.errors import UserError


def add_to_transformers(model: Any, adapters: Mapping[Aspect, Adapter]) -> Any:
    """Puts LoRA layers for all adapters into `model`, in place.

    Returns:
        A PeftModel to give to `use_adapter`, or None if there are no adapters. Keep calling `model` itself.

    Raises:
        UserError: if PEFT finds no place for a tensor, or no tensor for a place.
    """
    peft_model = None
    for adapter in distinct(adapters):
        peft_model = attach(peft_model or model, adapter)
    return peft_model


@contextlib.contextmanager
def use_adapter(peft_model: Any, adapter: Adapter | None) -> Iterator[None]:
    """Runs the block with one adapter, or with the base model where there is none."""
    if peft_model is None:
        assert adapter is None
        yield
    elif adapter is None:
        with peft_model.disable_adapter():
            yield
    else:
        peft_model.set_adapter(adapter.name)
        yield


def attach(model: Any, adapter: Adapter) -> Any:
    """Adds one adapter of any kind that PEFT knows to a model or PeftModel, and checks that all of it was loaded."""
    from peft import PeftConfig, PeftModel

    if not isinstance(model, PeftModel):
        config = PeftConfig.from_pretrained(str(adapter.folder))
        config.inference_mode = True
        try:
            model = PeftModel(model, config, adapter.name, low_cpu_mem_usage=_starts_empty(adapter))
        except ValueError as error:
            # PEFT's word for target modules that the model does not have.
            raise UserError(f"adapter {adapter.folder}", f"does not fit the model: {error}", _CURE) from None
    device = str(next(model.parameters()).device)
    result = model.load_adapter(
        adapter.folder, adapter.name, torch_device=device, low_cpu_mem_usage=_starts_empty(adapter)
    )
    strange = [*result.missing_keys, *result.unexpected_keys]
    if strange:
        rule = f"{len(strange)} of its tensors have no place in the model ({listed(strange)})"
        raise UserError(f"adapter {adapter.folder}", rule, _CURE)
    return model.eval()


_CURE = "give the model that it was trained from as model.path"


def _starts_empty(adapter: Adapter) -> bool:
    """Whether the layers can wait for the file's weights, rather than be initialised from the base model's."""
    return not isinstance(adapter.settings.get("init_lora_weights", True), str)
