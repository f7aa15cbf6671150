"""Makes the tiny model: `python -m m3agiqa.tiny --out DIR --work DIR`."""

import argparse
from pathlib import Path

from m3agiqa.tiny.train import train


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m m3agiqa.tiny",
        description="Trains the tiny model from nothing. Set OMP_NUM_THREADS=1 on a machine with other work.",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the model")
    parser.add_argument(
        "--work", required=True, type=Path, help="folder for the states of the stages: a broken run goes on from there"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train(given.out, given.work, seed=given.seed, log=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
