"""Stage 1: the eye. It learns what is known of every picture before any word is spoken.

A randomly initialised patch embedding of this size never learns to see noise or blur in minutes.
So the eye starts from a whitened DCT of its patches, its first MLP from absolute values and its second
attention from the mean over the picture, which together are the energies per frequency that a
handcrafted measure of sharpness would start from.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Idefics3ForConditionalGeneration

from m3agiqa.aspects import SCALE_MAX
from m3agiqa.tiny.degrade import ARTEFACTS, DEGRADATIONS
from m3agiqa.tiny.pictures import COLOURS, EYE, PLACES, SHAPES
from m3agiqa.tiny.samples import Sample

_CHROMA_BANDS = 7
_CONSTANT = 3.0


def pixel_values(pixels: Sequence[Any]) -> Tensor:
    """What the image processor makes of pictures of the eye's size: [n, 3, EYE, EYE], -1 to 1."""
    stack = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
    return stack / 127.5 - 1.0


@torch.no_grad()
def initialise(model: Idefics3ForConditionalGeneration, samples: Sequence[Sample]) -> None:
    """Sets what the module's text says, whitened on `samples`.

    Of a patch's features the first are its whitened DCT coefficients; then come the energies of their
    bands, which the first MLP computes; then the means of these over the picture, which the second
    layer's attention computes, for it starts out uniform; then the place of the patch.
    """
    vision = model.model.vision_model
    conv = vision.embeddings.patch_embedding
    basis, bands = _dct_filters(conv.kernel_size[0])
    count, summed = len(basis), int(bands.max()) + 1
    spots = _places(vision.embeddings.num_patches_per_side)
    local, whole, spot = count, count + summed, count + 2 * summed
    if spot + spots.shape[1] > conv.out_channels:
        raise ValueError(f"a vision width of {conv.out_channels} is too small for {spot + spots.shape[1]} features")
    responses = F.conv2d(pixel_values([s.pixels for s in samples]), basis, stride=conv.stride)
    mean, spread = responses.mean((0, 2, 3)), responses.std((0, 2, 3)) + 1e-4
    conv.weight.zero_()
    conv.bias.zero_()
    conv.weight[:count] = basis / spread[:, None, None, None]
    conv.bias[:count] = -mean / spread
    # Large constants keep the layer norm from dividing a patch's energy out.
    conv.bias[local:spot] = _CONSTANT * torch.tensor([1.0, -1.0]).repeat(summed)
    position = vision.embeddings.position_embedding.weight
    position.mul_(0.1)
    position[:, spot : spot + spots.shape[1]] = spots

    first, second = vision.encoder.layers[:2]
    membership = F.one_hot(bands, summed).T / F.one_hot(bands, summed).sum(0)[:, None]
    # gelu(x) + gelu(-x) is |x| but for small x.
    _set(first.mlp.fc1.weight, 0, 0, 2 * torch.eye(count))
    _set(first.mlp.fc1.weight, count, 0, -2 * torch.eye(count))
    _set(first.mlp.fc2.weight, local, 0, membership)
    _set(first.mlp.fc2.weight, local, count, membership)
    _set(second.self_attn.v_proj.weight, 0, local, 2 * torch.eye(summed))
    _set(second.self_attn.out_proj.weight, whole, 0, torch.eye(summed))


def _set(weight: Tensor, row: int, column: int, block: Tensor) -> None:
    weight[row : row + block.shape[0]] *= 0.1
    weight[row : row + block.shape[0], column : column + block.shape[1]] += block


def _dct_filters(patch: int) -> tuple[Tensor, Tensor]:
    """Orthonormal 2-D DCT filters, and the number of the band that each is in.

    All of the luma, the lower ones of two chroma channels; a band is a diagonal of one channel.
    """
    k = torch.arange(patch)
    rows = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / patch)
    rows[0] /= math.sqrt(2)
    planes = torch.einsum("iy,jx->ijyx", rows, rows).reshape(-1, patch, patch) * (2.0 / patch)
    order = sorted(range(patch * patch), key=lambda n: (sum(divmod(n, patch)), n))
    planes, diagonal = planes[order], torch.tensor([sum(divmod(n, patch)) for n in order])
    luma, red, blue = torch.tensor([[0.299, 0.587, 0.114], [0.5, -0.42, -0.08], [-0.17, -0.33, 0.5]])
    kept = diagonal < _CHROMA_BANDS
    parts = [(planes, luma), (planes[kept], red), (planes[kept], blue)]
    above = 2 * patch - 1
    bands = [diagonal, diagonal[kept] + above, diagonal[kept] + above + _CHROMA_BANDS]
    return torch.cat([p[:, None] * c[None, :, None, None] for p, c in parts]), torch.cat(bands)


def _places(side: int) -> Tensor:
    """Sines and cosines of every patch's place: [side * side, 12]."""
    at = (torch.arange(side) + 0.5) / side * 2 * math.pi
    y, x = torch.meshgrid(at, at, indexing="ij")
    waves = [f(k * axis) for k in (0.5, 1, 2) for axis in (x, y) for f in (torch.sin, torch.cos)]
    return torch.stack([w.flatten() for w in waves], 1)


