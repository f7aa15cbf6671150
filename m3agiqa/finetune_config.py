"""The configuration of a fine-tuning: frozen, typed, every field documented. Light to import."""

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from m3agiqa.config import AUTO_ADAPTERS, AccessConfig, CorpusConfig, ImageConfig, ModelConfig
from m3agiqa.distil_config import RatingsConfig
from m3agiqa.settings import Config, Section
from m3agiqa.train_config import TrackConfig, WorkersConfig

BestBy = Literal["loss", "accuracy", "within_one", "srcc"]


class LoraConfig(Section):
    """What is learnt: low-rank changes of the model's projections."""

    adapters: Literal["joint", "per_aspect"] = Field(
        "joint",
        description="joint (one adapter for all aspects), or per_aspect (one each, trained one after the other)",
    )
    rank: int = Field(16, gt=0, le=512, description="Rank of every change")
    alpha: float = Field(32.0, gt=0, description="A change counts alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="Of what a change is computed from, while training")
    targets: tuple[str, ...] | None = Field(
        None, description="Names of projections (q_proj,v_proj); null: every linear projection of the trained parts"
    )
    vision: bool = Field(
        False, description="Train the vision tower too; vLLM applies that for Idefics3 only, else merge the adapter"
    )
    connector: bool = Field(
        False, description="Train what leads from the vision tower to the language model; as vision"
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class TalkLossConfig(Section):
    """What is minimised: the cross-entropy of the assistant's tokens, and what is added to it."""

    rating: float = Field(1.0, ge=0, description="How much a token of the rating word counts, by any other token")
    score: float = Field(
        0.0, ge=0, description="Weight of the squared error of the expected rating, 0 to 5, against the human score"
    )


class LearnConfig(Section):
    """How the weights are found: AdamW, a linear warm-up, then a cosine."""

    learning_rate: float = Field(2e-4, gt=0, description="Highest learning rate")
    weight_decay: float = Field(0.0, ge=0, description="Of all that is learnt")
    warmup: float = Field(0.05, ge=0, description="Steps of the warm-up; below 1 a share of all steps")
    cosine: bool = Field(True, description="Fall to 0 along a cosine over all epochs; false: stay at the highest")
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of a step's gradient")
    epochs: int = Field(3, gt=0, description="Passes over the training part")
    batch_size: int = Field(32, gt=0, description="Conversations of a step, over all workers together")
    micro_batch: int = Field(
        8, gt=0, description="Conversations that a worker has in the model at once; the rest waits"
    )
    seed: int = Field(0, ge=0, description="Of first weights, order, dropout and split")


class ComputeConfig(Section):
    """How the model is run."""

    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Of the computation; what is learnt is float32, and the model's own weights are model.dtype"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="ddp (every worker has the whole model) or fsdp (the model's layers are spread over them)"
    )
    gradient_checkpointing: bool = Field(False, description="Compute layers twice, to keep less of them in memory")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="Which attention; eager is fastest for tiny models on a CPU"
    )


class TalksConfig(Section):
    """What is trained on, and in what order."""

    conversation: str = Field("v1", description="Version of the questions, that of the scoring later on")
    split_by: Literal["prompt", "id", "split"] = Field(
        "prompt",
        description="prompt (none is both trained on and validated with), id, or the column split (train, val, test); "
        "what that marks as test is left out whatever this is",
    )
    validation_share: float = Field(
        0.1, gt=0, lt=1, description="Of the images, to choose the best step by; with split or --validation unused"
    )
    cache_mib: int = Field(
        4096, ge=0, description="What a worker keeps of its images, ready for the model; the rest it reads each epoch"
    )
    bucket_batches: int = Field(
        8, gt=0, description="Batches that share out their conversations by length, to pad less; 1: none do"
    )
    together: bool = Field(
        False, description="All aspects of an image in one batch, so that the vision side sees it once an epoch"
    )
    readers: int = Field(4, gt=0, description="Threads of a worker that read and decode images")

    @field_validator("conversation")
    @classmethod
    def _known(cls, value: str) -> str:
        from m3agiqa.conversation import WORDINGS

        if value not in WORDINGS:
            raise ValueError(f"is none of {', '.join(sorted(WORDINGS))}")
        return value


class WatchConfig(Section):
    """Looking at the training while it runs, and keeping it."""

    log_steps: int = Field(20, gt=0, description="Steps from one line of progress to the next")
    evaluate_steps: int | None = Field(None, gt=0, description="Steps between evaluations, beside those of every epoch")
    most_rows: int = Field(2000, gt=0, description="Conversations of the validation part that are used, spread evenly")
    best_by: BestBy = Field("loss", description="What is best on validation: loss, accuracy, within_one or srcc")
    checkpoint_steps: int = Field(
        200, gt=0, description="Steps between checkpoints, beside those of every epoch; a crash loses fewer"
    )


class ProofConfig(Section):
    """The finished adapter in the engine that will use it: descriptions of its own, then ratings."""

    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="auto: vllm where it is installed and can apply the adapter, else transformers"
    )
    images: int = Field(8, gt=0, description="Validation images that are scored with it")
    max_description_tokens: int = Field(160, gt=0, description="Longest description, in tokens")


class FinetuneConfig(Config):
    """Everything that `m3agiqa finetune` can be told, input, columns and output apart."""

    docs: ClassVar[str] = "m3agiqa config --docs --kind finetune"

    model: ModelConfig = ModelConfig.model_construct()
    lora: LoraConfig = LoraConfig.model_construct()
    loss: TalkLossConfig = TalkLossConfig.model_construct()
    optim: LearnConfig = LearnConfig.model_construct()
    compute: ComputeConfig = ComputeConfig.model_construct()
    data: TalksConfig = TalksConfig.model_construct()
    ratings: RatingsConfig = RatingsConfig.model_construct()
    watch: WatchConfig = WatchConfig.model_construct()
    proof: ProofConfig = ProofConfig.model_construct()
    corpus: CorpusConfig = CorpusConfig.model_construct()
    access: AccessConfig = AccessConfig.model_construct()
    images: ImageConfig = ImageConfig.model_construct()
    track: TrackConfig = TrackConfig.model_construct()
    ray: WorkersConfig = WorkersConfig.model_construct()

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.model.adapters not in (None, AUTO_ADAPTERS):
            raise ValueError(
                "model.adapters: a new adapter is trained on a plain model; merge the old one into it first"
            )
        if self.corpus.text_only and (self.lora.vision or self.lora.connector):
            raise ValueError(
                "corpus.text_only=true shows no image, so that lora.vision and lora.connector learn nothing"
            )
        return self
