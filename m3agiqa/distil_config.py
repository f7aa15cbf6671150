"""The configuration of a distillation: frozen, typed, every field documented. Light to import."""

from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from m3agiqa.aspects import Aspect
from m3agiqa.config import AccessConfig, CorpusConfig, ImageConfig
from m3agiqa.errors import UserError
from m3agiqa.ratings import NAMED_BINS, Bins, equal_bins
from m3agiqa.settings import Config, Section


class TeacherConfig(Section):
    """The multimodal model that is asked, through any API that is compatible with OpenAI's chat completions."""

    base_url: str = Field("https://api.openai.com/v1", description="Of the API, with its version")
    model: str = Field("gpt-4o", min_length=1, description="Its name there; it must take images")
    key_env: str | None = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the key; null: a server that wants none"
    )
    response_format: Literal["auto", "json_schema", "json_object", "text"] = Field(
        "auto", description="How JSON is asked for; auto: a schema, and less where the server refuses it"
    )
    temperature: float | None = Field(None, ge=0, description="Of the sampling; null: the server's own")
    max_output_tokens: int = Field(500, gt=0, description="Longest answer, in tokens; those of reasoning count too")
    output_limit_key: Literal["max_completion_tokens", "max_tokens"] = Field(
        "max_completion_tokens", description="What the server calls that limit; older ones say max_tokens"
    )
    timeout_s: float = Field(120.0, gt=0, description="Seconds to wait for an answer")
    extra: dict[str, Any] = Field(
        default_factory=dict, description="Further fields of each request, such as {reasoning_effort: low}"
    )

    # Of the whole section: an error of the field would repeat what it holds.
    @model_validator(mode="after")
    def _no_secret(self) -> Self:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("base_url is no http or https URL")
        if parts.username or parts.password:
            raise ValueError("base_url holds a user or a password, which would be written down; use key_env")
        return self


class AskConfig(Section):
    """What the teacher is told."""

    wording: str = Field("d1", description="Version of the request (m3agiqa/distil/prompts.py)")
    blind: bool = Field(False, description="Show no score; what --blind sets")


class TeacherImages(ImageConfig):
    """Which images are accepted, and how they are sent."""

    max_side: int = Field(1024, gt=0, description="Images with a longer side are downscaled to it, in pixels")
    encoding: Literal["jpeg", "png"] = Field("jpeg", description="png loses nothing and is several times larger")
    jpeg_quality: int = Field(95, ge=1, le=100, description="Lower adds damage that the teacher might describe")
    detail: Literal["auto", "low", "high"] = Field("auto", description="How closely an OpenAI model looks")


class SamplingConfig(Section):
    """How many answers are asked for, and which is kept."""

    candidates: int = Field(
        1, gt=0, description="More than 1: ask up to so often, and keep the first whose rating is the human word"
    )
    if_none_agrees: Literal["drop", "nearest"] = Field(
        "drop", description="Of several candidates: keep none, or the one whose rating is nearest"
    )
    again: int = Field(
        2, ge=0, description="Times that a description is asked for again after answers that are leaky or malformed"
    )


class LimitsConfig(Section):
    """How hard the teacher is pressed."""

    concurrency: int = Field(8, gt=0, description="Requests at once")
    requests_per_minute: int | None = Field(None, gt=0, description="Null: no limit but the server's")
    tokens_per_minute: int | None = Field(None, gt=0, description="Input and output; null: no limit but the server's")
    retries: int = Field(6, ge=0, description="Tries after the first where the server fails, is busy or silent")
    first_wait_s: float = Field(1.0, gt=0, description="Before the first of them; it doubles, and varies by a half")
    longest_wait_s: float = Field(60.0, gt=0, description="Unless the server's Retry-After says more")
    longest_retry_after_s: float = Field(600.0, gt=0, description="A server that asks for more ends the run")
    give_up_after: int = Field(
        3, gt=0, description="Requests in a row that fail for good, none answered in between, which end the run"
    )


class BudgetConfig(Section):
    """What may be spent on an output, all commands on it together, and the prices, in any currency."""

    max_requests: int | None = Field(None, ge=0, description="Answered requests; what --max-requests sets")
    max_cost: float | None = Field(None, ge=0, description="What --max-cost sets; needs both prices")
    input_price: float | None = Field(None, ge=0, description="Of a million tokens of input, images included")
    output_price: float | None = Field(None, ge=0, description="Of a million tokens of output")
    cached_price: float | None = Field(None, ge=0, description="Of a million cached tokens of input; null: input_price")
    batch_share: float = Field(0.5, ge=0, le=1, description="What the Batch API costs of that")
    image_tokens: int | None = Field(
        None, gt=0, description="Of one image, for estimates; null: as the GPT-4o family counts them"
    )
    answer_tokens: int = Field(150, gt=0, description="Of a usual answer, for estimates")

    @model_validator(mode="after")
    def _prices(self) -> Self:
        if self.max_cost is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("max_cost needs the prices: give budget.input_price and budget.output_price")
        return self


class BatchConfig(Section):
    """The Batch API: answers within a day, at half the price."""

    use: bool = Field(False, description="What --batch sets")
    poll_s: float = Field(60.0, gt=0, description="Seconds between two looks at it")
    max_requests: int = Field(5000, gt=0, le=50_000, description="Of one batch")
    max_mib: int = Field(150, gt=0, le=200, description="Size of one batch's file; images make it large")


class RatingsConfig(Section):
    """Which rating word a human score becomes."""

    dataset: str | None = Field(
        None, description=f"Its bins: {', '.join(NAMED_BINS)}; null: five of equal width on --scale"
    )
    edges: dict[Aspect, tuple[float, float, float, float]] = Field(
        default_factory=dict, description="By aspect, four ascending scores at which the next word begins"
    )

    @field_validator("dataset")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in NAMED_BINS:
            raise ValueError(f"is none of {', '.join(NAMED_BINS)}")
        return value

    @field_validator("edges")
    @classmethod
    def _ascending(cls, value: dict[Aspect, tuple[float, float, float, float]]) -> dict[Aspect, Any]:
        for edges in value.values():
            Bins(edges)
        return value

    def bins(self, aspect: Aspect, scale: tuple[float, float]) -> Bins:
        """Those of an aspect.

        Args:
            scale: lowest and highest score.

        Raises:
            UserError: if the data set states none for the aspect.
        """
        if aspect in self.edges:
            return Bins(self.edges[aspect])
        if self.dataset is None:
            return equal_bins(*scale)
        if (named := NAMED_BINS[self.dataset].get(aspect)) is None:
            value, rule = f"ratings.dataset={self.dataset}", f"states no bins for {aspect}"
            raise UserError(value, rule, f"give ratings.edges.{aspect}")
        return named


class DistilConfig(Config):
    """Everything that `m3agiqa distil` can be told, input, labels and output apart."""

    docs: ClassVar[str] = "m3agiqa config --docs --kind distil"

    teacher: TeacherConfig = TeacherConfig.model_construct()
    ask: AskConfig = AskConfig.model_construct()
    sampling: SamplingConfig = SamplingConfig.model_construct()
    limits: LimitsConfig = LimitsConfig.model_construct()
    budget: BudgetConfig = BudgetConfig.model_construct()
    batch: BatchConfig = BatchConfig.model_construct()
    ratings: RatingsConfig = RatingsConfig.model_construct()
    corpus: CorpusConfig = CorpusConfig.model_construct()
    access: AccessConfig = AccessConfig.model_construct()
    images: TeacherImages = TeacherImages.model_construct()
