"""Whether a conversation fits into the model's context. Nothing is ever cut in silence."""

from m3agiqa.config import ScoringConfig
from m3agiqa.engine.base import ItemRejected


def check_context(first: int, second: int, scoring: ScoringConfig, context: int) -> None:
    """Refuses a conversation that could outgrow the context.

    Args:
        first: tokens of the image and question 1.
        second: tokens between the description and the rating.
        scoring: the limits of both answers.
        context: most tokens that the model takes.

    Raises:
        ItemRejected: with the counts.
    """
    total = first + scoring.max_description_tokens + second + scoring.max_rating_tokens
    if total > context:
        raise ItemRejected(
            f"conversation too long: {first} tokens of image and question + up to {scoring.max_description_tokens} of "
            f"description + {second} of second question + {scoring.max_rating_tokens} of rating = {total}, but the "
            f"context is {context} tokens (shorten the prompt or raise model.max_model_len)"
        )
