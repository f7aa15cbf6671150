"""`ray job submit -- python jobs/distill.py --input ... --out ...`: `m3agiqa distil` on a cluster's head."""

import sys

from m3agiqa.cli import main

if __name__ == "__main__":
    sys.exit(main(["distil", *sys.argv[1:]]))
