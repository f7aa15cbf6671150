"""A model with what is learnt of it: LoRA layers by PEFT, what it says to a batch, and how far that is off.

Shapes: B conversations, T tokens, H numbers a token, N tokens that are learnt from, in all conversations together.
"""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from m3agiqa.aspects import RATING_LEVELS
from m3agiqa.config import ModelConfig
from m3agiqa.engine.pictures import Tensors, image_inputs, stack
from m3agiqa.errors import UserError
from m3agiqa.finetune_config import FinetuneConfig
from m3agiqa.finetuning.encoding import Batch
from m3agiqa.finetuning.pictures import Prepared, Seen
from m3agiqa.models import takes_images

ADAPTER = "default"
"""PEFT's name of the adapter while it is trained; its tensors in a file are named without it."""


class Outcome(NamedTuple):
    """What a batch came to.

    Attributes:
        loss: [B], the weighted cross-entropies of a conversation added up. weight: [B], what they add up to.
        ratings: [B, 5], logits of the rating words where the rating begins.
    """

    loss: torch.Tensor
    weight: torch.Tensor
    ratings: torch.Tensor

    def expected(self) -> torch.Tensor:
        """Expected scores [B] of the ratings, 0 to 5."""
        levels = torch.tensor(RATING_LEVELS, device=self.ratings.device)
        return self.ratings.softmax(-1) @ levels


def load_model(folder: Path, model: ModelConfig, attention: str, *, text_only: bool) -> Any:
    """A checkpoint in the precision of `model.dtype`, as the transformers engine loads it, nothing of it trainable."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    dtype = model.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
    loader: Any = AutoModelForCausalLM if text_only and not takes_images(folder) else AutoModelForImageTextToText
    loaded = loader.from_pretrained(
        folder, dtype=dtype, trust_remote_code=model.trust_remote_code, attn_implementation=attention
    )
    return loaded.requires_grad_(False)


class Learner(nn.Module):
    """A model with LoRA layers.

    Args:
        model: from `load_model`. word_ids: the first token of each rating word.
        image_token_id: of the placeholder; None in a training of text only.

    Raises:
        UserError: if nothing of the model is called as `lora.targets` says, or vision is asked for and there is none.
    """

    def __init__(self, model: Any, config: FinetuneConfig, word_ids: Sequence[int], image_token_id: int | None) -> None:
        super().__init__()
        from peft import inject_adapter_in_model

        self._parts = _parts(model)
        self.targets = targets(model, config)
        torch.manual_seed(config.optim.seed)
        self.model: Any = inject_adapter_in_model(lora_config(config, self.targets), model, ADAPTER)
        self._word_ids, self._image_token_id = list(word_ids), image_token_id
        self._bf16 = config.compute.precision == "bf16"
        self._checkpoints = config.compute.gradient_checkpointing
        if self._checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        for module in self.modules():
            if hasattr(module, "lora_A"):
                # Autocast brings inputs to bf16 by itself; by way of float32 they would be copied twice.
                vars(module)["cast_input_dtype_enabled"] = not self._bf16
        self.sees = "mm_encoder_outputs" in inspect.signature(type(model.model).forward).parameters
        """Whether the model takes what its vision side has made of an image, so that it need look only once."""
        self.frozen_eye = not (config.lora.vision or config.lora.connector)

    def learnt(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    def train(self, mode: bool = True) -> "Learner":
        """Dropout on or off; the vision side keeps it off where it learns nothing."""
        super().train(mode)
        if self.frozen_eye and (eye := self._parts["vision"]):
            self.model.get_submodule(eye).eval()
        return self

    def forward(self, batch: Batch) -> Outcome:
        """What a batch comes to. The loss has a gradient, if gradients are on."""
        device = batch.ids.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._bf16):
            inputs = self._image_inputs(batch)
            states = self.model.model(
                input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **inputs
            ).last_hidden_state
            rows = torch.arange(len(batch.ids), device=device)
            # What comes before a token predicts it; states of what is not learnt never reach the head.
            learn = batch.weights[:, 1:] != 0
            logits = self._logits(states[:, :-1][learn])
            ratings = self._logits(states[rows, batch.rating_at - 1])[:, self._word_ids]
        weights = batch.weights[:, 1:]
        losses = F.cross_entropy(logits, batch.ids[:, 1:][learn], reduction="none") * weights[learn]
        of_talk = rows[:, None].expand_as(learn)[learn]
        return Outcome(losses.new_zeros(len(rows)).index_add(0, of_talk, losses), weights.sum(1), ratings)

    @torch.no_grad()
    def look(self, images: Sequence[Tensors]) -> list[Seen]:
        """What the vision side makes of some images of one shape, on the CPU."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._bf16):
            return [_to(seen, torch.device("cpu")) for seen in self._see(images, device)]

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocabulary] in float32 of states [n, H]."""
        logits = self.model.get_output_embeddings()(states).float()
        text = self.model.config.get_text_config()
        logits = logits * (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
        if cap := getattr(text, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return logits

    def _image_inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model takes of the images of a batch."""
        if not batch.images:
            return {}
        assert self._image_token_id is not None
        device, each = batch.ids.device, [batch.images[i] for i in batch.image_of]
        inputs: dict[str, Any] = image_inputs([one.tensors for one in each], batch.ids, self._image_token_id)
        if not self.sees:
            return {key: self._fitting(value) for key, value in inputs.items()}
        seen = self._all_seen(batch.images, device)
        joined = _join([seen[i] for i in batch.image_of])
        rest = {key: value for key, value in inputs.items() if not key.startswith("pixel")}
        return rest | {"mm_encoder_outputs": {"image": joined}}

    def _fitting(self, value: torch.Tensor) -> torch.Tensor:
        """An image's tensor in the precision of the model's weights."""
        return value.to(self.model.get_input_embeddings().weight.dtype) if value.is_floating_point() else value

    def _all_seen(self, images: Sequence[Prepared], device: torch.device) -> list[Seen]:
        """Each image as the vision side sees it: as it was kept, or by looking now, those of one shape together."""
        found: dict[int, Seen] = {i: _to(one.seen, device) for i, one in enumerate(images) if one.seen is not None}
        by_shape: dict[tuple[Any, ...], list[int]] = {}
        for i, one in enumerate(images):
            if i not in found:
                shapes = tuple((key, tuple(value.shape)) for key, value in sorted(one.tensors.items()))
                by_shape.setdefault(shapes, []).append(i)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_eye):
            for numbers in by_shape.values():
                found |= zip(numbers, self._see([images[i].tensors for i in numbers], device), strict=True)
        return [found[i] for i in range(len(images))]

    def _see(self, images: Sequence[Tensors], device: torch.device) -> list[Seen]:
        taken = inspect.signature(type(self.model.model).get_image_features).parameters
        inputs = {key: stack([one[key] for one in images]).to(device) for key in images[0] if key in taken}
        inputs = {key: self._fitting(value) for key, value in inputs.items()}
        out = self.model.model.get_image_features(**inputs, return_dict=True)
        deep = getattr(out, "deepstack_features", None) or ()
        pooled, *layers = (_cut(values, len(images)) for values in (out.pooler_output, *deep))
        pieces = not isinstance(out.pooler_output, torch.Tensor)
        return [Seen(pooled[i], tuple(layer[i] for layer in layers), pieces) for i in range(len(images))]


