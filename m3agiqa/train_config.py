"""The configuration of a predictor's training: frozen, typed, every field documented. Light to import."""

import math
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from m3agiqa.settings import Config, Section

RankLoss = Literal["fidelity", "ranknet", "margin"]
Pooling = Literal["mean", "last", "max", "first_last"]
Metric = Literal["srcc", "plcc", "srcc+plcc", "rmse", "mae"]


class HeadShape(Section):
    """The head's shape; the defaults are the published one's."""

    width: int = Field(512, gt=0, description="Width between the blocks; a multiple of heads")
    blocks: int = Field(4, gt=0, description="Number of xLSTM blocks")
    slstm_at: tuple[int, ...] = Field((1,), description="Which blocks, from 0, are sLSTM; the others are mLSTM")
    heads: int = Field(4, gt=0, description="Heads of each block")
    conv_kernel: int = Field(4, gt=0, description="Steps that the causal convolutions see")
    qkv_block: int = Field(4, gt=0, description="Size of the blocks of the query, key and value projections")
    ffn_factor: float = Field(1.3, gt=0, description="Width of the sLSTM's feed-forward, by width")
    pooling: Pooling = Field("mean", description="Of the tokens; first_last is the mean of both")
    hidden: int = Field(128, gt=0, description="Width of the regression's hidden layer")
    dropout: float = Field(0.0, ge=0, lt=1, description="In the blocks and after pooling, while training")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % self.heads or self.width // self.heads < 2:
            raise ValueError(f"width {self.width} is no multiple of {self.heads} heads of at least 2")
        inner = math.ceil(2 * self.width / 64) * 64
        if inner % self.heads or inner % self.qkv_block:
            raise ValueError(f"the blocks are {inner} wide, no multiple of {self.heads} heads and of {self.qkv_block}")
        if any(not 0 <= at < self.blocks for at in self.slstm_at):
            raise ValueError(f"slstm_at {list(self.slstm_at)} names a block beyond the {self.blocks} there are")
        return self


class LossConfig(Section):
    """The weights of the losses, which are added up; each is over all conversations of a step."""

    mse: float = Field(1.0, ge=0, description="Squared error of standardised labels")
    plcc: float = Field(1.0, ge=0, description="(1 - Pearson correlation) / 2")
    rank: float = Field(0.0, ge=0, description="Ranking loss over all pairs")
    rank_kind: RankLoss = Field("fidelity", description="fidelity, ranknet or margin")
    margin: float = Field(0.1, gt=0, description="Of the margin loss, in standard deviations of the labels")

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.mse + self.plcc + self.rank:
            raise ValueError("mse, plcc and rank are all 0, so that there is nothing to learn from")
        return self


class OptimConfig(Section):
    """How the weights are found: AdamW, a linear warm-up, then a cosine."""

    learning_rate: float = Field(3e-4, gt=0, description="Highest learning rate")
    weight_decay: float = Field(0.01, ge=0, description="Of matrices; biases, norms and gains have none")
    warmup: float = Field(0.05, ge=0, description="Steps of the warm-up; below 1 a share of all steps")
    cosine: bool = Field(True, description="Fall to 0 along a cosine over all epochs; false: stay at the highest")
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of a step's gradient")
    epochs: int = Field(30, gt=0, description="Most passes over the training part")
    batch_size: int = Field(32, gt=1, description="Conversations of a step, over all workers together")
    patience: int = Field(8, gt=0, description="Epochs without a better validation after which it stops")
    metric: Metric = Field("srcc+plcc", description="What is best on validation, as the mean over the aspects")
    seed: int = Field(0, ge=0, description="Of first weights, order, dropout and splits")


class DataConfig(Section):
    """What is trained on, and in what order."""

    split_by: Literal["prompt", "id", "split"] = Field(
        "prompt",
        description="prompt (none is both trained on and validated with), id, or the column split (train, val, test); "
        "what that marks as test is left out whatever this is",
    )
    validation_share: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Of the images, for the choice of the best epoch; with split or --validation unused",
    )
    shuffle_window: int = Field(
        512, gt=0, description="Conversations that are shuffled together; they are in memory, two bytes a number"
    )
    cache_mib: int = Field(
        2048, ge=0, description="A worker whose share of the states is no larger keeps it; else it is read each epoch"
    )
    bucket_batches: int = Field(
        8, gt=0, description="Batches that share out their conversations by length, to pad less; 1: none do"
    )


class CalibrationConfig(Section):
    """The intervals that go with the scores."""

    share: float = Field(0.1, ge=0, lt=1, description="Of the training images, kept out of training; 0: no intervals")
    level: float = Field(0.9, gt=0, lt=1, description="How often an interval is to hold the human score")


class TrackConfig(Section):
    """Where the epochs are logged, beside TensorBoard."""

    to: tuple[Literal["mlflow", "wandb"], ...] = Field((), description="Further trackers; they must be installed")
    project: str = Field("m3agiqa", min_length=1, description="Name of the project or experiment there")

    @field_validator("to", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class WorkersConfig(Section):
    """How the training is spread over a cluster."""

    address: str | None = Field(
        None, description="Ray address, or auto; null: the cluster of the Ray job this is, else one of its own"
    )
    workers: int = Field(1, gt=0, description="Processes that share each step; batch_size is a multiple")
    use_gpu: bool | None = Field(None, description="One GPU a worker; null: if the cluster has enough")
    cpus: float = Field(1.0, gt=0, description="CPUs reserved per worker")
    max_failures: int = Field(3, ge=0, description="Lost workers after which the training is given up")
    storage: str | None = Field(
        None, description="Folder or URI that all nodes see, for checkpoints; null: beside --out"
    )


class TrainConfig(Config):
    """Everything that `m3agiqa train-predictor` can be told, input, labels and output apart."""

    docs: ClassVar[str] = "m3agiqa config --docs --kind train-predictor"

    head: HeadShape = HeadShape.model_construct()
    loss: LossConfig = LossConfig.model_construct()
    optim: OptimConfig = OptimConfig.model_construct()
    data: DataConfig = DataConfig.model_construct()
    calibration: CalibrationConfig = CalibrationConfig.model_construct()
    track: TrackConfig = TrackConfig.model_construct()
    ray: WorkersConfig = WorkersConfig.model_construct()
