"""What torchrun runs where every process has arguments of its own: argv[rank + 1], split at spaces, for `dsmoe`."""

import os
import sys

from dsmoe_lite.cli import main

if __name__ == "__main__":
    main(sys.argv[int(os.environ["RANK"]) + 1].split())
