"""What three aspects cost beside one: `python -m benchmarks.aspects [--model wide]`. Prints a JSON line.

Prefill work is counted in tokens that were really computed: those of all prompts, less those that came
from the prefix cache. Aspects under one adapter (or none) share the image; under adapters of their own
they cannot, as each adapter's keys and values are others.
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import Job
from benchmarks.inputs import write_adapter, write_corpus, write_wide_model
from m3agiqa.aspects import Aspect
from m3agiqa.engine.base import Item, create_engine


async def measure(job: Job, adapters: str, aspects: tuple[Aspect, ...]) -> dict[str, float]:
    """Tokens computed and seconds for the job's images, the engine's start not counted."""
    engine = create_engine(job.config("capture.kind=states", f"model.adapters={adapters}"))
    corpus = [(np.asarray(image), prompt) for image, prompt in job.corpus()]
    try:
        # The first request pays for what is set up once.
        await engine.assess([Item(255 - corpus[0][0], corpus[0][1], aspects)])
        before, started = engine.stats(), time.perf_counter()
        await engine.assess([Item(pixels, prompt, aspects) for pixels, prompt in corpus])
        seconds, after = time.perf_counter() - started, engine.stats()
    finally:
        engine.close()
    asked, cached = (after[key] - before[key] for key in ("prompt_tokens", "prefix_cache_hits"))
    return {"computed_tokens": asked - cached, "prompt_tokens": asked, "seconds": round(seconds, 2)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aspects", description=__doc__)
    parser.add_argument("--model", choices=["tiny", "wide"], default="wide")
    parser.add_argument("--images", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wide = args.model == "wide"
        model = write_wide_model(folder / "model") if wide else Job("", "tiny", "float32", 64, 0).folder()
        manifest = write_corpus(folder / "corpus", 0, args.images)
        job = Job(str(manifest), str(model), *(("bfloat16", 48) if wide else ("float32", 64)), args.images)
        paths = {aspect: write_adapter(model, folder / aspect, seed) for seed, aspect in enumerate(Aspect)}
        joint = str(paths[Aspect.QUALITY])
        own = "{" + ", ".join(f"{aspect}: {path}" for aspect, path in paths.items()) + "}"
        every = tuple(Aspect)
        found = {
            "one aspect": asyncio.run(measure(job, joint, every[:1])),
            "three aspects, joint adapter": asyncio.run(measure(job, joint, every)),
            "three aspects, an adapter each": asyncio.run(measure(job, own, every)),
        }
    one = found["one aspect"]
    ratios = {
        name: {key: round(value[key] / one[key], 2) for key in ("computed_tokens", "seconds")}
        for name, value in found.items()
        if name != "one aspect"
    }
    print(json.dumps({"model": args.model, "images": args.images, "measured": found, "against one aspect": ratios}))


if __name__ == "__main__":
    main()
