"""`ray job submit --working-dir . -- python jobs/curate.py SCORES --out ...`: `m3agiqa curate` on a cluster."""

import sys

from m3agiqa.cli import main

if __name__ == "__main__":
    sys.exit(main(["curate", *sys.argv[1:]]))
