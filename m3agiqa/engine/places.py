"""How many images may be in an engine at once."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

# What the estimates do not know: blocks that hold nothing yet, and what finished images leave behind in the cache.
_SHARE = 0.9
# An image's size is taken to be like those of the last so many.
_MEMORY = 64


class Places:
    """Lets in as many images as the KV cache can hold from their first question to their last answer.

    With more of them, an image's keys and values are evicted before its second round, which then computes
    all of them again: the engine is busy, and much of its work is waste.

    Args:
        blocks: of the cache.
        block: tokens of a block.
        image_tokens: tokens of an image at most; holds until images are known.
    """

    def __init__(self, blocks: int, block: int, image_tokens: int) -> None:
        self._block = block
        self._free = _SHARE * blocks * block
        self._inside = 0
        self._largest, self._lately = image_tokens, deque[int](maxlen=_MEMORY)
        self._changed = asyncio.Condition()

    def need(self, shared: int, own: list[int], adapters: int) -> int:
        """The tokens of the cache that an image takes at most.

        Args:
            shared: tokens beside the image's that its aspects have in common.
            own: further tokens of each aspect, answers included.
            adapters: how many the aspects run under; those under one share the image.
        """
        common = max(self._lately, default=self._largest) + shared
        # The last block of a conversation is its own.
        return adapters * common + sum(own) + len(own) * self._block

    @contextlib.asynccontextmanager
    async def take(self, tokens: int) -> AsyncIterator[None]:
        """Waits until there is room for so many tokens; where nobody is, there is, as vLLM makes it."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._inside or tokens <= self._free)
            self._inside += 1
            self._free -= tokens
        try:
            yield
        finally:
            async with self._changed:
                self._inside -= 1
                self._free += tokens
                self._changed.notify_all()

    def learn(self, image_tokens: int) -> None:
        """Takes note of how many tokens an image was."""
        self._lately.append(image_tokens)
