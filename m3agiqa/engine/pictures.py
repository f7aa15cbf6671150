"""An image as a model takes it: its tokens and tensors by the model's own processor, and batches of them.

What differs between processors is here and nowhere else: Idefics3 gives a row of tiles per image, Qwen-VL a flat
list of patches with the grid beside it, MiniCPM-V slices with their sizes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

Tensors = Mapping[str, torch.Tensor]
"""What a processor makes of one image, by name."""

# Which tokens are an image's: a matter of the conversation, not of the image.
_OF_TOKENS = "mm_token_type_ids"


def encode_image(
    processor: Any, image_token: str | None, pixels: np.ndarray
) -> tuple[list[int], dict[str, torch.Tensor]]:
    """The token ids that take the placeholder's place, and the image's tensors.

    Args:
        pixels: uint8 [height, width, 3], RGB.
    """
    encoded = processor(
        text=[image_token], images=[[Image.fromarray(pixels)]], add_special_tokens=False, return_tensors="pt"
    )
    tensors = {key: value for key, value in encoded.items() if key not in ("input_ids", "attention_mask")}
    return encoded["input_ids"][0].tolist(), tensors


def image_inputs(images: Sequence[Tensors], ids: torch.Tensor, image_token_id: int) -> dict[str, torch.Tensor]:
    """What a model takes of the images of some conversations, one image each.

    Args:
        ids: [conversations, tokens], padded, the images' tokens put in.
    """
    inputs = {}
    for key in images[0]:
        if key == _OF_TOKENS:
            inputs[key] = (ids == image_token_id).long()
        else:
            inputs[key] = stack([image[key] for image in images]).to(ids.device)
    return inputs


def stack(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Joins per-image tensors along the batch, padding the number of image tiles with zeros."""
    if values[0].dim() >= 4 and len({v.shape[1:] for v in values}) > 1:
        shape = [max(v.shape[d] for v in values) for d in range(1, values[0].dim())]
        padded = [v.new_zeros(v.shape[0], *shape) for v in values]
        for target, value in zip(padded, values, strict=True):
            target[tuple(slice(0, n) for n in value.shape)] = value
        values = padded
    return torch.cat(list(values))
