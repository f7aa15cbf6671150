"""How close to linear images/s grows with the number of engines, by simulation: engines that take a set time an image.

    python -m benchmarks.scaling                   # 1, 2, 4, 8, 16 and 32 engines

An engine works on one batch of four images at a time and takes `--latency` seconds for it, as a GPU would, and no CPU.
What falls short of linear is then the pipeline's: reading, decoding, handing out and writing, for all engines together.
Each size runs until every engine had `--batches` batches. One JSON line for each size.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.streaming import write_corpus
from m3agiqa.config import load_config

BATCH = 4


def images_per_second(manifest: Path, output: Path, engines: int, latency_s: float) -> float:
    """Of a whole run with so many engines, from the first engine's start to the last file's end."""
    from m3agiqa.pipeline import run_scoring

    settings = {
        "engine.kind": "simulated",
        "engine.simulated_latency_s": latency_s,
        "ray.actors": engines,
        "ray.num_cpus": 0.01,
        "ray.decode_cpus": 0.25,
        "ray.batch_size": BATCH,
        "ray.batches_in_flight": 1,
    }
    config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
    return run_scoring(config, str(manifest), str(output)).images_per_second or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--latency", type=float, default=4.0, help="seconds for a batch of four images (default 4)")
    parser.add_argument("--batches", type=int, default=24, help="for each engine (default 24)")
    args = parser.parse_args()
    import ray

    from m3agiqa.connection import local_cluster

    ray.init(address="local", log_to_driver=False, logging_level="ERROR", **local_cluster(4))
    for engines in args.engines:
        with TemporaryDirectory() as name:
            manifest, _ = write_corpus(Path(name) / "in", engines * args.batches * BATCH, 64)
            rate = images_per_second(manifest, Path(name) / "out", engines, args.latency)
        linear = engines * BATCH / args.latency
        found = {"engines": engines, "images_per_second": round(rate, 3), "linear": linear}
        print(json.dumps({"benchmark": "scaling", **found, "of_linear": round(rate / linear, 3)}), flush=True)


if __name__ == "__main__":
    main()
