"""Configurations: frozen, typed, every field documented; here that of a scoring run. Light to import.

A config is read from YAML, changed by `key=value` overrides (`engine.kind=transformers`), and refused
with the nearest name where a key does not exist.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from m3agiqa.aspects import Aspect
from m3agiqa.errors import UserError

TINY_MODEL = "tiny"
"""The name under which the embedded demonstration model is known."""


class Section(BaseModel):
    """A named group of keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Config(Section):
    """A configuration: every field is a section."""

    docs: ClassVar[str] = "m3agiqa config --docs"
    """The command that explains its keys."""

    @model_validator(mode="before")
    @classmethod
    def _sections_are_mappings(cls, value: Any) -> Any:
        for name in cls.model_fields:
            if isinstance(value, dict) and name in value and value[name] is None:
                raise ValueError(f"section {name!r} is empty; remove it or give it keys")
        return value


ConfigT = TypeVar("ConfigT", bound=Config)


class ModelConfig(Section):
    """Which multimodal language model judges, and in what precision."""

    path: str = Field(TINY_MODEL, description="`tiny` (embedded), a local folder, or a Hugging Face hub id")
    adapters: str | dict[Aspect, str | None] | None = Field(
        None, description="LoRA adapter (folder or hub id) for all aspects, or one by aspect; null: none"
    )
    revision: str | None = Field(None, description="Commit, tag or branch of a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of weights and activations; auto takes the checkpoint's"
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the checkpoint")
    max_model_len: int | None = Field(None, gt=0, description="Context in tokens; null takes the model's own")
    image_token: str | None = Field(
        None, description="Placeholder of the image in the chat template; null asks the processor"
    )
    content_parts: bool = Field(
        True, description="Whether the chat template takes content as parts; false for MiniCPM-V 2.5"
    )


class EngineConfig(Section):
    """What runs the model."""

    kind: Literal["vllm", "transformers", "simulated"] = Field(
        "vllm", description="vllm (fast), transformers (no vLLM needed), simulated (no model: load tests, dry runs)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the transformers engine runs")
    batch_size: int = Field(16, gt=0, description="Conversations at once in the transformers engine")
    max_num_seqs: int | None = Field(None, gt=0, description="Most sequences at once in vLLM; null: vLLM's default")
    max_num_batched_tokens: int | None = Field(
        None, gt=0, description="Tokens per vLLM step; smaller forces chunked prefill; null: vLLM's default"
    )
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of a GPU's memory for vLLM")
    cpu_kv_cache_gib: int = Field(1, gt=0, description="KV cache of vLLM on a CPU, in GiB")
    tensor_parallel_size: int = Field(1, gt=0, description="GPUs that share one engine")
    enforce_eager: bool | None = Field(
        None, description="No CUDA graphs or compilation; null: eager on a CPU, graphs on a GPU"
    )
    batch_invariant: bool = Field(
        False, description="vLLM's mode in which a result does not depend on the batch to the bit; slower, GPUs only"
    )
    vllm_args: dict[str, Any] = Field(
        default_factory=dict, description="Further vLLM engine arguments by name, passed on as they are"
    )
    simulated_latency_s: float = Field(0.0, ge=0, description="Seconds that the simulated engine takes for an image")


class ScoringConfig(Section):
    """What is asked about each image."""

    aspects: tuple[Aspect, ...] = Field(tuple(Aspect), min_length=1, description="The aspects to judge")
    conversation: str = Field("v1", description="Version of the questions (m3agiqa/conversation.py)")
    max_description_tokens: int = Field(160, gt=0, description="Longest description, in tokens")
    max_rating_tokens: int = Field(8, gt=0, description="Longest answer of round 2, in tokens")
    downscale_to_fit: bool = Field(
        False, description="Downscale an image whose tokens do not fit into the context, and say so; false: reject it"
    )

    @field_validator("aspects", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("aspects")
    @classmethod
    def _unique(cls, value: tuple[Aspect, ...]) -> tuple[Aspect, ...]:
        return tuple(aspect for aspect in Aspect if aspect in value)

    @field_validator("conversation")
    @classmethod
    def _known(cls, value: str) -> str:
        from m3agiqa.conversation import WORDINGS

        if value not in WORDINGS:
            raise ValueError(f"is none of {', '.join(sorted(WORDINGS))}")
        return value


class CaptureConfig(Section):
    """What is kept of each conversation for a predictor, beside the rating words' probabilities."""

    kind: Literal["none", "states", "top_k", "logits"] = Field(
        "none", description="none, states (last hidden states), top_k or logits (per position; small vocabularies)"
    )
    top_k: int = Field(20, gt=0, description="Logits kept per position where kind is top_k")
    write: bool = Field(False, description="Write the states into the output; what `m3agiqa capture` sets")
    mib_per_file: int = Field(
        256, gt=0, description="MiB of states that are gathered into a file and committed together; a crash loses fewer"
    )
    first_answer: Literal["own", "given"] = Field(
        "own", description="Whose description the conversation goes on with: the model's own, or one of the corpus"
    )
    descriptions: dict[Aspect, str] = Field(
        default_factory=dict, description="The column of the given first answers, by aspect"
    )

    @model_validator(mode="after")
    def _agrees(self) -> "CaptureConfig":
        if self.write and self.kind != "states":
            raise ValueError(f"write=true is for kind=states, not {self.kind}")
        if self.descriptions and self.first_answer != "given":
            raise ValueError("descriptions name columns, but first_answer=own does not read them")
        return self


class PredictorConfig(Section):
    """What turns the states into mean opinion scores."""

    path: str | None = Field(
        "auto", description="Folder of a predictor; auto: the one that comes with the embedded model; null: none"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where it runs; auto: a GPU where there is one")


class CorpusConfig(Section):
    """How the input's columns are named."""

    image_column: str | None = Field(None, description="Column of image paths or bytes; null: the usual names")
    prompt_column: str = Field("prompt", description="Column of the prompts")
    id_column: str = Field("id", description="Column of ids; made where there is none")
    generator_column: str = Field("generator", description="Column that names the image generator")
    images: str | None = Field(
        None, description="Folder that a manifest's relative image paths start from; null: the manifest's own"
    )
    text_only: bool = Field(
        False, description="Converse about prompt and description alone: no image is read, and none needs to be there"
    )
    drop: tuple[str, ...] = Field((), description="Columns of the input that are not passed through")


class ImageConfig(Section):
    """Which images are accepted, and what is done to them before the model's own preprocessing."""

    max_pixels: int = Field(100_000_000, gt=0, description="Images of more pixels are rejected before decoding")
    min_side: int = Field(8, gt=0, description="Images with a shorter side are rejected, in pixels")
    max_side: int = Field(4096, gt=0, description="Images with a longer side are downscaled to it, in pixels")
    max_aspect_ratio: float = Field(50.0, ge=1, description="Longer by shorter side; beyond it rejected")


class RayConfig(Section):
    """How the run is spread over a cluster."""

    address: str | None = Field(
        None, description="Ray address, or auto; null: the cluster of the Ray job this is, else one of its own"
    )
    actors: int | tuple[int, int] = Field(1, description="Engine actors, or [fewest, most] of a growing pool")
    num_gpus: float | None = Field(None, ge=0, description="GPUs per engine actor; null: 1 where there are any")
    num_cpus: float = Field(1.0, ge=0, description="CPUs reserved per engine actor")
    decode_cpus: float = Field(0.5, gt=0, description="CPUs reserved per image-decoding task")
    batch_size: int = Field(16, gt=0, description="Images handed to an engine at a time")
    batches_in_flight: int = Field(8, gt=0, description="Batches that one vLLM engine works on at once")
    rows_per_file: int = Field(
        512, gt=0, description="Rows that are gathered into a file and committed together; a crash loses fewer"
    )

    @field_validator("actors")
    @classmethod
    def _range(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = value if isinstance(value, tuple) else (value, value)
        if not 1 <= low <= high:
            raise ValueError("needs at least 1, and fewest <= most")
        return value


class RunConfig(Config):
    """Everything that `m3agiqa score` can be told, input and output apart."""

    model: ModelConfig = ModelConfig.model_construct()
    engine: EngineConfig = EngineConfig.model_construct()
    scoring: ScoringConfig = ScoringConfig.model_construct()
    capture: CaptureConfig = CaptureConfig.model_construct()
    predictor: PredictorConfig = PredictorConfig.model_construct()
    corpus: CorpusConfig = CorpusConfig.model_construct()
    images: ImageConfig = ImageConfig.model_construct()
    ray: RayConfig = RayConfig.model_construct()


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a scoring run; see `load`."""
    return load(RunConfig, path, overrides)


def load(kind: type[ConfigT], path: str | Path | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads a YAML file and applies `key.key=value` overrides, whose values are YAML too.

    Raises:
        UserError: for a file that cannot be read, an unknown key (names the nearest), a bad value.
    """
    data = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {override}", "is not of the form key=value", "write e.g. engine.kind=transformers")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {override}", "the value is not YAML", "quote it") from error
        _put(data, key.strip().split("."), value, override, kind)
    source = f"--config {path}" if path is not None else "the configuration"
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(error, source, kind) from None


def dump_config(config: Config) -> str:
    """The effective configuration as YAML that `load` reads back to the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe_config(kind: type[Config] = RunConfig) -> str:
    """Every key with its default and its documentation, one per line, as commented YAML."""
    lines: list[str] = []
    for section, field in kind.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, Section)
        doc = " ".join((model.__doc__ or "").split())
        lines += [f"# {doc}", f"{section}:"]
        defaults = model().model_dump(mode="json")
        for key, info in model.model_fields.items():
            value = yaml.safe_dump(defaults[key], default_flow_style=True).removesuffix("...\n").strip()
            lines.append(f"  {key}: {value}  # {info.description}")
    return "\n".join(lines)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {path}", "does not exist", "see configs/ for examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}", f"cannot be read ({error})", "give a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}", f"is not YAML: {error}", "mend the line it names") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"--config {path}", f"holds a {type(data).__name__}, not sections with keys", "see configs/")
    return data


def _put(data: dict[str, Any], keys: list[str], value: Any, override: str, kind: type[Config]) -> None:
    for key in keys[:-1]:
        inner = data.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override}", f"{key!r} is a value, not a section", f"see `{kind.docs}`")
        data = inner
    data[keys[-1]] = value


def _explain(error: ValidationError, source: str, kind: type[Config]) -> UserError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = _nearest(first["loc"], kind)
        cure = f"did you mean {near}?" if near else f"`{kind.docs}` lists every key"
        return UserError(f"{source}: {where}", "there is no such key", cure)
    given = first.get("input")
    shown = "" if isinstance(given, Mapping) else f" = {given!r}"
    message = first["msg"].removeprefix("Value error, ")
    return UserError(f"{source}: {where}{shown}", message, f"`{kind.docs}` explains every key")


def _nearest(loc: tuple[int | str, ...], kind: type[Config]) -> str | None:
    """The known key most like an unknown one: in its own section first, then anywhere."""
    known = {f"{s}.{k}" for s, f in kind.model_fields.items() for k in _keys(f.annotation)}
    known |= set(kind.model_fields)
    wanted = ".".join(str(part) for part in loc)
    by_key = difflib.get_close_matches(str(loc[-1]), [k.split(".")[-1] for k in known], n=1, cutoff=0.6)
    match = difflib.get_close_matches(wanted, sorted(known), n=1, cutoff=0.75)
    if match:
        return match[0]
    return next((k for k in sorted(known) if by_key and k.split(".")[-1] == by_key[0]), None)


def _keys(annotation: Any) -> list[str]:
    return list(annotation.model_fields)