class Heads(nn.Module):
    """What stage 1 reads off the eye; thrown away afterwards.

    Per patch: shape, colour and artefact. Per image token: object centres. Per image: severities,
    the two scores, the place, and number, colour and shape of the groups.
    """

    def __init__(self, model: Idefics3ForConditionalGeneration) -> None:
        super().__init__()
        config: Any = model.config
        width, tokens = config.vision_config.hidden_size, config.text_config.hidden_size
        self.patch = nn.Linear(width, (1 + len(SHAPES)) + (1 + len(COLOURS)) + (1 + len(ARTEFACTS)))
        self.centres = nn.Linear(tokens, 1)
        self.query = nn.Parameter(torch.randn(8, tokens) * 0.1)
        sizes = [len(DEGRADATIONS) + 1, len(ARTEFACTS) + 1, 1 + len(PLACES), *_group_sizes()]
        self.sizes = sizes
        self.image = nn.Sequential(nn.Linear(8 * tokens, 256), nn.GELU(), nn.Linear(256, sum(sizes)))

    def forward(self, patches: Tensor, tokens: Tensor) -> dict[str, Any]:
        attention = (tokens @ self.query.T / math.sqrt(tokens.shape[-1])).softmax(1)
        pooled = torch.einsum("btq,btw->bqw", attention, tokens).flatten(1)
        return {
            "patch": self.patch(patches).split([1 + len(SHAPES), 1 + len(COLOURS), 1 + len(ARTEFACTS)], -1),
            "centres": self.centres(tokens)[..., 0],
            "image": self.image(pooled).split(self.sizes, -1),
        }


def _group_sizes() -> list[int]:
    """Number, colour and shape of the left and of the right group; the last of each: no such group."""
    return [4, 1 + len(COLOURS), 1 + len(SHAPES)] * 2


def targets_of(samples: Sequence[Sample], patch: int, tokens_per_side: int) -> dict[str, Any]:
    """The truth in the form that `loss_of` compares with the heads' output."""
    middle = slice(patch // 2, EYE, patch)
    maps = [
        torch.from_numpy(np.stack([getattr(s, name)[middle, middle] for s in samples]).astype(np.int64)).flatten(1)
        for name in ("shape_map", "colour_map", "artefact_map")
    ]
    centres = np.zeros((len(samples), tokens_per_side, tokens_per_side), np.float32)
    for sample, cells in zip(samples, centres, strict=True):
        for x, y in sample.centres:
            cells[min(int(y * tokens_per_side), tokens_per_side - 1), min(int(x * tokens_per_side), 3)] += 1
    return {
        "patch": maps,
        "centres": torch.from_numpy(centres).flatten(1),
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
    found = [[g.count - 1, colours.index(g.colour), SHAPES.index(g.shape)] for g in groups]
    found += [[3, len(COLOURS), len(SHAPES)]] * (2 - len(groups))
    return [PLACES.index(sample.scene.place), *found[0], *found[1]]


def loss_of(out: dict[str, Any], truth: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """The stage-1 loss and its parts."""
    parts: dict[str, Tensor] = {}
    for name, logits, target in zip(("shape", "colour", "artefact"), out["patch"], truth["patch"], strict=True):
        parts[f"patch {name}"] = F.cross_entropy(logits.float().flatten(0, 1), target.flatten())
    parts["centres"] = F.mse_loss(out["centres"].float(), truth["centres"])
    degraded, falsified, *classes = (o.float() for o in out["image"])
    parts["degradations"] = 10 * F.mse_loss(degraded.sigmoid(), truth["degradations"])
    parts["artefacts"] = 10 * F.mse_loss(falsified.sigmoid(), truth["artefacts"])
    keep = truth["readable"]
    for i, logits in enumerate(classes):
        parts[f"class {i}"] = 0.3 * F.cross_entropy(logits[keep], truth["classes"][keep, i])
    total = torch.stack(list(parts.values())).sum()
    return total, {name: part.item() for name, part in parts.items()}


def see(model: Idefics3ForConditionalGeneration, images: Tensor) -> tuple[Tensor, Tensor]:
    """Patch features and image tokens of a batch of pixel values."""
    output = model.model.get_image_features(images[:, None])
    return output.last_hidden_state, output.pooler_output


def train_eye(
    model: Idefics3ForConditionalGeneration,
    draw: Callable[[int], list[Sample]],
    *,
    steps: int,
    batch: int,
    rate: float,
    log: Callable[[str], None],
) -> Heads:
    """Trains vision tower and connector for `steps` batches of `draw(batch)`; returns the heads."""
    heads = Heads(model)
    config: Any = model.config.vision_config
    per_side = config.image_size // config.patch_size // model.config.scale_factor
    learned = [*model.model.vision_model.parameters(), *model.model.connector.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps))
    model.train()
    for step in range(steps):
        samples = draw(batch)
        truth = targets_of(samples, config.patch_size, per_side)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = heads(*see(model, pixel_values([s.pixels for s in samples])))
        loss, parts = loss_of(out, truth)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            log(f"eye {step}/{steps} loss {loss.item():.3f} " + " ".join(f"{k} {v:.2f}" for k, v in parts.items()))
    return heads


def warm_cosine(steps: int) -> Callable[[int], float]:
    """A learning rate that rises over the first steps and falls to a fiftieth along a cosine."""
    warm = min(100, 1 + steps // 10)

    def factor(step: int) -> float:
        done = min(step / max(steps, 1), 1.0)
        return min((step + 1) / warm, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    return factor
