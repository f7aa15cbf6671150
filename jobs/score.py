"""`ray job submit -- python jobs/score.py --input ... --output ...`: `m3agiqa score` on a cluster."""

import sys

from m3agiqa.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
