"""The language in which the eye tells the language side what it sees.

Every image token is to hold, in directions fixed beforehand, what is known of the whole picture and of
the token's own part of it. So the eye can be trained apart, which takes a fraction of the time of learning
from words, and the language side has to learn no more than to read.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m3agiqa.aspects import RATING_WORDS, SCALE_MAX, Aspect, word_of_score
from m3agiqa.tiny.corpus import Sample
from m3agiqa.tiny.degrade import ARTEFACTS, DEGRADATIONS
from m3agiqa.tiny.facts import ITEMS, Facts
from m3agiqa.tiny.pictures import COLOURS, EYE, SHAPES

_AMOUNTS = len(DEGRADATIONS) + 1 + len(ARTEFACTS) + 1
"""Severities, extents and what each aspect lost in all, 0 to 1; then a photograph's flag, verdicts and items."""
_VERDICTS: dict[str, tuple[str | None, ...]] = {
    "fault": (None, *DEGRADATIONS),
    "sign": (None, *ARTEFACTS),
    "quality": RATING_WORDS,
    "authenticity": RATING_WORDS,
}
"""The severest degradation and artefact, and the words of both scores: what the answers name, in plain terms."""
_CHOICES = [len(values) for values in (_VERDICTS | ITEMS).values()]
_ITEMS_AT = _AMOUNTS + 1 + sum(map(len, _VERDICTS.values()))
WHOLE = _AMOUNTS + 1 + sum(_CHOICES)
_OF_A_PATCH = [1 + len(SHAPES), 1 + len(COLOURS), 1 + len(ARTEFACTS)]
PART = 1 + sum(_OF_A_PATCH)
_SHARPNESS = 6.0
"""What turns the numbers of verdicts and items, 0 or 1, into logits."""


def whole_of(facts: Sequence[Facts]) -> Tensor:
    """The numbers that say what is known of whole pictures: [n, WHOLE]."""
    return torch.tensor([_whole(f) for f in facts])


def _whole(facts: Facts) -> list[float]:
    amounts: list[float] = []
    for damages, kinds, score in (
        (facts.degradations, DEGRADATIONS, facts.quality),
        (facts.artefacts, ARTEFACTS, facts.authenticity),
    ):
        by_kind = {d.kind: d.severity for d in damages}
        amounts += [*(by_kind.get(kind, 0.0) for kind in kinds), 1 - score / SCALE_MAX]
    told: dict[str, object] = {
        "fault": facts.degradations[0].kind if facts.degradations else None,
        "sign": facts.artefacts[0].kind if facts.artefacts else None,
        "quality": word_of_score(facts.quality),
        "authenticity": word_of_score(facts.authenticity),
    }
    told |= {name: facts.scene and getattr(facts.scene, name) for name in ITEMS}
    chosen = [float(value == told[name]) for name, values in (_VERDICTS | ITEMS).items() for value in values]
    return [*amounts, float(facts.scene is None), *chosen]


