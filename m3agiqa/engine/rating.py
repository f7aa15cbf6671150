"""Probabilities of the five rating words from next-token log-probabilities.

Most tokenizers have each word as one token at the answer position. Where a word takes several, its
log-probability is the sum over them, each given the ones before: a walk over the tree of the words'
token ids. A prefix is a node of that tree; the root () is the answer position itself.
"""

import math
from collections.abc import Mapping, Sequence

Prefix = tuple[int, ...]


def prefixes(rating_ids: Sequence[Prefix]) -> dict[Prefix, tuple[int, ...]]:
    """Each prefix after which log-probabilities are needed, with the next tokens that matter.

    The root comes first; where every word is one token it is the only one.
    """
    needed: dict[Prefix, dict[int, None]] = {}
    for ids in rating_ids:
        for i, token in enumerate(ids):
            needed.setdefault(ids[:i], {})[token] = None
    return {prefix: tuple(tokens) for prefix, tokens in sorted(needed.items(), key=lambda entry: len(entry[0]))}


def rating_probs(
    rating_ids: Sequence[Prefix], logprobs: Mapping[Prefix, Mapping[int, float]]
) -> tuple[float, ...] | None:
    """Softmax over the words of their log-probabilities, *bad* to *excellent*.

    Args:
        rating_ids: token ids of the five words.
        logprobs: for each of `prefixes(rating_ids)`, the log-probability of each token that matters.

    Returns:
        Five probabilities that sum to 1, or None where no word has a finite log-probability.
    """
    totals = [sum(logprobs[ids[:i]][token] for i, token in enumerate(ids)) for ids in rating_ids]
    top = max(totals)
    if not math.isfinite(top):
        return None
    weights = [math.exp(total - top) for total in totals]
    return tuple(weight / sum(weights) for weight in weights)
