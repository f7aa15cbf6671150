"""What is trained: the base, and for each alternative the base with that one thing changed. Light to import."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from m3agiqa.ablate_config import FACTORS, AblateConfig
from m3agiqa.errors import UserError


@dataclass(frozen=True)
class Variation:
    """One way to make a predictor.

    Attributes:
        descriptions: `TRAIN/TEST`, the names of the inputs that it is trained and tested on.
        factor: what differs from the base; None for the base itself.
    """

    rounds: str
    capture: str
    head: str
    pooling: str
    loss: str
    descriptions: str
    factor: str | None = None

    @property
    def name(self) -> str:
        """`base`, or what differs and how: `head=gru`."""
        return "base" if self.factor is None else f"{self.factor}={self.value}"

    @property
    def value(self) -> str:
        """The value of what differs; for the base all values, between commas."""
        if self.factor is not None:
            return str(getattr(self, self.factor))
        return ", ".join(str(getattr(self, factor)) for factor in FACTORS)

    @property
    def trained_on(self) -> str:
        """The name of the input that it is trained on."""
        return self.descriptions.partition("/")[0]

    @property
    def tested_on(self) -> str:
        """The name of the input that it is tested on."""
        return self.descriptions.partition("/")[2]

    @property
    def shows(self) -> tuple[str, str]:
        """What of a conversation the head is shown: rounds and capture."""
        return self.rounds, self.capture


def variations(config: AblateConfig, inputs: Sequence[str]) -> list[Variation]:
    """The base first, then the alternatives in the order of the factors.

    Args:
        inputs: the names of the inputs; the first is the default.

    Raises:
        UserError: for a name that is none of the inputs, and where there is nothing to compare.
    """
    base = base_of(config, inputs)
    found = [base]
    for factor in FACTORS:
        for value in getattr(config.vary, factor):
            chosen = _descriptions(value, inputs, "vary") if factor == "descriptions" else value
            one = replace(base, **{factor: chosen, "factor": factor})
            if replace(one, factor=None) != base and one not in found:
                found.append(one)
    if len(found) == 1:
        raise UserError("vary", "names nothing that differs from the base", "set e.g. vary.head=[lstm, gru]")
    return found


def base_of(config: AblateConfig, inputs: Sequence[str]) -> Variation:
    """The variation that `base` and `shape.pooling` describe.

    Raises:
        UserError: if it names no input.
    """
    base = config.base
    descriptions = _descriptions(base.descriptions or inputs[0], inputs, "base")
    return Variation(base.rounds, base.capture, base.head, config.shape.pooling, base.loss, descriptions)


def _descriptions(value: str, inputs: Sequence[str], section: str) -> str:
    trained, _, tested = value.partition("/")
    for name in (trained, tested or trained):
        if name not in inputs:
            raise UserError(
                f"{section}.descriptions={value}",
                f"names {name!r}, but the inputs are {', '.join(inputs)}",
                "give --input NAME=FOLDER for each",
            )
    return f"{trained}/{tested or trained}"
