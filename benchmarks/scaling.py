"""How close to linear images/s grows with the number of engines, by simulation: engines that take a set time an image.

    python -m benchmarks.scaling                   # 1, 2, 4, 8, 16 and 32 engines

An engine works on one batch of four images at a time and takes `--latency` seconds for it, as a GPU would, and no CPU.
What falls short of linear is then the pipeline's: reading, decoding, handing out and writing, for all engines together.
The rate is taken from when every engine has given a batch until two batches for each are left: how fast 32 processes
start on a small machine is another matter. One JSON line for each size.
"""

import argparse
import json
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.streaming import write_corpus
from m3agiqa.config import load_config

BATCH = 4
_EVERY_S = 0.05


def images_per_second(folder: Path, manifest: Path, rows: int, engines: int, latency_s: float) -> float:
    """Of so many engines while all of them are at work; 0 where they never were."""
    from m3agiqa.pipeline import run_scoring

    log = folder / "log"
    settings = {
        "engine.kind": "simulated",
        "engine.simulated_latency_s": latency_s,
        "engine.simulated_log": log,
        "ray.actors": engines,
        "ray.num_cpus": 0.01,
        "ray.decode_cpus": 0.25,
        "ray.batch_size": BATCH,
        "ray.batches_in_flight": 1,
    }
    config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
    with Watch(log, engines, rows - 2 * engines * BATCH) as watch:
        run_scoring(config, str(manifest), str(folder / "out"))
    return watch.rate


class Watch:
    """Reads the engines' log, which has a line that begins with the engine's process for each image, while entered.

    Args:
        last: images after which no more is looked at.
    """

    def __init__(self, log: Path, engines: int, last: int) -> None:
        self._log, self._engines, self._last = log, engines, last
        self._steps: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def rate(self) -> float:
        """Images per second between the first step with all engines and the last."""
        if len(self._steps) < 2:
            return 0.0
        (began, first), (ended, last) = self._steps[0], self._steps[-1]
        return (last - first) / (ended - began)

    def _look(self) -> None:
        seen = 0
        while not self._stop.wait(_EVERY_S):
            lines = self._log.read_text().splitlines() if self._log.exists() else []
            if seen < len(lines) <= self._last and len({line.split()[0] for line in lines}) >= self._engines:
                self._steps.append((time.monotonic(), len(lines)))
            seen = len(lines)


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
            rows = engines * args.batches * BATCH
            manifest, _ = write_corpus(Path(name) / "in", rows, 64)
            rate = images_per_second(Path(name), manifest, rows, engines, args.latency)
        linear = engines * BATCH / args.latency
        found = {"engines": engines, "images_per_second": round(rate, 3), "linear": linear}
        print(json.dumps({"benchmark": "scaling", **found, "of_linear": round(rate / linear, 3)}), flush=True)


if __name__ == "__main__":
    main()
