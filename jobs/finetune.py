"""`ray job submit -- python jobs/finetune.py --input ... --out ...`: `m3agiqa finetune` on a cluster."""

import sys

from m3agiqa.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
