"""`ray job submit -- python jobs/capture.py --input ... --output ...`: `m3agiqa capture` on a cluster."""

import sys

from m3agiqa.cli import main

if __name__ == "__main__":
    sys.exit(main(["capture", *sys.argv[1:]]))
