"""What is known of every picture, learnt before any word is spoken and thrown away afterwards.

Words alone are a thin signal: one description says little of a picture, and the language side would
take long to find out where to look. So both sides are also asked for everything that is known: the
eye patch by patch and as a whole, and the language side at the place where a description begins.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m3agiqa.aspects import SCALE_MAX
from m3agiqa.tiny.degrade import ARTEFACTS, DEGRADATIONS
from m3agiqa.tiny.pictures import COLOURS, EYE, PLACES, SHAPES
from m3agiqa.tiny.samples import Sample

_MATCHES = 4
_OF_A_GROUP = [4, 1 + len(COLOURS), 1 + len(SHAPES)]
"""Number, colour and shape; the last of each: no such group."""
_OF_AN_IMAGE = [len(DEGRADATIONS) + 1, len(ARTEFACTS) + 1, 1 + len(PLACES), *_OF_A_GROUP, *_OF_A_GROUP]
_OF_A_PATCH = [1 + len(SHAPES), 1 + len(COLOURS), 1 + len(ARTEFACTS)]


class Heads(nn.Module):
    """Reads the truth off patches, image tokens and the language side's states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        width, tokens = config.vision_config.hidden_size, config.text_config.hidden_size
        self.patch = nn.Linear(width, sum(_OF_A_PATCH))
        self.token = nn.Linear(tokens, 1 + sum(_OF_A_PATCH))
        self.query = nn.Parameter(torch.randn(8, tokens) * 0.01)
        self.image = nn.Sequential(nn.Linear(8 * tokens, 256), nn.GELU(), nn.Linear(256, sum(_OF_AN_IMAGE)))
        self.talk = nn.Sequential(nn.LayerNorm(tokens), nn.Linear(tokens, sum(_OF_AN_IMAGE) + _MATCHES))

    def of_the_eye(self, patches: Tensor, tokens: Tensor, truth: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of the vision side."""
        losses = {}
        patch_logits = self.patch(patches).float().split(_OF_A_PATCH, -1)
        for name, logits, target in zip(("shape", "colour", "artefact"), patch_logits, truth["patch"], strict=True):
            losses[f"patch {name}"] = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        losses["tokens"] = 10 * F.mse_loss(self.token(tokens).float(), truth["tokens"])
        attention = (tokens @ self.query.T / math.sqrt(tokens.shape[-1])).softmax(1)
        pooled = torch.einsum("btq,btw->bqw", attention, tokens).flatten(1)
        losses |= _of_images(self.image(pooled).float(), truth, slice(None))
        return losses

    def of_the_talk(
        self, states: Tensor, truth: dict[str, Any], image_of: Tensor, matches: Tensor
    ) -> dict[str, Tensor]:
        """Losses of the language side, from its states where descriptions begin; `matches` is NaN if unknown."""
        out = self.talk(states).float()
        losses = _of_images(out[:, :-_MATCHES], truth, image_of)
        known = ~matches.isnan().any(1)
        met = F.binary_cross_entropy_with_logits(out[known, -_MATCHES:], matches[known], reduction="sum")
        losses["matches"] = met / max(_MATCHES * int(known.sum()), 1)
        return {f"talk {name}": loss for name, loss in losses.items()}


def _of_images(out: Tensor, truth: dict[str, Any], image_of: Any) -> dict[str, Tensor]:
    degraded, falsified, *classes = out.split(_OF_AN_IMAGE, -1)
    keep, target = truth["readable"][image_of], truth["classes"][image_of]
    # The sum over none is 0, where the mean would be no number.
    share = 1 / max(int(keep.sum()), 1)
    answered = [
        F.cross_entropy(logits[keep], target[keep, i], reduction="sum") * share for i, logits in enumerate(classes)
    ]
    return {
        # No sigmoid: its slope dies where a rare damage is first taken to be absent.
        "degradations": 20 * F.mse_loss(degraded, truth["degradations"][image_of]),
        "artefacts": 20 * F.mse_loss(falsified, truth["artefacts"][image_of]),
        "place": 0.3 * answered[0],
        "number": 0.5 * (answered[1] + answered[4]),
        "colour": 0.5 * (answered[2] + answered[5]),
        "shape": 0.5 * (answered[3] + answered[6]),
    }


def truth_of(samples: Sequence[Sample], config: Any) -> dict[str, Any]:
    """The truth in the form that the heads' output is compared with."""
    patch = config.vision_config.patch_size
    tokens_per_side = EYE // patch // config.scale_factor
    middle = slice(patch // 2, EYE, patch)
    maps = [
        torch.from_numpy(np.stack([getattr(s, name)[middle, middle] for s in samples]).astype(np.int64)).flatten(1)
        for name in ("shape_map", "colour_map", "artefact_map")
    ]
    centres = torch.zeros(len(samples), tokens_per_side, tokens_per_side)
    for sample, cells in zip(samples, centres, strict=True):
        for x, y in sample.centres:
            cells[int(y * tokens_per_side), int(x * tokens_per_side)] += 1
    # What share of a token's patches shows each shape, colour and artefact.
    side = EYE // patch
    shares = torch.cat([F.one_hot(m, n) for m, n in zip(maps, _OF_A_PATCH, strict=True)], -1).float()
    shares = F.avg_pool2d(shares.view(len(samples), side, side, -1).permute(0, 3, 1, 2), side // tokens_per_side)
    return {
        "patch": maps,
        "tokens": torch.cat([centres[:, None], shares], 1).flatten(2).transpose(1, 2),
        "degradations": torch.tensor([_severities(s.degradations, DEGRADATIONS, s.quality) for s in samples]),
        "artefacts": torch.tensor([_severities(s.artefacts, ARTEFACTS, s.authenticity) for s in samples]),
        "classes": torch.tensor([_classes(s) for s in samples]),
        "readable": torch.tensor([s.readable for s in samples]),
    }


def _severities(damages: Sequence[Any], kinds: dict[str, Any], score: float) -> list[float]:
    by_kind = {d.kind: d.severity for d in damages}
    return [*(by_kind.get(kind, 0.0) for kind in kinds), score / SCALE_MAX]


def _classes(sample: Sample) -> list[int]:
    colours = list(COLOURS)
    if sample.scene is None:
        return [len(PLACES), *[3, len(COLOURS), len(SHAPES)] * 2]
    groups = sample.scene.groups
    found: list[list[int]] = [[g.count - 1, colours.index(g.colour), SHAPES.index(g.shape)] for g in groups]
    found += [[3, len(COLOURS), len(SHAPES)]] * (2 - len(groups))
    return [PLACES.index(sample.scene.place), *found[0], *found[1]]
