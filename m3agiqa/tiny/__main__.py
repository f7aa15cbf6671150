"""Makes the tiny model: `python -m m3agiqa.tiny --out DIR`."""

import argparse
from pathlib import Path

from m3agiqa.tiny.train import DEFAULT_MINUTES, train


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m m3agiqa.tiny",
        description="Trains the tiny model from nothing. Set OMP_NUM_THREADS=1 on a machine with other work.",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the model")
    parser.add_argument(
        "--minutes",
        type=float,
        default=DEFAULT_MINUTES,
        help="about how long to train on one core; decides the numbers of steps (default: %(default)g)",
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train(given.out, minutes=given.minutes, seed=given.seed, log=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
