"""How many images may be in an engine at once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

# Some of the cache is left for what the estimate does not know: blocks that are not full, images above the mean.
_SHARE = 0.9
# The mean follows a corpus whose images change, and one image does not upset it.
_MEMORY = 64


class Places:
    """Lets in as many images as the KV cache can hold from their first question to their last answer.

    With more of them, an image's keys and values are evicted before its second round, which then computes
    all of them again: the engine is busy, and most of its work is waste.

    Args:
        capacity: tokens that the cache holds.
        block: tokens of one of its blocks; the last one of each conversation is its own.
    """

    def __init__(self, capacity: int, block: int = 1) -> None:
        self._capacity, self._block = _SHARE * capacity, block
        self._needed, self._known = 0.0, 0
        self._inside = 0
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def take(self, longest: int) -> AsyncIterator[None]:
        """Waits until there is room for one more image; one always has room, as vLLM makes it.

        Args:
            longest: tokens that it takes at most; counts until the mean of some images is known.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._inside < max(1, self._capacity // (self._needed or longest)))
            self._inside += 1
        try:
            yield
        finally:
            async with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def learn(self, tokens: int) -> None:
        """Takes note of how many tokens of the cache an image took."""
        self._known = min(self._known + 1, _MEMORY)
        self._needed += (tokens - self._needed) / self._known

    def tokens(self, conversations: list[tuple[int, int]], adapters: int) -> int:
        """The tokens of the cache that an image takes.

        Args:
            conversations: for each aspect the tokens that it shares with the others, and those of all of it.
            adapters: how many they run under; aspects under one share them.
        """
        shared = min(common for common, _ in conversations)
        whole = sum(whole + self._block for _, whole in conversations)
        return whole - (len(conversations) - adapters) * shared
