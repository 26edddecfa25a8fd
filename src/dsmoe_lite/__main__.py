"""`python -m dsmoe_lite`: the `dsmoe` command, for folders whose path no script's first line can hold."""

from dsmoe_lite.cli import main

main()
