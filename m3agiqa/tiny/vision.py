"""The eye before its training, and what it sees.

A randomly initialised patch embedding of this size never learns to see noise or blur in minutes.
So the eye starts from a whitened DCT of its patches, its first MLP from absolute values and its second
attention from the mean over the picture, which together are the energies per frequency that a
handcrafted measure of sharpness would start from.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Idefics3ForConditionalGeneration

from m3agiqa.tiny.corpus import Sample

_CHROMA_BANDS = 7
_CONSTANT = 3.0
_RIDGE = 0.03
BEGUN_LAYERS = 2
"""How many layers of the eye, from the first, begin with something."""


def pixel_values(pixels: Sequence[Any]) -> Tensor:
    """What the image processor makes of pictures of the eye's size: [n, 3, EYE, EYE], -1 to 1."""
    stack = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
    return stack / 127.5 - 1.0


def look(model: Any, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """What the eye sees: its last states, [n, patches, vision width], and the connector's tokens, [n, tokens, width].

    The products are of bfloat16 numbers, which costs two thirds of the time where a CPU has instructions for them.
    """
    with torch.autocast("cpu", torch.bfloat16):
        seen = model.model.get_image_features(pixel_values([s.pixels for s in samples])[:, None])
    return seen.last_hidden_state.float(), seen.pooler_output.float()


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
    # The connector has no bias of its own to take the constants out again.
    seen = model.model.get_image_features(pixel_values([s.pixels for s in samples])[:, None]).last_hidden_state
    vision.post_layernorm.weight /= seen.std((0, 1)) + 1e-3
    vision.post_layernorm.bias -= seen.mean((0, 1)) * vision.post_layernorm.weight


@torch.no_grad()
def join(model: Idefics3ForConditionalGeneration, pixels: Tensor, wanted: Tensor) -> None:
    """Lets the connector begin as the ridge regression of `wanted` [n, tokens, width] on what the eye begins with."""
    found: list[Tensor] = []
    projection = model.model.connector.modality_projection.proj
    hook = projection.register_forward_pre_hook(lambda _, given: found.append(given[0].flatten(0, -2)))
    for chunk in pixels.split(100):
        model.model.get_image_features(chunk[:, None])
    hook.remove()
    x = torch.cat(found).double()
    penalty = _RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.double)
    solved = torch.linalg.solve(x.T @ x + penalty, x.T @ wanted.flatten(0, -2).double())
    projection.weight.copy_(solved.T)


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
