"""A script for torchrun that gives each rank its own `dsmoe` command: argv[rank + 1], split at spaces."""

import os
import sys

from dsmoe_lite.cli import main

if __name__ == "__main__":
    main(sys.argv[int(os.environ["RANK"]) + 1].split())
