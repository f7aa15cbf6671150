"""`ray job submit -- python jobs/train_predictor.py --input ... --out ...`: `m3agiqa train-predictor` on a cluster."""

import sys

from m3agiqa.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-predictor", *sys.argv[1:]]))
