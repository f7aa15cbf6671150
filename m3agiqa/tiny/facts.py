"""What is known of a picture: its contents and its damage, apart from how any of it is drawn or worded."""

from dataclasses import dataclass, fields

import numpy as np

from m3agiqa.tiny.degrade import ARTEFACTS, DEGRADATIONS, Damage, score
from m3agiqa.tiny.pictures import COLOURS, COUNTS, PLACES, SHAPES, Scene

ITEMS: dict[str, tuple[object, ...]] = {
    "count": tuple(range(1, len(COUNTS) + 1)),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "place": PLACES,
}
"""The items of a scene, by the names of `Scene`'s fields, and the values that each can have."""

assert tuple(ITEMS) == tuple(field.name for field in fields(Scene))


@dataclass(frozen=True)
class Facts:
    """The truth about one picture.

    Attributes:
        scene: what is shown; None for a photograph or a collage.
        degradations, artefacts: the severest first.
    """

    scene: Scene | None
    degradations: tuple[Damage, ...] = ()
    artefacts: tuple[Damage, ...] = ()

    @property
    def quality(self) -> float:
        """The true quality score, 0 to 5."""
        return score(self.degradations)

    @property
    def authenticity(self) -> float:
        """The true authenticity score, 0 to 5."""
        return score(self.artefacts)

    @property
    def readable(self) -> bool:
        """Whether the contents can still be made out."""
        return self.quality >= 1.0 and self.authenticity >= 2.0


def draw_degradations(rng: np.random.Generator, most: float = 1.0) -> tuple[Damage, ...]:
    """None, one or two of the kinds that are trained on.

    Args:
        most: the severity that 1 stands for.
    """
    chosen = [str(kind) for kind in rng.choice(list(DEGRADATIONS), 2, replace=False)]
    if {"underexposure", "overexposure"} == set(chosen):
        chosen = chosen[:1]
    chosen = chosen[: int(rng.choice(3, p=(0.2, 0.6, 0.2)))]
    return _by_severity([Damage(kind, float(rng.uniform(0.1, 1.0)) * most) for kind in chosen])


def draw_artefacts(rng: np.random.Generator) -> tuple[Damage, ...]:
    """None or one."""
    if rng.random() < 0.4:
        return ()
    return (Damage(str(rng.choice(list(ARTEFACTS))), float(rng.uniform(0.1, 1.0))),)


def draw_damage(scene: Scene | None, rng: np.random.Generator) -> Facts:
    """The facts of a picture of `scene` with damage by chance."""
    artefacts = draw_artefacts(rng)
    # Under a strong degradation no eye could tell what the artefact is.
    return Facts(scene, draw_degradations(rng, 0.5 if artefacts else 1.0), artefacts)


def _by_severity(damages: list[Damage]) -> tuple[Damage, ...]:
    return tuple(sorted(damages, key=lambda d: -d.severity))