def maps_of(samples: Sequence[Sample], patch: int) -> list[Tensor]:
    """Shape, colour and artefact in the middle of every patch: three of [n, patches]."""
    middle = slice(patch // 2, EYE, patch)
    names = ("shape_map", "colour_map", "artefact_map")
    return [
        torch.from_numpy(np.stack([getattr(s, n)[middle, middle] for s in samples]).astype(np.int64)).flatten(1)
        for n in names
    ]


def parts_of(samples: Sequence[Sample], maps: Sequence[Tensor], tokens_per_side: int) -> Tensor:
    """How many objects have their middle in a token, and the shares of its patches by kind: [n, tokens, PART]."""
    centres = torch.zeros(len(samples), 1, tokens_per_side, tokens_per_side)
    for sample, (cells,) in zip(samples, centres, strict=True):
        for x, y in sample.centres:
            cells[int(y * tokens_per_side), int(x * tokens_per_side)] += 1
    side = int(maps[0].shape[1] ** 0.5)
    shares = torch.cat([F.one_hot(m, n) for m, n in zip(maps, _OF_A_PATCH, strict=True)], -1).float()
    shares = F.avg_pool2d(shares.view(len(samples), side, side, -1).permute(0, 3, 1, 2), side // tokens_per_side)
    return torch.cat([centres, shares], 1).flatten(2).transpose(1, 2)


def directions(width: int) -> Tensor:
    """The directions of the code, orthonormal and always the same: [WHOLE + PART, width]."""
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(noise)[0][: WHOLE + PART]


def scores_told(tokens: Tensor) -> dict[Aspect, Tensor]:
    """The scores [n], 0 to 5, that image tokens [n, tokens, width] were trained to tell, without any language."""
    amounts = (tokens @ directions(tokens.shape[-1])[:_AMOUNTS].T).mean(1)
    lost = {Aspect.QUALITY: len(DEGRADATIONS), Aspect.AUTHENTICITY: _AMOUNTS - 1}
    return {aspect: SCALE_MAX * (1 - amounts[:, at]) for aspect, at in lost.items()}


class EyeLoss(nn.Module):
    """How far image tokens are from what they should tell."""

    code: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        vision, self.scale = model.config.vision_config, model.config.scale_factor
        self.patch_size, self.side = vision.patch_size, EYE // vision.patch_size // self.scale
        self.register_buffer("code", directions(model.config.text_config.hidden_size), persistent=False)
        # Patches that know what they show come sooner to tokens that do; thrown away after the training.
        self.patch = nn.Linear(vision.hidden_size, sum(_OF_A_PATCH))

    def targets(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The whole's numbers, the parts' and the patches' classes."""
        maps = maps_of(samples, self.patch_size)
        return whole_of([s.facts for s in samples]), parts_of(samples, maps, self.side), maps

    def forward(self, patches: Tensor, tokens: Tensor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Losses by name.

        Args:
            patches: the eye's last states, [n, patches, vision width].
            tokens: the connector's, [n, tokens, text width].
        """
        whole, parts, maps = self.targets(samples)
        tokens = tokens.float()
        told = tokens @ self.code.T
        rest = tokens - told @ self.code
        mean = told[..., :WHOLE].mean(1)
        readable = torch.tensor([s.facts.readable for s in samples])
        known = torch.ones_like(whole)
        known[~readable, _ITEMS_AT:] = 0
        losses = {
            "amounts": 20 * F.mse_loss(mean[:, :_AMOUNTS], whole[:, :_AMOUNTS]),
            "each": 4 * ((told[..., :WHOLE] - whole[:, None]) ** 2 * known[:, None]).mean(),
            "parts": 4 * F.mse_loss(told[..., WHOLE:], parts),
            "rest": 0.5 * rest.square().mean(),
        }
        for name, logits, truth in zip(
            ("shapes", "colours", "artefacts"), self.patch(patches).float().split(_OF_A_PATCH, -1), maps, strict=True
        ):
            losses[name] = 0.5 * F.cross_entropy(logits.flatten(0, 1), truth.flatten())
        return losses | self._choices(mean, whole, readable)

    def _choices(self, mean: Tensor, whole: Tensor, readable: Tensor) -> dict[str, Tensor]:
        """How well the numbers of each group tell which of its values it is; contents only where they can be told."""
        everywhere, shown = torch.ones_like(readable), readable & (whole[:, _AMOUNTS] == 0)
        pairs = zip(
            mean[:, _AMOUNTS + 1 :].split(_CHOICES, 1), whole[:, _AMOUNTS + 1 :].split(_CHOICES, 1), strict=True
        )
        losses = {}
        for name, (logits, truth) in zip(_VERDICTS | ITEMS, pairs, strict=True):
            rows = everywhere if name in _VERDICTS else shown
            wrong = F.cross_entropy(_SHARPNESS * logits[rows], truth[rows].argmax(1), reduction="sum")
            losses[name] = 0.8 / max(int(rows.sum()), 1) * wrong
        return losses
