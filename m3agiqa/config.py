"""The configuration of a scoring run, and the sections that other commands share with it. Light to import."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from m3agiqa.aspects import Aspect
from m3agiqa.settings import Config, Section, load

TINY_MODEL = "tiny"
"""The name under which the embedded demonstration model is known."""
AUTO_ADAPTERS = "auto"
"""The value of `model.adapters` for the adapter that comes with the model."""


class ModelConfig(Section):
    """Which multimodal language model judges, and in what precision."""

    path: str = Field(TINY_MODEL, description="`tiny` (embedded), a local folder, or a Hugging Face hub id")
    adapters: str | dict[Aspect, str | None] | None = Field(
        AUTO_ADAPTERS,
        description="LoRA adapter (folder or hub id) for all aspects, or one by aspect; null: none; auto: the embedded "
        "one for `tiny`, none for other models",
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
    cpu_kv_cache_gib: float = Field(
        1,
        gt=0,
        allow_inf_nan=False,
        description="KV cache of vLLM on a CPU, in GiB; taken at the start with a predictor",
    )
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
    simulated_failures: float = Field(0.0, ge=0, le=1, description="Share of images that the simulated engine fails on")
    simulated_poison: str | None = Field(
        None, min_length=1, description="A prompt that holds this kills the simulated engine's process"
    )
    simulated_log: str | None = Field(
        None, description="File that the simulated engine adds a line to for each image, its process and the prompt"
    )


class ScoringConfig(Section):
    """What is asked about each image."""

    aspects: tuple[Aspect, ...] = Field(tuple(Aspect), min_length=1, description="The aspects to judge")
    conversation: str = Field("v1", description="Version of the questions (m3agiqa/conversation.py)")
    max_description_tokens: int = Field(160, gt=0, description="Longest description, in tokens")
    max_rating_tokens: int = Field(
        8, gt=0, description="Longest answer of round 2, in tokens; the row says where one was cut"
    )
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


class AccessConfig(Section):
    """Which files the rows of a corpus may name, beyond those in the corpus's own folders and `corpus.images`."""

    roots: tuple[str, ...] = Field((), description="Further folders, local or URIs, that images may be read from")
    max_mib: int = Field(
        256, gt=0, description="Largest image, in MiB: a file, embedded in a manifest, or a member of a tar"
    )
    http: bool = Field(False, description="Read images from the web: http and https, public addresses only")
    http_hosts: tuple[str, ...] = Field(
        (), description="The only hosts, * standing for anything; empty: all. Named in full, one may be a private host"
    )
    http_timeout_s: float = Field(30.0, gt=0, description="Seconds for one image, redirects included")
    http_max_mib: int = Field(64, gt=0, description="Largest answer, in MiB")

    @field_validator("roots", "http_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


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
    decode_on: str | None = Field(
        None, description="Custom resource of the nodes that decode, to keep that off the GPU nodes; null: any node"
    )
    object_store_gib: float | None = Field(
        None, gt=0, description="Most GiB of object store for what is between two steps; null: Ray's own share of it"
    )
    wait_s: float = Field(
        0.0, ge=0, description="Seconds to wait for a node that has what an actor needs, on a cluster that grows"
    )
    batch_size: int = Field(16, gt=0, description="Images handed to an engine at a time")
    batches_in_flight: int = Field(8, gt=0, description="Batches that one vLLM engine works on at once")
    rows_per_file: int = Field(
        512, gt=0, description="Rows that are gathered into a file and committed together; a crash loses fewer"
    )
    retries: int = Field(2, ge=0, description="Further tries of a row that the engine failed on, in the same run")
    max_failed_fraction: float = Field(
        0.1, ge=0, le=1, description="Share of failed rows beyond which a run stops with exit code 3"
    )

    @field_validator("actors")
    @classmethod
    def _range(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = value if isinstance(value, tuple) else (value, value)
        if not 1 <= low <= high:
            raise ValueError("needs at least 1, and fewest <= most")
        return value


class ReportConfig(Section):
    """The report that a run ends with."""

    write: bool = Field(True, description="Write OUTPUT/report.html at the end; not made of text or captured states")


class RunConfig(Config):
    """Everything that `m3agiqa score` can be told, input and output apart."""

    model: ModelConfig = ModelConfig.model_construct()
    engine: EngineConfig = EngineConfig.model_construct()
    scoring: ScoringConfig = ScoringConfig.model_construct()
    capture: CaptureConfig = CaptureConfig.model_construct()
    predictor: PredictorConfig = PredictorConfig.model_construct()
    corpus: CorpusConfig = CorpusConfig.model_construct()
    access: AccessConfig = AccessConfig.model_construct()
    images: ImageConfig = ImageConfig.model_construct()
    ray: RayConfig = RayConfig.model_construct()
    report: ReportConfig = ReportConfig.model_construct()


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a scoring run; see `load`."""
    return load(RunConfig, path, overrides)
