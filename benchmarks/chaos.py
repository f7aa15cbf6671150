"""Random kills over many jobs: no row lost, none twice, one fingerprint, little done again.

`python -m benchmarks.chaos [--jobs 20 --kills 50 --rows 1000 --engine simulated|vllm --seed 0]` starts a cluster of
three nodes on this machine (`chaos_nodes.py`), runs each job as the command of a user, kills its driver, an actor's
process, a whole node or (vLLM) the engine's process at random moments, pulls a node's cable for a while, gives the
same command again where it ended, and prints one JSON line. It ends with 1 where a row was lost, doubled or mixed, or
where the kills of a job cost more than `COST` each.
"""

import argparse
import bisect
import csv
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from benchmarks.chaos_nodes import Nodes, start_nodes

_ACTOR, _ENGINE = "MapWorker(MapBatches(", "EngineCore"
_FILE_ROWS, _ACTORS, _BATCHES, _BATCH_ROWS = 64, 2, 2, 16
COST = 2 * (_FILE_ROWS + _BATCH_ROWS) + _ACTORS * _BATCHES * _BATCH_ROWS
"""Rows that a kill may cost: the file that is being written, the one being gathered, and what is in the engines."""
# A command that has not ended by then is a hang, which counts as rows lost.
_PATIENCE_S = 900.0


