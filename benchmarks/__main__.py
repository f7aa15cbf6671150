"""`make bench`: images per second of each way to score one corpus, and their ratios, as JSON lines.

a  reference-style   transformers at batch 1, two readings of every conversation, logits written out
b  two-engines       vLLM generates, a second vLLM engine reads everything again for the states
c  ray-data-llm      two chained processors of ray.data.llm, rating words only
d  ours              Ray Data into parquet, with the states
n  ours, no capture  what the capture costs
p  ours, predictor   with a predictor of the published size beside the engine
s  ours, small one   with a predictor of the embedded model's size beside it
e  the limit         the bare vLLM engine, text only, in memory

Each measurement runs in a process of its own. The repetitions are interleaved, each on its own part of
the corpus, and medians are compared, as machines are noisy. Nothing is kept and no speed fails anything.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks import bare_engine, ours, ray_data_llm, reference_style
from benchmarks.common import Job
from benchmarks.inputs import write_corpus, write_wide_model

SYSTEMS: dict[str, Callable[[Job], dict[str, float]]] = {
    "a": reference_style.measure,
    "b": bare_engine.measure_two_engines,
    "c": ray_data_llm.measure,
    "d": ours.measure,
    "n": ours.measure_without_capture,
    "p": ours.measure_with_predictor,
    "s": ours.measure_with_small_predictor,
    "e": bare_engine.measure,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["tiny", "wide"], default="tiny")
    parser.add_argument("--image-tokens", type=int, default=576, help="of the wide model; a square number")
    parser.add_argument("--images", type=int, default=256, help="images of one repetition")
    # System a takes one image after the other, and b and c are slow: their rates change little with the number.
    parser.add_argument("--reference-images", type=int, default=16, help="images of one repetition of system a")
    parser.add_argument("--slow-images", type=int, help="images of one repetition of systems b and c (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--systems", default="a,b,c,d,n,p,e", help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "JOB"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        system, job = args.one
        print(json.dumps(SYSTEMS[system](Job(**json.loads(job)))))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Measures the systems in turn, and prints a line for each measurement and one for the medians' ratios."""
    tiny = args.model == "tiny"
    model = "tiny" if tiny else str(write_wide_model(folder / "model", args.image_tokens))
    dtype, tokens = ("float32", 64) if tiny else ("bfloat16", 48)
    systems = args.systems.split(",")
    rates: dict[str, list[float]] = {system: [] for system in systems}
    for repeat in range(args.repeats):
        sizes = {"a": args.reference_images} | dict.fromkeys("bc", args.slow_images or args.images)
        counts = {system: sizes.get(system, args.images) for system in systems}
        made = {n: write_corpus(folder / f"{repeat}-{n}", repeat * args.images, n) for n in set(counts.values())}
        for system in systems:
            images = counts[system]
            found = measure(system, Job(str(made[images]), model, dtype, tokens, images))
            rates[system].append(found["images"] / found["seconds"])
            named = {"system": system, "model": args.model, "repeat": repeat}
            print(json.dumps(named | {"images_per_s": round(rates[system][-1], 3)} | found), flush=True)
    medians = {system: round(statistics.median(found), 3) for system, found in rates.items()}
    ours_rate = medians.get("d")
    ratios = {f"d/{other}": round(ours_rate / medians[other], 2) for other in systems if ours_rate and other != "d"}
    print(json.dumps({"model": args.model, "median_images_per_s": medians, "ratios": ratios}))


def measure(system: str, job: Job) -> dict[str, float]:
    """Runs one system in a process of its own: images, seconds, and what else it counted."""
    command = [sys.executable, "-m", "benchmarks", "--one", system, json.dumps(asdict(job))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
