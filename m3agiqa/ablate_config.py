"""The configuration of `m3agiqa ablate` and `m3agiqa cross-evaluate`: frozen, typed, every field documented."""

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from m3agiqa.settings import Config, Section
from m3agiqa.train_config import DataConfig, HeadShape, LossConfig, OptimConfig, Pooling

Rounds = Literal["none", "description", "description+rating"]
Capture = Literal["states", "top_k", "rating_probs"]
HeadKind = Literal["xlstm", "lstm", "gru", "transformer", "mlp", "ridge"]

FACTORS = ("rounds", "capture", "head", "pooling", "loss", "descriptions")
"""What is varied, one at a time, in the order of the table."""

_WEIGHTS: dict[str, dict[str, object]] = {
    "mse": {"mse": 1},
    "plcc": {"plcc": 1},
    "mse+plcc": {"mse": 1, "plcc": 1},
    "fidelity": {"rank": 1, "rank_kind": "fidelity"},
    "ranknet": {"rank": 1, "rank_kind": "ranknet"},
    "margin": {"rank": 1, "rank_kind": "margin"},
    "mse+fidelity": {"mse": 1, "rank": 1, "rank_kind": "fidelity"},
    "mse+plcc+fidelity": {"mse": 1, "plcc": 1, "rank": 1, "rank_kind": "fidelity"},
}
_NONE: dict[str, object] = {"mse": 0, "plcc": 0, "rank": 0}
LOSSES = {name: LossConfig.model_validate(_NONE | weights) for name, weights in _WEIGHTS.items()}
"""The losses by name. A ranking loss alone gives an order and no scale: its RMSE means little."""


class Base(Section):
    """What every variation is compared with, its pooling being shape.pooling; each differs from it in one thing."""

    rounds: Rounds = Field("description+rating", description="What the head sees: question 1 only (none), up to ...")
    capture: Capture = Field("states", description="states, those that top-k logits leave, or the rating probabilities")
    head: HeadKind = Field("xlstm", description="xlstm, lstm, gru, transformer, mlp (no sequence model) or ridge")
    loss: str = Field("mse+plcc", description="One of " + ", ".join(LOSSES))
    descriptions: str | None = Field(
        None, description="The --input trained on, or TRAIN/TEST where it is tested on another; null: the first"
    )

    @field_validator("loss")
    @classmethod
    def _known(cls, value: str) -> str:
        return _loss(value)


class Vary(Section):
    """The alternatives to the base, by what they change; what is as in the base is left out."""

    rounds: tuple[Rounds, ...] = Field((), description="Other parts of the conversation")
    capture: tuple[Capture, ...] = Field((), description="Other captures; top_k needs --lm-head")
    head: tuple[HeadKind, ...] = Field((), description="Other heads")
    pooling: tuple[Pooling, ...] = Field((), description="Other poolings")
    loss: tuple[str, ...] = Field((), description="Other losses")
    descriptions: tuple[str, ...] = Field((), description="Other inputs, as in base.descriptions")

    @field_validator("loss")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_loss(one) for one in value)


class Data(DataConfig):
    """What is trained on, and in what order."""

    split_by: Literal["prompt", "id", "split"] = Field(
        "prompt",
        description="prompt (no prompt is in two parts), id, or the column split (train, val, test), which is not read "
        "otherwise: the test part is drawn from all images",
    )


class Measure(Section):
    """How often, on what, and how sure."""

    seeds: int = Field(5, ge=2, le=100, description="Trainings of each variation, with seeds from optim.seed on")
    test_share: float = Field(
        0.2, gt=0, lt=1, description="Of the images, held out by data.split_by; unused with data.split_by=split"
    )
    split_seed: int = Field(0, ge=0, description="Of the parts, which all variations and seeds share")
    top_k: int = Field(16, gt=0, description="Logits that capture=top_k keeps of each token")
    resamples: int = Field(1000, ge=100, description="Draws of the test images for the intervals over images")
    level: float = Field(0.95, gt=0.5, lt=1, description="Of the intervals, and what a difference must pass to hold up")


class AblateConfig(Config):
    """Everything that the two commands can be told, inputs, label and output apart."""

    docs: ClassVar[str] = "m3agiqa config --docs --kind ablate"

    base: Base = Base.model_construct()
    vary: Vary = Vary.model_construct()
    shape: HeadShape = HeadShape.model_construct()
    optim: OptimConfig = OptimConfig.model_construct()
    data: Data = Data.model_construct()
    measure: Measure = Measure.model_construct()

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        captures = (self.base.capture, *self.vary.capture)
        if "rating_probs" in captures and self.base.rounds != "description+rating":
            cure = "set base.rounds=description+rating, or leave it out"
            raise ValueError(f"capture=rating_probs is of the whole conversation: {cure}")
        if self.base.capture == "rating_probs" and self.vary.rounds:
            raise ValueError("capture=rating_probs is the same whatever rounds are shown: leave vary.rounds out")
        if self.base.head == "ridge" and self.vary.loss:
            raise ValueError("ridge has a loss of its own: leave vary.loss out, or take another base.head")
        return self


def _loss(value: str) -> str:
    if value not in LOSSES:
        raise ValueError(f"there is no loss {value!r}; take one of {', '.join(LOSSES)}")
    return value
