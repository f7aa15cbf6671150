"""How far an image's assessment depends on what is assessed beside it: `python -m benchmarks.determinism`.

Prints a JSON line for each data type: 64 images one at a time, all at once, shuffled, and in a second
engine. Drift is that of the expected score of the rating words (0 to 5) and of the captured states,
relative to the largest of their conversation.
"""

import argparse
import asyncio
import json
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.common import Job
from benchmarks.inputs import write_corpus
from m3agiqa.aspects import Aspect, expected_score
from m3agiqa.engine.base import Item, ItemFailed, ItemRejected, Outcome, create_engine
from m3agiqa.records import Assessment

Found = list[Mapping[Aspect, Assessment]]


async def assess(job: Job, order: list[int], at_once: int) -> Found:
    """What an engine of its own finds, given the images in this order, `at_once` at a time.

    Of its own, since what lies in an engine's caches would be looked up and not computed again.
    """
    engine = create_engine(job.config("capture.kind=states"))
    corpus = job.corpus()
    items = [Item(np.asarray(image), prompt, tuple(Aspect)) for image, prompt in corpus]
    outcomes: dict[int, Mapping[Aspect, Assessment]] = {}
    try:
        for start in range(0, len(order), at_once):
            chosen = order[start : start + at_once]
            found = await engine.assess([items[i] for i in chosen])
            outcomes |= {i: _judged(outcome) for i, outcome in zip(chosen, found, strict=True)}
    finally:
        engine.close()
    return [outcomes[i] for i in range(len(items))]


def _judged(outcome: Outcome) -> Mapping[Aspect, Assessment]:
    if isinstance(outcome, ItemRejected | ItemFailed):
        raise outcome
    return outcome


def drift(one: Found, two: Found) -> dict[str, float]:
    """How two passes over the same images differ; scores and states where the descriptions are the same."""
    pairs = [(a[aspect], b[aspect]) for a, b in zip(one, two, strict=True) for aspect in a]
    same = [(a, b) for a, b in pairs if a.description == b.description]
    scores, states = [0.0], [0.0]
    for a, b in same:
        assert a.rating_probs is not None
        assert b.rating_probs is not None
        assert a.captured is not None
        assert b.captured is not None
        scores.append(abs(expected_score(a.rating_probs) - expected_score(b.rating_probs)))
        x, y = a.captured.values.float(), b.captured.values.float()
        states.append(float((x - y).abs().max() / x.abs().max()))
    return {
        "conversations": len(pairs),
        "other_description": len(pairs) - len(same),
        "other_rating": sum(a.rating != b.rating for a, b in pairs),
        "score_drift": float(f"{max(scores):.2g}"),
        "states_drift": float(f"{max(states):.2g}"),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.determinism", description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    args = parser.parse_args()
    given = list(range(args.images))
    shuffled = random.Random(0).sample(given, len(given))
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_corpus(Path(folder) / "corpus", 0, args.images)
        for dtype in ("float32", "bfloat16"):
            job = Job(str(manifest), "tiny", dtype, 64, args.images)
            together = asyncio.run(assess(job, given, args.images))
            found = {
                f"batch 1 against {args.images}": drift(asyncio.run(assess(job, given, 1)), together),
                "shuffled": drift(asyncio.run(assess(job, shuffled, args.images)), together),
                "another replica": drift(asyncio.run(assess(job, given, args.images)), together),
            }
            print(json.dumps({"model": "tiny", "dtype": dtype, **found}), flush=True)


if __name__ == "__main__":
    main()