def _cut(values: Any, images: int) -> list[tuple[torch.Tensor, ...]]:
    """What a model gives for several images of one shape, image by image."""
    if isinstance(values, torch.Tensor):
        return [(part,) for part in values.chunk(images)]
    each = len(values) // images
    return [tuple(values[i * each : (i + 1) * each]) for i in range(images)]


def _join(seen: Sequence[Seen]) -> Any:
    """Images one after the other, in the form in which the model gives them itself."""

    def together(pieces: list[torch.Tensor]) -> Any:
        return pieces if seen[0].pieces else torch.cat(pieces)

    pooled = together([piece for one in seen for piece in one.pooled])
    depth = range(len(seen[0].deepstack))
    deep = [together([piece for one in seen for piece in one.deepstack[layer]]) for layer in depth]
    return SimpleNamespace(pooler_output=pooled, deepstack_features=deep)


def _to(seen: Seen, device: torch.device) -> Seen:
    deep = tuple(tuple(piece.to(device) for piece in layer) for layer in seen.deepstack)
    return Seen(tuple(piece.to(device) for piece in seen.pooled), deep, seen.pieces)


def lora_config(config: FinetuneConfig, targets: str) -> Any:
    """PEFT's settings of an adapter, as adapter_config.json holds them."""
    from peft import LoraConfig

    lora = config.lora
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.model.path,
        revision=config.model.revision,
    )


def targets(model: Any, config: FinetuneConfig) -> str:
    """A pattern of the names of all modules that get a change.

    Raises:
        UserError: if a part that is to be trained has no such module.
    """
    wanted = {"language": True, "vision": config.lora.vision, "connector": config.lora.connector}
    modules = _linear_modules(model)
    patterns, chosen = [], set()
    for part in (part for part, is_wanted in wanted.items() if is_wanted):
        names = [n for n in modules[part] if config.lora.targets is None or n.rpartition(".")[2] in config.lora.targets]
        if not names:
            there = sorted({name.rpartition(".")[2] for name in modules[part]})
            rule = f"the model has no such projection in its {part} part"
            cure = f"it has {', '.join(there)}" if there else f"set lora.{part}=false"
            raise UserError(f"lora.targets={','.join(config.lora.targets or ('null',))}", rule, cure)
        leaves = sorted({name.rpartition(".")[2] for name in names})
        start = _parts(model)[part] or _common(names)
        patterns.append(rf"{re.escape(start)}\.(.*\.)?({'|'.join(map(re.escape, leaves))})")
        chosen |= set(names)
    pattern = patterns[0] if len(patterns) == 1 else "|".join(f"({pattern})" for pattern in patterns)
    if {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)} == chosen:
        return pattern
    # Something else goes by the name of a projection: the convolution that cuts up images, say.
    return "|".join(map(re.escape, sorted(chosen)))


def _parts(model: Any) -> dict[str, str]:
    """Names of the modules that the language model, the vision tower and the connector are; empty: not one module."""
    names = {id(module): name for name, module in model.named_modules()}
    decoder, eye = model.get_decoder(), model.get_encoder("image")
    vision = "" if eye in (model, model.model, decoder) else names.get(id(eye), "")
    return {"language": names[id(decoder)], "vision": vision, "connector": ""}


def _linear_modules(model: Any) -> dict[str, list[str]]:
    """Names of the linear projections of each part; what is neither language nor vision leads from one to the other."""
    parts = _parts(model)
    found: dict[str, list[str]] = {part: [] for part in parts}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            inside = (p for p in ("vision", "language") if parts[p] and name.startswith(f"{parts[p]}."))
            found[next(inside, "connector")].append(name)
    return found


def _common(names: Sequence[str]) -> str:
    """The module that holds all of some modules."""
    parents = [name.split(".")[:-1] for name in names]
    shared = next(
        (i for i, parts in enumerate(zip(*parents, strict=False)) if len(set(parts)) > 1), min(map(len, parents))
    )
    return ".".join(parents[0][:shared])
