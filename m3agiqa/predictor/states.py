"""Captured states as tensors."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from m3agiqa.errors import UserError
from m3agiqa.predictor.captured import Conversations, chunks, read_chunk

BYTES_OF_A_NUMBER = 2
"""Captured states are bfloat16."""


def decode(states: pa.Buffer | bytes, tokens: int) -> torch.Tensor:
    """The states of one conversation: bfloat16 [tokens, H], in memory of its own.

    Raises:
        ValueError: if the bytes are not those of that many tokens.
    """
    size = len(states)
    if tokens < 1 or not size or size % (tokens * BYTES_OF_A_NUMBER):
        raise ValueError(f"states of {size} bytes are not {tokens} rows of bfloat16")
    return torch.frombuffer(bytearray(states), dtype=torch.bfloat16).view(tokens, -1)


def states_width(conversations: Conversations, names: Sequence[str]) -> int:
    """H, read from the first conversation of each set.

    Raises:
        UserError: if the sets differ, or the states cannot be read.
    """
    widths: dict[str, int] = {}
    origin = np.array(conversations.origin)[conversations.image]
    for i, one in enumerate(conversations.sets):
        if not len(keys := np.flatnonzero(origin == i)):
            continue
        (chunk,) = chunks(conversations, names, keys[:1], 1)
        try:
            table = next(read_chunk(chunk))
            widths[one.uri] = decode(table["states"][0].as_buffer(), table["tokens"][0].as_py()).shape[1]
        except (ValueError, OSError) as error:
            raise UserError(one.uri, f"its states cannot be read ({error})", "capture it again") from None
    if len(set(widths.values())) > 1:
        shown = ", ".join(f"{width} in {uri}" for uri, width in widths.items())
        raise UserError("--input", f"the states have different widths: {shown}", "give sets of one model")
    return next(iter(widths.values()))
