"""`ray job submit -- python jobs/evaluate.py --scores ... --out ...`: `m3agiqa evaluate` on a cluster."""

import sys

from m3agiqa.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
