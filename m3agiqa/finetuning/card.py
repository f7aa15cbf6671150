"""An adapter's folder: its weights and settings as PEFT has them, and the card that says where they come from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from m3agiqa.corpus.files import is_local
from m3agiqa.finetune_config import FinetuneConfig
from m3agiqa.finetuning.figures import Figures
from m3agiqa.finetuning.learner import ADAPTER, lora_config
from m3agiqa.seen import FILE as TRAINED_ON
from m3agiqa.seen import Seen
from m3agiqa.settings import dump_config

SHEET = "m3agiqa.json"
"""The file of an adapter's folder that names its training, base model and figures."""


def write_adapter(
    folder: Path, weights: Mapping[str, torch.Tensor], targets: str, config: FinetuneConfig, met: Seen | None = None
) -> None:
    """Writes what PEFT and vLLM load, and what the training has met.

    Args:
        weights: by their names in the model (`Trainer.weights`). targets: pattern of the modules that are changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor for name, tensor in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = lora_config(config, targets)
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    if met is not None:
        met.write(folder / TRAINED_ON)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read


def write_sheet(folder: Path, config: FinetuneConfig, provenance: Mapping[str, Any]) -> None:
    """Writes what identifies the adapter's training. The last file of a folder: with it, it is whole.

    Args:
        provenance: with the sections of the configuration that decide the weights under `config`.
    """
    told = _told(config).model_dump(mode="json", include=set(provenance["config"]))
    text = json.dumps({"provenance": {**provenance, "config": told}}, indent=1, ensure_ascii=False)
    (folder / SHEET).write_text(text + "\n", encoding="utf-8")


def write_card(folder: Path, config: FinetuneConfig, facts: Mapping[str, Any]) -> None:
    """Writes README.md.

    Args:
        facts: `base`, `aspects`, `inputs`, `counts`, `validation`, `step`, `steps`, `proof` and `notes`.
    """
    config = _told(config)
    merge = config.lora.vision or config.lora.connector
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {config.model.path}",
        "tags: [lora, m3agiqa, image-quality]",
        "---",
        f"# LoRA adapter for {', '.join(facts['aspects'])}, by m3agiqa finetune",
        "",
        f"Base model: `{config.model.path}` (digest `{facts['base']}`). To score with it: "
        f"`m3agiqa score --set model.path={config.model.path} model.adapters=FOLDER "
        f"scoring.conversation={config.data.conversation} scoring.aspects={','.join(facts['aspects'])}`.",
    ]
    if merge:
        lines.append(
            "It changes the vision side too. vLLM applies that for Idefics3 with "
            "`engine.vllm_args={enable_tower_connector_lora: true}`; for other models merge it first "
            "(`m3agiqa merge-adapter`)."
        )
    lines += ["", "## Data", "", *[f"- `{_public(one)}`" for one in facts["inputs"]], ""]
    lines += [
        f"- {part}: " + ", ".join(f"{count} {name}" for name, count in counts.items())
        for part, counts in facts["counts"].items()
    ]
    lines += [*[f"- {note}" for note in facts["notes"]], "", "## Measured", ""]
    lines += [
        f"On the validation part, given the teacher's descriptions (step {facts['step']} of {facts['steps']}):",
        "",
    ]
    lines += [*_table(facts["validation"]), ""]
    proof = facts["proof"]
    lines += [f"On {proof['images']} of its images, with descriptions of its own, by the {proof['engine']} engine:", ""]
    lines += [*_table(proof["figures"]), ""]
    lines += ["SRCC is of the expected rating with the human score, or with the word where there is no score.", ""]
    lines += ["## Settings", "", "```yaml", dump_config(config).rstrip(), "```", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _table(found: Mapping[str, Figures]) -> list[str]:
    rows = ["| aspect | conversations | loss | right word | within one | SRCC |", "|---|---|---|---|---|---|"]
    for name, one in found.items():
        loss, srcc = ("--" if value is None else f"{value:.3f}" for value in (one["loss"], one["srcc"]))
        right, within = f"{one['accuracy']:.3f}", f"{one['within_one']:.3f}"
        rows.append(f"| {name} | {one['conversations']} | {loss} | {right} | {within} | {srcc} |")
    return rows


def _told(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration for readers elsewhere."""
    images, storage = (path and _public(path) for path in (config.corpus.images, config.ray.storage))
    told = {
        "model": {"path": _public(config.model.path)},
        "access": {"roots": tuple(map(_public, config.access.roots))},
        "corpus": {"images": images},
        "ray": {"storage": storage},
    }
    return config.model_copy(update={name: getattr(config, name).model_copy(update=new) for name, new in told.items()})


def _public(uri: str) -> str:
    """A place for readers elsewhere: of a local one its last two names, and not where it lies on this machine."""
    return "/".join([name for name in Path(uri).parts if name not in ("/", "~", "..")][-2:]) if is_local(uri) else uri