@dataclass
class Job:
    """One corpus, one output, and the kills that it is to bear."""

    folder: Path
    rows: int
    engine: str
    address: str
    kills: list[str]
    done: Counter[str] = field(default_factory=Counter)
    commands: int = 0
    marks: list[int] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """A line for each row that the simulated engine was given."""
        return self.folder / "log"

    def write_corpus(self) -> None:
        """A manifest of so many rows over a few small images."""
        for i in range(16):
            Image.new("RGB", (64, 64), (16 * i, 255 - 16 * i, 128)).save(self.folder / f"{i}.png")
        with (self.folder / "manifest.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "image_path", "prompt"])
            writer.writerows([f"row {i}", f"{i % 16}.png", f"a red fox, number {i}"] for i in range(self.rows))

    def command(self) -> subprocess.Popen[bytes]:
        """The user's command, the same each time."""
        settings = [
            f"engine.kind={self.engine}", f"ray.address={self.address}", f"ray.rows_per_file={_FILE_ROWS}",
            f"ray.actors={_ACTORS}", "ray.num_cpus=1", "ray.decode_cpus=0.25", f"ray.batches_in_flight={_BATCHES}",
            f"ray.batch_size={_BATCH_ROWS}", "predictor.path=null",
            "engine.simulated_latency_s=1", f"engine.simulated_log={self.log}",
        ]  # fmt: skip
        if self.engine != "simulated":
            settings += ["ray.actors=1", "scoring.max_description_tokens=40"]
        io = ["--input", str(self.folder / "manifest.csv"), "--output", str(self.folder / "out")]
        self.commands += 1
        with (self.folder / "output.txt").open("ab") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "m3agiqa.cli", "score", *io, "--set", *settings], stdout=said, stderr=said
            )

    def progress(self) -> int:
        """Something that grows while rows are scored."""
        if self.engine == "simulated":
            return self.log.stat().st_size if self.log.exists() else 0
        return len(list((self.folder / "out" / "scores").glob("*.parquet")))

    def run(self, nodes: Nodes, rng: random.Random) -> None:
        """Gives the command until it ends by itself, with the kills between."""
        process = self.command()
        until = time.monotonic() + _PATIENCE_S
        seen, wait_s = self.progress(), rng.uniform(0.0, 3.0)
        while (code := process.poll()) != 0:
            if time.monotonic() > until:
                process.kill()
                raise TimeoutError(f"a job did not end; see {self.folder}/output.txt")
            if code is not None:
                process = self.command()
            time.sleep(0.1)
            nodes.tend()
            # A kill hits work that is under way: before the first row it would only test Ray's start.
            if not self.kills or self.progress() == seen:
                continue
            time.sleep(wait_s)
            if process.poll() is None and self._kill(self.kills[0], process, nodes, rng):
                self.done[self.kills.pop(0)] += 1
                seen, wait_s = self.progress(), rng.uniform(0.0, 3.0)

    def _kill(self, kind: str, process: subprocess.Popen[bytes], nodes: Nodes, rng: random.Random) -> bool:
        mark = len(self.given())
        if kind == "driver":
            process.kill()
            process.wait()
        elif kind in nodes.kinds:
            nodes.harm(kind, rng)
        elif not nodes.kill_process(_ENGINE if kind == "engine" else _ACTOR, rng):
            return False
        self.marks.append(mark)
        return True

    def given(self) -> list[str]:
        """The prompts that the simulated engines were given so far, in order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.split(" ", 1)[1] for line in lines]

    def repeated(self) -> list[int]:
        """Rows that were given to an engine again, by the kill before that."""
        counts, seen = [0] * max(len(self.marks), 1), set()
        for place, prompt in enumerate(self.given()):
            if prompt in seen:
                counts[max(bisect.bisect_right(self.marks, place) - 1, 0)] += 1
            seen.add(prompt)
        return counts

    def outcome(self) -> Counter[str]:
        """Rows lost, doubled, not ok and of a second fingerprint."""
        from m3agiqa.runs import Output

        rows = Output(str(self.folder / "out")).rows(["id", "status", "fingerprint"]).to_pylist()
        ids, prints = Counter(row["id"] for row in rows), Counter(row["fingerprint"] for row in rows)
        counts = Counter(
            lost=len({f"row {i}" for i in range(self.rows)} - set(ids)),
            twice=len(rows) - len(ids),
            mixed_fingerprints=len(rows) - max(prints.values()),
            not_ok=sum(row["status"] != "ok" for row in rows),
            commands=self.commands,
        )
        return counts


def main() -> int:
    """Runs the jobs and prints what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--engine", choices=["simulated", "vllm"], default="simulated")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # Drivers and nodes find the package where this was started.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    rng, started = random.Random(args.seed), time.monotonic()
    nodes, total, kills, repeated, dear = start_nodes(), Counter[str](), Counter[str](), list[int](), False
    kinds = itertools.cycle(["driver", "actor", *nodes.kinds, *(["engine"] if args.engine == "vllm" else [])])
    left = [next(kinds) for _ in range(args.kills)]
    try:
        for number in range(args.jobs):
            share = -(-len(left) // (args.jobs - number))
            with tempfile.TemporaryDirectory() as folder:
                job = Job(Path(folder), args.rows, args.engine, nodes.address, left[:share])
                job.write_corpus()
                job.run(nodes, rng)
                outcome, again = job.outcome(), job.repeated()
            # A job that ended before all of its kills leaves them to the next.
            left = job.kills + left[share:]
            kills += job.done
            repeated += again
            # Not each by itself: what one kill cost may be given again only after the next.
            dear |= sum(again) > COST * len(again)
            total += outcome
            said = f"{dict(job.done)}, {dict(outcome)}, repeated {again}"
            print(f"job {number + 1} of {args.jobs}: {said}", file=sys.stderr, flush=True)
    finally:
        nodes.close()
    names = ("lost", "twice", "mixed_fingerprints", "not_ok", "commands")
    seconds = round(time.monotonic() - started, 1)
    found = {
        "engine": args.engine,
        "nodes": nodes.name,
        "jobs": args.jobs,
        "rows": args.jobs * args.rows,
        "kills": dict(kills),
    }
    found |= {name: total[name] for name in names}
    worst = max(repeated, default=0)
    if args.engine == "simulated":  # only this one notes what it is given
        found |= {"repeated": sum(repeated), "most_repeated_by_a_kill": worst, "may_cost": COST}
    found["seconds"] = seconds
    print(json.dumps(found))
    return int(any(total[name] for name in names[:4]) or dear)


if __name__ == "__main__":
    sys.exit(main())
