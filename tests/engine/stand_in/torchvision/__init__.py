"""What transformers and vLLM use of torchvision for a picture, in torch, for machines that have no torchvision.

The builds that there are need CUDA, and do not load beside a torch for CPUs. It is no matter for what is compared here:
both engines are given the same pixels.
"""

import enum
import sys
import types
from typing import Any

import numpy as np
import torch
from PIL import Image

__version__ = "0.28.0"


class InterpolationMode(enum.Enum):
    """Ways to resize, by their names in torchvision."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def pil_to_tensor(image: Image.Image) -> torch.Tensor:
    """[channels, height, width] of whole numbers."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def resize(image: torch.Tensor, size: Any, interpolation: InterpolationMode, antialias: bool = True) -> torch.Tensor:
    """[..., channels, height, width] in the new size, of the same type."""
    resized = torch.nn.functional.interpolate(image.float(), tuple(size), mode=interpolation.value, antialias=antialias)
    return resized if image.is_floating_point() else resized.round().clamp(0, 255).to(image.dtype)


def normalize(image: torch.Tensor, mean: Any, std: Any, inplace: bool = False) -> torch.Tensor:
    """[..., channels, height, width] less the means, by the deviations."""
    mean, std = (torch.as_tensor(value, dtype=image.dtype).view(-1, 1, 1) for value in (mean, std))
    return (image - mean) / std


def _anything(name: str) -> None:
    """Stands for the rest, which transformers imports for other models and nobody calls."""
    if name.startswith("__"):
        raise AttributeError(name)


def _module(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(f"{__name__}.{name}")
    vars(module).update(content, __getattr__=_anything)
    sys.modules[module.__name__] = module
    return module


_used = {
    "InterpolationMode": InterpolationMode,
    "pil_to_tensor": pil_to_tensor,
    "resize": resize,
    "normalize": normalize,
}
io = _module("io")
functional = _module("transforms.functional", **_used)
v2 = _module("transforms.v2", functional=_module("transforms.v2.functional", **_used))
transforms = _module("transforms", InterpolationMode=InterpolationMode, functional=functional, v2=v2)
