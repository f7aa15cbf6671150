"""Whether a conversation fits into the model's context. Nothing is ever cut in silence."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from m3agiqa.config import ScoringConfig
from m3agiqa.engine.base import Item, ItemRejected

# A step in which an image is made smaller: little is lost that would have fitted, and few steps are needed.
_STEP = 0.75
# Below this an image says nothing more; what does not fit then, does not fit for its text.
_LEAST_SIDE = 32


def check_context(
    first: int, second: int, scoring: ScoringConfig, context: int, description: int | None = None
) -> None:
    """Refuses a conversation that could outgrow the context.

    Args:
        first: tokens of the image and question 1.
        second: tokens between the description and the rating.
        scoring: the limits of both answers.
        context: most tokens that the model takes.
        description: tokens of a description that is given; None: the model has yet to write it.

    Raises:
        ItemRejected: with the counts.
    """
    longest = scoring.max_description_tokens if description is None else description
    total = first + longest + second + scoring.max_rating_tokens
    if total > context:
        raise ItemRejected(
            f"conversation too long: {first} tokens of image and question + {'up to ' if description is None else ''}"
            f"{longest} of description + {second} of second question + {scoring.max_rating_tokens} of rating = "
            f"{total}, but the context is {context} tokens (shorten the prompt, raise model.max_model_len, or set "
            "scoring.downscale_to_fit)"
        )


def smaller(item: Item, scoring: ScoringConfig) -> Iterator[tuple[Item, str]]:
    """The item with an ever smaller image, and a note that says so; nothing where that is not wanted.

    Whether fewer pixels are fewer tokens is the model's affair: some take every image at one size.
    """
    if item.pixels is None:
        return
    height, width = item.pixels.shape[:2]
    factor = _STEP
    while scoring.downscale_to_fit and min(height, width) * factor >= _LEAST_SIDE:
        size = (round(width * factor), round(height * factor))
        pixels = np.asarray(Image.fromarray(item.pixels).resize(size, Image.Resampling.LANCZOS))
        yield replace(item, pixels=pixels), f"image downscaled to {size[0]} x {size[1]} to fit the model's context"
        factor *= _STEP
