"""The recipe of a curated set: frozen, typed, every field documented. Light to import.

The rules are applied in the order of their sections here; each sees what the earlier ones left.
"""

import hashlib
import json
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from m3agiqa.aspects import Aspect
from m3agiqa.settings import Config, Section

# `--set rows.where="quality_mos > 3"` is one condition, not its letters.
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
Share = Annotated[float, Field(gt=0, le=1)]


class CompositeSection(Section):
    """One score of several: the column `composite`, which every other expression may name."""

    weights: dict[str, float] = Field(
        {},
        description="SQL expression -> weight; composite is their weighted mean, null where one is null. "
        "Empty: the first mean opinion score that the run has, else the first rating_score",
    )


class RowsSection(Section):
    """Which rows are fit for use at all; rows that are not ok never are."""

    where: Texts = Field((), description="SQL conditions on the columns; each must be true")


class SizeSection(Section):
    """The size of the picture in pixels, upright."""

    min_side: int | None = Field(None, gt=0, description="Fewest pixels of the shorter side")
    max_side: int | None = Field(None, gt=0, description="Most pixels of the longer side")
    min_aspect: float | None = Field(None, gt=0, description="Smallest width / height")
    max_aspect: float | None = Field(None, gt=0, description="Largest width / height")


class DuplicatesSection(Section):
    """Of pictures that are alike the one with the best composite stays."""

    exact: bool = Field(False, description="Remove further copies of a file (equal image_sha256)")
    distance: int | None = Field(
        None, ge=0, le=16, description="Remove pictures whose 64-bit perceptual hash is so near; reads the images"
    )
    similarity: float | None = Field(
        None, gt=0, le=1, description="Remove pictures whose mean captured states have such a cosine; 0.98, say"
    )
    aspect: Aspect = Field(Aspect.QUALITY, description="Whose captured states similarity compares")


class QuantileSection(Section):
    """The best share of all rows, or of each group."""

    top: dict[str, Share] = Field({}, description="SQL expression (composite, say) -> share that is kept")
    within: Texts = Field((), description="Columns or SQL expressions: a quantile for each group, e.g. generator")


class BestSection(Section):
    """The best by composite; equal ones by id."""

    per_prompt: int | None = Field(None, gt=0, description="Most rows of a prompt; a row without one is alone")
    top: int | None = Field(None, gt=0, description="Most rows of all")


class SampleSection(Section):
    """A random sample that is the same every time."""

    size: int | None = Field(None, gt=0, description="Rows to keep, if there are so many")
    strata: Texts = Field((), description="Columns or SQL expressions: groups to sample from, e.g. generator")
    shares: Literal["proportional", "equal"] = Field(
        "proportional", description="As large as the group is, or as equal as the groups allow"
    )
    seed: int = Field(0, ge=0, description="Another seed is another sample")


class SplitSection(Section):
    """A column `split` of train and val; all rows of a prompt are in one part."""

    validation: float = Field(0.0, ge=0, lt=1, description="Share of the rows; 0: no such column")
    seed: int = Field(0, ge=0, description="Another seed is another split")


class PairsSection(Section):
    """Preference pairs of the rows that are kept: chosen and rejected from one prompt."""

    margin: float | None = Field(None, ge=0, description="Least difference; null: no pairs")
    by: str = Field("composite", min_length=1, description="SQL expression whose higher value is chosen")
    per_prompt: int = Field(1, gt=0, description="Most pairs: best with worst, second best with second worst, ...")


class ResourcesSection(Section):
    """What the work may take; not part of the recipe's hash."""

    memory_gib: float = Field(1.5, gt=0, description="Memory of DuckDB; what is larger goes to disk, beside the output")
    threads: int | None = Field(None, gt=0, description="Threads of DuckDB; null: one a CPU")
    address: str | None = Field(
        None, description="Ray address, or auto, where images are read; null: the Ray job's, else one of its own"
    )


class Recipe(Config):
    """Everything that `m3agiqa curate` can be told, input and output apart."""

    docs: ClassVar[str] = "m3agiqa config --docs --kind curate"

    composite: CompositeSection = CompositeSection.model_construct()
    rows: RowsSection = RowsSection.model_construct()
    size: SizeSection = SizeSection.model_construct()
    duplicates: DuplicatesSection = DuplicatesSection.model_construct()
    quantile: QuantileSection = QuantileSection.model_construct()
    best: BestSection = BestSection.model_construct()
    sample: SampleSection = SampleSection.model_construct()
    split: SplitSection = SplitSection.model_construct()
    pairs: PairsSection = PairsSection.model_construct()
    resources: ResourcesSection = ResourcesSection.model_construct()

    def rules(self) -> dict[str, object]:
        """The recipe as it is kept beside what it made: without what the work may take."""
        return self.model_dump(mode="json", exclude={"resources"})

    def digest(self) -> str:
        """16 hex digits that are equal where all rules are."""
        return hashlib.sha256(json.dumps(self.rules(), sort_keys=True).encode()).hexdigest()[:16]
